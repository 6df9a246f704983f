"""What telemetry notes about a step of the torch backend, computed again from what the step stored."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gwt_kernels.hyper import Hyper, Rule
from gwt_kernels.torch_backend.haar import compute_dtype
from gwt_kernels.torch_backend.quantized import decode_first, decode_second

__all__ = ["observe"]


def observe(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    limiter_norms: Sequence[Tensor | None],
    steps: Sequence[int],
    hypers: Sequence[Hyper],
    rows: Tensor,
    *,
    level: int,
    rule: Rule,
    scales: Sequence[tuple[Tensor, Tensor] | None],
) -> None:
    """Write the ``rows`` ``[n, 6]`` of :mod:`gwt_kernels.telemetry` after a step; moments as they were stored."""
    width = 2**level
    for p, g, m, v, norm, step, hyper, row, scale in zip(
        params, grads, exp_avgs, exp_avg_sqs, limiter_norms, steps, hypers, rows, scales, strict=True
    ):
        if p.numel() == 0:
            continue
        row[5] += 1
        dtype = compute_dtype(torch.float32 if scale else torch.promote_types(p.dtype, m.dtype))
        if scale is not None:
            m, v = decode_first(m, scale[0], level), decode_second(v, scale[1], level)
        m, v = m.to(dtype).unsqueeze(-1), v.to(dtype).unsqueeze(-1)
        blocks = _blocks(g.to(dtype) * hyper.signed_factor, width)
        mean = blocks.mean(-1, keepdim=True)
        residual = blocks - mean
        if level == 0:
            update = m / (v.sqrt() + hyper.eps)
        elif rule == "foam":
            update = (m + residual) / ((v + residual.square()).sqrt() + hyper.eps)
        else:
            update = (residual + m / math.sqrt(width)) / (v.sqrt() + hyper.eps)
        if norm is not None:
            unlimited = (m / (v.sqrt() + hyper.eps)).square().sum().sqrt()
            row[3] = torch.where(norm > 0, unlimited / norm, torch.ones_like(unlimited))
            update = update / row[3].to(dtype)
        inside = _blocks(torch.ones_like(g, dtype=torch.bool), width)
        update = update.mul_(hyper.step_size(step, level)).where(inside, torch.zeros_like(update))
        details, approximation = residual.square().sum(), mean.square().sum() * width
        row[0], row[1], row[2] = details, approximation, update.square().sum()
        row[4] += ~torch.isfinite(details + approximation)


def _blocks(x: Tensor, width: int) -> Tensor:
    """``[..., nb, width]``, zeros beyond a row's end."""
    x = x.reshape(1) if x.dim() == 0 else x
    x = torch.nn.functional.pad(x, (0, -x.shape[-1] % width))
    return x.reshape(*x.shape[:-1], -1, width) if x.dim() > 1 else x.reshape(-1, width)
