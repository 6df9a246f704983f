"""Candidates on one model, built, checked and timed in turns; an error becomes a note."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from bench.common.bandwidth import StepBandwidth
from bench.common.measure import Spread, available_bytes, clock, held_bytes, kernel_launches, wall_clock
from bench.common.models import Shape
from bench.optimizers.candidate import (
    BuiltCandidate,
    Candidate,
    build,
    bytes_moved,
    bytes_needed,
    peak_extra_bytes,
    renew_gradients,
)
from bench.optimizers.checks import check
from bench.optimizers.peers import REFRESH_GAP, projection_time

WARM_UP = 3
FEWEST = 3  # fewest timed steps when a candidate's time is up
SECONDS = 10.0  # time limit for the timed steps of a candidate


class Metric(NamedTuple):
    """One measured quantity; exact ones are a spread of a single sample."""

    name: str
    unit: str
    spread: Spread
    clipped: bool = False


class Result(NamedTuple):
    """The result for one candidate on one model; without metrics, and with a note, if it could not be timed."""

    model: str
    candidate: Candidate
    metrics: Sequence[Metric]
    note: str = ""

    @property
    def medians(self) -> dict[str, float]:
        """Return the medians by metric, without clipping."""
        return {metric.name: metric.spread.median for metric in self.metrics if not metric.clipped}

    @property
    def seconds(self) -> float | None:
        """Return the median time of a step, or None."""
        return self.medians.get("step_time")

    @property
    def failed(self) -> bool:
        """Whether a result was wrong or this package did not run; a missing peer is no failure."""
        wrong = self.candidate.oracle is not None and self.note.startswith("not timed")
        return wrong or (self.candidate.peer == "gwt" and self.note.startswith("cannot run"))


class _Sample(NamedTuple):
    """Seconds of one step; the fields have the metrics' names."""

    step_time: float
    host_time: float
    wall_time: float


class _Turn(NamedTuple):
    """A candidate's steps in one round, and the bytes per second that bounded them."""

    step: _Sample
    clipped: _Sample
    bandwidth: float


def measure(
    model: str,
    candidates: Sequence[Candidate],
    shapes: Sequence[Shape],
    device: torch.device,
    *,
    repetitions: int,
    bandwidth: StepBandwidth,
    seconds: float = SECONDS,
) -> list[Result]:
    """Build, check and time candidates; those built together take turns, so that all meet the same load.

    Args:
        model: Name of the model in the results.
        candidates: Candidates to time. A CPU holds several at once; pass one at a time if memory is short.
        shapes: The tensors of the model.
        device: Device to run on.
        repetitions: Timed steps of each, after the warm-up; fewer if they take too long.
        bandwidth: Bandwidth of this device; on a CPU it is measured again in every round.
        seconds: Time limit for the timed steps of each.
    """
    notes: dict[str, str] = {}
    ready: dict[str, BuiltCandidate] = {}
    errors: dict[str, float] = {}
    for candidate in candidates:
        needed, available = bytes_needed(candidate, shapes), available_bytes(device)
        if needed > available:
            gigabytes = f"{needed / 2**30:.1f} GiB, {available / 2**30:.1f} GiB free"
            notes[candidate.name] = f"does not fit: needs about {gigabytes}"
            continue
        built = None
        try:
            built = build(candidate, shapes, device)
            error = errors[candidate.name] = check(built)
            if error <= 1:
                ready[candidate.name] = built
            else:
                notes[candidate.name] = _refusal(candidate, error)
        except Exception as error:  # any exception of a package that cannot run here
            notes[candidate.name] = _excuse(error, device)
        del built
        release(device)

    turns: dict[str, list[_Turn]] = {name: [] for name in ready}
    begin, patience = time.monotonic(), seconds * len(ready)
    for round_ in range(WARM_UP + repetitions):
        now = bandwidth.now()
        for name, built in list(ready.items()):
            try:
                taken = [_sample(built, device, turns[name], clipped=clipped) for clipped in (False, True)]
                turns[name].append(_Turn(*taken, now))
            except Exception as error:
                notes[name] = _excuse(error, device)
                del ready[name], built
                release(device)
        if round_ + 1 >= WARM_UP + FEWEST and time.monotonic() - begin > patience:
            break

    metrics: dict[str, list[Metric]] = {name: [] for name in ready}
    for name, built in ready.items():
        try:
            for metric in _metrics(built, device, turns[name][WARM_UP:], errors[name], bandwidth.metric):
                metrics[name].append(metric)  # one by one, so that earlier metrics stay if a later one fails
        except Exception as error:
            notes[name] = _excuse(error, device)
    return [Result(model, c, metrics.get(c.name, ()), notes.get(c.name, "")) for c in candidates]


def _sample(built: BuiltCandidate, device: torch.device, before: Sequence[_Turn], *, clipped: bool) -> _Sample:
    """Time one step with new gradients; on CUDA two, as the lead that hides launch latency spoils host time."""
    work = built.clipped_step if clipped else built.optimizer.step
    renew_gradients(built)
    if device.type != "cuda":
        seconds, _ = clock(work, device)
        return _Sample(seconds, seconds, seconds)
    host, wall = wall_clock(work, device)
    usual = min((turn.clipped if clipped else turn.step).host_time for turn in before) if before else host
    renew_gradients(built)
    on_device, _ = clock(work, device, lead=min(max(0.01, 2 * usual), 0.5))
    return _Sample(on_device, host, wall)


def _metrics(
    built: BuiltCandidate,
    device: torch.device,
    turns: Sequence[_Turn],
    error: float,
    bandwidth: str,
) -> Iterator[Metric]:
    def exact(name: str, unit: str, value: float, clipped: bool = False) -> Metric:
        return Metric(name, unit, Spread(value, value, value, 1), clipped)

    for clipped in (False, True):
        for index, name in enumerate(_Sample._fields):
            yield Metric(name, "s", Spread.of([turn[clipped][index] for turn in turns]), clipped)

    moved = bytes_moved(built)
    rooflines = [moved / turn.bandwidth for turn in turns]
    shares = [roofline / turn.step.step_time for roofline, turn in zip(rooflines, turns, strict=True)]
    yield exact("bytes_moved", "B", moved)
    yield exact("roofline_time", "s", Spread.of(rooflines).median)
    yield Metric(f"{bandwidth}_fraction", "1", Spread.of(shares))

    weights_and_gradients = [t for p in built.tensors for t in (p, p.grad) if t is not None]
    state = held_bytes(built.optimizer, weights_and_gradients)
    yield exact("state_bytes", "B", state)
    yield exact("state_bytes_per_parameter", "B", state / sum(p.numel() for p in built.tensors))
    yield exact("check_error", "bounds", error)

    extra = peak_extra_bytes(built, device)
    if extra is not None:
        yield exact("peak_extra_bytes", "B", extra)
    projection = projection_time(built, device)
    if projection is not None:
        each = projection / REFRESH_GAP
        step = Spread.of([turn.step.step_time for turn in turns]).median
        yield exact("projection_time", "s", projection)
        yield exact("projection_share", "1", each / (each + step))
    for clipped in (False, True):
        renew_gradients(built)
        launches = kernel_launches(built.clipped_step if clipped else built.optimizer.step, device)
        if launches is not None:
            yield exact("kernel_launches", "1", launches, clipped)


def _refusal(candidate: Candidate, error: float) -> str:
    if candidate.oracle is not None:
        return f"not timed: differs from float64 by {error:.3g} times what rounding explains"
    return f"not timed: differs from AdamW's update by {error:.3g} times what its method explains"


def _excuse(error: Exception, device: torch.device) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        return f"does not fit: out of memory with {available_bytes(device) / 2**30:.1f} GiB free"
    text = " ".join(str(error).split())
    return f"cannot run here: {type(error).__name__}: {text[:300]}".rstrip(": ")


def release(device: torch.device) -> None:
    """Free the memory of candidates that are done."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
