"""Blocks of neighbours: their sums in PyTorch and in Triton, and rows padded to whole blocks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor
from torch.nn import functional as F

from gwt_kernels.core.kernel import statement
from gwt_kernels.core.level import ROW, Level, block_width

if TYPE_CHECKING:
    import triton.language as tl


class Heads(NamedTuple):
    """The rows here that share a second moment of a tensor.

    Attributes:
        lengths: How many neighbours share each of the second moments that are here: none to all of a head's.
        rows: How many rows of the whole tensor do.
    """

    lengths: Sequence[int]
    rows: int


class RowSums(NamedTuple):
    """What is known of whole rows of a gradient, of which a process has some columns.

    Attributes:
        length: Elements of a whole row where it is one block, else blocks.
        sums: Of the elements, or of the squares of blocks' means, of a head's rows on average: ``[..., 1]``.
        squares: Sums of squares of elements, or the mean square of the sums of a head's rows, likewise; None where
            no rule asks for them.
    """

    length: int
    sums: Tensor
    squares: Tensor | None = None

    def part(self, first: int, shape: Sequence[int]) -> RowSums:
        """Those of rows from ``first`` on, as many as a gradient of this shape has."""
        n, held = math.prod(shape[:-1]), (*shape[:-1], 1)
        sums_here = [x.view(-1)[first : first + n].view(held) for x in (self.sums, self.squares) if x is not None]
        return RowSums(self.length, *sums_here)

    def scaled(self, factor: Any, level: Level) -> RowSums:
        """The sums of a gradient ``factor`` times as large."""
        sums = self.sums * (factor if level == ROW else factor * factor)
        return RowSums(self.length, sums, None if self.squares is None else self.squares * (factor * factor))


def width_of(g: Tensor, level: Level, rows: RowSums | None = None) -> int:
    """Elements of a block of ``g``: of whole ``rows`` where these are blocks, of which ``g`` is a part."""
    if rows is not None and level == ROW:
        return rows.length
    return block_width(level, g.shape[-1] if g.dim() else 1)


def block_sums(g: Tensor, level: Level, rows: RowSums | None = None) -> Tensor:
    """Sums of the blocks along the last dimension, zeros beyond its end: ``[..., nb]``; see :func:`width_of`.

    Pairwise additions of strided halves: on a CPU several times as fast as a sum over a short last axis.
    """
    if level == ROW:
        return g.sum(-1, keepdim=True) if rows is None else rows.sums.clone()
    for _ in range(level):
        g = pad_to_blocks(g, 1)
        g = g[..., 0::2] + g[..., 1::2]
    return g


def block_squares(g: Tensor, level: Level, rows: RowSums | None) -> Tensor:
    """Sums of the squares of the blocks' elements, as :func:`block_sums`."""
    if rows is not None and rows.squares is not None:
        return rows.squares
    return block_sums(g.square(), level)


def pad_to_blocks(x: Tensor, level: Level) -> Tensor:
    """``x`` with zeros on the right up to a whole number of blocks."""
    missing = -x.shape[-1] % width_of(x, level) if x.dim() else 0
    return F.pad(x, (0, missing)) if missing else x


def cut_like(x: Tensor, p: Tensor) -> Tensor:
    """Of ``x``, of whole blocks, what lies in the rows of ``p``."""
    return x[..., : p.shape[-1]] if p.dim() else x


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
    mean = g
    if W > 1:
        mean = kernel_block_sums(g, W, NB, KIND) * (1.0 / W)
        if KIND != "flat":
            mean, m = tl.split(tl.join(mean, m))
    return mean, m


@statement
def kernel_block_squares(g, W: tl.constexpr, NB: tl.constexpr, KIND: tl.constexpr):
    """The mean of the squares of each block of ``g [NB * W]``: ``[NB]``."""
    return kernel_block_sums(g * g, W, NB, KIND) * (1.0 / W)


@statement
def kernel_residuals(g, mean, W: tl.constexpr, NB: tl.constexpr):
    """What the elements of ``g [NB * W]`` differ by from the means of their blocks ``[NB]``: ``[NB, W]``."""
    residual = tl.zeros((NB, 1), tl.float32)
    if W > 1:
        residual = tl.reshape(g, (NB, W)) - mean[:, None]
    return residual
