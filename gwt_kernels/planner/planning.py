"""Plan an optimizer's state and traffic from shapes and options alone."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gwt_kernels.core.hyper import Rule
from gwt_kernels.core.level import Level, depth_of
from gwt_kernels.formats.moments import FORMATS, MOMENTS, format_of
from gwt_kernels.models.files import build_on_meta
from gwt_kernels.optim.base import PlannedOptimizer
from gwt_kernels.optim.by_rule import optimizer_of
from gwt_kernels.optim.checks import check_initialized, name_of
from gwt_kernels.optim.options import state_dtype_of
from gwt_kernels.optim.param_groups import Decision, decide
from gwt_kernels.planner.costs import (
    adamw_state,
    bytes_of,
    first_state,
    is_offered,
    limiter_bytes,
    name_of_dtype,
    names_of,
    pass_bytes,
    stand_in,
)
from gwt_kernels.planner.plan import Cost, Entry, Plan

LEVELS = (0, 1, 2, 3, 4)
_NOT_PLANNED = {
    *("params", "level", "rule", "state_dtype"),
    *("max_grad_norm", "skip_nonfinite", "capturable", "telemetry", "backend"),
}
"""Arguments of optimizers that are not among the options: `plan` sets them, or no state depends on them."""
MOMENT_DTYPES = tuple(each.dtypes[0] for each in FORMATS.values() if each.dtypes[0] != torch.float64)


def plan(
    model: nn.Module | str | Path,
    *,
    level: Level = 2,
    state_dtype: torch.dtype | None = None,
    rule: Rule = "gwt",
    include: Sequence[str | re.Pattern[str]] | None = None,
    exclude: Sequence[str | re.Pattern[str]] | None = None,
    dtype: torch.dtype | None = None,
    bandwidth: float | None = None,
    **options: Any,
) -> Plan:
    """Compute state and traffic of an optimizer over the groups of `gwt_param_groups`, without allocating any.

    The optimizer itself makes its states on the meta device, so they equal those after a first step byte for byte
    (on one process; `gwt_kernels.plan_sharded` divides them). Traffic is that of the fused pass: gradients are
    read, weights and moments read and written, all once. The limiter reads gradients and moments once more
    (docs/algorithm.md, "One pass"). Buffers and activations are not counted.

    Args:
        model: A preset's name (``"llama_1b"``), the path of a Hugging Face ``config.json`` or of its folder, or a
            module on any device.
        level: As for `gwt_param_groups`.
        include: As for `gwt_param_groups`.
        exclude: As for `gwt_param_groups`.
        state_dtype: dtype of the moments; None for the optimizer's default. An unsupported dtype is computed too,
            and marked as not offered.
        rule: As for `GWTAdamW`; ``"muon"`` for `GWTMuon`, ``"lion"`` for `GWTLion`, and so on.
        dtype: dtype of weights and gradients; None for the module's or configuration's, or bfloat16 if the
            configuration has none.
        bandwidth: Memory bandwidth in bytes per second, such as :func:`gwt_kernels.plan.measure_bandwidth` returns.
        **options: Further options of the optimizer, such as ``norm_growth_limit``, ``weight_rounding``,
            ``head_rows`` and ``workspace_bytes``; its defaults for others. Clipping is an argument of
            :func:`gwt_kernels.plan_sharded.plan_sharded`.

    Raises:
        FileNotFoundError, ModuleNotFoundError: as :func:`gwt_kernels.models.files.build_on_meta`.
        TypeError: the model, a parameter or an option has a wrong type, or the optimizer has no such option.
        ValueError: the file is not a model configuration, or an option is out of range.
        RuntimeError: a parameter of a lazy module has no shape before the first forward pass.
    """
    for option, value in (("dtype", dtype), ("state_dtype", state_dtype)):
        stored = option == "state_dtype" and value in MOMENT_DTYPES
        fits = isinstance(value, torch.dtype) and (value.is_floating_point or stored)
        if value is not None and not fits:
            raise TypeError(f"{option} must be a floating-point torch.dtype or None, got {value!r}")
    if bandwidth is not None and not (math.isfinite(bandwidth) and bandwidth > 0):
        raise ValueError(f"bandwidth must be a finite number of bytes per second above 0, got {bandwidth}")
    if not isinstance(model, nn.Module | str | Path):
        raise TypeError(f"model must be a torch.nn.Module, a preset's name or a path, got {type(model).__name__}")
    source = "a live module" if isinstance(model, nn.Module) else str(model)
    module = model if isinstance(model, nn.Module) else build_on_meta(model, dtype)
    check_initialized((f"parameter {name!r}", p) for name, p in module.named_parameters())

    if not isinstance(rule, str):
        raise TypeError(f"rule must be a string, such as 'gwt', got {rule!r}")
    optimizer = optimizer_of(rule)
    taken = [name for name in inspect.signature(optimizer).parameters if name not in _NOT_PLANNED]
    if "norm_growth_limit" not in taken and options.get("norm_growth_limit") in (None, "published"):
        options.pop("norm_growth_limit", None)  # there is no limiter
    for option in options:
        if option not in taken:
            raise TypeError(
                f"plan takes no option {option!r} of {optimizer.__name__}'s: it takes {', '.join(taken)}"
            )

    def options_at(level: Level) -> _Setting:
        decided = decide(module, level=level, include=include, exclude=exclude)
        stand_ins = [(stand_in(p, dtype), decision) for p, decision in decided]
        return _Setting(stand_ins, level, rule, options)

    requested = options_at(level)
    if state_dtype is not None and is_offered(state_dtype):
        requested.made(state_dtype)
    settings: dict[Level, _Setting] = {level: requested}
    for other in LEVELS:
        if other not in settings:
            # The requested level has accepted the options, so the only possible error is a row that is too short.
            with suppress(ValueError):
                settings[other] = options_at(other)
    chosen = requested.cost(state_dtype)
    requested_format = None if state_dtype is None else format_of(state_dtype)
    dtypes = {name_of_dtype(each): each for each in MOMENT_DTYPES} | {chosen.moments: state_dtype}
    weights = names_of({p.dtype for p, _ in requested.members})
    deep = {d.name for _, d in requested.members if d.level}
    return Plan(
        model=type(module).__name__,
        source=source,
        entries=tuple(requested.entries(state_dtype)),
        frozen={name: stand_in(p, dtype) for name, p in module.named_parameters() if not p.requires_grad},
        states={d.name: (p, state) for p, d, state in requested.states(state_dtype)},
        groups={d.name: requested.group_of[p] for p, d in requested.members},
        tensor_parallel=dict(getattr(module, "_tp_plan", None) or {}),
        chosen=chosen,
        adamw=tuple(requested.adamw(each) for each in ((None,) if weights == "float32" else (None, torch.float32))),
        options=tuple(settings[each].cost(d) for each in sorted(settings, key=depth_of) for d in dtypes.values()),
        too_narrow=tuple(d.name for _, d in settings[1].members if d.level and d.name not in deep)
        if level and 1 in settings
        else (),
        float32_moments=tuple(
            d.name
            for _, d, state in requested.states(state_dtype)
            if MOMENTS[0] in state and state[MOMENTS[0]].dtype == torch.float32
        )
        if requested_format is not None and requested_format.smallest
        else (),
        bandwidth=bandwidth,
    )


def predicted_state_bytes(optimizer: Optimizer) -> int:
    """Return the bytes of an optimizer's state after its first step, from shapes and options alone.

    Args:
        optimizer: `GWTAdamW` or another of this package, ``torch.optim.AdamW`` or ``Adam``, over tensors on any
            device.

    Raises:
        TypeError: it is another optimizer, whose state is unknown.
        RuntimeError: a parameter of a lazy module has no shape before the first forward pass.
    """
    if not isinstance(optimizer, PlannedOptimizer | torch.optim.AdamW | torch.optim.Adam):
        raise TypeError(
            f"optimizer must be one of this package, torch.optim.AdamW or Adam, got {type(optimizer).__name__}, "
            f"whose state is unknown: add up the bytes of its state_dict() after a step"
        )
    for i, group in enumerate(optimizer.param_groups):
        check_initialized((name_of(group, k, i), p) for k, p in enumerate(group["params"]))
    return sum(
        bytes_of(*first_state(p, group).values())
        for group in optimizer.param_groups
        for p in group["params"]
        if p.requires_grad
    )


class _Setting:
    """An optimizer over a model's tensors at one level, on the meta device."""

    def __init__(
        self, members: list[tuple[Tensor, Decision]], level: Level, rule: Rule, options: Mapping[str, Any]
    ) -> None:
        self.members = members
        self.level = level
        kinds = {(d.level, d.is_transformed) for _, d in members}
        self._groups = [
            {"params": [(d.name, p) for p, d in members if (d.level, d.is_transformed) == kind], "level": kind[0]}
            | ({} if kind[1] else {"rule": "adamw"})
            for kind in sorted(kinds, key=lambda kind: (depth_of(kind[0]), kind[1]))
        ]
        self._make, self._options = optimizer_of(rule), {**options, "level": level}
        if "rule" in inspect.signature(self._make).parameters:
            self._options["rule"] = rule
        self.optimizer = self.made(None)
        self.group_of = {p: group for group in self.optimizer.param_groups for p in group["params"]}

    def made(self, state_dtype: torch.dtype | None) -> PlannedOptimizer:
        """Make the real optimizer, which checks the options and completes its groups with its defaults."""
        groups = [dict(group) for group in self._groups]
        return self._make(groups, state_dtype=state_dtype, **self._options)  # type: ignore[call-arg]  # a subclass's

    def _is_offered(self, state_dtype: torch.dtype | None) -> bool:
        """Return whether the optimizer takes moments of this dtype together with its options."""
        if state_dtype is None or not is_offered(state_dtype):
            return state_dtype is None
        try:
            self.made(state_dtype)
        except ValueError:
            return False
        return True

    def states(self, state_dtype: torch.dtype | None) -> Iterator[tuple[Tensor, Decision, dict[str, Tensor]]]:
        for p, decision in self.members:
            yield p, decision, first_state(p, self.group_of[p], state_dtype)

    def entries(self, state_dtype: torch.dtype | None) -> Iterator[Entry]:
        for p, d, state in self.states(state_dtype):
            yield Entry(
                d.name, d.shape, p.dtype, d.level, d.decayed, d.reason,
                bytes_of(p), bytes_of(*state.values()),
                pass_bytes(p, state, self.group_of[p]) + limiter_bytes(p, state),
            )  # fmt: skip

    def cost(self, state_dtype: torch.dtype | None) -> Cost:
        states = list(self.states(state_dtype))
        limiter = sum(limiter_bytes(p, state) for p, _, state in states)
        return Cost(
            optimizer=type(self.optimizer).__name__,
            level=self.level,
            moments=names_of(
                {state_dtype_of(p, None) if state_dtype is None else state_dtype for p, _, _ in states}
            ),
            state_bytes=sum(bytes_of(*state.values()) for _, _, state in states),
            moved_bytes=sum(pass_bytes(p, state, self.group_of[p]) for p, _, state in states) + limiter,
            limiter_bytes=limiter,
            offered=self._is_offered(state_dtype),
        )

    def adamw(self, moments: torch.dtype | None) -> Cost:
        states = [(p, adamw_state(p, moments or p.dtype)) for p, _ in self.members]
        return Cost(
            optimizer="AdamW",
            level=None,
            moments=names_of({moments or p.dtype for p, _ in states}),
            state_bytes=sum(bytes_of(*state.values()) for _, state in states),
            moved_bytes=sum(pass_bytes(p, state) for p, state in states),
            limiter_bytes=0,
            offered=moments is None,
        )
