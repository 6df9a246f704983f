"""AdamW without bias correction inside the root: the rules of GWT and FOAM at level 0.

Per element, with ``m`` and ``v`` the moments (Loshchilov and Hutter, arXiv 1711.05101)::

    m = b1*m + (1-b1)*g
    v = b2*v + (1-b2)*g*g
    u = m / (sqrt(v) + eps)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from gwt_kernels.core.kernel import statement
from gwt_kernels.rules.rule import Context, Rule

if TYPE_CHECKING:
    import triton.language as tl

# In PyTorch ------------------------------------------------------------------------------------------------


def _moments(g: Tensor, m: Tensor, v: Tensor, context: Context) -> tuple[Tensor, ...]:
    hyper = context.hyper
    g = hyper.scaled(g.to(m.dtype))
    m.mul_(hyper.beta1).add_(g, alpha=1 - hyper.beta1)
    v.mul_(hyper.beta2).addcmul_(g, g, value=1 - hyper.beta2)
    if context.notes is not None:
        context.notes.gradient(g, 1.0, g, 1)
    return m, v.sqrt().add_(hyper.eps)


def _update(p: Tensor, g: Tensor, parts: tuple[Tensor, ...], step_size: Tensor | float, context: Context) -> None:
    m, denominator = parts
    p.addcdiv_(m, denominator, value=-step_size)  # type: ignore[arg-type]  # level 0 has no limiter: a number
    if context.notes is not None:
        context.notes.update(m / denominator, float(step_size))


# In Triton: see :class:`gwt_kernels.rules.rule.Kernel` ---------------------------------------------------------


@statement
def kernel_moments(mean, square, m, v, numbers, root):
    b1, rest1, b2, rest2, _, _ = numbers
    m = b1 * m + rest1 * mean
    v = b2 * v + rest2 * (mean * mean)
    return m, v


@statement
def kernel_update(g, residual, m, v, step_size, numbers, per_root):
    denominator = tl.sqrt_rn(v) + numbers[4]
    return m * tl.div_rn(tl.zeros_like(denominator) + step_size, denominator)


ADAMW = Rule("adamw", __name__, _moments, _update, is_scaled=False, is_literal=True, is_of_elements=True)
