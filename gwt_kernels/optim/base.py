"""Base class of this package's optimizers: groups and planned steps. A subclass names the options."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple, Protocol, overload

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from gwt_kernels.backends import choice
from gwt_kernels.backends.step_decision import ClipRequest
from gwt_kernels.core.dtensor import any_sharded
from gwt_kernels.core.hyper import Hyper
from gwt_kernels.core.survey import PYTHON
from gwt_kernels.distributed.sharding import local_parts, made_by_a_getter
from gwt_kernels.optim import telemetry as telemetry_rows
from gwt_kernels.optim.added_groups import divided, warn_of_level_0, warn_of_unused
from gwt_kernels.optim.checks import check_captured_everywhere, check_traceable, is_captured
from gwt_kernels.optim.fingerprint import Sources
from gwt_kernels.optim.grad_scaler import FoundInf
from gwt_kernels.optim.group_checks import Form, GroupChecks, kept_form, kept_forms
from gwt_kernels.optim.numbers import number
from gwt_kernels.optim.options import (
    check_group,
    check_max_grad_norm,
    hyper_of,
    published_limit,
    state_dtype_name,
)
from gwt_kernels.optim.parameter_steps import ParameterSteps
from gwt_kernels.optim.planned_bucket import Member
from gwt_kernels.optim.saved import SavedOptimizer
from gwt_kernels.optim.state import complete
from gwt_kernels.optim.step_plan import StepPlan, count_of_skipped, options_of
from gwt_kernels.rules import ADAMW, check_rule


class _Release(Protocol):
    """Interface that the optimizer uses of ``GradientRelease``, which updates parameters in the backward pass."""

    accumulating: bool

    def watch(self, groups: Iterable[Mapping[str, Any]]) -> None: ...


class _Step(NamedTuple):
    """A checked step before its execution: its plan, and the arguments of :meth:`StepPlan.step`.

    Attributes:
        capturing: Whether a CUDA graph captures it.
        symbolic: Whether tensors may be symbolic (fake tensors, proxies in a graph).
    """

    plan: StepPlan
    grads: list[Tensor | None]
    hypers: list[Hyper]
    asked: ClipRequest
    skipped: Tensor | None
    capturing: bool
    symbolic: bool


def _is_set_to(group: Mapping[str, Any], option: str, name: str) -> bool:
    """Return whether an option has this name for a value; an array would compare element by element."""
    value = group.get(option)
    return isinstance(value, str) and value == name


class PlannedOptimizer(SavedOptimizer):
    """An optimizer whose steps follow a :class:`gwt_kernels.optim.step_plan.StepPlan`.

    A subclass declares the ``rules`` that its groups may have.

    Args:
        params: As for ``torch.optim.AdamW``.
        options: ``locals()`` of the subclass's constructor, whose arguments are options of a step, of groups with
            ``rule="adamw"`` (``adamw_betas``, ``adamw_eps``), or of all groups; and group options that the
            subclass fixes.
    """

    rules: tuple[str, ...]
    """Allowed values of a group's ``rule``."""

    max_grad_norm: float | None
    skip_nonfinite: bool
    capturable: bool
    _observed: bool
    # torch.amp.GradScaler then passes grad_scale and found_inf, and the step itself unscales, or is skipped.
    _step_supports_amp_scaling = True
    found_inf = FoundInf()
    _grad_norm: Tensor | None = None
    _skipped: Tensor | None = None
    _captured: list[Any]
    _rows: dict[Tensor, Tensor]
    _is_sharded = False  # whether any parameter is a DTensor
    _is_built = False  # whether the constructor has added its groups
    _has_warned = False
    _release: _Release | None = None
    _plan: StepPlan | None
    _single: ParameterSteps

    def __init__(self, params: ParamsT, options: dict[str, Any]) -> None:
        defaults = {key: value for key, value in options.items() if key not in ("self", "params", "__class__")}
        defaults["state_dtype"] = state_dtype_name(defaults["state_dtype"])
        check_rule(defaults["rule"], "haar")
        self._limiter_is_published = _is_set_to(defaults, "norm_growth_limit", "published")
        if self._limiter_is_published:
            defaults["norm_growth_limit"] = published_limit(defaults["rule"])
        self._adamw = {key: defaults.pop(f"adamw_{key}") for key in ("betas", "eps") if f"adamw_{key}" in defaults}
        self.max_grad_norm, self.skip_nonfinite = defaults.pop("max_grad_norm"), defaults.pop("skip_nonfinite")
        self.capturable, self._observed = defaults.pop("capturable"), defaults.pop("telemetry")
        self._shapes: list[dict[Tensor, torch.Size]] = []  # of each group's parameters, at the last check
        self._forms: dict[Tensor, Form] = {}  # of the parameters' states, at the last check
        self._check_options()
        if self._adamw:  # first, as an optimizer without eps has that of these groups
            lr = 0.0 if defaults["lr"] is None else defaults["lr"]  # some rules compute it themselves
            adamw = {"lr": lr, **self._adamw, "rule": ADAMW.name, "level": 0, "norm_growth_limit": None}
            try:
                check_group({**defaults, **adamw}, capturable=self.capturable, slack=0.0)
            except (TypeError, ValueError) as error:  # its message has the names of a group's options
                said = str(error)
                raise type(error)(f"adamw_{said}" if said.startswith(tuple(self._adamw)) else said) from None
        self._checks.check_options(defaults, slack=0.0)
        self._rows = {}
        self._captured = []
        self._forget_plans()
        super().__init__(params, defaults)
        self._is_built = True
        warn_of_unused(type(self), defaults, self.param_groups)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group, as in ``torch.optim.Optimizer``; an invalid group is refused and not added.

        If a group has no ``level``, as when a callback unfreezes layers, its matrices get the optimizer's level.
        Its one-dimensional tensors, tensors named as embeddings or heads, and tensors too narrow for the level
        become a second group at level 0, with a warning the first time. If the other groups have names and this
        one has none, its parameters are named by their positions.

        Raises:
            TypeError, ValueError, RuntimeError: as the constructor.
        """
        count = len(self.param_groups)
        if isinstance(param_group, dict) and _is_set_to(param_group, "rule", ADAMW.name):
            param_group.setdefault("level", 0)
        parts, rest = [param_group], None
        if self._is_built and isinstance(param_group, dict):  # the base class refuses anything else
            group, rest = divided(param_group, self.param_groups, self.defaults)
            parts = [part for part in (group, rest) if part is not None]
        try:
            for part in parts:
                self._add_group(part)
            if not self._has_warned:  # within try, as a filter may turn warnings into errors
                self._has_warned = warn_of_level_0(rest, self.defaults["level"])
        except BaseException:
            del self.param_groups[count:]
            self._forget_plans()
            raise
        if self.param_groups[count] is not param_group:  # the base class completes and keeps the caller's dict
            param_group.update(self.param_groups[count])
            self.param_groups[count] = param_group
        if self._release is not None:
            self._release.watch(self.param_groups[count:])

    def _add_group(self, param_group: dict[str, Any]) -> None:
        if isinstance(param_group, dict):  # the base class refuses anything else
            rule = param_group.get("rule", self.defaults["rule"])
            check_rule(rule, "haar")
            if rule == ADAMW.name:
                param_group.update({key: value for key, value in self._adamw.items() if key not in param_group})
            if rule != self.defaults["rule"] and (published_limit(rule) is None or self._limiter_is_published):
                param_group.setdefault("norm_growth_limit", "published")
            if _is_set_to(param_group, "norm_growth_limit", "published"):
                param_group["norm_growth_limit"] = published_limit(rule)
        super().add_param_group(param_group)
        self._checks.check_new(self.param_groups[-1], len(self.param_groups) - 1)
        self._note_shapes()
        self._forget_plans()

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Perform one optimization step; parameters without gradient are left alone.

        Never waits for a CUDA device. Everything is checked before anything is changed. Within
        ``GradientRelease.accumulate`` nothing is updated.

        Args:
            closure: Re-evaluates the model and returns the loss.

        Raises:
            RuntimeError: a gradient is sparse, the requested backend cannot run on a parameter, or a CUDA graph
                captures the step without ``capturable``, or before the same step was taken outside the capture.
            TypeError, ValueError: a group's options were changed to invalid values.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._release is not None and self._release.accumulating:
            return loss
        if torch.compiler.is_compiling():
            self._update_outside_graphs()
        elif (now := self._begin()) is not None:
            self._end(now, now.plan.step(now.grads, now.hypers, now.asked, now.skipped))
        if self._release is not None:  # free sums that no backward pass outside accumulate() has used
            self.zero_grad()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset all gradients, as in ``torch.optim.Optimizer``; within ``GradientRelease.accumulate`` they stay."""
        if self._release is None or not self._release.accumulating:
            super().zero_grad(set_to_none)

    @torch._disable_dynamo  # type: ignore[attr-defined]  # one graph break, not one per tensor; slow in eager mode
    def _update_outside_graphs(self) -> None:
        if (now := self._begin()) is not None:
            self._end(now, now.plan.step(now.grads, now.hypers, now.asked, now.skipped))

    def _begin(self) -> _Step | None:
        """Check and plan a step, and complete the states; return None if the caller only wants new states."""
        if self._release is not None and "found_inf" in self.__dict__:
            raise RuntimeError(
                "a GradScaler's gradients were released before it unscaled them: see release_gradients"
            )
        capturing = is_captured(self.capturable)
        self._check_options()
        symbolic = choice.tracer() is not None and choice.is_symbolic()
        if symbolic:  # a later step must not find symbolic tensors
            self._forget_plans()
        groups, capturable = self.param_groups, self.capturable
        hypers = [hyper_of(group, capturable=capturable) for group in groups]
        params = list(chain.from_iterable(group["params"] for group in groups))
        held, grads = params, (PYTHON if self._plan is None else self._plan.survey).grads(params)
        if not self.state and made_by_a_getter():
            self._check_before_step()
            self._complete_states()  # a checkpointing library calls step() only for these
            return None
        if self._plan is None or not self._plan.is_of(params):
            self._is_sharded = any_sharded(params)
        if self._is_sharded:
            held, grads = local_parts(params, grads)
        asked = self._asked
        options = options_of(groups, capturable, asked.anything)
        sources = Sources(groups, self.state, params, held, grads, options)
        plan = self._plan
        if plan is None or not plan.holds(sources):
            plan = self._renew_plan(sources, capturing)
        if capturing and any(device.type != "cuda" for device in plan.devices):
            raise RuntimeError("a CUDA graph would not replay the update of parameters on the CPU: move them")
        check_captured_everywhere(set(plan.devices), capturing)
        self._grad_norm = skipped = None
        if asked.anything and not plan.is_idle:
            check_traceable(asked)
            skipped = count_of_skipped(None if choice.is_symbolic() else self._skipped, plan.devices)
            if not choice.is_symbolic():
                self._skipped = skipped
        return _Step(plan, grads, hypers, asked, skipped, capturing, symbolic)

    def _end(self, now: _Step, decisions: dict[torch.device, Tensor] | None) -> None:
        """Record the decision about a finished step; keep a captured plan's memory, drop a symbolic plan."""
        if now.skipped is not None and decisions is not None and now.asked.of_gradients:
            self._grad_norm = decisions[now.skipped.device][2]
        if now.capturing:  # replays use this memory even after the plan is replaced
            self._captured.append((now.plan.memory(), now.hypers, now.asked, decisions, self._skipped))
        if now.symbolic:
            self._forget_plans()

    @property
    def gradient_release(self) -> _Release | None:
        """Hooks that update parameters in the backward pass (:func:`gwt_kernels.release_gradients`), or None."""
        return self._release

    @gradient_release.setter
    def gradient_release(self, release: _Release | None) -> None:
        self._release = release
        self._forget_plans()

    @torch._disable_dynamo  # type: ignore[attr-defined]
    @torch.no_grad()
    def step_parameter(self, p: Tensor) -> None:
        """Update one parameter alone, with all checks of a step, for gradients that never exist at the same time.

        A parameter without gradient is left alone.

        Raises:
            RuntimeError: an option or a ``GradScaler`` needs all gradients to decide about a step.
            ValueError: the parameter is not the optimizer's.
            TypeError, ValueError, RuntimeError: as :meth:`step`.
        """
        if self._asked.anything:
            raise RuntimeError(
                "max_grad_norm, skip_nonfinite and GradScaler need all gradients before the first update; these "
                "are released: take the options away, or call remove() on what release_gradients returned"
            )
        _, i, k = self._single.place_of(p, self.param_groups)
        group = self.param_groups[i]
        hypers = [hyper_of(group)]

        def sources_now() -> Sources:
            return self._single.sources_of(p, self.param_groups, self.state, self.capturable)

        def checked_plan() -> StepPlan:
            self._checks.check_options(group)
            self._forms[p] = kept_form(group, k, i, self.state.get(p), self._forms.get(p))
            if p.grad is not None:
                self._checks.check_one(group, k, i, self.state.get(p))
                complete(self.state[p], p, group)
            return StepPlan(sources_now(), on_device=False, decides=False, telemetry_of=self._telemetry_rows)

        sources = sources_now()
        plan = self._single.plan_of(p, sources, checked_plan)
        plan.step(sources.grads, hypers, ClipRequest(), None)
        self._opt_called = True  # schedulers check it, and set it only in calls of step()

    @property
    def grad_norm(self) -> Tensor | None:
        """Global norm of the last step's unscaled gradients before clipping: a float64 scalar on their device.

        None if neither ``max_grad_norm`` nor ``skip_nonfinite`` is set. Reading its value waits for the device.
        """
        return self._grad_norm

    @property
    def skipped_steps(self) -> Tensor:
        """Number of steps skipped so far, by ``skip_nonfinite`` or a ``GradScaler``: float64, on the device."""
        return torch.zeros((), dtype=torch.float64, device="cpu") if self._skipped is None else self._skipped

    def telemetry(self) -> dict[str, dict[str, float]]:
        """Return statistics of each updated tensor; waits for the device, so call it only every n steps.

        Returns:
            By parameter name, or else position such as ``"0.3"`` (the fourth of group 0), the numbers that
            :func:`gwt_kernels.telemetry.read` explains: ``detail_energy``, ``update_rms``, ``limiter`` and
            ``nonfinite``. Empty unless the optimizer was built with ``telemetry=True``.
        """
        return telemetry_rows.read(telemetry_rows.named(self._rows, self.param_groups))

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._is_built = True
        self.__dict__.setdefault("_captured", [])
        self._note_shapes()
        self._forms = {}
        self._forget_plans()

    def _forget_plans(self) -> None:
        self._plan = None
        self._single = ParameterSteps()

    def _check_options(self) -> None:
        check_max_grad_norm(self.max_grad_norm)
        for name in ("skip_nonfinite", "capturable", "_observed"):
            if not isinstance(getattr(self, name), bool):
                name, value = name.replace("_observed", "telemetry"), getattr(self, name)
                raise TypeError(f"{name} must be True or False, got {value!r}")

    @property
    def _asked(self) -> ClipRequest:
        """Options that need all gradients, and the attributes that a ``GradScaler`` sets for one step."""
        attributes = self.__dict__  # getattr would call found_inf's descriptor, whose exception takes time
        max_norm = None if self.max_grad_norm is None else number("max_grad_norm", self.max_grad_norm)
        return ClipRequest(max_norm, self.skip_nonfinite, attributes.get("grad_scale"), attributes.get("found_inf"))

    def _renew_plan(self, sources: Sources, capturing: bool) -> StepPlan:
        """Check everything, and plan steps of the current parameters, gradients and options."""
        if capturing:
            raise RuntimeError(
                "step() is being captured in a CUDA graph with parameters, gradients or options that it "
                "has not stepped before: take a few steps before the capture, on a side stream"
            )
        self._check_before_step()
        self._complete_states()
        decides = self._asked.anything
        self._plan = None  # frees its memory before the new plan allocates
        self._plan = StepPlan(
            sources,
            on_device=self.capturable or decides,
            decides=decides,
            telemetry_of=self._telemetry_rows,
        )
        return self._plan

    def _check_before_step(self) -> None:
        self._check_options()
        self._checks.check_all(self.param_groups, self.state, self._shapes)
        self._forms = kept_forms(self.param_groups, self.state, self._forms)
        self._note_shapes()

    def _note_shapes(self) -> None:
        self._shapes = [{p: p.shape for p in group["params"]} for group in self.param_groups]

    @property
    def _checks(self) -> GroupChecks:
        return GroupChecks(type(self).__name__, self.rules, self.capturable, self._observed)

    def _complete_states(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    complete(self.state[p], p, group)

    def _telemetry_rows(self, members: Sequence[Member]) -> Tensor | None:
        """Return a bucket's telemetry rows in one tensor, with their values so far; None without telemetry."""
        if not self._observed or choice.is_symbolic():
            return None
        for gone in self._rows.keys() - set(chain.from_iterable(group["params"] for group in self.param_groups)):
            del self._rows[gone]  # a parameter that was replaced
        return telemetry_rows.joined(self._rows, [member.param for member in members])
