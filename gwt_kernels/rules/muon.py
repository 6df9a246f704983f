"""GWT-Muon: momentum on the means of blocks; Newton-Schulz (newton_schulz.py) orthogonalises it with the details.

For a block of ``W = 2**level`` neighbours of a matrix's row with mean ``mean``, with ``r_i = g_i - mean`` and
``s = detail_scale``::

    m = mu*m + (1-mu)*mean
    M_i = mu*m + (1-mu)*mean + s*r_i        with Nesterov's momentum; m + s*r_i without
    p = p - lr*weight_decay*p - lr*scale*adjust*NewtonSchulz(M)

Level 0 is Muon (K. Jordan, 2024) as in ``torch.optim.Muon``. ``b1`` is ``mu``; ``b2`` is ``mu`` too, or 1 without
Nesterov's momentum. The first stage, :data:`MUON`, writes ``M``; the last one, :data:`ORTHOGONAL`, takes
``NewtonSchulz(M)`` as a gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gwt_kernels.core.kernel import statement
from gwt_kernels.rules.blocks import block_sums, pad_to_blocks, width_of
from gwt_kernels.rules.rule import Context, Rule

# In PyTorch ------------------------------------------------------------------------------------------------


def _moments(g: Tensor, m: Tensor, v: None, context: Context) -> tuple[Tensor, ...]:
    """Return ``M``, padded to whole blocks."""
    hyper, level = context.hyper, context.level
    g, mean, _ = context.scaled_blocks(g, m.dtype)
    m.mul_(hyper.beta1).add_(mean, alpha=1 - hyper.beta1)
    direction = (m * hyper.beta2).add_(mean, alpha=1 - hyper.beta2)
    if not level:
        return (direction,)
    residual = g.reshape(*mean.shape, width_of(g, level)) - mean.unsqueeze(-1)
    torch.add(direction.unsqueeze(-1), residual, alpha=hyper.detail_scale, out=residual)
    return (residual.view(g.shape),)


def _write(p: Tensor, g: Tensor, parts: tuple[Tensor, ...], step_size: Tensor | float, context: Context) -> None:
    p.copy_(parts[0][..., : p.shape[-1]] if context.level else parts[0])


def _means(g: Tensor, m: Tensor, v: None, context: Context) -> tuple[Tensor, ...]:
    """Return nothing; add the update's details and approximation to telemetry."""
    if context.notes is not None:
        width, level = width_of(g, context.level), context.level
        mean = block_sums(pad_to_blocks(g.float(), level), level).div_(width) if level else g
        context.notes.gradient(g, 1.0, mean, width)
    return ()


def _apply(p: Tensor, g: Tensor, parts: tuple[Tensor, ...], step_size: Tensor | float, context: Context) -> None:
    p.sub_(g, alpha=step_size)  # type: ignore[arg-type]  # a number, as there is no limiter
    if context.notes is not None:
        context.notes.update(g, float(step_size))


# In Triton: see :class:`gwt_kernels.rules.rule.Kernel` ---------------------------------------------------------


@statement
def kernel_moments(mean, square, m, v, numbers, root):
    b1, rest1, b2, rest2, _, _ = numbers
    m = b1 * m + rest1 * mean
    return m, b2 * m + rest2 * mean


@statement
def kernel_update(g, residual, m, v, step_size, numbers, per_root):
    return v[:, None] + numbers[5] * residual


@statement
def kernel_none(mean, square, m, v, numbers, root):
    return m, v


@statement
def kernel_apply(g, residual, m, v, step_size, numbers, per_root):
    return g * step_size


ORTHOGONAL = Rule(
    "orthogonal",
    __name__,
    _means,
    _apply,
    statements=("kernel_none", "kernel_apply"),
    slots=(),
    corrects_bias=False,
)
MUON = Rule(
    "muon",
    __name__,
    _moments,
    _write,
    slots=("exp_avg",),
    last_stage=ORTHOGONAL,
    reads_weights=False,
    corrects_bias=False,
    takes_detail_scale=True,
    is_of_elements=True,
)
