"""Time each kernel alone: the fused step with and without limiter, steps of other rules, and the Haar transforms.

Every case is compared with float64 before it is timed. Sets of buffers take turns, so that none is in the cache
when its turn comes. The time is the device time of one call on one tensor; for a step it includes the copy of its
pointer table. The bandwidth counts the bytes that must move (`cases.bytes_moved`).
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from bench.common import records
from bench.common.bandwidth import copy_bandwidth
from bench.common.measure import Spread, available_bytes, chosen_device, clock, facts, is_present
from bench.common.models import load_config
from bench.kernels.cases import (
    CPU_MODEL,
    KERNELS,
    MODELS,
    PARTS,
    RULE_KERNELS,
    Case,
    bytes_moved,
    obstacle,
    plan,
    set_count,
    short,
)
from bench.kernels.oracle import Buffers, bytes_needed, check
from bench.kernels.targets import kernel_targets

BENCHMARK = "kernels"
WARM_UP = 3
CPU_CACHE = 32 * 2**20  # bytes; PyTorch does not report a core's share of the last-level cache
WIDTH = 160  # columns of the table if the terminal sets none


class Result(NamedTuple):
    """The result for one case; without times, and with a note, if it could not be timed."""

    case: Case
    source: str
    seconds: Spread | None = None
    error: float | None = None
    """The largest error over its rounding-error bound."""
    sets: int = 0
    note: str = ""
    failed: bool = False
    """Whether the kernel raised or gave a wrong result; False for a case that cannot run here."""


def measure(
    case: Case, source: str, device: torch.device, *, backend: str | None = None, repetitions: int = 20
) -> Result:
    """Check a case and time it; an error becomes the result's note."""
    missing = Result(case, source)
    if why := obstacle(case, device, backend):
        return missing._replace(note=why)
    free = "an unknown part of it free"
    try:
        sets, available = set_count(case, cache_bytes(device)), available_bytes(device)
        needed, free = bytes_needed(case, sets), f"{available / 2**30:.1f} GiB free"
        if needed > available:
            return missing._replace(note=f"does not fit: needs about {needed / 2**30:.1f} GiB, {free}")
        first = Buffers(case, device, backend)
        buffers = [first, *(first.clone() for _ in range(sets - 1))]
        error = check(first, buffers[1])
        if not error <= 1:
            note = f"not timed: differs from float64 by {error:.3g} times what rounding explains"
            return missing._replace(error=error, note=note, failed=True)
        return Result(case, source, Spread.of(times(buffers, device, repetitions)), error, sets)
    except torch.OutOfMemoryError:
        return missing._replace(note=f"does not fit: out of memory with {free}")
    except Exception as wrong:  # whatever a compiler or a driver raises, the following cases may still run
        reason = " ".join(str(wrong).split())[:300]
        return missing._replace(note=f"failed: {type(wrong).__name__}: {reason}", failed=True)


def times(buffers: Sequence[Buffers], device: torch.device, repetitions: int) -> list[float]:
    """Measure device seconds of `repetitions` calls, taking turns between the sets of buffers."""
    for one in buffers:
        one.run()  # so that the tables of each set are on the device
    turns = itertools.cycle(buffers)
    seconds = [clock(next(turns).run, device)[0] for _ in range(WARM_UP + repetitions)]
    return seconds[WARM_UP:]


def cache_bytes(device: torch.device) -> int:
    """Return the bytes of the last-level cache; on a CPU a fixed value."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    return CPU_CACHE


def rows(result: Result, bandwidth: float, about: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a result in long format: one row per quantity, each with all columns of its case."""
    case, seconds = result.case, result.seconds
    head = {
        "kernel": case.kernel,
        "source": result.source,
        "shape": "x".join(map(str, case.shape)),
        "elements": case.elements,
        "width": case.width,
        "level": case.level,
        "weights": short(case.data),
        "moments": case.moments and short(case.moments),
        "sets": result.sets,
    }
    if seconds is None:
        return [_row(head, about, "time", "s", note=result.note)]
    moved = bytes_moved(case)
    speeds = Spread(moved / seconds.median, moved / seconds.p80, moved / seconds.p20, seconds.samples)
    fractions = Spread(*(speed / bandwidth for speed in speeds[:3]), seconds.samples)
    return [
        _row(head, about, "time", "s", seconds),
        _row(head, about, "bytes_moved", "B", _exact(moved)),
        _row(head, about, "bandwidth", "B/s", speeds),
        _row(head, about, "copy_bandwidth_fraction", "1", fractions),
        _row(head, about, "check_error", "rounding bounds", _exact(result.error or 0.0)),
    ]


def _exact(value: float) -> Spread:
    return Spread(value, value, value, 1)


def _row(
    head: dict[str, Any],
    about: dict[str, Any],
    metric: str,
    unit: str,
    spread: Spread | None = None,
    note: str = "",
) -> dict[str, Any]:
    values: dict[str, Any] = {"median": None, "p20": None, "p80": None, "samples": 0}
    return {
        **head,
        "metric": metric,
        "unit": unit,
        **(spread._asdict() if spread else values),
        "note": note,
        **about,
    }


def bare_row(about: dict[str, Any], metric: str, unit: str, spread: Spread | None, note: str) -> dict[str, Any]:
    """Return a row without a case."""
    names = ("kernel", "source", "shape", "elements", "width", "level", "weights", "moments", "sets")
    return _row(dict.fromkeys(names), about, metric, unit, spread, note)


def table(results: Sequence[Result], bandwidth: float) -> Table:
    """Format the results for a terminal."""
    shown = Table(box=box.SIMPLE_HEAD)
    for heading in ("kernel", "shape", "level", "weights", "moments"):
        shown.add_column(heading, no_wrap=True)
    for heading in ("us", "20 %", "80 %", "GB/s", "of copy", "error/bound"):
        shown.add_column(heading, justify="right", no_wrap=True)
    shown.add_column("note", overflow="fold")
    for r in results:
        case = r.case
        shape, moments = "x".join(map(str, case.shape)), short(case.moments) if case.moments else "-"
        head = (case.kernel, shape, str(case.level), short(case.data), moments)
        if r.seconds is None:
            shown.add_row(*head, *[""] * 6, r.note)
        else:
            speed = bytes_moved(case) / r.seconds.median
            micros = (f"{1e6 * value:.1f}" for value in r.seconds[:3])
            shown.add_row(
                *head, *micros, f"{speed / 1e9:.1f}", f"{100 * speed / bandwidth:.0f} %", f"{r.error:.2f}", ""
            )
    return shown


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.kernels", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--device", help="cpu or cuda; by default CUDA where there is one")
    add("--backend", choices=["triton", "torch"], help="by default Triton on CUDA, PyTorch on a CPU")
    every = (*KERNELS, *RULE_KERNELS)
    text = f"of {' '.join(every)} (default: all; CPU: the first {len(KERNELS)})"
    add("--kernels", nargs="+", choices=every, metavar="NAME", help=text)
    add("--parts", nargs="+", choices=PARTS, default=PARTS, metavar="NAME", help="of matrices (each of the models, "
        "and experts), sizes (a sweep), grid (levels and dtypes at two shapes)")  # fmt: skip
    add("--models", nargs="+", help=f"whose matrices (default: {' '.join(MODELS)}, and experts; CPU: {CPU_MODEL})")
    add("--shapes", nargs="+", type=_shape, metavar="AxB", help="these alone, such as 2048x5461, not the parts")
    add("--sizes", nargs="+", type=int, metavar="E", help="exponents of the sweep over sizes (default: 16 to 31)")
    add("--levels", nargs="+", type=int, help="levels (default: 2; grid: 0 to 6)")
    add("--weights", nargs="+", type=_dtype, help="dtypes of weights and gradients (default: bfloat16; grid: all)")
    add("--moments", nargs="+", type=_dtype, help="dtypes of moments (default: float32; grid: and bfloat16, int8)")
    add(
        "--widths", nargs="+", choices=["flat", "odd"], default=["flat", "odd"], help="rows of whole blocks, others"
    )
    add("--full", action="store_true", help="every shape at every level and dtype")
    add("--repetitions", type=int, help="timed calls of each case (CUDA: 20; CPU: 5)")
    add("--minutes", type=float, help="start no case after this many minutes; the rest are rows that say so")
    add("--threads", type=int, help="threads of PyTorch on a CPU (default: PyTorch's own)")
    add("--out", type=Path, default=records.RESULTS, help="folder for the raw JSON (default: bench/results)")
    add("--commit", help="the commit measured, where the tree is no git checkout")
    options = parser.parse_args(arguments)

    options.device = chosen_device(options.device)
    options.kernels = options.kernels or (KERNELS if options.device.type == "cpu" else every)
    if options.device.type not in ("cpu", "cuda"):
        parser.error(f"--device {options.device}: must be cpu or cuda")
    options.repetitions = options.repetitions or (5 if options.device.type == "cpu" else 20)
    for name, least in (("repetitions", 1), ("threads", 1), ("minutes", 0)):
        value = getattr(options, name)
        if value is not None and value < least:
            parser.error(f"--{name} {value}: must be at least {least}")
    for name, most in (("levels", 16), ("sizes", 40)):
        if wrong := [value for value in getattr(options, name) or () if not 0 <= value <= most]:
            parser.error(f"--{name} {wrong[0]}: must be from 0 to {most}")
    try:
        for model in options.models or ():
            load_config(model)
    except FileNotFoundError as error:
        parser.error(str(error))
    options.cases = plan(options)
    if not options.cases:
        parser.error(
            "nothing is left to measure: level 0 has the kernel step only, and --widths odd needs odd rows"
        )
    return options


def _shape(text: str) -> tuple[int, ...]:
    shape = tuple(int(size) for size in text.split("x"))
    if not all(size > 0 for size in shape):
        raise argparse.ArgumentTypeError(f"{text}: sizes must be positive")
    return shape


def _dtype(text: str) -> torch.dtype:
    dtype = getattr(torch, text, None)
    if not isinstance(dtype, torch.dtype):
        known = "bfloat16, float32 or float16, or for moments int8"
        raise argparse.ArgumentTypeError(f"{text}: PyTorch has no such dtype; give {known}")
    return dtype


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the selected cases; return 1 if a kernel failed or the device is missing, 130 if interrupted."""
    started = time.monotonic()
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    device = options.device
    present = is_present(device)
    if options.threads:
        torch.set_num_threads(options.threads)
    about = facts(device if present else torch.device("cpu"), f"bench.{BENCHMARK}", arguments, options.commit)
    about["own_backend"] = options.backend or about["own_backend"]
    path = records.new_path(BENCHMARK, about, options.out)
    if not present:
        note = f"no device: PyTorch finds no {device} here, so nothing was measured"
        records.append(path, BENCHMARK, [bare_row(about, "time", "s", None, note)])
        print(note)
        return 1
    if device.type == "cuda":
        torch.cuda.set_device(device)

    copied = copy_bandwidth(device)
    records.append(path, BENCHMARK, [bare_row(about, "copy_bandwidth", "B/s", copied, "")])
    print(f"{about['device']}, torch {about['torch']}, triton {about['triton']}, commit {about['commit']}")
    low, middle, high = (value / 1e9 for value in (copied.p20, copied.median, copied.p80))
    print(f"copy bandwidth {middle:.1f} GB/s (20 % {low:.1f}, 80 % {high:.1f})", flush=True)
    results: list[Result] = []
    left_out: list[Result] = []
    interrupted = False
    try:
        for i, (case, source) in enumerate(options.cases.items(), 1):
            if options.minutes is not None and time.monotonic() - started > 60 * options.minutes:
                note = f"left out: {options.minutes:g} minutes were used up"
                left_out = [Result(*each, note=note) for each in list(options.cases.items())[i - 1 :]]
                records.append(path, BENCHMARK, [row for r in left_out for row in rows(r, copied.median, about)])
                break
            result = measure(case, source, device, backend=options.backend, repetitions=options.repetitions)
            results.append(result)
            records.append(path, BENCHMARK, rows(result, copied.median, about))
            found = result.note if result.seconds is None else f"{1e6 * result.seconds.median:.1f} us"
            print(f"{i}/{len(options.cases)} {case}: {found}", file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        interrupted = True
    medians = {r.case: r.seconds.median for r in results if r.seconds is not None}
    on_gpu = device.type == "cuda"
    promised = kernel_targets(medians, copied.median, cache_bytes(device)) if on_gpu else []
    exact = [(_exact(target.value), str(target)) for target in promised]
    records.append(path, BENCHMARK, [bare_row(about, "ratio", "1", *each) for each in exact])
    console = Console()
    console.width = console.width if console.is_terminal else WIDTH
    console.print(table(results, copied.median))
    print(*promised, sep="\n", end="\n" if promised else "")
    timed, failed = sum(r.seconds is not None for r in results), sum(r.failed for r in results)
    print(
        f"{timed} of {len(options.cases)} cases timed, {failed} failed, {len(left_out)} left out for lack of time"
    )
    print(f"raw measurements: {path.name}{', interrupted' if interrupted else ''}")
    return 130 if interrupted else int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
