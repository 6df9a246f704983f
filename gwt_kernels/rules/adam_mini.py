"""Adam-mini (arXiv 2406.16793) on the means of blocks: a first moment per block, a second moment for many blocks.

For a block of ``W = 2**level`` neighbours with mean ``mean``, with ``r_i = g_i - mean``, and for a *head*, the rows
that share a second moment (one, ``head_rows``, or all of a tensor)::

    m = b1*m + (1-b1)*mean
    v = b2*v + (1-b2) * (the mean of W*mean**2 over the blocks of the head)
    u_i = (m / (1-b1**t) + r_i) / (sqrt(v / (1-b2**t)) + eps)

``W*mean**2`` is the square of an approximation coefficient. Level 0, where no ``scale`` multiplies updates, is
Adam-mini. Its bias correction is inside the root. The statements compute ``(m + s*r_i) / (sqrt(v) + eps)`` with
the options of :meth:`gwt_kernels.core.hyper.Hyper.corrected`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor

from gwt_kernels.core.kernel import statement
from gwt_kernels.core.level import ROW
from gwt_kernels.rules.blocks import width_of
from gwt_kernels.rules.rule import Context, Rule, subtract

if TYPE_CHECKING:
    import triton.language as tl

# In PyTorch ------------------------------------------------------------------------------------------------


def _moments(g: Tensor, m: Tensor, v: Tensor, context: Context) -> tuple[Tensor, ...]:
    """Return the updates of the elements, padded to whole blocks and not yet multiplied by the step size."""
    hyper, level = context.hyper, context.level
    g, mean, width = context.scaled_blocks(g, m.dtype)
    m.mul_(hyper.beta1).add_(mean, alpha=1 - hyper.beta1)
    if context.rows is not None and context.rows.squares is not None:
        squares = context.rows.squares / context.rows.length**2
    elif context.rows is None or level == ROW:
        squares = mean.square().mean(-1, keepdim=True)  # per row
    else:
        squares = context.rows.sums / context.rows.length
    heads = squares.reshape(v.numel(), -1).mean(1).view(v.shape)
    v.mul_(hyper.beta2).add_(heads, alpha=(1 - hyper.beta2) * width)
    denominators = v.sqrt().add_(hyper.eps).view(-1, 1)
    denominators = denominators.expand(-1, squares.numel() // v.numel()).reshape(squares.shape)
    if not level:
        return (m / denominators,)
    residual = (g.reshape(*mean.shape, width_of(g, level)) - mean.unsqueeze(-1)).mul_(hyper.detail_scale)
    return (residual.add_(m.unsqueeze(-1)).div_(denominators.unsqueeze(-1)).view(g.shape),)


# In Triton: see :class:`gwt_kernels.rules.rule.Kernel`; ``v`` and ``square`` are of a row, or of its head -------


@statement
def kernel_moments(mean, square, m, v, numbers, root):
    b1, rest1, b2, rest2, _, _ = numbers
    m = b1 * m + rest1 * mean
    v = b2 * v + rest2 * square
    return m, v


@statement
def kernel_update(g, residual, m, v, step_size, numbers, per_root):
    denominator = tl.sqrt_rn(v) + numbers[4]
    gain = tl.div_rn(tl.zeros_like(denominator) + step_size, denominator)
    return (numbers[5] * residual + m[:, None]) * gain[:, None]


_BLOCKS = Rule(
    "adam_mini",
    __name__,
    _moments,
    subtract,
    row_slots=("exp_avg_sq",),
    squares="coefficients",
    corrects_inside=True,
    is_of_elements=True,
)
ADAM_MINI = replace(_BLOCKS, plain=replace(_BLOCKS, is_scaled=False))
