"""Gradient release: each tensor is updated in the backward pass, and its gradient freed at once."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from gwt_kernels import whole_step
from gwt_kernels.bucket import Bucket, Member, bucket_options, stream_of, survey_for
from gwt_kernels.checks import check_initialized, name_of
from gwt_kernels.optimizer import GWTAdamW
from gwt_kernels.options import hyper_of
from gwt_kernels.reduction import Limits
from gwt_kernels.sharding import is_sharded, local_parts, reduced_over
from gwt_kernels.snapshot import Snapshot
from gwt_kernels.state import complete, is_limited

__all__ = ["GradientRelease", "release_gradients"]


def release_gradients(model: nn.Module, optimizer: GWTAdamW) -> GradientRelease:
    """Let the backward pass update each parameter as soon as its gradient is complete, and free that gradient.

    The gradients of the whole model never exist together, which saves their memory. ``optimizer.step()`` may go on
    being called, by loops and frameworks, and finds nothing left to do. The result is that of ordinary steps,
    bit for bit. A parameter whose gradient one backward pass completes several times (a tied weight under reentrant
    checkpointing) would be updated each time: use ``torch.utils.checkpoint(..., use_reentrant=False)``.

    Args:
        model: Its parameters that need gradients must all be the optimizer's.
        optimizer: What updates them.

    Returns:
        The hooks' handle: accumulate micro-batches within :meth:`GradientRelease.accumulate`, and end with
        :meth:`GradientRelease.remove`.

    Raises:
        RuntimeError: something needs all gradients at once or reduces them elsewhere: clipping to a global norm,
            ``skip_nonfinite``, a ``GradScaler``, DDP; a parameter has another optimizer or a gradient already; or
            gradients are released already.
    """
    _check(model, optimizer)
    return GradientRelease(optimizer)


class GradientRelease:
    """Hooks that update parameters in the backward pass; made by :func:`release_gradients`.

    Attributes:
        accumulating: Whether gradients are only added up now: see :meth:`accumulate`.
    """

    def __init__(self, optimizer: GWTAdamW) -> None:
        self._optimizer = optimizer
        self.accumulating = False
        self._scalers_looked_for = False
        self._places: dict[Tensor, tuple[int, int, int]] = {}
        params = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        self._handles = [p.register_post_accumulate_grad_hook(self._step) for p in dict.fromkeys(params)]
        optimizer._released = self

    @contextlib.contextmanager
    def accumulate(self) -> Iterator[None]:
        """Within the block, backward passes add to the gradients and nothing is updated.

        Run all micro-batches but the last within it; the last one's backward pass, outside, updates with the sum.
        ``optimizer.step()`` and ``optimizer.zero_grad()`` do nothing in the block, so that a loop may call them
        after every micro-batch. Where no backward pass follows, ``optimizer.step()`` outside updates with the sum
        and frees it, and ``optimizer.zero_grad()`` outside drops it; ``model.zero_grad()`` drops it anywhere.
        """
        before, self.accumulating = self.accumulating, True
        try:
            yield
        finally:
            self.accumulating = before

    def remove(self) -> None:
        """Take the hooks away: from now on ``optimizer.step()`` updates, as before."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._optimizer._released is self:  # not a later handle's
            self._optimizer._released = None
        self._optimizer._forget_buckets()

    def _step(self, p: Tensor) -> None:
        if self.accumulating:
            return
        if not self._scalers_looked_for:  # one may have been made since
            self._scalers_looked_for = True
            _refuse_scalers()
        self._update(p)
        p.grad = None

    @torch._disable_dynamo  # type: ignore[attr-defined]
    @torch.no_grad()
    def _update(self, p: Tensor) -> None:
        """A step of one parameter alone, with all the checks of a step."""
        optimizer = self._optimizer
        if optimizer._asked.anything:
            raise RuntimeError(
                "max_grad_norm, skip_nonfinite and GradScaler need all gradients before the first update; these "
                "are released: take the options away, or call remove() on what release_gradients returned"
            )
        place, i, k = self._place_of(p)
        group = optimizer.param_groups[i]
        hyper = hyper_of(group)
        options = (*bucket_options(group), group["seed"])
        (held,), grads = local_parts([p], [p.grad]) if is_sharded(p) else ([p], [p.grad])
        state = {p: optimizer.state[p]}
        same = p in optimizer._lone and optimizer._lone[p][0].holds([p], grads, options, state, [held])
        if not same:
            optimizer._check_group(group)
            optimizer._check_one(p, group, name_of(group, k, i))
            complete(optimizer.state[p], p, group)
            limits = Limits([p]) if is_limited(group) and reduced_over(p) else None
            members = [Member(p, 0, 0, stream_of(group, k, place))]
            rows = optimizer._telemetry_rows(members)
            bucket = Bucket(members, optimizer.state, [group], False, rows, limits)
            optimizer._lone[p] = Snapshot([p], grads, options, state, [held], survey_for([bucket])), bucket
        bucket = optimizer._lone[p][1]
        shared = [] if bucket.limits is None else [bucket.limits]
        whole_step.update([bucket], [bucket.gradients(grads)], [None], shared, [hyper], None, same)

    def _place_of(self, p: Tensor) -> tuple[int, int, int]:
        """A parameter's place among all, its group's, and its place in that."""
        groups = self._optimizer.param_groups
        _, i, k = self._places.get(p, (0, len(groups), 0))
        if not (i < len(groups) and k < len(groups[i]["params"]) and groups[i]["params"][k] is p):
            listed = [(i, k, q) for i, group in enumerate(groups) for k, q in enumerate(group["params"])]
            self._places = {q: (place, i, k) for place, (i, k, q) in reversed(list(enumerate(listed)))}
        return self._places[p]


def _check(model: nn.Module, optimizer: GWTAdamW) -> None:
    if not isinstance(optimizer, GWTAdamW):
        raise TypeError(f"gradients are released to a GWTAdamW, got {type(optimizer).__name__}")
    if optimizer._released is not None:
        raise RuntimeError("gradients are released to this optimizer already: call remove() on that handle first")
    for name, value in (("max_grad_norm", optimizer.max_grad_norm), ("skip_nonfinite", optimizer.skip_nonfinite)):
        if value:
            raise RuntimeError(
                f"{name}={value!r} needs all gradients before the first update, but released ones never exist "
                f"together: build the optimizer without it"
            )
    if optimizer.capturable:
        raise RuntimeError(
            "capturable=True is for a step in a CUDA graph, released gradients are updated outside it"
        )
    for module in model.modules():
        if isinstance(module, nn.parallel.DistributedDataParallel):
            raise RuntimeError(
                "DDP reduces gradients in buckets after the hooks that release them have run: use fully_shard, or "
                "ordinary steps"
            )
    _refuse_scalers()
    check_initialized((f"parameter {name!r}", p) for name, p in model.named_parameters())
    own = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for name, p in model.named_parameters():
        if p.requires_grad and id(p) not in own:
            raise RuntimeError(f"parameter {name!r} is not the optimizer's: add it, or freeze it")
        if p.requires_grad and not p.is_leaf:
            raise RuntimeError(f"parameter {name!r} is no leaf, so that backward accumulates no gradient in it")
        if p.grad is not None:
            raise RuntimeError(f"parameter {name!r} has a gradient already: step, or call zero_grad(), before this")


def _refuse_scalers() -> None:
    # A scaler multiplies the loss before the backward pass and tells the optimizer after it: too late.
    if any(issubclass(type(x), torch.amp.GradScaler) and x.is_enabled() for x in gc.get_objects()):
        raise RuntimeError(
            "an enabled torch.amp.GradScaler is alive, but released gradients are used before it could unscale "
            "them: train in bfloat16, delete the scaler or build it with enabled=False, or use ordinary steps"
        )
