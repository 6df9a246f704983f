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
    """Heads of a tensor: neighbouring rows that share a second moment.

    Attributes:
        lengths: Number of this process's rows for each of its second moments: none to all of a head.
        rows: Number of rows of a whole head.
    """

    lengths: Sequence[int]
    rows: int


class RowSums(NamedTuple):
    """Sums over whole rows of a gradient, of which a process has some columns.

    Attributes:
        length: Number of a row's elements if it is one block, else of its blocks.
        sums: Sums of elements if a row is one block, else of blocks' squared means (averaged over a head's rows):
            ``[..., 1]``.
        squares: Sums of squared elements, or the mean square of the sums of a head's rows: ``[..., 1]``; None if
            the rule needs neither.
    """

    length: int
    sums: Tensor
    squares: Tensor | None = None

    def part(self, first: int, shape: Sequence[int]) -> RowSums:
        """Return the sums of rows from ``first`` on, as many as a gradient of this shape has."""
        n, held = math.prod(shape[:-1]), (*shape[:-1], 1)
        sums_here = [x.view(-1)[first : first + n].view(held) for x in (self.sums, self.squares) if x is not None]
        return RowSums(self.length, *sums_here)

    def scaled(self, factor: Any, level: Level) -> RowSums:
        """Return the sums of the gradient times ``factor``."""
        sums = self.sums * (factor if level == ROW else factor * factor)
        return RowSums(self.length, sums, None if self.squares is None else self.squares * (factor * factor))


def width_of(g: Tensor, level: Level, rows: RowSums | None = None) -> int:
    """Return the number of elements of a block of ``g``, or of a whole row if ``rows`` are blocks."""
    if rows is not None and level == ROW:
        return rows.length
    return block_width(level, g.shape[-1] if g.dim() else 1)


def block_sums(g: Tensor, level: Level, rows: RowSums | None = None) -> Tensor:
    """Return the sums of blocks (see :func:`width_of`) along the last dimension, padded with zeros: ``[..., nb]``.

    It adds strided halves pairwise: on a CPU several times as fast as a sum over a short last axis.
    """
    if level == ROW:
        return g.sum(-1, keepdim=True) if rows is None else rows.sums.clone()
    for _ in range(level):
        g = pad_to_blocks(g, 1)
        g = g[..., 0::2] + g[..., 1::2]
    return g


def block_squares(g: Tensor, level: Level, rows: RowSums | None) -> Tensor:
    """Return the sums of the squares of the blocks' elements, like :func:`block_sums`."""
    if rows is not None and rows.squares is not None:
        return rows.squares
    return block_sums(g.square(), level)


def pad_to_blocks(x: Tensor, level: Level) -> Tensor:
    """Return ``x`` with zeros on the right up to a whole number of blocks."""
    missing = -x.shape[-1] % width_of(x, level) if x.dim() else 0
    return F.pad(x, (0, missing)) if missing else x


def cut_like(x: Tensor, p: Tensor) -> Tensor:
    """Cut the rows of ``x``, padded to whole blocks, to the width of ``p``."""
    return x[..., : p.shape[-1]] if p.dim() else x


@statement
def kernel_block_sums(x, W: tl.constexpr, NB: tl.constexpr, KIND: tl.constexpr):
    """Return the sum of each block of ``x [NB * W]``: add pairs of neighbours, then pairs of these sums, and so on.

    So the sums are the same to the bit in any layout, as ``a + b`` is ``b + a``. On the row path each element of a
    block is in another lane, and one lane computes the block's moments. If there is a block for each lane, all its
    elements go to that lane; else its lanes add them up, and one gets the last sum.
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
def kernel_block_means(g, m, W: tl.constexpr, NB: tl.constexpr, KIND: tl.constexpr, SQUARES: tl.constexpr):
    """Return the mean of each block of ``g [NB * W]``, that of its ``SQUARES`` or the same, and ``m [NB]``.

    One operation returns two of them, unchanged, so that the compiler distributes both over lanes alike. On the row
    path it would otherwise add up a block in all of its lanes, which need its mean: it finds that cheaper than to
    send them the sum from the lane that holds ``m``. On the flat path, blocks of 16 elements or more lie in several
    lanes; there Triton before 3.9 would send whole tiles through shared memory in place of the blocks' results.
    """
    mean = g
    if W > 1:
        mean = kernel_block_sums(g, W, NB, KIND) * (1.0 / W)
        if KIND != "flat" or (W >= 16 and SQUARES != "elements"):
            mean, m = tl.split(tl.join(mean, m))
    square = mean
    if SQUARES == "elements":
        square = kernel_block_sums(g * g, W, NB, KIND) * (1.0 / W)
        if KIND == "flat" and W >= 16:
            mean, square = tl.split(tl.join(mean, square))
    return mean, square, m


@statement
def kernel_residuals(g, mean, W: tl.constexpr, NB: tl.constexpr):
    """Return the differences of ``g [NB * W]`` from the means of their blocks ``[NB]``: ``[NB, W]``."""
    residual = tl.zeros((NB, 1), tl.float32)
    if W > 1:
        residual = tl.reshape(g, (NB, W)) - mean[:, None]
    return residual
