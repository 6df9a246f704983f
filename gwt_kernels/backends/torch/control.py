"""Step decision in plain PyTorch: gradient norm, clipping, and skipping of non-finite gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gwt_kernels.backends import choice
from gwt_kernels.backends.torch.haar import compute_dtype

ROW = 4096  # elements whose squares are summed in float32 (float64 for float64); these sums are added in float64


def squares(grads: Sequence[Tensor], workspace: dict[str, Any], grad_stats: Sequence[Tensor] = ()) -> Tensor:
    """See :func:`gwt_kernels.backends.step_decision.squares`."""
    norms = []
    for g in grads:
        dtype = compute_dtype(g.dtype)
        flat = g.reshape(-1)
        whole = flat.numel() // ROW * ROW
        if whole:
            norms.append(torch.linalg.vector_norm(flat[:whole].view(-1, ROW), dim=1, dtype=dtype))
        if whole < flat.numel():
            norms.append(torch.linalg.vector_norm(flat[whole:], dtype=dtype).view(1))
    total = (
        torch.cat(norms).double().square().sum() if norms else torch.zeros((), dtype=torch.float64, device="cpu")
    )
    # Squares of finite numbers may overflow, so an infinite total does not imply a non-finite element.
    host_knows = total.device.type == "cpu" and not choice.is_symbolic()
    if not norms or (host_knows and total.isfinite()):
        bad = torch.zeros_like(total)
    else:
        bad = torch.stack([g.isfinite().logical_not_().sum() for g in grads]).sum().double()
    return torch.stack([total, bad])


def decide(
    total: Tensor | None,
    max_norm: float | None,
    skip_nonfinite: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    skipped: Tensor,
) -> Tensor:
    """See :func:`gwt_kernels.backends.step_decision.decide`."""
    one = torch.ones((), dtype=torch.float64, device=skipped.device)
    inverse = one if grad_scale is None else grad_scale.double().reciprocal().reshape(())
    norm = torch.full_like(one, float("nan")) if total is None else total[0].sqrt() * inverse
    factor = inverse if max_norm is None else inverse * (max_norm / (norm + 1e-6)).clamp(max=1.0)
    bad = torch.zeros_like(one, dtype=torch.bool)
    if skip_nonfinite and total is not None:
        bad |= total[1] > 0
    if found_inf is not None:
        bad |= found_inf.reshape(()) > 0
    skipped.add_(bad)
    return torch.stack([factor, (~bad).double(), norm])
