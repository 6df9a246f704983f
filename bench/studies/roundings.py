"""Cost on a CPU of storing weights or moments in fewer bits: steps on one matrix over the float32 step.

Each is timed between two float32 steps of the same rule and backend, by the thread's CPU clock, after a check that
both backends take the same first step.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.common import records, sources
from bench.common.measure import Spread, facts
from gwt_kernels import GWTAdamW
from gwt_kernels.formats.split import join_low
from gwt_kernels.optim.state import low_bits_of

BACKENDS = ("torch", "compiled")
RULES = ("gwt", "foam")


class Storage(NamedTuple):
    """How weights and moments are stored."""

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
    """Build an optimizer of one matrix with a gradient."""
    generator = torch.Generator().manual_seed(0)
    dtype = getattr(torch, storage.weights)
    p = torch.nn.Parameter((torch.randn(shape, generator=generator) * 0.02).to(dtype))
    p.grad = torch.randn(shape, generator=generator).to(dtype)
    return optimizer([p], lr=1e-3, **options)


def seconds(optimizer: torch.optim.Optimizer) -> float:
    """Measure the seconds of a step on this thread."""
    start = time.thread_time()
    optimizer.step()
    return time.thread_time() - start


def agree(a: torch.optim.Optimizer, b: torch.optim.Optimizer) -> bool:
    """Return whether two optimizers of one parameter hold the same numbers, up to float32's rounding.

    In fewer bits, rounding may change up to 2 % of the values by one unit in the last place.
    """
    held = []
    for optimizer in (a, b):
        p = optimizer.param_groups[0]["params"][0]
        state = dict(optimizer.state[p])
        low = state.pop("weight_low", None)
        p = p.detach() if low is None else join_low(p.detach(), low_bits_of(low))
        held.append([p, *(x for _, x in sorted(state.items()))])
    for x, y in zip(*held, strict=True):
        place = torch.finfo(x.dtype).eps if x.dtype.is_floating_point else 1 / 127
        error = (x.double() - y.double()).abs().max() / x.double().abs().max()
        wide = x.dtype in (torch.float32, torch.float64)
        if error > (1e-5 if wide else place) or not (wide or (x != y).double().mean() < 0.02):
            return False
    return True


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure every storage under both rules, and add the rows to the record one by one."""
    parser = argparse.ArgumentParser(prog="python -m bench.studies.roundings", description=__doc__)
    parser.add_argument("--shape", type=int, nargs=2, default=(1024, 2736))
    parser.add_argument("--level", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=25)
    parser.add_argument("--out", type=Path, default=records.RESULTS, help="folder for the raw JSON")
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    about = facts(torch.device("cpu"), "bench.studies.roundings", arguments)
    about["sources"] = sources.digest(about["own_backend"])
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
        bases = {name: make(GWTAdamW, shape, Storage(), backend=name, **of_rule) for name in BACKENDS}
        fused = make(torch.optim.AdamW, shape, Storage(), fused=True)
        for optimizer in (*bases.values(), fused):
            for _ in range(3):
                optimizer.step()
        compare(bases["torch"], fused, {"rule": rule, **Storage()._asdict(), "backend": "adamw_fused"})
        for storage in (Storage(), *STORAGES):
            kept = {"weight_rounding": storage.rounding, "state_dtype": storage.moments} | of_rule
            made = {name: make(GWTAdamW, shape, storage, backend=name, **kept) for name in BACKENDS}
            for optimizer in made.values():
                optimizer.step()
            if not agree(*made.values()):
                columns = {"rule": rule, **storage._asdict(), "backend": "compiled"}
                add(columns, "step_ratio", "1", [], "the numbers are not those of the torch backend")
                continue
            for name, optimizer in made.items():
                for _ in range(2):
                    optimizer.step()
                compare(bases[name], optimizer, {"rule": rule, **storage._asdict(), "backend": name})
    return 0


if __name__ == "__main__":
    sys.exit(main())
