"""One step over all buckets: what all of their gradients decide, and the order in which they are updated."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain

import torch
from torch import Tensor

from gwt_kernels.bucket import Bucket, Call
from gwt_kernels.control import Asked, control_, send
from gwt_kernels.functional import Begun, Hyper
from gwt_kernels.reduction import Limits, Totals

__all__ = ["count_of_skipped", "decide", "look", "update"]


def look(
    buckets: Sequence[Bucket], grads: Sequence[list[Tensor]], asked: Asked, hypers: list[Hyper], same_tensors: bool
) -> list[Begun | None]:
    """Begin the step of every bucket whose first pass can look at the gradients for what is asked of them.

    Nothing changes before :func:`update` takes the rest; what had to be copied, as tensors that are not contiguous,
    stays until then. Arguments as there.
    """
    return [
        bucket.begin(Call(own, hypers, None, same_tensors), looks=True) if asked.can_wait and bucket.looks else None
        for bucket, own in zip(buckets, grads, strict=True)
    ]


def decide(
    buckets: Sequence[Bucket],
    grads: Sequence[list[Tensor]],
    begun: Sequence[Begun | None],
    totals: Totals | None,
    asked: Asked,
    skipped: Tensor,
    workspace: dict[torch.device | tuple[torch.device, str], dict[str, object]],
) -> dict[torch.device, Tensor]:
    """What the device decides about a step, per device: see :func:`gwt_kernels.control.control_`.

    Args:
        buckets: All of them; none where other processes alone have gradients, which wait for this one all the same.
        grads: Each bucket's own.
        begun: What :func:`look` began; those gradients are not read again.
        totals: What adds up over processes, or None.
        asked: See there, as for what follows.
        skipped: From :func:`count_of_skipped`.
        workspace: The optimizer's own.
    """
    if totals is not None:
        if asked.found_inf is not None:
            found_inf = asked.found_inf.clone()
            totals.add_up(found_inf)
            asked = asked._replace(found_inf=found_inf)
        grads = [bucket.counted(own) for bucket, own in zip(buckets, grads, strict=True)]
    seen = list(chain.from_iterable(each.seen for each in begun if each is not None))
    chosen = [
        (own, bucket.backend)
        for own, bucket, each in zip(grads, buckets, begun, strict=True)
        if each is None or not each.seen  # of empty tensors
    ]
    if not (chosen or seen):
        chosen = [([torch.empty(0, dtype=torch.float32, device=skipped.device)], None)]
    reduce = None if totals is None else totals.add_up
    return control_(chosen, asked, skipped=skipped, workspace=workspace, reduce=reduce, seen=seen)


def count_of_skipped(skipped: Tensor | None, devices: Sequence[torch.device]) -> Tensor:
    """The count of skipped steps, from 0 where there is none yet, on the device that decides: a CUDA one if any."""
    home = next((device for device in devices if device.type == "cuda"), devices[0])
    if skipped is None:
        return torch.zeros((), dtype=torch.float64, device=home)
    return send(skipped, home) if skipped.device.type == "cpu" else skipped


def update(
    buckets: Sequence[Bucket],
    grads: Sequence[list[Tensor]],
    begun: Sequence[Begun | None],
    limits: Iterable[Limits],
    hypers: list[Hyper],
    control: Mapping[torch.device, Tensor] | None,
    same_tensors: bool,
) -> None:
    """Update every bucket; sums travel between processes while the buckets that need none are updated.

    Args:
        buckets: All of them.
        grads: Each bucket's own.
        begun: What :func:`look` began, to be finished.
        limits: What adds up the limiter's norms over processes, whether or not a bucket here needs it.
        hypers: Of all groups.
        control: What :func:`decide` found, or None.
        same_tensors: See :func:`gwt_kernels.functional.gwt_adamw_`.
    """
    begun = list(begun)
    calls = [
        Call(own, hypers, None if control is None else control[bucket.device], same_tensors)
        for bucket, own in zip(buckets, grads, strict=True)
    ]
    for each in limits:
        sums = []
        for i, bucket in enumerate(buckets):
            if bucket.limits is each:
                begun[i] = first_pass = begun[i] or bucket.begin(calls[i], looks=False)
                sums.append((bucket.limited_places, first_pass.sums))
        each.start(sums)
    waiting = [bucket.limits is not None for bucket in buckets]
    for i in sorted(range(len(buckets)), key=waiting.__getitem__):
        buckets[i].step(calls[i], begun[i])
