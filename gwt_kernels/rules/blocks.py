"""Blocks of neighbours: their sums in PyTorch and in Triton, and rows padded to whole blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn import functional as F

from gwt_kernels.core.kernel import statement

if TYPE_CHECKING:
    import triton.language as tl

__all__ = ["block_sums", "kernel_block_means", "kernel_block_sums", "pad_to_multiple"]


def block_sums(g: Tensor, level: int) -> Tensor:
    """Sums of ``2**level`` neighbours along the last dimension, zeros beyond its end: ``[..., nb]``.

    Pairwise additions of strided halves: on a CPU several times as fast as a sum over a short last axis.
    """
    for _ in range(level):
        g = pad_to_multiple(g, 2)
        g = g[..., 0::2] + g[..., 1::2]
    return g


def pad_to_multiple(x: Tensor, width: int) -> Tensor:
    """``x`` with zeros on the right up to a whole number of blocks."""
    missing = -x.shape[-1] % width if width > 1 else 0  # a scalar has no last dimension
    return F.pad(x, (0, missing)) if missing else x


@statement
def kernel_block_sums(x, W: tl.constexpr, NB: tl.constexpr, KIND: tl.constexpr):
    """The sum of each block of ``x [NB * W]``: of pairs of neighbours, then of pairs of these sums, and so on.

    So the sums are the same to the bit in any layout, as ``a + b`` is ``b + a``. On the row path a block's elements
    lie in as many lanes, and one of them is to compute what there is one of a block. Where there is a block for
    each lane, a block's elements all go to that lane; else lanes add up, and one gets the last sum.
    """
    for i in tl.static_range(0, 12):
        if W >> i > 1:
            pairs = tl.reshape(x, (NB * (W >> i + 1), 2))
            if KIND != "flat" and (NB >= 32 or W >> i == 2):
                even, odd = tl.split(pairs)
                x = even + odd
            else:
                x = tl.sum(pairs, axis=1)
    return x


@statement
def kernel_block_means(g, m, W: tl.constexpr, NB: tl.constexpr, KIND: tl.constexpr):
    """The mean of each block of ``g [NB * W]``, and ``m [NB]`` as it is.

    On the row path they come out of one operation. Else the compiler would find it cheaper to add up a block in
    all of its lanes, for what each needs of the mean, than to send them what the lane found that holds ``m``.
    """
    mean = kernel_block_sums(g, W, NB, KIND) * (1.0 / W)
    if KIND != "flat":
        mean, m = tl.split(tl.join(mean, m))
    return mean, m
