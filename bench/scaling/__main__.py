"""Compare steps on 1, 2 and 4 processes over gloo with the predictions of `gwt_kernels.plan_sharded`.

Bytes and collectives must be equal on every process. Times are predicted from components measured alone in the same
run. All numbers of processes and all kinds of steps take turns, so that all meet the same load. Each process has
one thread.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import multiprocessing

from bench.common import records
from bench.common.measure import Spread, facts
from bench.common.models import build_model, load_config
from bench.scaling import processes
from bench.scaling.processes import LARGE, LEVEL, SETTINGS, Job, work
from gwt_kernels.mesh import Mesh
from gwt_kernels.plan import plan
from gwt_kernels.plan_sharded import ShardedPlan, plan_sharded

REFERENCES = {"gwt": "no limiter", "foam": "foam"}
"""Settings without collectives by rule, whose step on one process tells how fast a core moves the plan's bytes."""

KEEP = {"MALLOC_TRIM_THRESHOLD_": "1000000000", "MALLOC_MMAP_THRESHOLD_": "1000000000"}
"""Environment for a C library that keeps freed memory. Otherwise it returns temporaries of some sizes to the system
again and again: page faults were half of the folded rule's step on one process, and there were none on two."""


class Measured(NamedTuple):
    """The measurements of all processes, in the same order on each."""

    counted: Sequence[Mapping[str, Any]]
    """For each process, state bytes and collectives by case, such as "2/limiter"."""
    times: Sequence[Mapping[str, Sequence[Sequence[float]]]]
    """For each process, wall and thread CPU seconds by timed call, such as "2/step/limiter"."""

    def spread(self, act: str, *, cpu: bool) -> Spread:
        """Return CPU seconds of the first process, whose share is planned, or wall seconds of the slowest one."""
        own = [times[act] for times in self.times if act in times]
        if cpu:
            return Spread.of([seconds for _, seconds in own[0]])
        return Spread.of([max(wall for wall, _ in repetition) for repetition in zip(*own, strict=True)])

    def median(self, act: str, *, cpu: bool) -> float:
        return self.spread(act, cpu=cpu).median


def run(job: Job) -> Measured:
    """Start the processes and wait for them; raise the error of any of them."""
    os.environ.update(KEEP)
    multiprocessing.spawn(work, (job,), nprocs=job.numbers[-1])  # type: ignore[no-untyped-call]
    found = [json.loads(Path(job.results, f"{rank}.json").read_text()) for rank in range(job.numbers[-1])]
    return Measured([each["counted"] for each in found], [each["times"] for each in found])


def planned(model: str, n: int, setting: str, **links: float) -> ShardedPlan:
    """Return the plan of a setting on `n` processes with FSDP2."""
    options = dict(SETTINGS[setting])
    clip = options.pop("max_grad_norm", None) is not None
    module = build_model(load_config(model), seed=0, device=torch.device("meta"), dtype=torch.float32)
    return plan_sharded(plan(module, level=LEVEL, **options), Mesh(fsdp=n), clip=clip, **links)


def check(sharded: ShardedPlan, setting: str, counted: Sequence[Mapping[str, Any]]) -> None:
    """Raise unless every process holds and sends the planned bytes exactly.

    Raises:
        RuntimeError: one differs; the message names the process, the plan and the measurement.
    """
    n = sharded.mesh.size
    sent = [
        [c.kind, c.processes, c.total_bytes] for c in sharded.collectives if not c.engine for _ in range(c.calls)
    ]
    for rank in range(n):
        real = counted[rank][f"{n}/{setting}"]
        expected = {"state_bytes": sharded.held_by(rank, 0).state_bytes, "collectives": sent}
        if real != expected:
            raise RuntimeError(f"process {rank} of {n}, {setting}: planned {expected}, but found {real}")


def rows_of(model: str, n: int, setting: str, measured: Measured) -> list[dict[str, Any]]:
    """Return the rows of one case: measured counts and times, and the plan's prediction from the same run."""
    rule = SETTINGS[setting].get("rule", "gwt")
    reference = REFERENCES[rule]
    alone = planned(model, 1, reference)
    host, host_alone = (
        measured.median(f"{n}/host/{setting}", cpu=True),
        measured.median(f"1/host/{reference}", cpu=True),
    )
    bandwidth = alone.largest.moved_bytes / (measured.median(f"1/step/{reference}", cpu=True) - host_alone)
    sharded = planned(model, n, setting, **links_of(n, measured))
    check(sharded, setting, measured.counted)
    collectives = [c for c in sharded.collectives if not c.engine]
    cpu = host + sharded.largest.moved_bytes / bandwidth
    # Wall over CPU time: more processes than cores, and other load, take turns with this process.
    crowding = measured.median(f"{n}/step/{reference}", cpu=False) / measured.median(
        f"{n}/step/{reference}", cpu=True
    )
    exact = {
        ("state_bytes", "B"): sharded.largest.state_bytes,
        ("collectives", "1"): len(collectives),
        ("collective_bytes", "B"): sum(c.total_bytes for c in collectives),
        ("moved_bytes", "B"): sharded.largest.moved_bytes,
        ("bandwidth", "B/s"): bandwidth,
        ("crowding", "1"): crowding,
        ("predicted_collective_time", "s"): sharded.collective_seconds,
        ("predicted_step_cpu_time", "s"): cpu,
        ("predicted_step_time", "s"): crowding * cpu + sharded.collective_seconds,
    }
    spreads = {(name, unit): Spread(value, value, value, 1) for (name, unit), value in exact.items()}
    spreads["host_cpu_time", "s"] = measured.spread(f"{n}/host/{setting}", cpu=True)
    spreads["step_cpu_time", "s"] = measured.spread(f"{n}/step/{setting}", cpu=True)
    spreads["step_time", "s"] = measured.spread(f"{n}/step/{setting}", cpu=False)
    return [_row(model, n, setting, name, unit, spread) for (name, unit), spread in spreads.items()]


def links_of(n: int, measured: Measured) -> dict[str, float]:
    """Return the latency and bandwidth that fit the plan's formula to the all-reduces timed alone."""
    if n == 1:
        return {}
    sizes = {int(act.split("/")[2]) for act in measured.times[0] if act.startswith(f"{n}/all-reduce/")}
    small, large = (measured.median(f"{n}/all-reduce/{size}", cpu=False) for size in (max(sizes - {LARGE}), LARGE))
    seconds = max(large - small, 1e-9)  # if other load hides the slope: infinite bandwidth
    return {"latency": small / (2 * math.ceil(math.log2(n))), "link_bandwidth": 2 * (n - 1) / n * LARGE / seconds}


def pieces_of(model: str, n: int, measured: Measured) -> list[dict[str, Any]]:
    """Return the rows of the components timed alone on `n` processes at once."""
    copy = Spread.of([2 * processes.COPIED / max(walls) for walls in zip(
        *([wall for wall, _ in times[f"{n}/copy"]] for times in measured.times[:n]), strict=True
    )])  # fmt: skip
    found = [_row(model, n, None, "copy_bandwidth", "B/s", copy)]
    for act in measured.times[0]:
        if act.startswith(f"{n}/all-reduce/"):
            row = _row(model, n, None, "all_reduce_time", "s", measured.spread(act, cpu=False))
            found.append(row | {"bytes": int(act.split("/")[2])})
    return found


def _row(model: str, n: int, setting: str | None, metric: str, unit: str, spread: Spread) -> dict[str, Any]:
    what = {"model": model, "level": LEVEL, "weights": "float32", "processes": n, "setting": setting}
    return what | {"metric": metric, "unit": unit, **spread._asdict()}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, compare, print and add to the record."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.scaling", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="llama_small", help="a configuration's name or path")
    parser.add_argument(
        "--processes", type=int, nargs="+", default=[1, 2, 4], metavar="N", help="1 is always among"
    )
    parser.add_argument("--repetitions", type=int, default=40, help="of everything, in turns")
    parser.add_argument("--note", default="", help="what else ran on the machine, for the record")
    parser.add_argument("--out", type=Path, default=records.RESULTS, help="folder for the raw JSON")
    parser.add_argument("--commit", help="the commit measured, where the tree is no git checkout")
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    options = parser.parse_args(arguments)
    numbers = tuple(sorted({1, *options.processes}))
    if numbers[0] < 1 or options.repetitions < 1:
        parser.error("--processes and --repetitions are at least 1")
    about = facts(torch.device("cpu"), "bench.scaling", arguments, options.commit) | {"threads": 1}
    about |= {"cores": len(os.sched_getaffinity(0)), "note": options.note}
    path = records.new_path("scaling", about, options.out)
    payloads = {
        c.total_bytes
        for setting in SETTINGS
        for c in planned(options.model, 2, setting).collectives
        if not c.engine
    }
    with tempfile.TemporaryDirectory() as folder:
        job = Job(f"{folder}/store", folder, options.model, numbers, tuple(sorted(payloads)), options.repetitions)
        measured = run(job)
    for n in numbers:
        records.append(path, "scaling", [row | about for row in pieces_of(options.model, n, measured)])
        for setting in SETTINGS:
            rows = rows_of(options.model, n, setting, measured)
            records.append(path, "scaling", [row | about for row in rows])
            found = {row["metric"]: row["median"] for row in rows}
            print(
                f"{n} x {setting}: {found['state_bytes']:,} B of state, {found['collectives']} collectives", end=""
            )
            for name, key in (("CPU", "step_cpu_time"), ("wall", "step_time")):
                print(
                    f"; {name} {1e3 * found[key]:.1f} ms ({1e3 * found[f'predicted_{key}']:.1f} predicted)", end=""
                )
            print(flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
