"""Time GWTAdamW over LLaMA shapes against torch.optim.AdamW, and on a CPU against a convolution-based GWT."""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench import records
from bench.contenders import measured_state_bytes
from bench.measure import Spread, available_bytes, copy_bandwidth, facts
from bench.models import load_config
from bench.trial import (
    Candidate,
    Shape,
    Trial,
    adamw,
    build,
    bytes_moved,
    bytes_needed,
    check,
    gwt,
    peak_extra_bytes,
    ptwt,
    shapes_of,
    timed_step,
)

WARM_UP = 3
FREE, LIMITED = "GWTAdamW level 2", "GWTAdamW level 2, limiter"

# What is promised of times: label, dtype, numerator, denominator, bound, whether the bound is a lower one.
PROMISES = {
    "cpu": [
        ("times as fast as the ptwt step", "float32", "ptwt level 2, limiter", LIMITED, 10.0, True),
        ("times as long as AdamW(foreach=False)", "float32", LIMITED, "AdamW(foreach=False)", 1.2, False),
    ],
    "cuda": [
        ("level 2, times as fast as fused AdamW", "bfloat16", "AdamW(fused=True)", FREE, 1.6, True),
        ("level 2, time with over without limiter", "bfloat16", LIMITED, FREE, 1.45, False),
    ],
}


class Metric(NamedTuple):
    """One measured quantity; exact ones are a spread of a single sample."""

    name: str
    unit: str
    spread: Spread


class Result(NamedTuple):
    """What was found for one candidate on one model; no metrics, and a note, where it could not be timed."""

    model: str
    candidate: Candidate
    metrics: dict[str, Metric]
    note: str = ""

    @property
    def seconds(self) -> float | None:
        """Median time of a step, or None."""
        return self.metrics["step_time"].spread.median if self.metrics else None


class Aim(NamedTuple):
    """A ratio of two results that the project set itself."""

    model: str
    label: str
    ratio: float
    bound: float
    at_least: bool

    def __str__(self) -> str:
        met = self.ratio >= self.bound if self.at_least else self.ratio <= self.bound
        aim = f"aim: {'at least' if self.at_least else 'at most'} {self.bound:g}, {'met' if met else 'NOT met'}"
        return f"{self.model}: {self.label}: {self.ratio:.2f} ({aim})"


def measure(
    model: str,
    candidates: Sequence[Candidate],
    shapes: Sequence[Shape],
    device: torch.device,
    *,
    repetitions: int,
    bandwidth: float,
) -> list[Result]:
    """Build, check and time candidates; those built together take turns, so that other load meets them alike.

    Args:
        model: For the results.
        candidates: What to time. A CPU holds all at once; pass one at a time where memory is short.
        shapes: The tensors of the model.
        device: Where to run.
        repetitions: Timed steps of each, after the warm-up.
        bandwidth: Bytes per second of a copy on this device.
    """
    trials: list[Trial] = []
    results: dict[str, Result] = {}
    errors: dict[str, float] = {}
    for candidate in candidates:
        trial, note = None, ""
        needed, available = bytes_needed(candidate, shapes), available_bytes(device)
        if needed > available:
            note = f"does not fit: needs about {needed / 2**30:.1f} GiB, {available / 2**30:.1f} GiB free"
        else:
            try:
                trial = build(candidate, shapes, device)
                error = errors[candidate.name] = check(trial)
                if error <= 1:
                    trials.append(trial)
                else:
                    note = f"not timed: differs from float64 by {error:.3g} times what rounding explains"
            except torch.OutOfMemoryError:
                note = f"does not fit: out of memory with {available / 2**30:.1f} GiB free"
        results[candidate.name] = Result(model, candidate, {}, note)
        del trial
        release(device)

    samples: dict[str, list[tuple[float, float]]] = {trial.candidate.name: [] for trial in trials}
    for round_ in range(WARM_UP + repetitions):
        for trial in trials:
            seconds = timed_step(trial, device)
            if round_ >= WARM_UP:
                samples[trial.candidate.name].append(seconds)
    for trial in trials:
        name = trial.candidate.name
        metrics = _metrics(trial, device, samples[name], errors[name], bandwidth)
        results[name] = Result(model, trial.candidate, {metric.name: metric for metric in metrics})
    return list(results.values())


def _metrics(
    trial: Trial, device: torch.device, samples: list[tuple[float, float]], error: float, bandwidth: float
) -> list[Metric]:
    def exact(name: str, unit: str, value: float) -> Metric:
        return Metric(name, unit, Spread(value, value, value, 1))

    moved = bytes_moved(trial)
    metrics = [
        Metric("step_time", "s", Spread.of([on_device for on_device, _ in samples])),
        Metric("host_time", "s", Spread.of([on_host for _, on_host in samples])),
        exact("bytes_moved", "B", moved),
        exact("roofline_time", "s", moved / bandwidth),
        Metric("copy_bandwidth_fraction", "1", Spread.of([moved / bandwidth / s for s, _ in samples])),
        exact("state_bytes", "B", measured_state_bytes(trial.optimizer)),
        exact("check_error", "rounding bounds", error),
    ]
    extra = peak_extra_bytes(trial, device)
    return metrics + ([] if extra is None else [exact("peak_extra_bytes", "B", extra)])


def release(device: torch.device) -> None:
    """Give back the memory of trials that are over."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def aims(results: Sequence[Result], device: torch.device) -> list[Aim]:
    """Return the ratios the project promises, of those results that have a time."""
    times = {(r.model, r.candidate.name, _short(r.candidate.dtype)): r.seconds for r in results}
    found = []
    for model in dict.fromkeys(r.model for r in results):
        for label, dtype, over, under, bound, at_least in PROMISES[device.type]:
            above, below = times.get((model, over, dtype)), times.get((model, under, dtype))
            if above is not None and below is not None:
                found.append(Aim(model, label, above / below, bound, at_least))
    for r in results:
        # Of the bandwidth nothing is promised for the 60M shapes, most of which is embedding at level 0.
        large = r.model in ("llama_1b", "llama_7b")
        if device.type == "cuda" and large and r.candidate.name == FREE and r.metrics:
            fraction = r.metrics["copy_bandwidth_fraction"].spread.median
            found.append(Aim(r.model, "level 2, fraction of the copy bandwidth", fraction, 0.9, True))
    return found


def table(results: Sequence[Result]) -> str:
    """Return the results as an aligned table."""
    lines: list[tuple[str, ...]] = [
        (
            *(
                "model",
                "optimizer",
                "weights",
                "step ms",
                "20 %",
                "80 %",
                "roofline ms",
                "of copy",
                "host ms",
            ),
            *("state MiB", "extra MiB", "error/bound"),
        )
    ]
    for r in results:
        head = (r.model, r.candidate.name, _short(r.candidate.dtype))
        if not r.metrics:
            lines.append((*head, r.note))
            continue
        step = r.metrics["step_time"].spread
        value = {name: metric.spread.median for name, metric in r.metrics.items()}
        extra = value.get("peak_extra_bytes")
        lines.append(
            (
                *head,
                *(f"{1e3 * seconds:.3f}" for seconds in (*step[:3], value["roofline_time"])),
                f"{100 * value['copy_bandwidth_fraction']:.0f} %",
                f"{1e3 * value['host_time']:.3f}",
                f"{value['state_bytes'] / 2**20:.1f}",
                "-" if extra is None else f"{extra / 2**20:.2f}",
                f"{value['check_error']:.2f}",
            )
        )
    full = [line for line in lines if len(line) == len(lines[0])]
    widths = [max(len(line[i]) for line in (full if i > 2 else lines)) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < 3 or len(line) < len(lines[0]) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=False))
        ).rstrip()
        for line in lines
    )


def rows(results: Sequence[Result], promised: Sequence[Aim], about: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the measurements in long format: one row a quantity, each with all it takes to place it."""
    empty: dict[str, Any] = {"optimizer": None, "weights": None, "level": None, "limiter": None}
    empty |= {
        "metric": None,
        "unit": None,
        "median": None,
        "p20": None,
        "p80": None,
        "samples": 0,
        "note": "",
    }
    found = []
    for r in results:
        head = {
            "model": r.model,
            **empty,
            "optimizer": r.candidate.name,
            "weights": _short(r.candidate.dtype),
            "level": r.candidate.level,
            "limiter": r.candidate.limiter,
            "note": r.note,
        }
        found += [
            head | {"metric": metric.name, "unit": metric.unit} | metric.spread._asdict() | about
            for metric in r.metrics.values()
        ]
        if not r.metrics:
            found.append(head | {"metric": "step_time", "unit": "s"} | about)
    for aim in promised:
        value = {"metric": "ratio", "unit": "1", "median": aim.ratio, "samples": 1, "note": str(aim)}
        found.append({"model": aim.model} | empty | value | about)
    return found


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line; what is not given depends on the device."""
    parser = argparse.ArgumentParser(prog="python -m bench.optimizers", description=__doc__)
    add = parser.add_argument
    add("--device", help="cpu or cuda; by default CUDA where there is one")
    add("--models", nargs="+", help="configurations in bench/configs (CPU: llama_350m; CUDA: llama_60m 1b 7b)")
    add("--levels", nargs="+", type=int, help="levels of GWT (CPU: 2; CUDA: 0 1 2 3)")
    add("--layers", type=int, help="number of layers (CPU: 1, they are all alike; CUDA: all)")
    add("--embeddings", action=argparse.BooleanOptionalAction, help="include embedding and head (CUDA: yes)")
    add("--repetitions", type=int, help="timed steps (CPU: 15; CUDA: 50)")
    add("--threads", type=int, help="threads of PyTorch on a CPU (default: PyTorch's own)")
    add("--out", type=Path, default=records.RESULTS, help="folder for the raw JSON (default: bench/results)")
    add("--commit", help="the commit measured, where the tree is no git checkout")
    options = parser.parse_args(arguments)

    options.device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    on_cpu = options.device.type == "cpu"
    if not on_cpu and (options.device.type != "cuda" or not torch.cuda.is_available()):
        parser.error(f"--device {options.device}: PyTorch finds no such CUDA device here; use --device cpu")
    defaults = {
        "models": ["llama_350m"] if on_cpu else ["llama_60m", "llama_1b", "llama_7b"],
        "levels": [2] if on_cpu else [0, 1, 2, 3],
        "layers": 1 if on_cpu else None,
        "embeddings": not on_cpu,
        "repetitions": 15 if on_cpu else 50,
    }
    for name, value in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    for name in ("layers", "repetitions", "threads"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name} {value}: must be at least 1")
    for model in options.models:
        try:
            load_config(model)
        except FileNotFoundError as error:
            parser.error(str(error))
    return options


def candidates_for(options: argparse.Namespace) -> list[Candidate]:
    """Return what a device's suite compares."""
    if options.device.type == "cpu":
        single = torch.float32
        peers = [adamw(single, foreach=False), adamw(single, foreach=True), adamw(single, fused=True)]
        own = [
            gwt(level, single, limiter=on) for level in options.levels for on in (True, False) if level or not on
        ]
        return own + peers + [ptwt(level, single) for level in options.levels if level]
    half = torch.bfloat16
    own = [gwt(level, half, limiter=on) for level in options.levels for on in (False, True) if level or not on]
    return [adamw(half, fused=True), adamw(torch.float32, fused=True), *own]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the suite of a device; return 1 where a check against the oracle failed."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    device = options.device
    if device.type == "cuda":
        torch.cuda.set_device(device)
    elif options.threads:
        torch.set_num_threads(options.threads)
    about = facts(device, "bench.optimizers", arguments, options.commit)
    bandwidth = copy_bandwidth(device)
    release(device)
    print(f"{about['device']}, torch {about['torch']}, triton {about['triton']}, commit {about['commit']}")
    low, high = bandwidth.p20 / 1e9, bandwidth.p80 / 1e9
    print(f"copy bandwidth {bandwidth.median / 1e9:.1f} GB/s (20 % {low:.1f}, 80 % {high:.1f})")

    candidates = candidates_for(options)
    batches = [candidates] if device.type == "cpu" else [[candidate] for candidate in candidates]
    results: list[Result] = []
    for model in options.models:
        shapes = shapes_of(model, layers=options.layers, embeddings=options.embeddings)
        elements = sum(torch.Size(shape.size).numel() for shape in shapes)
        print(f"{model}: {len(shapes)} tensors, {elements:,} parameters", flush=True)
        for batch in batches:
            print("  " + ", ".join(candidate.name for candidate in batch), file=sys.stderr, flush=True)
            results += measure(
                Path(model).stem, batch, shapes, device, repetitions=options.repetitions, bandwidth=bandwidth.median
            )
            release(device)
    promised = aims(results, device)
    print(table(results), *promised, sep="\n")

    about |= {"layers": options.layers, "embeddings": options.embeddings}
    copied = {"metric": "copy_bandwidth", "unit": "B/s"} | bandwidth._asdict()
    found = rows(results, promised, about)
    found.append(dict.fromkeys(found[0]) | {"note": ""} | copied | about)
    path = records.new_path("optimizers", about, options.out)
    records.append(path, "optimizers", found)
    print(f"raw measurements: {path.name}")
    return int(any(r.note.startswith("not timed") for r in results))


if __name__ == "__main__":
    raise SystemExit(main())
