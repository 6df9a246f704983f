"""Decide on the device whether a step is taken, and by which factor gradients are multiplied."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gwt_kernels.backends import choice
from gwt_kernels.core.send import send


class ClipRequest(NamedTuple):
    """Options of clipping and skipping, with the tensors of a gradient scaler.

    Attributes:
        max_norm: Global norm to clip to, as :func:`torch.nn.utils.clip_grad_norm_` does; None for no clipping,
            infinity to measure the norm only.
        skip_nonfinite: Whether to skip steps whose gradients have an infinity or a NaN.
        grad_scale: Loss scale in the gradients, one element (from ``torch.amp.GradScaler``); None for 1.
        found_inf: One element, above 0 to skip the step (from ``torch.amp.GradScaler``); or None.
    """

    max_norm: float | None = None
    skip_nonfinite: bool = False
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None

    @property
    def of_gradients(self) -> bool:
        """Whether the decision depends on the gradients."""
        return self.max_norm is not None or self.skip_nonfinite

    @property
    def anything(self) -> bool:
        """Whether there is anything to decide."""
        return self.of_gradients or self.found_inf is not None

    @property
    def can_wait(self) -> bool:
        """Whether the first phase may run before the decision, since no factor on gradients depends on it."""
        unclipped = self.max_norm is None or math.isinf(self.max_norm)
        return self.of_gradients and unclipped and self.found_inf is None


@torch.no_grad()
def control_(
    buckets: Sequence[tuple[Sequence[Tensor], choice.Backend | None]],
    asked: ClipRequest,
    *,
    skipped: Tensor,
    workspace: dict[Any, dict[str, Any]] | None = None,
    reduce: Callable[[Tensor], None] | None = None,
    grad_stats: Sequence[Tensor] = (),
) -> dict[torch.device, Tensor]:
    """Decide about one step from all its gradients, read once, without waiting for CUDA devices.

    Args:
        buckets: Gradients of any shapes and dtypes, with the requested backend; one device per bucket.
        asked: Options of the decision.
        skipped: Number of skipped steps, a float64 scalar that is updated.
        workspace: Dict in which the Triton backend keeps its tables between steps; None to rebuild them.
        reduce: Sums the result of :func:`squares` over processes, in place; None for one process.
        grad_stats: Statistics of further gradients, as in :class:`gwt_kernels.backends.runner.Reduction`.

    Returns:
        float64 ``[3]`` on each device of the gradients: the factor on gradients; 1 to take the step and 0 to skip
        it; and the global norm of the unscaled gradients (NaN if not needed).
    """
    by_place: dict[tuple[torch.device, str], tuple[list[Tensor], list[Tensor]]] = {}  # gradients, statistics
    for grads, backend in buckets:
        device = grads[0].device
        name = choice.resolve_update(backend, device, grads[0].dtype, 0)
        by_place.setdefault((device, name), ([], []))[0].extend(grads)
    for part in grad_stats:
        by_place.setdefault((part.device, "triton"), ([], []))[1].append(part)
    home = skipped.device
    total = None
    if asked.of_gradients:
        parts = [
            squares(grads, place[1], None if workspace is None else workspace.setdefault(place, {}), stats)
            for place, (grads, stats) in by_place.items()
        ]
        total = send(parts[0], home)
        for part in parts[1:]:
            total = total + send(part, home)
        if reduce is not None:
            reduce(total)
    scale, found = (None if x is None else send(x, home) for x in (asked.grad_scale, asked.found_inf))
    clipped = asked.max_norm if asked.max_norm is not None and math.isfinite(asked.max_norm) else None
    on = "triton" if (home, "triton") in by_place else "torch"
    decided = decide(on, total, clipped, asked.skip_nonfinite, scale, found, skipped)
    return {device: send(decided, device) for device in {home, *(device for device, _ in by_place)}}


def squares(
    grads: Sequence[Tensor],
    backend: str,
    workspace: dict[str, Any] | None = None,
    grad_stats: Sequence[Tensor] = (),
) -> Tensor:
    """Return the sum of squares of all elements, and the number of non-finite ones: float64 ``[2]``.

    Args:
        grads: Dense tensors on one device, of any shapes and floating-point dtypes.
        backend: ``"triton"`` or ``"torch"``.
        workspace: Dict in which the Triton backend keeps its tables between steps.
        grad_stats: Statistics of further gradients, added to the result (see :func:`control_`); for these the
            second number counts parts with a non-finite element.
    """
    return _kernels_of(backend).squares(grads, {} if workspace is None else workspace, grad_stats)  # type: ignore[no-any-return]


def decide(
    backend: str,
    total: Tensor | None,
    max_norm: float | None,
    skip_nonfinite: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    skipped: Tensor,
) -> Tensor:
    """Return the factor on gradients, whether to step, and the norm, float64 ``[3]``; count a ``skipped`` step::

    norm   = sqrt(total[0]) / grad_scale
    factor = min(1, max_norm / (norm + 1e-6)) / grad_scale
    go     = not (found_inf > 0 or (skip_nonfinite and total[1] > 0))
    """
    return _kernels_of(backend).decide(total, max_norm, skip_nonfinite, grad_scale, found_inf, skipped)  # type: ignore[no-any-return]


def _kernels_of(backend: str) -> Any:
    """Return the module that has :func:`squares` and :func:`decide` for a backend."""
    if backend == "torch":
        from gwt_kernels.backends.torch import control

        return control
    from gwt_kernels.backends.triton import control_launch

    return control_launch
