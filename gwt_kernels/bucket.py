"""Buckets: the tensors of an optimizer that share one launch per pass, and how they are brought together."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gwt_kernels import backends
from gwt_kernels.functional import Begun, Hyper, Rule, gwt_adamw_, is_on_triton, update_sums
from gwt_kernels.hyper import Boundary, key_of
from gwt_kernels.joined import Joined
from gwt_kernels.options import rounding_of
from gwt_kernels.reduction import Limits, Totals
from gwt_kernels.sharding import is_sharded, local_of, reduced_over
from gwt_kernels.state import SCALES, halves_of, is_limited, is_quantized, shard_spans
from gwt_kernels.survey import PYTHON, Survey

__all__ = ["Bucket", "Call", "Member", "bucket_options", "make_buckets", "make_limits", "stream_of", "survey_for"]


def make_buckets(
    groups: list[dict[str, Any]],
    states: Mapping[Tensor, dict[str, Any]],
    *,
    on_device: bool,
    rows_of: Callable[[list[Member]], Tensor | None],
    limits: Mapping[torch.device, Limits],
    totals: Totals | None,
) -> list[Bucket]:
    """Bring every parameter that has a gradient, once, together with those that can share its launches.

    Args:
        groups: The optimizer's, whose options are checked.
        states: Complete states of these parameters.
        on_device: Whether the device counts steps.
        rows_of: Makes the rows of telemetry for a bucket's members, or None.
        limits: What adds up the limiter's norms over processes, per device.
        totals: What adds up gradients over processes, or None.
    """
    chosen: dict[Any, list[Member]] = {}
    place = -1
    seen = set()
    for i, group in enumerate(groups):
        options = bucket_options(group)
        for k, p in enumerate(group["params"]):
            place += 1
            if p.grad is None or id(p) in seen:  # listed twice in one group: torch warns, once is what is meant
                continue
            seen.add(id(p))
            reduced = is_limited(group) and bool(reduced_over(p))
            dtypes = (p.dtype, p.grad.dtype, states[p]["exp_avg"].dtype)
            key = (options, p.device, dtypes, is_sharded(p), reduced)
            chosen.setdefault(key, []).append(Member(p, place, i, stream_of(group, k, place)))
    return [
        Bucket(
            members, states, groups, on_device, rows_of(members), limits.get(device) if reduced else None, totals
        )
        for (_, device, _, _, reduced), members in chosen.items()
    ]


def make_limits(groups: list[dict[str, Any]]) -> dict[torch.device, Limits]:
    """One per device, of all parameters that need it: whether they have gradients here does not matter."""
    chosen: dict[torch.device, dict[int, Tensor]] = {}
    for group in groups:
        for p in group["params"] if is_limited(group) else ():
            if p.requires_grad and reduced_over(p):
                chosen.setdefault(p.device, {})[id(p)] = p
    return {device: Limits(list(params.values())) for device, params in chosen.items()}


class Member(NamedTuple):
    """A parameter of a bucket."""

    param: Tensor
    place: int
    """Among all parameters of the optimizer."""
    group: int
    stream: int


class Call(NamedTuple):
    """What a step hands to one of its buckets."""

    grads: list[Tensor]
    hypers: list[Hyper]
    """Of all groups."""
    control: Tensor | None
    """What was decided on the bucket's device."""
    same_tensors: bool
    """See :func:`gwt_kernels.functional.gwt_adamw_`."""


class Bucket:
    """Tensors that share one launch per pass: one device, dtype combination, level, rule and backend."""

    def __init__(
        self,
        members: list[Member],
        states: Mapping[Tensor, dict[str, Any]],
        groups: list[dict[str, Any]],
        on_device: bool,
        rows: Tensor | None,
        limits: Limits | None = None,
        totals: Totals | None = None,
    ) -> None:
        self.rows = rows
        params = [member.param for member in members]
        self.params = list(map(local_of, params))
        self.device = self.params[0].device
        self.places = [member.place for member in members]
        self._chosen = itemgetter(*self.places, 0)  # the last one makes a tuple of a bucket of one
        self.owners = [member.group for member in members]
        self.owner = self.owners[0] if len(set(self.owners)) == 1 else None
        own = [states[p] for p in params]
        group = groups[self.owners[0]]
        self.level: int = group["level"]
        self.rule: Rule = group["rule"]
        self.wavelet: str = group["wavelet"]
        self.boundary: Boundary = group["boundary"]
        self.backend: backends.Backend | None = group["backend"]
        self.exp_avgs: list[Tensor] = [local_of(s["exp_avg"]) for s in own]
        self.exp_avg_sqs: list[Tensor] = [local_of(s["exp_avg_sq"]) for s in own]
        decided = is_limited(group) and limits is None  # by the step itself
        self.limiter_norms = [s["limiter_norm"] if decided else None for s in own]
        self.rounding = rounding_of(self.params[0], group["weight_rounding"])
        self.lows = [halves_of(s["weight_low"]) if self.rounding == "split" else None for s in own]
        self.scales = [
            (local_of(s[SCALES[0]]), local_of(s[SCALES[1]])) if is_quantized(p, group) else None
            for p, s in zip(params, own, strict=True)
        ]
        random = self.rounding == "stochastic" or self.exp_avgs[0].dtype in (torch.bfloat16, torch.int8)
        self.spans = [shard_spans(p, group) for p in params] if random and is_sharded(params[0]) else None
        self._counted = None if totals is None else list(map(totals.counts, params))
        self.limits = limits
        # Whether the limiter's first pass can look at the gradients, for what decides about the step. Another
        # process counts those that this one does not.
        arrays = (self.params, [g for g in (params[0].grad,) if g is not None], self.exp_avgs)
        self.on_triton = is_on_triton(arrays, self.level, self.wavelet, self.backend, self.boundary)
        self.looks = is_limited(group) and self.on_triton
        self.looks &= self._counted is None or all(self._counted)
        self.symbolic = backends.is_symbolic()
        if limits is not None:
            self.limited_places = limits.places_of(params)
            # To take norms together and apart again in each step would be most of it.
            dtype = own[0]["limiter_norm"].dtype
            self.norms = Joined(own, "limiter_norm", dtype, self.device, apart=self.symbolic)
        self.keys = [key_of(groups[member.group]["seed"], member.stream) for member in members]
        self.workspace: dict[str, Any] = {}
        # One addition counts all steps.
        self._is_unread = self.symbolic or self.device.type == "meta"
        self.on_device = on_device and not self._is_unread
        place = self.device if self.on_device else torch.device("cpu")
        self.steps = Joined(own, "step", torch.float64, place, apart=self.symbolic)

    def gradients(self, grads: list[Tensor | None]) -> list[Tensor]:
        """Its own among those of all parameters."""
        return list(self._chosen(grads)[:-1])

    def counted(self, grads: list[Tensor]) -> list[Tensor]:
        """Its gradients, without those that another process counts."""
        if self._counted is None:
            return grads
        return [g if counts else g.new_empty(0) for g, counts in zip(grads, self._counted, strict=True)]

    def begin(self, call: Call, looks: bool) -> Begun:
        """Begin a step with the limiter's first pass, for what has to be decided before the rest of it.

        Args:
            call: Of the step.
            looks: Whether the pass is to look at the gradients; else it is for the sums of shards alone.
        """
        if self.limits is not None:
            return update_sums(**self._arguments(call), looks=looks)
        begun = gwt_adamw_(**self._arguments(call), **self._of_the_step(), looks=True)
        assert begun is not None  # as it looks
        return begun

    def step(self, call: Call, begun: Begun | None) -> None:
        """Take a step, or the rest of it."""
        limits = None
        if self.limits is not None:
            gammas: Any = [call.hypers[i].norm_growth_limit for i in self.owners]
            self.norms.read()
            limits = self.limits.divisors(self.limited_places, self.norms.values, gammas, call.control)
            self.norms.write()
        if begun is not None and begun.finish is not None:
            begun.finish(call.control, limits)
        else:
            gwt_adamw_(**self._arguments(call), **self._of_the_step(), limits=limits)
        if self.on_device:
            self.steps.write_counts()
        else:
            self.steps.count()

    def _of_the_step(self) -> dict[str, Any]:
        """What a step takes beside :meth:`_arguments`."""
        return {"limiter_norms": self.limiter_norms, "rule": self.rule, "telemetry": self.rows}

    def _arguments(self, call: Call) -> dict[str, Any]:
        """What both functions of functional.py take."""
        hypers, control = call.hypers, call.control
        if self._is_unread and control is not None:  # a factor that nobody can read goes along as a tensor
            hypers = [hyper._replace(grad_factor=hyper.grad_factor * control[0]) for hyper in hypers]
            control = None
        if self.on_device:
            self.steps.read()
        return {
            "params": self.params,
            "grads": call.grads,
            "exp_avgs": self.exp_avgs,
            "exp_avg_sqs": self.exp_avg_sqs,
            "steps": self.steps.values if self.on_device else self.steps.next_steps(),
            "hypers": (
                [hypers[i] for i in self.owners] if self.owner is None else [hypers[self.owner]] * len(self.owners)
            ),
            "level": self.level,
            "scales": self.scales,
            "rounding": self.rounding,
            "keys": self.keys,
            "lows": self.lows,
            "spans": self.spans,
            "control": control,
            "wavelet": self.wavelet,
            "boundary": self.boundary,
            "backend": self.backend,
            "workspace": self.workspace,
            "same_tensors": call.same_tensors,
        }


def bucket_options(group: Mapping[str, Any]) -> tuple[Any, ...]:
    """What of a group's options decides with which other tensors its tensors can share a launch."""
    return *_shared_options(group), is_limited(group)


_shared_options = itemgetter("level", "rule", "wavelet", "boundary", "state_dtype", "backend", "weight_rounding")


def survey_for(buckets: Sequence[Bucket]) -> Survey:
    """How to survey the tensors of a step: through C where kernels are launched, which needs a compiler anyway."""
    if not any(bucket.on_triton for bucket in buckets):
        return PYTHON
    from gwt_kernels.triton_backend.native import quickest

    return quickest()


def stream_of(group: Mapping[str, Any], index: int, place: int) -> int:
    """What tells a parameter's random bits from another's: its name, or else its place in the optimizer."""
    names = group.get("param_names")
    return zlib.crc32(str(names[index]).encode()) if names and index < len(names) else place
