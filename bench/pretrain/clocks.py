"""Timers for a training run that do not slow it down."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch


class OptimizerTimer:
    """Timer of `optimizer.step()`; on CUDA it records events, and synchronises only to read them at the end."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[tuple[Any, Any]] = []

    def _mark(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def __enter__(self) -> None:
        self._begin = self._mark()

    def __exit__(self, *_: object) -> None:
        self._marks.append((self._begin, self._mark()))

    def milliseconds(self) -> dict[str, float] | None:
        """Return median, 20th and 80th percentile and number of steps, without the first few; None if too few."""
        marks = self._marks[3:]
        if len(marks) < 2:
            return None
        if self._cuda:
            torch.cuda.synchronize()
            times = [begin.elapsed_time(end) for begin, end in marks]
        else:
            times = [1e3 * (end - begin) for begin, end in marks]
        fifths = statistics.quantiles(times, n=5, method="inclusive")
        return {"p20": fifths[0], "median": statistics.median(times), "p80": fifths[3], "samples": len(times)}


class Stopwatch:
    """Seconds of training; stopped during evaluations and checkpoints."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self.seconds = 0.0
        self._began: float | None = None

    def start(self) -> None:
        self._began = time.perf_counter()

    def stop(self) -> float:
        """Stop once the device has finished its queued work, and return the seconds so far."""
        if self._began is not None:
            if self._cuda:
                torch.cuda.synchronize()
            self.seconds += time.perf_counter() - self._began
            self._began = None
        return self.seconds
