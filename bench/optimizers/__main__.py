"""Time `step()` of GWTAdamW over LLaMA shapes against the optimizers that a user would choose instead."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.common import records, sources
from bench.common.bandwidth import StepBandwidth
from bench.common.measure import Spread, chosen_device, facts, is_present, wall_clock
from bench.common.models import Shape, load_config, shapes_of
from bench.kernels.targets import Target, compared, targets
from bench.optimizers import rules as other_rules
from bench.optimizers.candidate import Candidate
from bench.optimizers.peers import PEERS, suite
from bench.optimizers.timing import SECONDS, Result, measure, release

MODELS = ["llama_60m", "llama_7b", "llama_1b", "llama_350m", "llama_130m"]  # models of the targets come first
EMPTY = {
    **dict.fromkeys(("model", "optimizer", "peer", "weights", "level", "limiter", "clipped", "check")),
    **dict.fromkeys(("metric", "unit", "median", "p20", "p80")),
    "samples": 0,
    "note": "",
}


def rows(result: Result, about: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a result in long format: one row per quantity, each with all columns of its case."""
    candidate = result.candidate
    head = EMPTY | {
        "model": result.model,
        "optimizer": candidate.name,
        "peer": candidate.peer,
        "weights": candidate.weights,
        "level": candidate.level,
        "limiter": candidate.limiter,
        "clipped": False,
        "check": candidate.check,
        "note": result.note,
    }
    if not result.metrics:
        return [head | {"metric": "step_time", "unit": "s"} | about]
    return [
        head
        | {"metric": metric.name, "unit": metric.unit, "clipped": metric.clipped}
        | metric.spread._asdict()
        | about
        for metric in result.metrics
    ]


def row(metric: str, unit: str, spread: Spread, about: dict[str, Any]) -> dict[str, Any]:
    """Return the row for a property of the machine, such as its bandwidth."""
    return EMPTY | {"metric": metric, "unit": unit} | spread._asdict() | about


def target_rows(promised: Sequence[Target], about: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a row for each target; its note says whether it is met."""
    return [
        EMPTY
        | {"model": target.model, "metric": "ratio", "unit": target.unit, "median": target.value, "samples": 1}
        | {"note": str(target)}
        | about
        for target in promised
    ]


def promises(results: Sequence[Result], device: torch.device, latency: Spread | None) -> list[Target]:
    """Return the targets of all models, computed from the results."""
    measured: dict[str, dict[tuple[str, str], dict[str, float]]] = {}
    for result in results:
        if result.seconds is not None:
            key = result.candidate.name, result.candidate.weights
            measured.setdefault(result.model, {})[key] = result.medians
    return [
        target
        for model, found in measured.items()
        for target in targets(model, found, device.type, None if latency is None else latency.median)
    ]


def table(results: Sequence[Result]) -> str:
    """Return an aligned table of all metrics in the results; times are in milliseconds, sizes in MiB."""
    columns = {
        "step": ("step_time", False, "{:.3f}", 1e3),
        "wall": ("wall_time", False, "{:.3f}", 1e3),
        "host": ("host_time", False, "{:.3f}", 1e3),
        "clipped": ("step_time", True, "{:.3f}", 1e3),
        "roofline": ("roofline_time", False, "{:.3f}", 1e3),
        "of copy": ("copy_bandwidth_fraction", False, "{:.0f} %", 100),
        "in place": ("in_place_bandwidth_fraction", False, "{:.0f} %", 100),
        "launches": ("kernel_launches", False, "{:.0f}", 1),
        "state B/param": ("state_bytes_per_parameter", False, "{:.3f}", 1),
        "extra MiB": ("peak_extra_bytes", False, "{:.2f}", 2**-20),
        "error": ("check_error", False, "{:.2f}", 1),
    }
    known = {"step_time", *(metric.name for result in results for metric in result.metrics)}
    columns = {heading: column for heading, column in columns.items() if column[0] in known}
    lines: list[tuple[str, ...]] = [("model", "optimizer", "weights", *columns)]
    for result in results:
        head = (result.model, result.candidate.name, result.candidate.weights)
        if not result.metrics:
            lines.append((*head, result.note))
            continue
        value = {(metric.name, metric.clipped): metric.spread.median for metric in result.metrics}
        cells = (
            form.format(value[name, clipped] * factor) if (name, clipped) in value else "-"
            for name, clipped, form, factor in columns.values()
        )
        lines.append((*head, *cells))
    full = [line for line in lines if len(line) == len(lines[0])]
    widths = [max(len(line[i]) for line in (full if i > 2 else lines)) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < 3 or len(line) < len(lines[0]) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=False))
        ).rstrip()
        for line in lines
    )


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line; defaults depend on the device."""
    parser = argparse.ArgumentParser(prog="python -m bench.optimizers", description=__doc__)
    add = parser.add_argument
    add("--device", help="cpu or cuda; by default CUDA where there is one")
    add("--models", nargs="+", help=f"configurations in bench/configs (CPU: llama_350m; CUDA: {' '.join(MODELS)})")
    add(
        "--peers",
        nargs="+",
        choices=PEERS,
        metavar="PEER",
        help=f"packages to time: {' '.join(PEERS)} (CPU: all but {other_rules.NAME}; CUDA: all)",
    )
    add("--levels", nargs="+", type=int, help="levels of GWT (0 1 2 3)")
    add("--layers", type=int, help="number of layers (CPU: 1, they are all alike; CUDA: all)")
    add("--embeddings", action=argparse.BooleanOptionalAction, help="include embedding and head (CUDA: yes)")
    add("--repetitions", type=int, help="timed steps (CPU: 15; CUDA: 50)")
    add("--minutes", type=float, help="what has not begun after this time is left out, and a row says so")
    add("--quick", action="store_true", help="5 steps, level 2 and the models that the targets name, unless given")
    add("--threads", nargs="+", type=int, help="threads on a CPU, a run for each (default: PyTorch's own)")
    add("--out", type=Path, default=records.RESULTS, help="folder for the raw JSON (default: bench/results)")
    add("--commit", help="the commit measured, where the tree is no git checkout")
    options = parser.parse_args(arguments)

    options.device = chosen_device(options.device)
    on_cpu = options.device.type == "cpu"
    if options.device.type not in ("cpu", "cuda"):
        parser.error(f"--device {options.device}: must be cpu or cuda")
    defaults = {
        "models": ["llama_350m"] if on_cpu else MODELS[: 2 if options.quick else None],
        "peers": [name for name in PEERS if name != other_rules.NAME or not on_cpu],
        "levels": [2] if options.quick else [0, 1, 2, 3],
        "layers": 1 if on_cpu else None,
        "embeddings": not on_cpu,
        "repetitions": 5 if options.quick else 15 if on_cpu else 50,
    }
    for name, value in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    for name in ("layers", "repetitions", "threads"):
        value = getattr(options, name)
        for each in value if isinstance(value, list) else [value]:
            if each is not None and each < 1:
                parser.error(f"--{name} {each}: must be at least 1")
    if options.minutes is not None and not options.minutes > 0:
        parser.error(f"--minutes {options.minutes}: must be above 0")
    for model in options.models:
        try:
            load_config(model)
        except FileNotFoundError as error:
            parser.error(str(error))
    return options


def batches(
    models: Sequence[str], candidates: Sequence[Candidate], device: torch.device
) -> list[tuple[str, list[Candidate]]]:
    """Return batches of candidates to measure together, the most important first, as time may be limited.

    On a CPU a batch has the candidates with weights of one dtype, so that all meet the same load; other rules are
    separate, since matrix products take a hundred times as long as other steps. On CUDA each candidate is a batch,
    to save memory. Those that the targets compare, on the models that these name, come first.
    """
    if device.type == "cpu":
        groups: dict[object, list[Candidate]] = {}
        for c in candidates:
            groups.setdefault((c.dtype, c.peer == other_rules.NAME), []).append(c)
        return [(model, group) for model in models for group in groups.values()]
    named = compared(device.type)
    pairs = [(model, [c]) for model in models for c in candidates]
    return sorted(
        pairs, key=lambda pair: (pair[1][0].name, pair[1][0].weights) not in named or pair[0] not in MODELS[:2]
    )


def run(
    options: argparse.Namespace, candidates: Sequence[Candidate], bandwidth: StepBandwidth
) -> Iterator[tuple[Sequence[Shape], list[Result]]]:
    """Measure batch after batch, and yield shapes and results of each; notes only, once the time is up."""
    device, begin = options.device, time.monotonic()
    shapes = {
        path: shapes_of(path, layers=options.layers, embeddings=options.embeddings) for path in options.models
    }
    for path, batch in batches(options.models, candidates, device):
        model = Path(path).stem
        if options.minutes is not None and time.monotonic() - begin > 60 * options.minutes:
            note = f"left out: --minutes {options.minutes:g} were over"
            yield shapes[path], [Result(model, candidate, (), note) for candidate in batch]
            continue
        print(f"  {model}: " + ", ".join(f"{c.name} {c.weights}" for c in batch), file=sys.stderr, flush=True)
        found = measure(
            *(model, batch, shapes[path], device),
            repetitions=options.repetitions,
            bandwidth=bandwidth,
            seconds=SECONDS / 2 if options.quick else SECONDS,
        )
        release(device)
        yield shapes[path], found


def launch_latency(device: torch.device) -> Spread:
    """Measure the seconds from the launch of one small kernel until the host sees it finished."""
    one = torch.zeros(1, device=device)
    return Spread.of([wall_clock(lambda: one.add_(1), device)[1] for _ in range(120)][20:])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the suite of a device; return 1 if an oracle's check or this package failed, or without a device."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    before = torch.get_num_threads()
    try:
        return max(_run_with(threads, options, arguments) for threads in options.threads or [before])
    finally:
        torch.set_num_threads(before)


def _run_with(threads: int, options: argparse.Namespace, arguments: Sequence[str]) -> int:
    """Run the suite with a number of threads, and write its own record."""
    device, present = options.device, is_present(options.device)
    torch.set_num_threads(threads)
    about = facts(device if present else torch.device("cpu"), "bench.optimizers", arguments, options.commit)
    path = records.new_path("optimizers", about, options.out)
    if not present:
        note = f"no device: PyTorch finds no {device} here, so nothing was measured"
        records.append(path, "optimizers", [EMPTY | {"metric": "step_time", "unit": "s", "note": note} | about])
        print(note)
        return 1
    if device.type == "cuda":
        torch.cuda.set_device(device)
    bandwidth = StepBandwidth(device)
    release(device)
    print(f"{about['device']}, torch {about['torch']}, triton {about['triton']}, commit {about['commit']}")
    middle, low, high = (1e-9 * value for value in bandwidth.spread[:3])
    print(f"{bandwidth.words} {middle:.1f} GB/s (20 % {low:.1f}, 80 % {high:.1f})", flush=True)

    about |= {"layers": options.layers, "embeddings": options.embeddings, "parameters": None}
    about["sources"] = sources.digest(about["own_backend"])
    machine = [row(bandwidth.metric, "B/s", bandwidth.spread, about)]
    latency = launch_latency(device) if device.type == "cuda" else None
    if latency is not None:
        machine.append(row("launch_latency", "s", latency, about))
    records.append(path, "optimizers", machine)

    results: list[Result] = []
    try:
        for shapes, found in run(options, suite(options.peers, options.levels, device), bandwidth):
            elements = sum(torch.Size(shape.size).numel() for shape in shapes)
            results += found
            fresh = [each for result in found for each in rows(result, about | {"parameters": elements})]
            records.append(path, "optimizers", fresh)
    finally:  # an interrupted run also reports the targets of what it measured
        promised = promises(results, device, latency)
        records.append(path, "optimizers", target_rows(promised, about))
        print(table(results), *promised, sep="\n")
        print(f"raw measurements: {path.name}", flush=True)
    return int(any(result.failed for result in results))


if __name__ == "__main__":
    raise SystemExit(main())
