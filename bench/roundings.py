"""What it costs on a CPU to keep weights or moments in fewer bits: steps on one matrix over the float32 step.

Each is timed between two float32 steps of the same rule, on the thread's own clock, with PyTorch's operators and
with `backend="compiled"`, after both have been seen to give the same numbers.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench import records
from bench.measure import Spread, facts
from gwt_kernels import GWTAdamW

BACKENDS = ("torch", "compiled")
RULES = ("gwt", "foam")


class Storage(NamedTuple):
    """How weights and moments are kept."""

    weights: str = "float32"
    rounding: str = "nearest"
    moments: str = "float32"


STORAGES = (
    Storage(moments="bfloat16"),
    Storage(moments="int8"),
    *(
        Storage("bfloat16", rounding, moments)
        for rounding in ("nearest", "stochastic", "split")
        for moments in ("float32", "bfloat16", "int8")
    ),
    Storage("float16", "stochastic"),
)


def make(
    optimizer: Callable[..., torch.optim.Optimizer], shape: tuple[int, int], storage: Storage, **options: Any
) -> torch.optim.Optimizer:
    """An optimizer of one matrix, which has its gradient."""
    generator = torch.Generator().manual_seed(0)
    dtype = getattr(torch, storage.weights)
    p = torch.nn.Parameter((torch.randn(shape, generator=generator) * 0.02).to(dtype))
    p.grad = torch.randn(shape, generator=generator).to(dtype)
    return optimizer([p], lr=1e-3, **options)


def seconds(optimizer: torch.optim.Optimizer) -> float:
    """Of a step, on this thread."""
    start = time.thread_time()
    optimizer.step()
    return time.thread_time() - start


def same(a: torch.optim.Optimizer, b: torch.optim.Optimizer) -> bool:
    """Whether two optimizers of one parameter hold the same numbers."""
    held = []
    for optimizer in (a, b):
        p = optimizer.param_groups[0]["params"][0]
        held.append([p, *(x for _, x in sorted(optimizer.state[p].items()))])
    return all(torch.equal(x, y) for x, y in zip(*held, strict=True))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure every way under both rules, and add the rows to the results as they come."""
    parser = argparse.ArgumentParser(prog="python -m bench.roundings", description=__doc__)
    parser.add_argument("--shape", type=int, nargs=2, default=(1024, 2736))
    parser.add_argument("--level", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=25)
    parser.add_argument("--out", type=Path, default=records.RESULTS, help="folder for the raw JSON")
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    about = facts(torch.device("cpu"), "bench.roundings", arguments)
    path, shape = records.new_path("roundings", about, options.out), tuple(options.shape)
    head = {"shape": "x".join(map(str, shape)), "level": options.level}

    def add(columns: dict[str, Any], metric: str, unit: str, values: Sequence[float], note: str = "") -> None:
        spread = Spread.of(values)._asdict() if values else dict.fromkeys(("median", "p20", "p80")) | {"samples": 0}
        row = head | columns | {"metric": metric, "unit": unit} | spread | {"note": note} | about
        records.append(path, "roundings", [row])
        shown = f"{spread['median']:.3g} {unit}" if values else note
        print(*columns.values(), metric, shown, flush=True)

    def compare(base: torch.optim.Optimizer, other: torch.optim.Optimizer, columns: dict[str, Any]) -> None:
        rounds = [(seconds(base), seconds(other), seconds(base)) for _ in range(options.repetitions)]
        add(columns, "step_time", "s", [own for _, own, _ in rounds])
        add(columns, "step_ratio", "1", [2 * own / (before + after) for before, own, after in rounds])

    for rule in RULES:
        of_rule = {"rule": rule, "level": options.level}
        base = make(GWTAdamW, shape, Storage(), backend="torch", **of_rule)
        fused = make(torch.optim.AdamW, shape, Storage(), fused=True)
        for optimizer in (base, fused):
            for _ in range(3):
                optimizer.step()
        compare(base, fused, {"rule": rule, **Storage()._asdict(), "backend": "adamw_fused"})
        compare(base, base, {"rule": rule, **Storage()._asdict(), "backend": "torch"})
        for storage in STORAGES:
            kept = {"weight_rounding": storage.rounding, "state_dtype": storage.moments} | of_rule
            made = {name: make(GWTAdamW, shape, storage, backend=name, **kept) for name in BACKENDS}
            for optimizer in made.values():
                for _ in range(3):
                    optimizer.step()
            if not same(*made.values()):
                columns = {"rule": rule, **storage._asdict(), "backend": "compiled"}
                add(columns, "step_ratio", "1", [], "the numbers are not those of the torch backend")
                continue
            for name, optimizer in made.items():
                compare(base, optimizer, {"rule": rule, **storage._asdict(), "backend": name})
    return 0


if __name__ == "__main__":
    sys.exit(main())
