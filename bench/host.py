"""Host time of GWTAdamW.step(): Python and Triton's launch path over many tensors, with or without a GPU.

Without a CUDA device the kernels are compiled for one, and all of a launch except the driver call is run.
"""

from __future__ import annotations

import argparse
import contextlib
import cProfile
import itertools
import pstats
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.optim import Optimizer
from torch.testing._internal.distributed.fake_pg import FakeStore
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from bench.common import records
from bench.common.measure import Spread, facts
from gwt_kernels import GWTAdamW, GWTMuon
from gwt_kernels.backends import choice
from gwt_kernels.rules.newton_schulz import NewtonSchulz

SIZE = (8, 64)  # small, since only host time is measured
WARM_UP = 5
TURN = 10  # steps of a scenario before the next one's turn


class NoDevice:
    """Substitute for Triton's driver of an H100 that is absent. Launches end before the driver call."""

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
    """One way of calling step() repeatedly."""

    limiter: bool
    reallocated: bool
    """Whether every step gets new gradient tensors at new addresses."""
    sharded: bool
    """Whether parameters and gradients are DTensors, whose local shard has the size of the plain tensor."""

    @property
    def name(self) -> str:
        limiter = "limiter" if self.limiter else "no limiter"
        return f"{limiter}, {'re-allocated' if self.reallocated else 'same gradients'}" + ", sharded" * self.sharded


SCENARIOS = [Scenario(*each) for each in itertools.product((False, True), repeat=3)]


@contextlib.contextmanager
def two_processes(device: torch.device) -> Iterator[DeviceMesh]:
    """Yield a mesh of this process and a simulated one, where a collective costs only the host's call."""
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        yield init_device_mesh(device.type, (2,))
    finally:
        dist.destroy_process_group()


def build(
    tensors: int, device: torch.device, *, limiter: bool, mesh: DeviceMesh | None = None
) -> tuple[Optimizer, list[torch.nn.Parameter]]:
    """Build an optimizer over groups like those of `gwt_param_groups`.

    Seven tensors in nine are matrices and two are norms, in addition to an embedding and a head. With a mesh they
    are DTensors sharded by rows, as `fully_shard` makes them.
    """
    values = [torch.randn(SIZE, device=device, dtype=torch.bfloat16) for _ in range(tensors)]
    if mesh is not None:
        values = [DTensor.from_local(x, mesh, [Shard(0)], run_check=False) for x in values]
    params = list(map(torch.nn.Parameter, values))
    norms = 2 * (tensors - 2) // 9
    matrices = params[: tensors - 2 - norms]
    groups = [
        {"params": matrices, "level": 2},
        {"params": params[len(matrices) : len(matrices) + 2], "level": 0, "weight_decay": 0.1},
        {"params": params[len(matrices) + 2 :], "level": 0},
    ]
    gamma = 1.01 if limiter else None
    return GWTAdamW(groups, weight_decay=0.1, norm_growth_limit=gamma, backend="triton"), params


def build_matrices(
    tensors: int, device: torch.device, kind: type[GWTAdamW | GWTMuon], mesh: DeviceMesh | None = None
) -> tuple[Optimizer, list[torch.nn.Parameter]]:
    """Build an optimizer without limiter over matrices of one shape, sharded as in `build`."""
    values = [torch.randn(SIZE, device=device, dtype=torch.bfloat16) for _ in range(tensors)]
    if mesh is not None:
        values = [DTensor.from_local(x, mesh, [Shard(0)], run_check=False) for x in values]
    params = list(map(torch.nn.Parameter, values))
    options: dict[str, Any] = {"norm_growth_limit": None} if kind is GWTAdamW else {}
    return kind([{"params": params, "level": 2}], backend="triton", **options), params


def gradients(params: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return new gradients; those of sharded parameters are built as FSDP2 builds them."""
    return [
        DTensor(torch.randn_like(p._local_tensor), p._spec, requires_grad=False)
        if isinstance(p, DTensor)
        else torch.randn_like(p)
        for p in params
    ]


def time_steps(optimizer: Optimizer, params: Sequence[torch.nn.Parameter], *, reallocated: bool) -> Iterator[float]:
    """Yield the thread's CPU time of each call of step() after the warm-up; other load does not count."""
    sets = [gradients(params), gradients(params)]
    for i in itertools.count():
        if reallocated or i == 0:
            for p, g in zip(params, sets[i % 2], strict=True):
                p.grad = g
            if i > 1:  # tensors and addresses both differ from the previous step's
                sets[i % 2] = []
                sets[(i + 1) % 2] = gradients(params)
        if params[0].is_cuda:
            torch.cuda.synchronize()
        start = time.thread_time()
        optimizer.step()
        seconds = time.thread_time() - start
        if i >= WARM_UP:
            yield seconds


def take_turns(runs: Sequence[Iterator[float]], repetitions: int) -> list[list[float]]:
    """Repeat the runs in turns, so that all of them meet the same load."""
    times: list[list[float]] = [[] for _ in runs]
    while len(times[-1]) < repetitions:
        for own, run in zip(times, runs, strict=True):
            own += itertools.islice(run, min(TURN, repetitions - len(own)))
    return times


def profile(optimizer: Optimizer, steps: int, lines: int) -> list[tuple[str, float, float]]:
    """Profile `steps` steps; return the most expensive functions, their own share of time, and calls per step.

    Time of C code called for every tensor (`map(Tensor.data_ptr, ...)`) counts towards the calling function.
    """
    profiler = cProfile.Profile()
    profiler.enable()
    for _ in range(steps):
        optimizer.step()
    profiler.disable()
    stats = pstats.Stats(profiler)
    own = sorted(stats.stats.items(), key=lambda item: -item[1][2])[:lines]  # type: ignore[attr-defined]
    return [
        (f"{Path(file).name}: {name}" if line else name, seconds / stats.total_tt, calls / steps)  # type: ignore[attr-defined]
        for (file, line, name), (_, calls, seconds, _, _) in own
    ]


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Return the options of a command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.host", description=__doc__)
    parser.add_argument("--tensors", type=int, default=300)
    parser.add_argument("--repetitions", type=int, default=200)
    parser.add_argument(
        "--profile", type=int, default=12, metavar="LINES", help="functions to show where the time goes, or 0"
    )
    parser.add_argument(
        "--matrices", action="store_true", help="GWTMuon beside GWTAdamW, over the same matrices, and nothing else"
    )
    parser.add_argument("--out", type=Path, default=records.RESULTS, help="folder for the raw JSON")
    parser.add_argument("--commit", help="the commit measured, where the tree is no git checkout")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure every scenario, print the results, and add them to the record."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    options = parse(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    about = facts(device, "bench.host", arguments, options.commit) | {"own_backend": "triton"}
    path = records.new_path("host", about, options.out)

    driven = contextlib.nullcontext() if device.type == "cuda" else without_device()
    with driven, two_processes(device) as mesh:
        if options.matrices:
            _compare_matrices(options, about, path, device, mesh)
            return 0
        for pair in zip(SCENARIOS[::2], SCENARIOS[1::2], strict=True):  # plain and sharded tensors
            made = [
                build(options.tensors, device, limiter=each.limiter, mesh=mesh if each.sharded else None)
                for each in pair
            ]
            runs = [time_steps(*own, reallocated=each.reallocated) for each, own in zip(pair, made, strict=True)]
            times = take_turns(runs, options.repetitions)
            for scenario, (optimizer, _), seconds in zip(pair, made, times, strict=True):
                row = {"scenario": f"GWTAdamW, {scenario.name}", "tensors": options.tensors} | about
                _report(path, row, seconds)
                if options.profile:
                    _report_profile(path, row, profile(optimizer, options.repetitions, options.profile))
    return 0


def _compare_matrices(
    options: argparse.Namespace, about: dict[str, Any], path: Path, device: torch.device, mesh: DeviceMesh
) -> None:
    """Measure GWTAdamW and GWTMuon in turns, without matrix products if there is no CUDA device."""
    made = [
        (kind, sharded, build_matrices(options.tensors, device, kind, mesh if sharded else None))
        for sharded in (False, True)
        for kind in (GWTAdamW, GWTMuon)
    ]
    with contextlib.nullcontext() if device.type == "cuda" else without_products():
        times = take_turns([time_steps(*own, reallocated=False) for *_, own in made], options.repetitions)
        for (kind, sharded, (optimizer, _)), seconds in zip(made, times, strict=True):
            name = f"{kind.__name__}, matrices alone" + ", sharded" * sharded
            row = {"scenario": name, "tensors": options.tensors} | about
            _report(path, row, seconds)
            if options.profile:
                _report_profile(path, row, profile(optimizer, options.repetitions, options.profile))


def without_products() -> contextlib.AbstractContextManager[Any]:
    """Replace Newton-Schulz, whose matrix products need a device, by a function that does nothing."""
    return patch.object(NewtonSchulz, "update_", lambda self, x: None)


@contextlib.contextmanager
def without_device() -> Iterator[None]:
    """Let `backend="triton"` accept CPU tensors, with launches that end before the driver call."""
    with (
        patch.object(driver, "_active", NoDevice()),
        patch.object(choice, "triton_obstacle", lambda *args, **kwargs: None),
    ):
        yield


def _report(path: Path, row: dict[str, Any], seconds: Sequence[float]) -> None:
    spread, least = Spread.of(seconds), min(seconds)
    times = f"{1e6 * spread.median:.0f} us ({1e6 * spread.p20:.0f} to {1e6 * spread.p80:.0f})"
    print(f"{row['scenario']}: {times}, {1e6 * least:.0f} at the least", flush=True)
    undisturbed = "what a step takes where nothing else uses the caches and the memory of the core's neighbours"
    measured = [
        {"metric": "host_time", "unit": "s", **spread._asdict(), "note": ""},
        {"metric": "host_time_least", "unit": "s"}
        | Spread(least, least, least, len(seconds))._asdict()
        | {"note": undisturbed},
    ]
    records.append(path, "host", [row | each for each in measured])


def _report_profile(path: Path, row: dict[str, Any], functions: Sequence[tuple[str, float, float]]) -> None:
    rows = []
    for name, share, calls in functions:
        print(f"  {100 * share:4.1f} %  {calls:6.1f} calls  {name}")
        exact = Spread(share, share, share, 1)
        rows.append(
            row
            | {"function": name, "calls": calls, "metric": "own_time_share", "unit": "1"}
            | exact._asdict()
            | {"note": "under cProfile, which makes every call dearer"}
        )
    records.append(path, "host", rows)


if __name__ == "__main__":
    sys.exit(main())
