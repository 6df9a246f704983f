"""Runner of a bucket's steps by Triton's kernels: one launch per pass and path, and no waiting for the device."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from gwt_kernels.backends.bucket import Bucket, StepInputs
from gwt_kernels.backends.bucket_validation import check_bucket, check_low_bits, check_scales
from gwt_kernels.backends.runner import Reduction
from gwt_kernels.backends.triton.launch import Launch, Sent
from gwt_kernels.backends.triton.layout import is_flat
from gwt_kernels.backends.triton.native import quickest
from gwt_kernels.backends.triton.tables import addresses, device_guard, misalignments
from gwt_kernels.core.laid_out import LaidOut
from gwt_kernels.core.level import ROW

_NULL = bytes(8)


class _Begun(NamedTuple):
    """A step between its two phases."""

    inputs: StepInputs
    params: Sequence[Tensor]
    grads: Sequence[Tensor]
    """The gradients, or copies of them, whose addresses were sent."""
    sent: list[Sent]
    counted: bool


class TritonRunner:
    """See :class:`gwt_kernels.backends.runner.Runner`.

    Tensors that the flat path can take share one launch per pass, the others a second one. A parameter that is not
    contiguous is updated in a contiguous copy, which is then copied back; a gradient is only copied.

    Args:
        bucket: The bucket that it updates. Gradients of all steps have the shapes and dtype of the first step's.

    Raises:
        ValueError: shapes, dtypes, devices or layouts do not fit the kernels.
    """

    collects_grad_stats = True

    def __init__(self, bucket: Bucket) -> None:
        self.bucket = bucket
        self.survey = quickest()
        self._packed = all(map(Tensor.is_contiguous, bucket.params))
        self._plain: bool | None = None  # whether gradients are contiguous, without the negative bit
        self._misaligned: list[bool] | None = None
        self._launches: list[Launch] = []
        self._begun: _Begun | None = None
        # Rows without columns on this process have moments nevertheless.
        self._is_empty = [
            not (n if bucket.row_numbers else p.numel()) for p, n in zip(bucket.params, bucket.n_rows, strict=True)
        ]
        self._empty = [i for i, is_empty in enumerate(self._is_empty) if is_empty]
        if bucket.rounding == "split":
            check_low_bits(bucket.params, bucket.lows)  # type: ignore[arg-type]
        absent = bytes(8 * len(bucket))
        scales = [absent, absent]
        if bucket.is_quantized:
            own: list[Any] = list(bucket.scales)
            check_scales(bucket.exp_avgs, own, bucket.level)
            scales = [*map(addresses, zip(*own, strict=True)), absent]
        moments = [*map(addresses, bucket.moments), absent, absent]
        norms = addresses(bucket.limiter_norms) if bucket.is_limited else absent  # type: ignore[arg-type]
        lows = addresses(bucket.lows) if bucket.rounding == "split" else absent  # type: ignore[arg-type]
        self._columns = {
            "p": addresses(bucket.params),
            "m": moments[0],
            "v": moments[1],
            "norm": norms,
            "key": array("q", bucket.keys).tobytes(),
            "low": lows,
            "m_scales": scales[0],
            "v_scales": scales[1],
        }
        self._own_misaligned = self._find_misaligned()

    def set_params(self, params: Sequence[Tensor]) -> None:
        """Replace the bucket's parameters by tensors of the same shapes, dtype and layouts."""
        self.bucket.params = params
        words, before = addresses(params), self._columns["p"]
        if words == before:
            return
        self._columns["p"] = words
        if misalignments(words) != misalignments(before):
            self._own_misaligned = self._find_misaligned()
        for launch in self._launches:
            launch.set_pointers(self._columns)

    def _find_misaligned(self) -> list[bool]:
        """Return for each tensor whether any array that stays from step to step is misaligned."""
        names = ["m", "low"] if self.bucket.stated.row_slots else ["m", "v", "low"]  # row slots may lie anywhere
        arrays = [self._columns[name] for name in (["p"] if self._packed else []) + names]
        return [any(each) for each in zip(*map(misalignments, arrays), strict=True)]

    @property
    def launches(self) -> list[Launch]:
        """Launches, one for each path that a tensor takes; none before the first step."""
        return self._launches

    def reduce(
        self,
        inputs: StepInputs,
        decision: Tensor | None = None,
        *,
        grad_stats: bool = False,
        update_sums: bool = False,
    ) -> Reduction:
        """See :class:`gwt_kernels.backends.runner.Runner`."""
        if self.bucket.stated.direction is None:
            raise ValueError(
                f"level {self.bucket.level} of rule={self.bucket.rule!r} has no limiter, and no first pass"
            )
        if grad_stats and (decision is not None or not isinstance(inputs.steps, Tensor)):
            raise ValueError(
                "a first pass that reads gradients for the decision needs steps that the device counts, and no "
                "decision"
            )
        begun = self._begun = self._send(inputs, decision, counts=not grad_stats)
        sums = (
            torch.zeros(len(self.bucket), dtype=torch.float32, device=self.bucket.device) if update_sums else None
        )
        stats = []
        with device_guard(self.bucket.device):
            for launch, sent in zip(self._launches, begun.sent, strict=True):
                launch.norms(sent, grad_stats)
                if sums is not None:
                    launch.add_up(sent, sums)
                if sent.grad_stats is not None:
                    stats.append(sent.grad_stats)
        return Reduction(stats, sums)

    def apply(self, inputs: StepInputs, decision: Tensor | None = None, divisors: Tensor | None = None) -> None:
        """See :class:`gwt_kernels.backends.runner.Runner`."""
        begun, self._begun = self._begun, None
        if begun is None or begun.inputs is not inputs:
            begun = self._send(inputs, decision, counts=True)
        elif not begun.counted:
            with device_guard(self.bucket.device):
                for sent in begun.sent:
                    sent.decide(decision)
        with device_guard(self.bucket.device):
            for launch, sent in zip(self._launches, begun.sent, strict=True):
                launch.update(sent, divisors)
        self.finish(begun, decision)

    def finish(self, begun: _Begun, decision: Tensor | None) -> None:
        """Count the step of tensors in no launch, and write updated copies back to the parameters."""
        inputs = begun.inputs
        if isinstance(inputs.steps, Tensor):
            for i in self._empty:  # in no launch
                inputs.steps[i].add_(1.0 if decision is None else decision[1])
        if not isinstance(self.bucket.params, LaidOut):
            increment_version(self.bucket.params)  # for autograd, which does not see the change
        if begun.params is not self.bucket.params:
            for p, x in zip(self.bucket.params, begun.params, strict=True):
                if x is not p:
                    p.copy_(x)

    def memory(self) -> list[object]:
        """See :class:`gwt_kernels.backends.runner.Runner`."""
        return [each for launch in self._launches for each in (launch, *launch.memory())]

    def _send(self, inputs: StepInputs, decision: Tensor | None, *, counts: bool) -> _Begun:
        """Send the tables of a step, and launch only the kernels that compute scalars on the device."""
        bucket, grads, params = self.bucket, inputs.grads, self.bucket.params
        if self._plain is None:
            self._check(grads)
        if not self._plain:
            grads = [g.resolve_neg().contiguous() for g in grads]
        grad_ptrs = addresses(grads)
        if _NULL in grad_ptrs and bucket.device.type != "meta":  # launches on meta tensors are only recorded
            _check_memory(grads, grad_ptrs)
        param_ptrs = self._columns["p"]
        if not self._packed:
            params = [p.contiguous() for p in params]
            param_ptrs = self._columns["p"] = addresses(params)
        self._aim(grad_ptrs, param_ptrs)
        with device_guard(bucket.device):
            sent = [launch.send(grad_ptrs, inputs, decision, counts) for launch in self._launches]
        return _Begun(inputs, params, grads, sent, counts)

    def _check(self, grads: Sequence[Tensor]) -> None:
        """Check once what kernels assume of all tensors."""
        bucket = self.bucket
        arrays: dict[str, Any] = {"params": bucket.params, "grads": grads}
        arrays |= zip(("exp_avgs", "exp_avg_sqs"), bucket.moments, strict=False)
        arrays |= {"limiter_norms": bucket.limiter_norms} if bucket.is_limited else {}
        check_bucket(arrays, bucket.level, bool(bucket.stated.row_slots))
        self._plain = all(map(Tensor.is_contiguous, grads)) and not any(map(Tensor.is_neg, grads))

    def _aim(self, grad_ptrs: bytes, param_ptrs: bytes) -> None:
        """Group the tensors into launches by path if the alignment of one has changed; set pointers to copies."""
        given = misalignments(grad_ptrs)
        if not self._packed:
            given = bytes(map(max, given, misalignments(param_ptrs)))
        if any(given) or self._misaligned is None or self._misaligned != self._own_misaligned:
            misaligned = [bool(off) or is_off for off, is_off in zip(given, self._own_misaligned, strict=True)]
            if misaligned != self._misaligned:
                self._launches = self._plan(misaligned)  # may raise
                self._misaligned = misaligned
                for launch in self._launches:
                    launch.set_pointers(self._columns)
        if not self._packed:
            for launch in self._launches:
                launch.set_pointers(self._columns)

    def _plan(self, misaligned: list[bool]) -> list[Launch]:
        """Return the launches of the tensors that are not empty, grouped by path."""
        chosen: dict[bool, list[int]] = {True: [], False: []}
        for i, p in enumerate(self.bucket.params):
            if not self._is_empty[i]:
                chosen[is_flat(p, misaligned[i], ROW if self.bucket.is_by_rows else self.bucket.level)].append(i)
        return [self._launch(places, flat) for flat, places in chosen.items() if places]

    def _launch(self, places: list[int], flat: bool) -> Launch:
        return Launch(self.bucket, places, flat)


def _check_memory(grads: Sequence[Tensor], words: bytes) -> None:
    """Raise if the memory of a gradient was freed, so that a kernel would read from a null pointer."""
    for i, g in enumerate(grads):
        if words[8 * i : 8 * i + 8] == _NULL and g.numel():
            raise ValueError(
                f"a gradient of shape {tuple(g.shape)} has no memory: it was freed, so bring it back before the "
                f"step"
            )
