"""One step over all buckets: what all of their gradients decide, and the order in which they are updated."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from gwt_kernels.bucket import Bucket, Call
from gwt_kernels.control import control_
from gwt_kernels.functional import Hyper
from gwt_kernels.reduction import Limits, Totals

__all__ = ["decide", "update"]


def decide(
    buckets: Sequence[Bucket],
    grads: Sequence[list[Tensor]],
    totals: Totals | None,
    *,
    max_norm: float | None,
    skip_nonfinite: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    skipped: Tensor,
    workspace: dict[torch.device | tuple[torch.device, str], dict[str, object]],
) -> dict[torch.device, Tensor]:
    """What the device decides about a step, per device: see :func:`gwt_kernels.control.control_`.

    Args:
        buckets: All of them; none where other processes alone have gradients, which wait for this one all the same.
        grads: Each bucket's own.
        totals: What adds up over processes, or None.
    """
    if totals is not None:
        if found_inf is not None:
            found_inf = found_inf.clone()
            totals.add_up(found_inf)
        grads = [bucket.counted(own) for bucket, own in zip(buckets, grads, strict=True)]
    chosen = [(own, bucket.backend) for own, bucket in zip(grads, buckets, strict=True)]
    return control_(
        chosen or [([torch.empty(0, device=skipped.device)], None)],
        max_norm=max_norm,
        skip_nonfinite=skip_nonfinite,
        grad_scale=grad_scale,
        found_inf=found_inf,
        skipped=skipped,
        workspace=workspace,
        reduce=None if totals is None else totals.add_up,
    )


def update(
    buckets: Sequence[Bucket],
    grads: Sequence[list[Tensor]],
    limits: Iterable[Limits],
    hypers: list[Hyper],
    control: Mapping[torch.device, Tensor] | None,
    same_tensors: bool,
) -> None:
    """Update every bucket; sums travel between processes while the buckets that need none are updated.

    Args:
        buckets: All of them.
        grads: Each bucket's own.
        limits: What adds up the limiter's norms over processes, whether or not a bucket here needs it.
        hypers: Of all groups.
        control: What :func:`decide` found, or None.
        same_tensors: See :func:`gwt_kernels.functional.gwt_adamw_`.
    """
    calls = [
        (b, Call(own, hypers, None if control is None else control[b.device], same_tensors))
        for b, own in zip(buckets, grads, strict=True)
    ]
    waiting = []
    for each in limits:
        mine = [(bucket, call) for bucket, call in calls if bucket.limits is each]
        each.start([bucket.update_sums(call) for bucket, call in mine])
        waiting += mine
    for bucket, call in [(bucket, call) for bucket, call in calls if bucket.limits is None] + waiting:
        bucket.step(call)
