"""Blocks of neighbours: their sums in PyTorch and in Triton, and rows padded to whole blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn import functional as F

from gwt_kernels.core.kernel import statement

if TYPE_CHECKING:
    import triton.language as tl

__all__ = ["block_sums", "kernel_block_sums", "pad_to_multiple"]


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
    missing = -x.shape[-1] % width
    return F.pad(x, (0, missing)) if missing else x


@statement
def kernel_block_sums(x, W: tl.constexpr, NB: tl.constexpr, KIND: tl.constexpr):
    """The sum of each block of ``x [NB * W]``: of pairs of neighbours, then of pairs of these sums, and so on.

    So the sums are the same to the bit in any layout, as ``a + b`` is ``b + a``. On the row path a block's elements
    lie in as many lanes, which all hold its sum; the last step gives it to one of them, which then computes what
    there is one of a block.
    """
    for i in tl.static_range(0, 12):
        if W >> i > 1:
            pairs = tl.reshape(x, (NB * (W >> i + 1), 2))
            if W >> i == 2 and KIND != "flat":
                even, odd = tl.split(pairs)
                x = even + odd
            else:
                x = tl.sum(pairs, axis=1)
    return x
