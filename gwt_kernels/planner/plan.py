"""The costs of a planned model, as data and as text."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gwt_kernels.core.level import Level
from gwt_kernels.formats.moments import FORMATS
from gwt_kernels.optim.options import state_dtype_name
from gwt_kernels.optim.param_groups import Decision, describe
from gwt_kernels.planner.costs import bytes_of, name_of_dtype, names_of
from gwt_kernels.planner.tables import aligned, amount, three_digits, unit_of


class Entry(NamedTuple):
    """One trainable parameter: its level, the reason, and its costs. Tied weights are one parameter."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    level: Level
    """Levels of the wavelet transform; 0 for none: the rule itself, or plain AdamW."""
    decayed: bool
    reason: str
    weight_bytes: int
    state_bytes: int
    """Moments and scalars (``step``, ``limiter_norm``) of the optimizer."""
    moved_bytes: int
    """Bytes that one step must read and write."""


class Cost(NamedTuple):
    """State and traffic per step of an optimizer with one level and one dtype of moments."""

    optimizer: str
    """``"AdamW"``, or the class of an optimizer of this package."""
    level: Level | None
    """None for ``torch.optim.AdamW``."""
    moments: str
    """dtype of the moments."""
    state_bytes: int
    moved_bytes: int
    """Per step: gradients read, weights and moments read and written, plus ``limiter_bytes``."""
    limiter_bytes: int
    """Bytes of the limiter's second read of gradients and moments, or of the two further reads of gradients that
    `GWTAdafactor` takes, included in ``moved_bytes``."""
    offered: bool
    """Whether the optimizer supports moments of this dtype; if not, the costs are hypothetical."""


@dataclass(frozen=True)
class Plan:
    """Result of `plan`. Sizes are in bytes; ``str()`` is the text that ``gwt-kernels plan`` prints."""

    model: str
    """Class of the model."""
    source: str
    """Preset or path of the model's configuration; ``"a live module"`` otherwise."""
    entries: tuple[Entry, ...]
    """The trainable parameters, in the model's order."""
    frozen: Mapping[str, Tensor] = field(repr=False, compare=False)
    """Weights without ``requires_grad``, as meta tensors: they have neither gradient nor state."""
    states: Mapping[str, tuple[Tensor, Mapping[str, Tensor]]] = field(repr=False, compare=False)
    """Each trainable parameter and its state with the requested options, as meta tensors."""
    groups: Mapping[str, Mapping[str, Any]] = field(repr=False, compare=False)
    """Each trainable parameter's group of options."""
    tensor_parallel: Mapping[str, str]
    """The model's tensor-parallel plan: style by module name, with ``*`` for a number; empty if it has none."""
    chosen: Cost
    """Costs of the optimizer with the requested options."""
    adamw: tuple[Cost, ...]
    """Costs of ``torch.optim.AdamW`` with moments in the weights' dtype, and in float32."""
    options: tuple[Cost, ...]
    """Costs by level and dtype of moments, without levels for which an included tensor is too narrow."""
    too_narrow: tuple[str, ...]
    """Tensors of the recipe that stay at level 0 because their rows are too short."""
    float32_moments: tuple[str, ...]
    """Tensors whose moments stay float32, as their format does not fit them: too small, or a level too deep."""
    bandwidth: float | None
    """Bytes per second."""

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights, including frozen ones."""
        return self.gradient_bytes + self.frozen_bytes

    @property
    def gradient_bytes(self) -> int:
        """Bytes of the gradients, in the weights' dtypes."""
        return sum(entry.weight_bytes for entry in self.entries)

    @property
    def frozen_bytes(self) -> int:
        """Bytes of the frozen weights."""
        return bytes_of(*self.frozen.values())

    @property
    def state_bytes(self) -> int:
        """Bytes of optimizer state with the requested options."""
        return self.chosen.state_bytes

    def seconds(self, cost: Cost) -> float | None:
        """Return the time to move a step's bytes at the plan's bandwidth; None without a bandwidth."""
        return None if self.bandwidth is None else cost.moved_bytes / self.bandwidth

    def as_dict(self) -> dict[str, Any]:
        """Return all data as plain numbers, strings, lists and dicts, for JSON."""

        def cost(c: Cost) -> dict[str, Any]:
            return {**c._asdict(), "seconds": self.seconds(c)}

        return {
            "model": self.model,
            "source": self.source,
            "weight_bytes": self.weight_bytes,
            "gradient_bytes": self.gradient_bytes,
            "frozen_bytes": self.frozen_bytes,
            "state_bytes": self.state_bytes,
            "bandwidth": self.bandwidth,
            "chosen": cost(self.chosen),
            "adamw": [cost(c) for c in self.adamw],
            "options": [cost(c) for c in self.options],
            "too_narrow": list(self.too_narrow),
            "float32_moments": list(self.float32_moments),
            "parameters": [
                {**entry._asdict(), "shape": list(entry.shape), "dtype": name_of_dtype(entry.dtype)}
                for entry in self.entries
            ],
        }

    def text(self, *, verbose: bool = False) -> str:
        """Return the plan's tables as aligned text.

        Args:
            verbose: A row for every parameter, with its bytes, instead of one for all layers.
        """
        table = describe(Decision(e.name, e.shape, e.level, e.decayed, e.reason) for e in self.entries)
        if verbose:
            table = "\n".join((_parameter_table(self), *table.splitlines()[-2:]))
        blocks = [
            _header(self),
            f"What each parameter gets at level {self.chosen.level}\n{table}",
            _memory(self),
            _steps(self),
            *_notes(self),
        ]
        return "\n\n".join(blocks)

    def __str__(self) -> str:
        return self.text()


def _parameter_table(plan: Plan) -> str:
    """Return a row for every parameter, with the bytes of its state and of its part of a step."""
    rows = [("parameter", "shape", "dtype", "level", "decay", "state, B", "moved per step, B", "reason")]
    rows += [
        (
            entry.name,
            str(entry.shape),
            name_of_dtype(entry.dtype),
            str(entry.level),
            "yes" if entry.decayed else "no",
            f"{entry.state_bytes:,}",
            f"{entry.moved_bytes:,}",
            entry.reason,
        )
        for entry in plan.entries
    ]
    return aligned(rows, right=(5, 6))


def _header(plan: Plan) -> str:
    dtypes = names_of({entry.dtype for entry in plan.entries})
    frozen = f"; {amount(plan.frozen_bytes)} of frozen weights" if plan.frozen_bytes else ""
    return (
        f"{plan.model} from {plan.source}: {_elements(plan):,} trainable parameters, "
        f"{amount(plan.gradient_bytes)} in {dtypes}, and as much for their gradients{frozen}"
    )


def _memory(plan: Plan) -> str:
    unit, size = unit_of(plan.weight_bytes)
    rows = [("", "optimizer", "moments", "states", "weights + states", "of AdamW's states")]
    rows += [
        (
            ">" if cost == plan.chosen else "",
            label(cost),
            moments_of(cost),
            f"{cost.state_bytes / size:.2f}",
            f"{(plan.weight_bytes + cost.state_bytes) / size:.2f}",
            f"{100 * cost.state_bytes / plan.adamw[0].state_bytes:.1f} %",
        )
        for cost in (*plan.adamw, *plan.options)
    ]
    return f"Memory, {unit} (> marks the options asked for)\n{aligned(rows, right=(3, 4, 5))}"


def _steps(plan: Plan) -> str:
    unit, size = unit_of(plan.weight_bytes)
    elements = max(_elements(plan), 1)
    rows: list[tuple[str, ...]] = [
        ("", "optimizer", "moments", f"moved, {unit}", "for the limiter", "bytes/parameter", "time, ms")
    ]
    for cost in (*plan.adamw, *plan.options):
        seconds = plan.seconds(cost)
        rows.append(
            (
                ">" if cost == plan.chosen else "",
                label(cost),
                moments_of(cost),
                f"{cost.moved_bytes / size:.2f}",
                f"{cost.limiter_bytes / size:.2f}",
                f"{cost.moved_bytes / elements:.2f}",
                "" if seconds is None else three_digits(1e3 * seconds),
            )
        )
    if plan.bandwidth is None:
        rows = [row[:-1] for row in rows]
        title = "A step (give --bandwidth or --measure for its time)"
    else:
        rate = f"{plan.bandwidth / 1e9:,.1f} GB/s"
        title = f"A step, and the time in which {rate} moves its bytes (no launches, no arithmetic, no cache)"
    return f"{title}\n{aligned(rows, right=(3, 4, 5, 6))}"


def _notes(plan: Plan) -> list[str]:
    notes = []
    for dtype in sorted({cost.moments for cost in (plan.chosen, *plan.options) if not cost.offered}):
        try:
            state_dtype_name(dtype)
        except ValueError as error:
            notes.append(f"* This optimizer takes no {dtype} moments; their rows are computed only: {error}.")
        else:
            notes.append(
                f"* With these options this optimizer takes no {dtype} moments; their rows are computed only."
            )
    if not all(cost.offered for cost in plan.adamw):
        notes.append(
            "* torch.optim.AdamW keeps its moments in the weights' dtype: float32 ones take float32 weights, or a "
            "wrapper that keeps a float32 copy of the weights, which is not counted here."
        )
    if plan.too_narrow:
        names = dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in plan.too_narrow)
        notes.append(
            f"Too narrow for level {plan.chosen.level}, so at level 0: {', '.join(names)} "
            f"({len(plan.too_narrow)} tensors)."
        )
    if plan.float32_moments:
        names = dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in plan.float32_moments)
        stored = FORMATS[plan.chosen.moments]
        notes.append(
            f"Moments stay float32, for {stored.name} pays from {stored.smallest} coefficients and up to level "
            f"{stored.deepest}: {', '.join(names)} ({len(plan.float32_moments)} tensors)."
        )
    if plan.chosen.level and not any(entry.level for entry in plan.entries):
        notes.append("Nothing is transformed, so every level is AdamW: name the matrices with --include.")
    return notes


def _elements(plan: Plan) -> int:
    return sum(math.prod(entry.shape) for entry in plan.entries)


def label(cost: Cost) -> str:
    """Return the optimizer and its level for a table."""
    if cost.level is None:
        return cost.optimizer
    return f"{'GWT' if cost.optimizer == 'GWTAdamW' else cost.optimizer} level {cost.level}"


def moments_of(cost: Cost) -> str:
    """Return the dtype of the moments, with a star if the optimizer does not support it."""
    return cost.moments if cost.offered else f"{cost.moments} *"
