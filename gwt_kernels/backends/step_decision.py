"""What is decided on the device before a step: whether it is taken, and what gradients are multiplied by."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gwt_kernels.backends import choice

__all__ = ["ClipRequest", "control_", "decide", "send", "squares"]


class ClipRequest(NamedTuple):
    """What a step asks of all gradients, and what it is told of them.

    Attributes:
        max_norm: Global norm to clip to, as :func:`torch.nn.utils.clip_grad_norm_` does; None for no clipping,
            infinity to measure the norm alone.
        skip_nonfinite: Whether a gradient that holds an infinity or a NaN makes the step be skipped.
        grad_scale: What the gradients were multiplied by, one element (``torch.amp.GradScaler``'s); None for 1.
        found_inf: One element, above 0 where the step is to be skipped (``torch.amp.GradScaler``'s); or None.
    """

    max_norm: float | None = None
    skip_nonfinite: bool = False
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None

    @property
    def of_gradients(self) -> bool:
        """Whether gradients have to be read before the step."""
        return self.max_norm is not None or self.skip_nonfinite

    @property
    def anything(self) -> bool:
        """Whether there is something to decide."""
        return self.of_gradients or self.found_inf is not None

    @property
    def can_wait(self) -> bool:
        """Whether the step may begin with the gradients as they are: no factor on them is to be found first."""
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
    seen: Sequence[Tensor] = (),
) -> dict[torch.device, Tensor]:
    """Decide about one step from all its gradients, read once; on CUDA devices nothing waits for them.

    Args:
        buckets: Gradients of any shapes and dtypes, with the backend asked for; those of one bucket on one device.
        asked: What is to be decided, and by what.
        skipped: Number of steps skipped so far, a float64 scalar, counted here.
        workspace: Where the Triton backend keeps its tables from step to step; None makes them anew.
        reduce: Adds what :func:`squares` returns over processes, in place; None for one process.
        seen: What is known already of other gradients (:class:`gwt_kernels.functional.Begun`).

    Returns:
        For every device of the gradients float64 ``[3]``: the factor on gradients, 1 where the step is taken and 0
        where not, and the global norm of the unscaled gradients (NaN where nothing asked for it).
    """
    by_place: dict[tuple[torch.device, str], tuple[list[Tensor], list[Tensor]]] = {}  # gradients; what is seen
    for grads, backend in buckets:
        device = grads[0].device
        name = choice.resolve_update(backend, device, grads[0].dtype, 0)
        by_place.setdefault((device, name), ([], []))[0].extend(grads)
    for part in seen:
        by_place.setdefault((part.device, "triton"), ([], []))[1].append(part)
    home = skipped.device
    total = None
    if asked.of_gradients:
        parts = [
            squares(own, place[1], None if workspace is None else workspace.setdefault(place, {}), known)
            for place, (own, known) in by_place.items()
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
    seen: Sequence[Tensor] = (),
) -> Tensor:
    """Sum of the squares of all elements, and the number of those that are not finite: float64 ``[2]``.

    Args:
        grads: Dense tensors of one device, any shapes and floating-point dtypes.
        backend: ``"triton"`` or ``"torch"``.
        workspace: Where the Triton backend keeps its tables from step to step.
        seen: What it has found of other gradients there, which is added: see :func:`control_`. Of these the second
            number counts the parts that hold such an element.
    """
    workspace = {} if workspace is None else workspace
    if backend == "torch":
        from gwt_kernels.backends.torch import control as torch_control

        return torch_control.squares(grads, workspace)
    from gwt_kernels.backends.triton import control_launch

    return control_launch.squares(grads, workspace, seen)


def decide(
    backend: str,
    total: Tensor | None,
    max_norm: float | None,
    skip_nonfinite: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    skipped: Tensor,
) -> Tensor:
    """Factor on gradients, whether to step, and their norm, float64 ``[3]``; counts a step that is ``skipped``::

    norm   = sqrt(total[0]) / grad_scale
    factor = min(1, max_norm / (norm + 1e-6)) / grad_scale
    go     = not (found_inf > 0 or (skip_nonfinite and total[1] > 0))
    """
    arguments = (total, max_norm, skip_nonfinite, grad_scale, found_inf, skipped)
    if backend == "torch":
        from gwt_kernels.backends.torch import control as torch_control

        return torch_control.decide(*arguments)
    from gwt_kernels.backends.triton import control_launch

    return control_launch.decide(*arguments)


def send(x: Tensor, device: torch.device) -> Tensor:
    """``x`` on ``device``; the host waits only where it is to read the result itself."""
    return x.to(device, non_blocking=device.type != "cpu")
