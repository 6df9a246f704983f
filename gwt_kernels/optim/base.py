"""What optimizers of this package share: groups, steps by a plan, state, pickles; a subclass names the options."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple, Protocol, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

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
from gwt_kernels.optim.loading import check_and_set_aside
from gwt_kernels.optim.numbers import plain
from gwt_kernels.optim.options import (
    ADDED,
    check_group,
    check_max_grad_norm,
    hyper_of,
    published_limit,
    state_dtype_name,
)
from gwt_kernels.optim.parameter_steps import ParameterSteps
from gwt_kernels.optim.planned_bucket import Member
from gwt_kernels.optim.state import complete, upgraded
from gwt_kernels.optim.step_plan import StepPlan, count_of_skipped, options_of
from gwt_kernels.rules import ADAMW, check_rule

_NO_CONTROL = {
    "max_grad_norm": None,
    "skip_nonfinite": False,
    "capturable": False,
    "_observed": False,
    "_skipped": None,
}  # what older pickles lack
_KEPT = ("defaults", "state", "param_groups", "_limiter_is_published", "_adamw", "_rows", *_NO_CONTROL)


class _Release(Protocol):
    """What updates parameters in the backward pass, as the optimizer sees it: ``GradientRelease`` is one."""

    accumulating: bool

    def watch(self, groups: Iterable[Mapping[str, Any]]) -> None: ...


class _Step(NamedTuple):
    """A step that is about to be taken: its plan, what :meth:`StepPlan.step` takes, and what follows it.

    Attributes:
        capturing: Whether a CUDA graph captures it.
        symbolic: Whether tensors stand for others now.
    """

    plan: StepPlan
    grads: list[Tensor | None]
    hypers: list[Hyper]
    asked: ClipRequest
    skipped: Tensor | None
    capturing: bool
    symbolic: bool


class PlannedOptimizer(Optimizer):
    """An optimizer whose steps follow a :class:`gwt_kernels.optim.step_plan.StepPlan`.

    A subclass says which ``rules`` its groups may have.

    Args:
        params: What ``torch.optim.AdamW`` takes.
        options: ``locals()`` of the subclass's constructor, each of whose arguments is an option: of a step, of
            groups at ``rule="adamw"`` (``adamw_betas``, ``adamw_eps``), or else of groups. And options of groups
            that it fixes.
    """

    rules: tuple[str, ...]
    """What a group's ``rule`` may be."""

    max_grad_norm: float | None
    skip_nonfinite: bool
    capturable: bool
    _observed: bool
    # torch.amp.GradScaler then hands over its scale and what it found, and the step unscales and skips by itself.
    _step_supports_amp_scaling = True
    found_inf = FoundInf()
    _grad_norm: Tensor | None = None
    _skipped: Tensor | None = None
    _captured: list[Any]
    _rows: dict[Tensor, Tensor]
    _is_sharded = False  # whether there are DTensors among the parameters
    _is_built = False  # whether groups that are added come after the constructor's
    _has_warned = False
    _release: _Release | None = None
    _plan: StepPlan | None
    _single: ParameterSteps

    def __init__(self, params: ParamsT, options: dict[str, Any]) -> None:
        defaults = {key: value for key, value in options.items() if key not in ("self", "params", "__class__")}
        defaults["state_dtype"] = state_dtype_name(defaults["state_dtype"])
        check_rule(defaults["rule"], "haar")
        self._limiter_is_published = defaults["norm_growth_limit"] == "published"
        if self._limiter_is_published:
            defaults["norm_growth_limit"] = published_limit(defaults["rule"])
        self._adamw = {key: defaults.pop(f"adamw_{key}") for key in ("betas", "eps") if f"adamw_{key}" in defaults}
        self.max_grad_norm, self.skip_nonfinite = defaults.pop("max_grad_norm"), defaults.pop("skip_nonfinite")
        self.capturable, self._observed = defaults.pop("capturable"), defaults.pop("telemetry")
        self._shapes: list[dict[Tensor, torch.Size]] = []  # of each group's parameters, as they were checked last
        self._forms: dict[Tensor, Form] = {}  # of the parameters' states, as they were checked last
        self._check_options()
        self._checks.check_options(defaults, slack=0.0)
        if self._adamw:
            lr = 0.0 if defaults["lr"] is None else defaults["lr"]  # which some rules find themselves
            adamw = {"lr": lr, **self._adamw, "rule": ADAMW.name, "level": 0, "norm_growth_limit": None}
            try:
                check_group({**defaults, **adamw}, capturable=self.capturable, slack=0.0)
            except (TypeError, ValueError) as error:  # which has the names of a group's options
                said = str(error)
                raise type(error)(f"adamw_{said}" if said.startswith(tuple(self._adamw)) else said) from None
        self._rows = {}
        self._captured = []
        self._forget_plans()
        super().__init__(params, defaults)
        self._is_built = True
        warn_of_unused(type(self), defaults, self.param_groups)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, as in ``torch.optim.Optimizer``; a bad one is refused and not added.

        A group that says no ``level`` of its own, as callbacks that unfreeze layers add them to an optimizer, takes
        the optimizer's for its matrices. Its one-dimensional tensors, what its names call embeddings or heads, and
        what is too narrow for the level become a second group of level 0, with a warning, once. Where the other
        groups have names and this one has none, its parameters are named by their places.

        Raises:
            TypeError, ValueError, RuntimeError: as the constructor.
        """
        count = len(self.param_groups)
        if isinstance(param_group, dict) and param_group.get("rule") == ADAMW.name:
            param_group.setdefault("level", 0)
        parts, rest = [param_group], None
        if self._is_built and isinstance(param_group, dict):  # the base class refuses anything else
            group, rest = divided(param_group, self.param_groups, self.defaults)
            parts = [part for part in (group, rest) if part is not None]
        try:
            for part in parts:
                self._add_group(part)
            if not self._has_warned:  # here, as warnings may be errors
                self._has_warned = warn_of_level_0(rest, self.defaults["level"])
        except BaseException:
            del self.param_groups[count:]
            self._forget_plans()
            raise
        if self.param_groups[count] is not param_group:  # which the base class would have completed and kept
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
            if param_group.get("norm_growth_limit") == "published":
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
            RuntimeError: a gradient is sparse, the backend asked for cannot run on a parameter, or a CUDA graph is
                being captured.
            TypeError, ValueError: a group's options were changed to something that cannot be honoured.
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
        if self._release is not None:  # sums that no backward pass outside accumulate() has used
            self.zero_grad()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset all gradients, as in ``torch.optim.Optimizer``; within ``GradientRelease.accumulate`` they stay."""
        if self._release is None or not self._release.accumulating:
            super().zero_grad(set_to_none)

    @torch._disable_dynamo  # type: ignore[attr-defined]  # one graph break, not one a tensor; dear where none is made
    def _update_outside_graphs(self) -> None:
        if (now := self._begin()) is not None:
            self._end(now, now.plan.step(now.grads, now.hypers, now.asked, now.skipped))

    def _begin(self) -> _Step | None:
        """Check and plan a step, and change nothing but states; None where nothing but these was wanted."""
        if self._release is not None and "found_inf" in self.__dict__:
            raise RuntimeError(
                "a GradScaler's gradients were released before it unscaled them: see release_gradients"
            )
        capturing = is_captured(self.capturable)
        self._check_options()
        symbolic = choice.tracer() is not None and choice.is_symbolic()
        if symbolic:  # nothing that stands for numbers here may be found by a later step
            self._forget_plans()
        groups, capturable = self.param_groups, self.capturable
        hypers = [hyper_of(group, capturable=capturable) for group in groups]
        params = list(chain.from_iterable(group["params"] for group in groups))
        held, grads = params, (PYTHON if self._plan is None else self._plan.survey).grads(params)
        if not self.state and made_by_a_getter():
            self._check_before_step()
            self._complete_states()  # and that is all that is wanted
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
        """Note what was decided about a step that was taken."""
        if now.skipped is not None and decisions is not None and now.asked.of_gradients:
            self._grad_norm = decisions[now.skipped.device][2]
        if now.capturing:  # replays go on using this memory, whatever becomes of the plan
            self._captured.append((now.plan.memory(), now.hypers, now.asked, decisions, self._skipped))
        if now.symbolic:
            self._forget_plans()

    @property
    def gradient_release(self) -> _Release | None:
        """What updates parameters in the backward pass (:func:`gwt_kernels.release_gradients`), or None."""
        return self._release

    @gradient_release.setter
    def gradient_release(self, release: _Release | None) -> None:
        self._release = release
        self._forget_plans()

    @torch._disable_dynamo  # type: ignore[attr-defined]
    @torch.no_grad()
    def step_parameter(self, p: Tensor) -> None:
        """Update one parameter alone, with all the checks of a step: for gradients that never exist together.

        A parameter without gradient is left alone.

        Raises:
            RuntimeError: the options or a ``GradScaler`` decide about a step by all gradients.
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
        self._opt_called = True  # schedules, which see calls of step() alone, look here for others

    @property
    def grad_norm(self) -> Tensor | None:
        """Global norm of the last step's gradients, before clipping, unscaled: a float64 scalar on their device.

        None where neither ``max_grad_norm`` nor ``skip_nonfinite`` asks for it. To read it waits for the device.
        """
        return self._grad_norm

    @property
    def skipped_steps(self) -> Tensor:
        """Number of steps skipped so far, by ``skip_nonfinite`` or a ``GradScaler``: float64, on the device."""
        return torch.zeros((), dtype=torch.float64, device="cpu") if self._skipped is None else self._skipped

    def telemetry(self) -> dict[str, dict[str, float]]:
        """What the last steps did to each tensor that took one; waits for the device, so ask every n steps.

        Returns:
            By parameter, its name or else its place such as ``"0.3"`` (the fourth of group 0), numbers that
            :func:`gwt_kernels.telemetry.read` explains: ``detail_energy``, ``update_rms``, ``limiter`` and
            ``nonfinite``. Empty unless the optimizer was built with ``telemetry=True``.
        """
        return telemetry_rows.read(telemetry_rows.named(self._rows, self.param_groups))

    def state_dict(self) -> dict[str, Any]:
        """Return the state, as ``torch.optim.Optimizer`` does, with plain numbers for NumPy's among the options.

        ``torch.load(..., weights_only=True)`` refuses NumPy's.
        """
        found = super().state_dict()
        for group in found.get("param_groups", ()):  # which a user's hook may leave out
            group.update({name: plain(value) for name, value in group.items() if name != "params"})
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state as :meth:`state_dict` returned it: same dtypes, same bits, copied.

        Differs from ``torch.optim.Optimizer`` where that would lose something: moments keep their dtype
        instead of taking the parameter's, tensors are copied instead of shared, and a state whose level,
        rule, wavelet, boundary, dtype, shapes or bias correction do not belong to these parameters is refused
        before anything changes.
        A group's options are taken from the state, but for ``backend``, which belongs to the machine.

        Raises:
            ValueError: the state does not fit; the message names the group or the parameter.
            TypeError: an option in the state has the wrong type.
        """
        # Registered last, so that it sees what the user's own hooks have made of the state.
        handle = self.register_load_state_dict_pre_hook(check_and_set_aside)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
            self.__dict__.pop("_set_aside", None)

    def __getstate__(self) -> dict[str, Any]:
        return {key: getattr(self, key) for key in _KEPT}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._is_built = True
        for name, value in _NO_CONTROL.items():
            self.__dict__.setdefault(name, value)
        self.__dict__.setdefault("_rows", {})
        self.__dict__.setdefault("_adamw", {})
        self.__dict__.setdefault("_captured", [])
        for key, value in self.__dict__.pop("_set_aside", {}).items():
            self.state[key] = value
        for p, held in self.state.items():
            self.state[p] = upgraded(held, p if isinstance(p, Tensor) else None)
        self.defaults.pop("differentiable", None)  # the base class puts it there, and groups would inherit it
        for options in (self.defaults, *self.param_groups):
            options.update(ADDED | options)
        for group in self.param_groups:
            for name, default in self.defaults.items():
                group.setdefault(name, default)
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
        """What is asked of all gradients; a ``GradScaler`` sets attributes for the time of a step."""
        attributes = self.__dict__  # getattr would ask found_inf's descriptor, which raises, and that is dear
        return ClipRequest(
            self.max_grad_norm, self.skip_nonfinite, attributes.get("grad_scale"), attributes.get("found_inf")
        )

    def _renew_plan(self, sources: Sources, capturing: bool) -> StepPlan:
        """Check everything, and plan steps of what is there now."""
        if capturing:
            raise RuntimeError(
                "step() is being captured in a CUDA graph with parameters, gradients or options that it "
                "has not stepped before: take a few steps before the capture, on a side stream"
            )
        self._check_before_step()
        self._complete_states()
        decides = self._asked.anything
        self._plan = None  # and its memory, before another takes some
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
        """One tensor for a bucket's rows, which go on from where they were; None where nothing is observed."""
        if not self._observed or choice.is_symbolic():
            return None
        for gone in self._rows.keys() - set(chain.from_iterable(group["params"] for group in self.param_groups)):
            del self._rows[gone]  # a parameter that another took the place of
        return telemetry_rows.joined(self._rows, [member.param for member in members])
