"""Lion (arXiv 2302.06675) on the means of blocks: one moment, and the sign of an interpolation as the update.

For a block of ``W = 2**level`` neighbours with mean ``mean`` and moment ``m``, with ``r_i = g_i - mean`` and
``s = detail_scale``::

    u_i = sign(b1*m + (1-b1)*mean + s*r_i)
    m = b2*m + (1-b2)*mean

Level 0 is Lion. There is neither limiter nor bias correction. The sign of 0 is 0. The sign of infinity and NaN
is NaN, so that weights show them: PyTorch's sign of NaN, 0, would hide what stays in the moment.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from gwt_kernels.core.kernel import statement
from gwt_kernels.rules.blocks import width_of
from gwt_kernels.rules.rule import Context, Rule, subtract

if TYPE_CHECKING:
    import triton.language as tl

# In PyTorch ------------------------------------------------------------------------------------------------


def _moments(g: Tensor, m: Tensor, v: None, context: Context) -> tuple[Tensor, ...]:
    """Return the updates of the elements, padded to whole blocks and not yet multiplied by the step size."""
    hyper, level = context.hyper, context.level
    g, mean, _ = context.scaled_blocks(g, m.dtype)
    direction = (m * hyper.beta1).add_(mean, alpha=1 - hyper.beta1)
    m.mul_(hyper.beta2).add_(mean, alpha=1 - hyper.beta2)
    if level:
        residual = g.reshape(*mean.shape, width_of(g, level)) - mean.unsqueeze(-1)
        direction = direction.unsqueeze(-1).add(residual, alpha=hyper.detail_scale).view(g.shape)
    return (direction.sign().add_(direction, alpha=0),)


# In Triton: see :class:`gwt_kernels.rules.rule.Kernel` ---------------------------------------------------------


@statement
def kernel_moments(mean, square, m, v, numbers, root):
    b1, rest1, b2, rest2, _, _ = numbers
    direction = b1 * m + rest1 * mean
    m = b2 * m + rest2 * mean
    return m, direction


@statement
def kernel_update(g, residual, m, v, step_size, numbers, per_root):
    u = v[:, None] + numbers[5] * residual  # [NB, W]
    return tl.where(u > 0.0, step_size, tl.where(u < 0.0, -step_size, 0.0)) + u * 0.0


LION = Rule(
    "lion",
    __name__,
    _moments,
    subtract,
    slots=("exp_avg",),
    corrects_bias=False,
    takes_detail_scale=True,
    is_of_elements=True,
)
