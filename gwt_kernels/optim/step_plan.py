"""The plan of a step: buckets with their runners, reductions over processes, and a fingerprint of its sources."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from operator import itemgetter
from typing import Any, TypeVar

import torch
from torch import Tensor

from gwt_kernels.backends import choice
from gwt_kernels.backends.bucket import StepInputs
from gwt_kernels.backends.runner import Reduction
from gwt_kernels.backends.step_decision import ClipRequest, control_
from gwt_kernels.core.dtensor import any_sharded, is_sharded, local_of
from gwt_kernels.core.hyper import Hyper
from gwt_kernels.core.send import send
from gwt_kernels.core.survey import PYTHON
from gwt_kernels.distributed.factors import FactorPlaces, FactorReduction
from gwt_kernels.distributed.heads import heads_here
from gwt_kernels.distributed.reduction import GradNormReduction, LimiterReduction, RowReduction
from gwt_kernels.distributed.sharding import reduced_over
from gwt_kernels.formats.moments import MOMENTS
from gwt_kernels.optim.fingerprint import Fingerprint, Sources
from gwt_kernels.optim.matrices import has_matrices, is_exchanged, stage_key
from gwt_kernels.optim.options import STRUCTURAL
from gwt_kernels.optim.planned_bucket import Member, PlannedBucket, attendance, stream_id_of, with_gradients
from gwt_kernels.optim.state import (
    factors_of,
    head_rows_of,
    is_limited,
    moments_of,
    needs_row_sums,
    shared_dims,
    state_shape,
)
from gwt_kernels.rules import rule_of

_Reduction = TypeVar("_Reduction")


class StepPlan:
    """Plan of the updates of all parameters with gradients, valid while only values and gradients change.

    Args:
        sources: Groups, states and tensors that it is made from.
        on_device: Whether the device counts steps.
        decides: Whether clipping or skipping is decided before each step.
        telemetry_of: Returns the telemetry rows of a bucket's members, or None.
    """

    def __init__(
        self,
        sources: Sources,
        *,
        on_device: bool,
        decides: bool,
        telemetry_of: Callable[[Sequence[Member]], Tensor | None],
    ) -> None:
        groups, states = sources.groups, sources.states
        self._limits = _by_device(groups, LimiterReduction, _is_limited_by_rows)
        self._rows = [_by_device(groups, RowReduction, of) for of in (_row_numbers, _head_numbers)]
        self._factors = _by_device(groups, FactorReduction, _factored_shape)
        self._totals = GradNormReduction(sources.params) if decides and any_sharded(sources.params) else None
        self._workspace: dict[Any, dict[str, Any]] = {}
        planned = list(_members(sources))
        chosen = [own for own in planned if with_gradients(own[1])]
        self.buckets = [
            PlannedBucket(
                members,
                states,
                groups,
                on_device,
                telemetry_of(with_gradients(members)),
                self._limits[members[0].param.device] if reduced and is_limited(groups[members[0].group]) else None,
                self._totals,
                [each[members[0].param.device] for each in self._rows[:shared]],
            )
            for (reduced, shared), members in chosen
        ]
        # Buckets whose steps have stages that end with sums over processes, by device.
        self._staged: dict[torch.device, dict[int, FactorPlaces]] = {device: {} for device in self._factors}
        for i, ((reduced, _), members) in enumerate(chosen):
            if reduced and self.buckets[i].limits is None:
                device = self.buckets[i].device
                places = self._factors[device].places_of([member.param for member in members])
                self._staged[device][i] = places
        # Sums travel between processes while the buckets that need none are updated.
        staged = set(chain.from_iterable(self._staged.values()))
        self._waiting: list[_Turn] = []
        self._ready: list[_Turn] = []
        indices = iter(range(len(self.buckets)))
        turns: list[_Turn] = [
            next(indices) if with_gradients(members) else attendance(members, groups) for _, members in planned
        ]
        in_order = sorted(zip(planned, turns, strict=True), key=lambda each: _precedence(each[0][1]))
        for ((_, shared), _), turn in in_order:
            waits = shared or (isinstance(turn, int) and self.buckets[turn].limits is not None)
            if turn not in staged:
                (self._waiting if waits else self._ready).append(turn)
        self._home = sources.params[0].device if sources.params else torch.device("cpu")
        surveys = [bucket.runner.survey for bucket in self.buckets]
        self.survey = next((survey for survey in surveys if survey is not PYTHON), PYTHON)
        # Matrices without a gradient here, which other processes exchange unless they are frozen.
        self._missing = [
            p
            for group in groups
            if has_matrices(group)
            for p in group["params"]
            if p.grad is None and is_sharded(p)
        ]
        self._are_trained = [p.requires_grad for p in self._missing]
        self._snapshot = None
        if not choice.is_symbolic():  # a later step must not find symbolic tensors
            self._snapshot = Fingerprint(sources, self.survey)

    def is_of(self, params: list[Tensor]) -> bool:
        """Return whether these are the same parameter objects as the plan's, in the same order."""
        return self._snapshot is not None and self._snapshot.is_of(params)

    def holds(self, sources: Sources) -> bool:
        """Return whether the plan is still valid: nothing changed, except for new gradients of the same kind."""
        are_trained = [p.requires_grad for p in self._missing]
        return self._snapshot is not None and are_trained == self._are_trained and self._snapshot.holds(sources)

    @property
    def devices(self) -> list[torch.device]:
        """Devices of the buckets; the first parameter's if only other processes have gradients."""
        return [bucket.device for bucket in self.buckets] or [self._home]

    @property
    def is_idle(self) -> bool:
        """Whether a step has nothing to do, and no other process waits for this one's gradients."""
        return not self.buckets and self._totals is None

    def step(
        self, grads: Sequence[Tensor | None], hypers: Sequence[Hyper], asked: ClipRequest, skipped: Tensor | None
    ) -> dict[torch.device, Tensor] | None:
        """Take one step.

        Nothing but ``skipped`` changes before the decision.

        Args:
            grads: Gradients of all parameters, or this process's shards of them.
            hypers: Options of all groups.
            asked: Clipping and skipping, which all gradients decide together.
            skipped: Number of skipped steps, from :func:`count_of_skipped`, which a skipped step increments; None
                if nothing is asked.

        Returns:
            The decision on each device; None if nothing is asked.
        """
        buckets = self.buckets
        inputs = [bucket.inputs(bucket.gradients(grads), hypers) for bucket in buckets]
        reductions: list[Reduction | None] = [None] * len(buckets)
        row_parts = self._start_rows(0, inputs)
        decisions: dict[torch.device, Tensor] | None = None
        if skipped is not None:
            if asked.can_wait:
                reductions = [
                    bucket.reduce(brought, None, grad_stats=True) if bucket.collects_grad_stats else None
                    for bucket, brought in zip(buckets, inputs, strict=True)
                ]
            decisions = self._decide(inputs, reductions, asked, skipped)
        own_decisions = [None if decisions is None else decisions[bucket.device] for bucket in buckets]
        # Meanwhile sums over rows travel between processes; the sums for limits depend on them.
        ready = self._ready if self._rows[0] else []
        self._take(ready, inputs, own_decisions)
        for i, parts in row_parts.items():
            inputs[i] = buckets[i].with_row_sums(0, inputs[i], parts)
        head_parts = self._start_rows(1, inputs)
        for limits in self._limits.values():
            sums = []
            for i, bucket in enumerate(buckets):
                if bucket.limits is limits:
                    reduction = reductions[i] or bucket.reduce(inputs[i], own_decisions[i], grad_stats=False)
                    sums.append(bucket.update_sums(reduction))
            limits.start(sums)
        for i, parts in head_parts.items():
            inputs[i] = buckets[i].with_row_sums(1, inputs[i], parts)
        self._take(self._waiting if ready else [*self._ready, *self._waiting], inputs, own_decisions)
        for device, staged in self._staged.items():
            self._factors[device].drive(
                [(places, buckets[i].stages(inputs[i], own_decisions[i])) for i, places in staged.items()]
            )
        return decisions

    def _take(
        self, turns: Sequence[_Turn], inputs: Sequence[StepInputs], decisions: Sequence[Tensor | None]
    ) -> None:
        """Update buckets, and take part in exchanges without gradients here, in the order of all processes."""
        for turn in turns:
            if isinstance(turn, int):
                self.buckets[turn].apply(inputs[turn], decisions[turn])
            else:
                turn()

    def _start_rows(self, stage: int, inputs: Sequence[StepInputs]) -> dict[int, Tensor]:
        """Start to sum shared rows (stage 0) or heads (stage 1) over processes; return local parts by bucket."""
        found: dict[int, Tensor] = {}
        for rows in self._rows[stage].values():
            sums = []
            for i, bucket in enumerate(self.buckets):
                if rows in bucket.rows:
                    sums.append(bucket.row_parts(stage, inputs[i]))
                    found[i] = sums[-1][1]
            rows.start(sums)
        return found

    def memory(self) -> list[object]:
        """Return the objects whose memory replays of a captured step use, even after the plan is replaced."""
        launched = [bucket.runner.memory() for bucket in self.buckets]
        limited = [limits.memory() for limits in self._limits.values()]
        return [self, *launched, *limited, *(dict(workspace) for workspace in self._workspace.values())]

    def _decide(
        self,
        inputs: Sequence[StepInputs],
        reductions: Sequence[Reduction | None],
        asked: ClipRequest,
        skipped: Tensor,
    ) -> dict[torch.device, Tensor]:
        """Return the decision about a step on each device: see :func:`gwt_kernels.control.control_`."""
        totals, reduce = self._totals, None
        grads: list[Sequence[Tensor]] = [each_grads.grads for each_grads in inputs]
        if totals is not None:
            reduce = totals.add_up
            grads = [bucket.counted(each_grads) for bucket, each_grads in zip(self.buckets, grads, strict=True)]
            if asked.found_inf is not None:
                found_inf = asked.found_inf.clone()
                totals.add_up(found_inf)
                asked = asked._replace(found_inf=found_inf)
        grad_stats = list(chain.from_iterable(each.grad_stats for each in reductions if each is not None))
        chosen: list[tuple[Sequence[Tensor], choice.Backend | None]] = [
            (each_grads, bucket.backend)
            for each_grads, bucket, each in zip(grads, self.buckets, reductions, strict=True)
            if each is None or not each.grad_stats  # empty tensors have none
        ]
        if not (chosen or grad_stats):
            chosen = [([torch.empty(0, dtype=torch.float32, device=skipped.device)], None)]
        return control_(
            chosen, asked, skipped=skipped, workspace=self._workspace, reduce=reduce, grad_stats=grad_stats
        )


def count_of_skipped(skipped: Tensor | None, devices: Sequence[torch.device]) -> Tensor:
    """Return the count of skipped steps, 0 at first, on the device that decides: a CUDA device if there is one."""
    home = next((device for device in devices if device.type == "cuda"), devices[0])
    if skipped is None:
        return torch.zeros((), dtype=torch.float64, device=home)
    return send(skipped, home) if skipped.device.type == "cpu" else skipped


_Turn = int | Callable[[], None]
"""A bucket's index, or the function that :func:`gwt_kernels.optim.planned_bucket.attendance` returns."""

_shared_options = itemgetter(*STRUCTURAL, "backend", "weight_rounding")


def options_of(groups: Sequence[Mapping[str, Any]], capturable: bool, decides: bool) -> list[Any]:
    """Return what the checks before a step depend on besides tensors and gradients: ``Sources.options``."""
    return [
        *((*bucket_options(g), g["seed"], len(g["params"])) for g in groups),
        capturable,
        decides,
        choice.tracer(),
        *(getattr(g["lr"], "device", None) for g in groups),
    ]


def bucket_options(group: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return the options of a group that all tensors of one launch must have in common."""
    keeps_none = group.get("beta1", 0.0) is None
    return *_shared_options(group), group.get("head_rows"), is_limited(group), stage_key(group), keeps_none


def _members(sources: Sources) -> Iterator[tuple[tuple[bool, int], list[Member]]]:
    """Yield buckets of the parameters with a gradient here, and of matrices that may have one elsewhere.

    Each parameter is in one bucket. The first pair says whether norms or factors are reduced over processes, and
    whether sums over rows are (1), and over heads too (2).
    """
    chosen: dict[Any, list[Member]] = {}
    place = -1
    seen = set()
    for i, group in enumerate(sources.groups):
        options = bucket_options(group)
        for k, p in enumerate(group["params"]):
            place += 1
            if id(p) in seen:  # listed twice in one group: torch warns; it is updated once
                continue
            if p.grad is None and not is_exchanged(p, group):
                continue
            seen.add(id(p))
            reduced = (is_limited(group) or bool(factors_of(p, group))) and bool(reduced_over(p))
            first = moments_of(p, group).get(MOMENTS[0])  # None if the rule keeps none
            # A gradient that only another process has is of the parameter's grad_dtype, if that is set.
            grad_dtype = (p.grad_dtype or p.dtype) if p.grad is None else p.grad.dtype
            dtypes = (p.dtype, grad_dtype, None if first is None else first[1])
            shared = needs_row_sums(p, group) + bool(shared_dims(p, group))
            key = ((reduced, shared), options, p.device, dtypes, is_sharded(p))
            chosen.setdefault(key, []).append(
                Member(p, place, i, stream_id_of(group, k, sources.first_place + place))
            )
    return ((key[0], members) for key, members in chosen.items())


def _precedence(members: Sequence[Member]) -> tuple[int, int]:
    """Return a sort key of buckets, equal on all processes that share them: the first member on the largest mesh.

    Other members may be on meshes of only some of these processes; the other processes do not know them.
    """
    params: list[Any] = [member.param for member in members]
    sizes = [p.device_mesh.size() if is_sharded(p) else 0 for p in params]
    return min((-size, member.place) for size, member in zip(sizes, members, strict=True))


def _by_device(
    groups: Iterable[Mapping[str, Any]],
    make: Callable[[list[Any], list[Any]], _Reduction],
    of: Callable[[Tensor, Mapping[str, Any]], Any],
) -> dict[torch.device, _Reduction]:
    """Return a reduction per device over all parameters that need it; frozen ones may have gradients elsewhere.

    Args:
        groups: All parameter groups.
        make: Constructs the reduction from the parameters of a device and the result of ``of`` for each.
        of: Returns what the reduction needs to know about a parameter of a group; None if it needs no reduction.
    """
    chosen: dict[torch.device, dict[int, tuple[Tensor, Any]]] = {}
    for group in groups:
        for p in group["params"]:
            if (known := of(p, group)) is not None:
                chosen.setdefault(p.device, {})[id(p)] = p, known
    return {device: make(*map(list, zip(*found.values(), strict=True))) for device, found in chosen.items()}


def _is_limited_by_rows(p: Tensor, group: Mapping[str, Any]) -> bool | None:
    return needs_row_sums(p, group) if is_limited(group) and reduced_over(p) else None


def _row_numbers(p: Tensor, group: Mapping[str, Any]) -> tuple[int, tuple[int, ...]] | None:
    """Return the number of sums over this process's rows, and the dimensions along which processes share rows."""
    if not needs_row_sums(p, group):
        return None
    n = math.prod(local_of(p).shape[:-1]) * rule_of(group["rule"]).row_numbers(group["level"])
    return n, (p.dim() - 1,)


def _head_numbers(p: Tensor, group: Mapping[str, Any]) -> tuple[int, tuple[int, ...]] | None:
    """Return the number of heads of this process, and the dimensions along which processes share heads."""
    dims = shared_dims(p, group)
    return (len(heads_here(p, head_rows_of(group)).lengths), dims) if dims else None


def _factored_shape(p: Tensor, group: Mapping[str, Any]) -> tuple[int, ...] | None:
    return state_shape(p, group) if factors_of(p, group) and reduced_over(p) else None
