"""Comparable times of optimizer steps, measured in turns over copies of one model with the same gradients."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from bench.common import records, sources
from bench.common.measure import Spread, clock

BENCHMARK = "step_times"
WARM_UP = 5
"""Untimed steps of each newly built optimizer."""
ROUNDS = 60
"""Timed steps of each optimizer."""
LARGE = 10_000_000
"""Number of parameters above which only one copy of the model is in memory at a time."""
PASSES = 3
"""Turns of each optimizer if copies are in memory one at a time."""
Row = dict[str, Any]


class Contender(NamedTuple):
    """An optimizer to time, and how to build it over a fresh copy of the model."""

    optimizer: str
    recipe: str | None
    """The part of the model that is trained; None for all of it."""
    build: Callable[[], tuple[nn.Module, Optimizer]]
    note: str = ""


class Timed(NamedTuple):
    """The step time of one contender in milliseconds, and its numbers of parameters."""

    contender: Contender
    milliseconds: Spread
    parameters: int
    trained_parameters: int


def default_path(preset: str) -> Path:
    """Return the committed record of a preset."""
    return records.RESULTS / f"step_times_{preset}.json"


def fused(optimizer: Optimizer) -> Optimizer:
    """Return the fused form of a `torch.optim.AdamW`, which is in common use; other optimizers unchanged."""
    if type(optimizer) is not AdamW:
        return optimizer
    return AdamW([{**group, "fused": True, "foreach": None} for group in optimizer.param_groups], fused=True)


def measure(
    contenders: Sequence[Contender], device: torch.device, *, rounds: int = ROUNDS, large: int = LARGE
) -> list[Timed]:
    """Time steps in turns, so that all meet the same load.

    Small models are in memory together, and each round is a step of each optimizer. Copies of a large model are
    built, timed and freed one at a time, each several times.

    Args:
        contenders: Optimizers to time.
        device: Device to run on.
        rounds: Number of timed steps of each.
        large: Number of parameters above which a model is large.
    """
    counts = [_counts(contender.build()[0]) for contender in contenders]
    together = max(total for total, _ in counts) <= large
    places = range(len(contenders))
    groups = [list(places)] if together else [[place] for place in places]
    passes = 1 if together else PASSES
    seconds: list[list[float]] = [[] for _ in contenders]
    for _ in range(passes):
        for group in groups:
            ready = {place: _ready(contenders[place], device) for place in group}
            for step in range(WARM_UP + math.ceil(rounds / passes)):
                for place, optimizer in ready.items():
                    taken, _ = clock(optimizer.step, device)
                    if step >= WARM_UP:
                        seconds[place].append(taken)
            del ready, optimizer
            gc.collect()
    spreads = [Spread.of([1e3 * taken for taken in own]) for own in seconds]
    return [Timed(*found, *count) for *found, count in zip(contenders, spreads, counts, strict=True)]


def _counts(model: nn.Module) -> tuple[int, int]:
    """Return the number of parameters, and of those that are trained."""
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)


def _ready(contender: Contender, device: torch.device) -> Optimizer:
    """Build an optimizer whose parameters have gradients, the same for each copy of the model."""
    model, optimizer = contender.build()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            values = 1e-3 * torch.randn(parameter.shape, generator=generator)
            parameter.grad = values.to(device, parameter.dtype)
    return optimizer


def rows_of(found: Sequence[Timed], what: Row, about: Row) -> list[Row]:
    """Return rows in long format.

    Args:
        found: Results of `measure`.
        what: Columns `of`, `preset`, `model` and `precision`.
        about: Facts about the machine and versions.
    """
    about = about | {"sources": sources.digest(about["own_backend"])}
    return [
        {
            **what,
            "optimizer": timed.contender.optimizer,
            "recipe": timed.contender.recipe,
            "metric": "optimizer step",
            "unit": "ms",
            **timed.milliseconds._asdict(),
            "note": timed.contender.note,
            "parameters": timed.parameters,
            "trained_parameters": timed.trained_parameters,
            **about,
        }
        for timed in found
    ]


IDENTITY = ("of", "preset", "model", "precision", "optimizer", "recipe", "device", "threads")


def record(path: Path, rows: Sequence[Row]) -> None:
    """Add rows to a record in place of older ones of the same optimizers, and print them."""
    new = {tuple(row[key] for key in IDENTITY) for row in rows}
    records.append(path, BENCHMARK, rows, keep=lambda row: tuple(row.get(key) for key in IDENTITY) not in new)
    for row in rows:
        name = row["optimizer"] + (f", {row['recipe']}" if row["recipe"] else "")
        times = "{median:.4g} ms ({p20:.4g} to {p80:.4g} over {samples} steps)".format(**row)
        print(f"{name}: {times}" + (f"; {row['note']}" if row["note"] else ""))
    print(f"numbers: {path}")
