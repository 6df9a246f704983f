"""A bucket of an optimizer: its tensors, their runner, and the scalars of their states that a step updates."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gwt_kernels.backends import choice
from gwt_kernels.backends.bucket import Bucket, StepInputs
from gwt_kernels.backends.factored_bucket import FactoredBucket
from gwt_kernels.backends.heads import HeadsRunner, cap_
from gwt_kernels.backends.matrix_runner import MatrixRunner
from gwt_kernels.backends.prepare import prepare, row_summer
from gwt_kernels.backends.runner import Reduction, Runner, StagedRunner
from gwt_kernels.core.dtensor import is_sharded, local_of
from gwt_kernels.core.hyper import Hyper, key_of
from gwt_kernels.core.level import ROW
from gwt_kernels.distributed.heads import heads_here
from gwt_kernels.distributed.reduction import GradNormReduction, LimiterReduction, RowReduction
from gwt_kernels.optim.checks import label_of, names_of
from gwt_kernels.optim.joined import Joined
from gwt_kernels.optim.matrices import exchange_of, matrix_options, matrix_stage
from gwt_kernels.optim.options import rounding_of
from gwt_kernels.optim.state import (
    factors_of,
    head_rows_of,
    is_limited,
    low_bits_of,
    moment_format,
    needs_row_sums,
    shard_spans,
    shared_dims,
    slots_of,
    state_shape,
)


class Member(NamedTuple):
    """A parameter of a bucket.

    Attributes:
        param: The parameter.
        place: Its index among all parameters of the optimizer.
        group: Its group's index.
        stream: Id of its random bits, from :func:`stream_id_of`.
    """

    param: Tensor
    place: int
    group: int
    stream: int


class PlannedBucket:
    """Tensors that share one launch per pass: one device, dtype combination, level, rule and backend.

    Args:
        members: Its parameters, at least one of which has a gradient. The others are not updated here, but other
            processes need this one to orthogonalise their matrices.
        states: Complete states of those with a gradient.
        groups: All groups of the optimizer.
        on_device: Whether the device counts steps.
        telemetry: Rows of telemetry, or None.
        limits: Reduction of the limiter's norms over processes; None if these tensors need none.
        totals: Reduction of the gradient norm over processes, or None.
        rows: Reductions of sums over rows, and then over heads, if processes hold parts of these.
    """

    def __init__(
        self,
        members: Sequence[Member],
        states: Mapping[Tensor, dict[str, Any]],
        groups: Sequence[Mapping[str, Any]],
        on_device: bool,
        telemetry: Tensor | None,
        limits: LimiterReduction | None = None,
        totals: GradNormReduction | None = None,
        rows: Sequence[RowReduction] = (),
    ) -> None:
        all_members, members = members, with_gradients(members)
        params = [member.param for member in members]
        member_states = [states[p] for p in params]
        group = groups[members[0].group]
        self._grads_of = itemgetter(*(member.place for member in members), 0)  # 0: a tuple for one member, too
        self._owners = [member.group for member in members]
        self._owner = self._owners[0] if len(set(self._owners)) == 1 else None
        self.bucket = _bucket_of(members, member_states, groups, telemetry, limits is None)
        self.device = self.bucket.device
        self.backend: choice.Backend | None = group["backend"]
        self.runner = _runner_of(self.bucket, all_members, groups)
        self._counted = None if totals is None else list(map(totals.counts, params))
        # Whether the limiter's first pass can collect gradient statistics for the step's decision: not if another
        # process counts some of the gradients.
        self.collects_grad_stats = is_limited(group) and self.runner.collects_grad_stats
        self.collects_grad_stats &= self._counted is None or all(self._counted)
        self.rows = rows
        if rows:
            self.collects_grad_stats = False  # their first pass needs the sums over rows
            self._add_up_rows = row_summer(self.bucket, self.backend)
            self._row_places = [each.places_of(params) for each in rows]
        symbolic = choice.is_symbolic()
        self.limits = limits
        if limits is not None:
            self._limited_places = limits.places_of(params)
            # Stacking and unbinding the norms in each step would take most of its time.
            dtype = member_states[0]["limiter_norm"].dtype
            self._norms = Joined(member_states, "limiter_norm", dtype, self.device, apart=symbolic)
        # One addition counts all steps.
        self._is_unread = symbolic or self.device.type == "meta"
        self._on_device = on_device and not self._is_unread
        place = self.device if self._on_device else torch.device("cpu")
        self._steps = Joined(member_states, "step", torch.float64, place, apart=symbolic)

    def gradients(self, grads: Sequence[Tensor | None]) -> list[Tensor]:
        """Return the members' gradients from those of all parameters."""
        return list(self._grads_of(grads)[:-1])

    def counted(self, grads: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return its gradients, with empty tensors for those that another process counts."""
        if self._counted is None:
            return grads
        return [g if counts else g.new_empty(0) for g, counts in zip(grads, self._counted, strict=True)]

    def inputs(self, grads: list[Tensor], hypers: Sequence[Hyper]) -> StepInputs:
        """Return the inputs of its step; ``hypers`` are those of all groups."""
        member_hypers = (
            [hypers[self._owner]] * len(grads) if self._owner is not None else [hypers[i] for i in self._owners]
        )
        if self._on_device:
            self._steps.read()
        return StepInputs(grads, self._steps.values if self._on_device else self._steps.next_steps(), member_hypers)

    def row_parts(self, stage: int, inputs: StepInputs) -> tuple[Tensor, Tensor]:
        """Return the positions of its rows' sums in its ``RowReduction``, and this process's parts of them.

        In stage 1 those of its heads, which follow from the finished sums over rows.
        """
        if not stage:
            return self._row_places[0], self._add_up_rows(inputs.grads)
        assert isinstance(self.runner, HeadsRunner)
        assert inputs.row_sums is not None
        return self._row_places[1], self.runner.head_sums(inputs.row_sums)

    def with_row_sums(self, stage: int, inputs: StepInputs, parts: Tensor) -> StepInputs:
        """Return a step's inputs with the reduced sums over whole rows, or in stage 1 over heads."""
        sums = self.rows[stage].finish(self._row_places[stage], parts)
        of_elements = not stage and self.bucket.level == ROW  # the first sums are not of squares
        cap_(sums[:, 1:] if of_elements else sums)
        return inputs._replace(head_sums=sums) if stage else inputs._replace(row_sums=sums)

    def reduce(self, inputs: StepInputs, decision: Tensor | None, *, grad_stats: bool) -> Reduction:
        """Run the first phase, whose sums are needed for decisions before the second."""
        inputs, decision = self._readable(inputs, decision)
        return self.runner.reduce(inputs, decision, grad_stats=grad_stats, update_sums=self.limits is not None)

    def update_sums(self, reduction: Reduction) -> tuple[Tensor, Tensor]:
        """Return the positions of its sums in its ``LimiterReduction``, and their values."""
        assert reduction.update_sums is not None
        return self._limited_places, reduction.update_sums

    def apply(self, inputs: StepInputs, decision: Tensor | None) -> None:
        """Take a step, or the rest of it after :meth:`reduce`, and count it."""
        divisors = None
        if self.limits is not None:
            gammas: Any = [hyper.norm_growth_limit for hyper in inputs.hypers]
            self._norms.read()
            divisors = self.limits.divisors(self._limited_places, self._norms.values, gammas, decision)
            self._norms.write()
        self.runner.apply(*self._readable(inputs, decision), divisors)
        self._count()

    def stages(self, inputs: StepInputs, decision: Tensor | None) -> Iterator[Tensor]:
        """Take a step in stages (:class:`gwt_kernels.backends.runner.StagedRunner`), and count it."""
        assert isinstance(self.runner, StagedRunner)
        yield from self.runner.stages(*self._readable(inputs, decision))
        self._count()

    def _count(self) -> None:
        if self._on_device:
            self._steps.write_counts()
        else:
            self._steps.count()

    def _readable(self, inputs: StepInputs, decision: Tensor | None) -> tuple[StepInputs, Tensor | None]:
        """Move the decision's factor into the options if tensors have no values, as fake ones; return both."""
        if not self._is_unread or decision is None:
            return inputs, decision
        hypers = [hyper._replace(grad_factor=hyper.grad_factor * decision[0]) for hyper in inputs.hypers]
        return inputs._replace(hypers=hypers), None


def _bucket_of(
    members: Sequence[Member],
    states: Sequence[dict[str, Any]],
    groups: Sequence[Mapping[str, Any]],
    telemetry: Tensor | None,
    decides: bool,
) -> Bucket:
    """Return a backend's bucket of the members' local tensors; ``decides``: whether it computes the limiter."""
    params, group = [member.param for member in members], groups[members[0].group]
    local = list(map(local_of, params))
    slots = slots_of(group)
    moments = [[local_of(s[key]) for s in states] for key in slots]
    rounding = rounding_of(local[0], group["weight_rounding"])
    stored = [moment_format(p, group) for p in params]
    random = rounding == "stochastic" or stored[0].is_random
    scales: list[Any] = [
        tuple(local_of(s[key]) for key in each.scales_of(slots)) or None
        for each, s in zip(stored, states, strict=True)
    ]
    make: Callable[..., Bucket] = Bucket
    if any(factors_of(p, group) for p in params):
        keys = [factors_of(p, group) for p in params]
        factors: list[Any] = [
            (None, *(local_of(s[key]) for key in each))[-2:] for each, s in zip(keys, states, strict=True)
        ]
        make = partial(FactoredBucket, factors=factors, wholes=[(state_shape(p, group), p.numel()) for p in params])
    return make(
        local,
        moments[0] if moments else None,
        moments[1] if len(slots) > 1 else None,
        level=group["level"],
        grad_dtype=next(p.grad.dtype for p in params if p.grad is not None),
        limiter_norms=[s["limiter_norm"] for s in states] if is_limited(group) and decides else None,
        rule=group["rule"],
        rounding=rounding,
        keys=[key_of(groups[member.group]["seed"], member.stream) for member in members],
        lows=[low_bits_of(s["weight_low"]) for s in states] if rounding == "split" else None,
        scales=scales,
        spans=[shard_spans(p, group) for p in params] if random and is_sharded(params[0]) else None,
        telemetry=telemetry,
        whole_widths=[p.shape[-1] for p in params] if needs_row_sums(params[0], group) else None,
        heads=[heads_here(p, head_rows_of(group)) for p in params] if shared_dims(params[0], group) else None,
        wavelet=group["wavelet"],
        boundary=group["boundary"],
    )


def _runner_of(bucket: Bucket, members: Sequence[Member], groups: Sequence[Mapping[str, Any]]) -> Runner:
    """Return the runner of the bucket: a backend's, or one with a matrix stage between two of a backend's."""
    group = groups[members[0].group]
    options = matrix_options(group)
    if options is None:
        return prepare(bucket, group["backend"])
    has_grad = [member.param.grad is not None for member in members]
    stage = matrix_stage(*_params_of(members, groups), options, has_grad)
    return MatrixRunner(bucket, group["backend"], stage)


def attendance(members: Sequence[Member], groups: Sequence[Mapping[str, Any]]) -> Callable[[], None]:
    """Return a function that takes part in other processes' steps of a bucket without gradients here."""
    options = matrix_options(groups[members[0].group])
    assert options is not None
    exchange, _ = exchange_of(*_params_of(members, groups), options, [False] * len(members))
    return exchange.attend


def with_gradients(members: Sequence[Member]) -> list[Member]:
    """Return the members that have a gradient on this process."""
    return [member for member in members if member.param.grad is not None]


def _params_of(members: Sequence[Member], groups: Sequence[Mapping[str, Any]]) -> tuple[list[Tensor], list[str]]:
    """Return the members' parameters and their names in errors."""
    names = [_name_of(member, groups[member.group]) for member in members]
    return [member.param for member in members], names


def _name_of(member: Member, group: Mapping[str, Any]) -> str:
    """Return the name of a member in errors."""
    index = next(i for i, p in enumerate(group["params"]) if p is member.param)
    return label_of(group, index, member.group)


def stream_id_of(group: Mapping[str, Any], index: int, place: int) -> int:
    """Return the id of a parameter's random bits: CRC-32 of its name, or else its index in the optimizer."""
    names = names_of(group)
    return zlib.crc32(str(names[index]).encode()) if names else place
