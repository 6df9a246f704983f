"""GWT-Adam, the published rule (arXiv 2501.07237, algorithm 1), folded for the Haar wavelet.

For a block of ``W = 2**level`` neighbours with mean ``mean``, first moment ``m`` and second moment ``v``::

    A = sqrt(W) * mean
    m = b1*m + (1-b1)*A
    v = b2*v + (1-b2)*A*A
    u_i = (g_i - mean + m / sqrt(W)) / (sqrt(v) + eps)

which equals the multi-level transform, Adam on its approximation and the inverse transform (docs/algorithm.md).
The limiter compares the norm of ``m / (sqrt(v) + eps)``.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gwt_kernels.core.kernel import statement
from gwt_kernels.rules.adamw import ADAMW
from gwt_kernels.rules.blocks import block_sums, cut_like, pad_to_blocks, width_of
from gwt_kernels.rules.rule import Context, Rule

if TYPE_CHECKING:
    import triton.language as tl

# In PyTorch ------------------------------------------------------------------------------------------------


def _moments(g: Tensor, m: Tensor, v: Tensor, context: Context) -> tuple[Tensor, ...]:
    """Return ``m``, ``1 / (sqrt(v) + eps)`` and ``mean - m / sqrt(W)``."""
    hyper, level, notes, rows = context
    width = width_of(g, level, rows)
    factor = hyper.signed_factor if rows is None else 1.0
    mean = block_sums(g.to(m.dtype), level, rows).mul_(factor / width)
    m.mul_(hyper.beta1).add_(mean, alpha=(1 - hyper.beta1) * math.sqrt(width))
    v.mul_(hyper.beta2).addcmul_(mean, mean, value=(1 - hyper.beta2) * width)
    gain = v.sqrt().add_(hyper.eps).reciprocal_()  # factor on an element's gradient in its update
    if notes is not None:
        notes.gradient(g, hyper.signed_factor, mean, width)
    return m, gain, mean.sub_(m, alpha=1 / math.sqrt(width))


def _update(p: Tensor, g: Tensor, parts: tuple[Tensor, ...], step_size: Tensor | float, context: Context) -> None:
    """Compute ``p_i += step_size * gain_k * (offset_k - factor * g_i)`` for element ``i`` of block ``k``."""
    (_, gain, offset), (hyper, level, notes, _) = parts, context
    g = pad_to_blocks(g.to(gain.dtype), level)
    gain.mul_(step_size)
    offset.mul_(gain)
    blocks = g.reshape(*gain.shape, width_of(g, level))
    update = torch.addcmul(offset.unsqueeze(-1), blocks, gain.unsqueeze(-1), value=-hyper.signed_factor)
    update = cut_like(update.view(g.shape), p)
    p.add_(update)
    if notes is not None:
        notes.update(update)


def _direction(parts: tuple[Tensor, ...]) -> Tensor:
    m, gain, _ = parts
    return m * gain


# In Triton: see :class:`gwt_kernels.rules.rule.Kernel` ---------------------------------------------------------


@statement
def kernel_moments(mean, square, m, v, numbers, root):
    b1, rest1, b2, rest2, _, _ = numbers
    a = mean * root
    m = b1 * m + rest1 * a
    v = b2 * v + rest2 * (a * a)
    return m, v


@statement
def kernel_update(g, residual, m, v, step_size, numbers, per_root):
    denominator = tl.sqrt_rn(v) + numbers[4]
    gain = tl.div_rn(tl.zeros_like(denominator) + step_size, denominator)  # [NB]
    return (residual + (m * per_root)[:, None]) * gain[:, None]


@statement
def kernel_direction(m, v, numbers):
    return m / (tl.sqrt_rn(v) + numbers[4])


GWT = Rule("gwt", __name__, _moments, _update, _direction, plain=ADAMW, norm_growth_limit=1.01, is_literal=True)
