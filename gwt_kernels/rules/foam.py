"""The folded rule, FOAM (arXiv 2512.07112): a denominator per element, which bounds every element of the update.

For a block of ``W = 2**level`` neighbours with mean ``mean``, with ``r_i = g_i - mean``::

    m = b1*m + (1-b1)*mean
    v = b2*v + (1-b2)*mean(g*g)
    u_i = (m + s*r_i) / (sqrt(v + s*s*r_i*r_i) + eps)

with ``s = detail_scale``, which the authors call ``res_scale``.

There is no limiter.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gwt_kernels.core.kernel import statement
from gwt_kernels.rules.adamw import ADAMW
from gwt_kernels.rules.blocks import block_squares, width_of
from gwt_kernels.rules.rule import Context, Rule, subtract

if TYPE_CHECKING:
    import triton.language as tl

# In PyTorch ------------------------------------------------------------------------------------------------


def _moments(g: Tensor, m: Tensor, v: Tensor, context: Context) -> tuple[Tensor, ...]:
    """Return the updates of the elements, padded to whole blocks and not yet multiplied by the step size."""
    hyper, level = context.hyper, context.level
    g, mean, width = context.scaled_blocks(g, m.dtype)
    m.mul_(hyper.beta1).add_(mean, alpha=1 - hyper.beta1)
    v.mul_(hyper.beta2).add_(block_squares(g, level, context.rows), alpha=(1 - hyper.beta2) / width)
    residual = g.reshape(*mean.shape, width_of(g, level)) - mean.unsqueeze(-1)
    if hyper.detail_scale != 1.0:
        residual.mul_(hyper.detail_scale)
    denominator = torch.addcmul(v.unsqueeze(-1), residual, residual).sqrt_().add_(hyper.eps)
    return (residual.add_(m.unsqueeze(-1)).div_(denominator).view(g.shape),)


# In Triton: see :class:`gwt_kernels.rules.rule.Kernel` ---------------------------------------------------------


@statement
def kernel_moments(mean, square, m, v, numbers, root):
    b1, rest1, b2, rest2, _, _ = numbers
    m = b1 * m + rest1 * mean
    v = b2 * v + rest2 * square
    return m, v


@statement
def kernel_update(g, residual, m, v, step_size, numbers, per_root):
    residual *= numbers[5]
    denominators = tl.sqrt_rn(v[:, None] + residual * residual) + numbers[4]  # [NB, W]
    return tl.div_rn(step_size * (residual + m[:, None]), denominators)


FOAM = Rule(
    "foam",
    __name__,
    _moments,
    subtract,
    plain=ADAMW,
    takes_detail_scale=True,
    squares="elements",
    is_of_elements=True,
)
