"""Gradient release: update each tensor in the backward pass, and free its gradient at once."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gwt_kernels.optim.base import PlannedOptimizer
from gwt_kernels.optim.checks import check_initialized


def release_gradients(model: nn.Module, optimizer: PlannedOptimizer) -> GradientRelease:
    """Let the backward pass update each parameter as soon as its gradient is complete, and free that gradient.

    The gradients of the whole model never exist together, which saves their memory. Loops and frameworks may still
    call ``optimizer.step()``, which then has nothing to do. The result equals that of ordinary steps to the bit,
    except for matrices that :func:`gwt_kernels.rules.newton_schulz.orthogonalize_` multiplies in batches there,
    where the library's batched products round differently. A parameter whose gradient one backward pass completes
    several times (a tied weight under reentrant checkpointing) would be updated each time: use
    ``torch.utils.checkpoint(..., use_reentrant=False)``.

    Args:
        model: Its parameters that need gradients must all be the optimizer's.
        optimizer: The optimizer that updates them.

    Returns:
        The handle of the hooks: accumulate micro-batches within :meth:`GradientRelease.accumulate`, and end with
        :meth:`GradientRelease.remove`.

    Raises:
        RuntimeError: something needs all gradients at once (clipping to a global norm, ``skip_nonfinite``, a
            ``GradScaler``, DDP), or ``capturable`` is on; a parameter is not the optimizer's or has a gradient; or
            gradients are already released.
        TypeError: the optimizer is not of this package.
    """
    _check(model, optimizer)
    return GradientRelease(optimizer)


class GradientRelease:
    """Hooks that update parameters in the backward pass; made by :func:`release_gradients`.

    Attributes:
        accumulating: Whether backward passes only accumulate gradients: see :meth:`accumulate`.
    """

    def __init__(self, optimizer: PlannedOptimizer) -> None:
        self._optimizer = optimizer
        self.accumulating = False
        self._scalers_looked_for = False
        self._handles: list[RemovableHandle] = []
        self.watch(optimizer.param_groups)
        optimizer.gradient_release = self

    def watch(self, groups: Iterable[Mapping[str, Any]]) -> None:
        """Update the parameters of more groups in the backward pass, frozen ones as soon as they are trained."""
        for p in dict.fromkeys(p for group in groups for p in group["params"]):
            is_trained = p.requires_grad
            self._handles.append(p.requires_grad_().register_post_accumulate_grad_hook(self._step))
            p.requires_grad_(is_trained)  # a hook can be registered only while it is True

    @contextlib.contextmanager
    def accumulate(self) -> Iterator[None]:
        """Accumulate gradients within the ``with`` block, without updates.

        Run all micro-batches except the last within it; the backward pass of the last one updates with the sum.
        ``optimizer.step()`` and ``optimizer.zero_grad()`` do nothing within it, so that a loop may call them after
        every micro-batch. If no backward pass follows, ``optimizer.step()`` updates with the sum and frees it, and
        ``optimizer.zero_grad()`` drops it; ``model.zero_grad()`` drops it anywhere.
        """
        before, self.accumulating = self.accumulating, True
        try:
            yield
        finally:
            self.accumulating = before

    def remove(self) -> None:
        """Remove the hooks: ``optimizer.step()`` updates again."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._optimizer.gradient_release is self:  # not a later handle
            self._optimizer.gradient_release = None

    def _step(self, p: Tensor) -> None:
        if self.accumulating:
            return
        if not self._scalers_looked_for:  # one may have been created since
            self._scalers_looked_for = True
            _refuse_scalers()
        self._optimizer.step_parameter(p)
        p.grad = None


def _check(model: nn.Module, optimizer: PlannedOptimizer) -> None:
    if not isinstance(optimizer, PlannedOptimizer):
        raise TypeError(f"gradients are released to this package's optimizers, got {type(optimizer).__name__}")
    if optimizer.gradient_release is not None:
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
    ids = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for name, p in model.named_parameters():
        if p.requires_grad and id(p) not in ids:
            raise RuntimeError(f"parameter {name!r} is not the optimizer's: add it, or freeze it")
        if p.requires_grad and not p.is_leaf:
            raise RuntimeError(f"parameter {name!r} is no leaf, so that backward accumulates no gradient in it")
        if p.grad is not None:
            raise RuntimeError(f"parameter {name!r} has a gradient already: step, or call zero_grad(), before this")


def _any_scaler() -> bool:
    return any(issubclass(type(x), torch.amp.GradScaler) and x.is_enabled() for x in gc.get_objects())


def _refuse_scalers() -> None:
    # A scaler scales the loss before the backward pass and unscales gradients after it: too late.
    if not _any_scaler():
        return
    gc.collect()  # a deleted scaler may wait for it in a reference cycle
    if _any_scaler():
        raise RuntimeError(
            "an enabled torch.amp.GradScaler is alive, but released gradients are used before it could unscale "
            "them: train in bfloat16, delete the scaler or build it with enabled=False, or use ordinary steps"
        )
