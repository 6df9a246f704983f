"""Where a table's tensors and a tile's elements lie in memory: the index arithmetic that all kernels share."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["array_ptr", "owner", "tile_offsets"]


@triton.jit
def tile_offsets(
    n_blocks,
    width,
    row_blocks,
    first_block,
    W: tl.constexpr,
    NB: tl.constexpr,
    FLAT: tl.constexpr,
    MULTIPLE: tl.constexpr,
):
    """Offsets and masks of the ``NB`` blocks of ``W`` elements that start with block ``first_block``.

    The array has ``n_blocks`` blocks. On the flat path they lie end to end, and ``n_blocks`` is a multiple of
    ``MULTIPLE``. On the row path a row of ``width`` elements is ``row_blocks`` blocks, the last one cut short.

    Returns the offset of the tile's origin (64 bits), then relative to that origin (32 bits; the host has
    checked that they suffice) the elements and which of them are inside, ``[NB * W]`` on the flat path and
    ``[NB, W]`` on the row path, then the blocks and which of them are inside, ``[NB]``.
    """
    here = tl.multiple_of(tl.minimum(n_blocks - first_block, NB).to(tl.int32), MULTIPLE)
    blocks = tl.arange(0, NB)
    if FLAT:
        start = first_block * W
        elements = tl.arange(0, NB * W)
        # A run of MULTIPLE * W elements is inside or outside as a whole, so one access can take all of it.
        inside = elements < tl.multiple_of(here * W, MULTIPLE * W)
    else:
        first_row = first_block // row_blocks
        start = first_row * width
        block = (first_block - first_row * row_blocks).to(tl.int32) + blocks
        row = block // row_blocks.to(tl.int32)
        column = (block - row * row_blocks.to(tl.int32))[:, None] * W + tl.arange(0, W)[None, :]
        elements = row[:, None] * width.to(tl.int32) + column
        inside = (blocks < here)[:, None] & (column < width.to(tl.int32))
    return start, elements, inside, blocks, blocks < here


@triton.jit
def owner(first_ptr, index, n_tensors):
    """The tensor that tile (or chunk) ``index`` belongs to: the last whose first one is not above it."""
    low = 0
    high = n_tensors
    while high - low > 1:
        middle = (low + high) // 2
        after = tl.load(first_ptr + middle) > index
        low = tl.where(after, low, middle)
        high = tl.where(after, middle, high)
    return low


@triton.jit
def array_ptr(pointers_ptr, which, i, n_tensors, dtype: tl.constexpr, ALIGN: tl.constexpr):
    """Address of one of tensor ``i``'s arrays, a multiple of ``ALIGN`` bytes."""
    return tl.multiple_of(tl.load(pointers_ptr + which * n_tensors + i).to(tl.pointer_type(dtype)), ALIGN)
