"""Host time of GWTAdamW.step(): Python and Triton's launch path over many tensors, with or without a GPU.

Without a CUDA device the kernels are compiled for one, and all of a launch but the driver's own call is done.
"""

from __future__ import annotations

import argparse
import contextlib
import cProfile
import pstats
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch.optim import Optimizer
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from bench import records
from bench.measure import Spread, facts
from gwt_kernels import GWTAdamW, backends

SIZE = (8, 64)  # small: on a CPU the copies of a clipped gradient must not count
WARM_UP = 5


class NoDevice:
    """What Triton asks of a driver, answered for an H100 that is not there; launches end before the device's."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        return lambda *args: None

    utils = SimpleNamespace(
        load_binary=lambda *args: (0, 0, 0, 0, 1024),
        get_device_properties=lambda device: {"max_shared_mem": 232448},
    )


class Scenario(NamedTuple):
    """One way to call step() again and again."""

    name: str
    limiter: bool
    reallocated: bool
    """Every gradient is another tensor at another address than in the step before."""


SCENARIOS = [
    Scenario(
        f"{'limiter' if limiter else 'no limiter'}, {'re-allocated' if moved else 'same gradients'}", limiter, moved
    )
    for limiter in (False, True)
    for moved in (False, True)
]


def build(tensors: int, device: torch.device, *, limiter: bool) -> tuple[Optimizer, list[torch.nn.Parameter]]:
    """A model as `gwt_param_groups` sorts it: seven matrices in nine, two norms, an embedding and a head."""
    params = [torch.nn.Parameter(torch.randn(SIZE, device=device, dtype=torch.bfloat16)) for _ in range(tensors)]
    norms = 2 * (tensors - 2) // 9
    matrices = params[: tensors - 2 - norms]
    groups = [
        {"params": matrices, "level": 2},
        {"params": params[len(matrices) : len(matrices) + 2], "level": 0, "weight_decay": 0.1},
        {"params": params[len(matrices) + 2 :], "level": 0},
    ]
    gamma = 1.01 if limiter else None
    return GWTAdamW(groups, weight_decay=0.1, norm_growth_limit=gamma, backend="triton"), params


def gradients(params: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [torch.randn_like(p) for p in params]


def time_steps(
    optimizer: Optimizer, params: Sequence[torch.nn.Parameter], *, reallocated: bool, repetitions: int
) -> list[float]:
    """Seconds of its thread's time that each call of step() takes, after a warm-up: other load does not count."""
    sets = [gradients(params), gradients(params)]
    seconds = []
    for i in range(WARM_UP + repetitions):
        if reallocated or i == 0:
            for p, g in zip(params, sets[i % 2], strict=True):
                p.grad = g
            if i > 1:  # neither the tensors nor their addresses are those of the step before
                sets[i % 2] = []
                sets[(i + 1) % 2] = gradients(params)
        if params[0].is_cuda:
            torch.cuda.synchronize()
        start = time.thread_time()
        optimizer.step()
        seconds.append(time.thread_time() - start)
    return seconds[WARM_UP:]


def profile(optimizer: Optimizer, steps: int, lines: int) -> None:
    """Print where the time of `steps` steps goes, by function."""
    profiler = cProfile.Profile()
    profiler.enable()
    for _ in range(steps):
        optimizer.step()
    profiler.disable()
    pstats.Stats(profiler).strip_dirs().sort_stats("tottime").print_stats(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure every scenario, print them, and add them to the results."""
    parser = argparse.ArgumentParser(prog="python -m bench.host", description=__doc__)
    parser.add_argument("--tensors", type=int, default=300)
    parser.add_argument("--repetitions", type=int, default=200)
    parser.add_argument("--profile", type=int, metavar="LINES", help="also print where the time goes")
    parser.add_argument("--out", type=Path, default=records.RESULTS, help="folder for the raw JSON")
    parser.add_argument("--commit", help="the commit measured, where the tree is no git checkout")
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    about = facts(device, "bench.host", arguments, options.commit)
    path = records.new_path("host", about, options.out)

    with contextlib.nullcontext() if device.type == "cuda" else without_device():
        for scenario in SCENARIOS:
            optimizer, params = build(options.tensors, device, limiter=scenario.limiter)
            times = time_steps(optimizer, params, reallocated=scenario.reallocated, repetitions=options.repetitions)
            _report(path, about, f"GWTAdamW, {scenario.name}", times, options.tensors)
            if options.profile:
                profile(optimizer, options.repetitions, options.profile)
    return 0


@contextlib.contextmanager
def without_device() -> Iterator[None]:
    """Let `backend="triton"` take CPU tensors, with launches that end before the device."""
    with (
        patch.object(driver, "_active", NoDevice()),
        patch.object(backends, "triton_obstacle", lambda *args, **kwargs: None),
    ):
        yield


def _report(path: Path, about: dict[str, Any], scenario: str, seconds: list[float], tensors: int) -> None:
    spread = Spread.of(seconds)
    print(
        f"{scenario}: {1e6 * spread.median:.0f} us ({1e6 * spread.p20:.0f} to {1e6 * spread.p80:.0f})", flush=True
    )
    row = {
        "scenario": scenario,
        "tensors": tensors,
        "metric": "host_time",
        "unit": "s",
        **spread._asdict(),
        "note": "",
    }
    records.append(path, "host", [row | about])


if __name__ == "__main__":
    sys.exit(main())
