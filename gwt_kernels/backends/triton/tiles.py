"""Index arithmetic shared by all kernels: addresses of tensors in tables, and of elements in tiles.

A tile is ``NB`` consecutive blocks of a tensor. On the flat path blocks are contiguous. On the row path a row has
``row_blocks`` blocks, the last of which may be incomplete or only padding. Elements beyond a row count as zero.

``KIND`` is the kind of a tile at compile time. ``FLAT``: on the flat path. ``RUN``: complete and within one row, as
most are, so that no mask is needed. ``ROWS``: any; rows are found by a multiplication in place of a division.
"""

from __future__ import annotations

import triton
import triton.language as tl

FLAT, RUN, ROWS = tl.constexpr("flat"), tl.constexpr("run"), tl.constexpr("rows")


@triton.jit
def tile_of(
    n_blocks,
    row_blocks,
    reciprocal,
    first_block,
    NB: tl.constexpr,
    KIND: tl.constexpr,
    MULTIPLE: tl.constexpr,
):
    """Return the tile that starts with block ``first_block``, for the functions below.

    It is a tuple: first block; blocks from there to the end of tensor or tile (32 bits); row of the first block;
    blocks from there to the end of that row; period ``c`` of rows in the tile, and ``place`` of the first block in
    its row (both 32 bits). Block ``b`` of the tile is ``(b + place) // c`` rows below the first block. ``c`` is
    ``row_blocks``, or less for rows longer than two tiles, of which a tile only needs the end, with less than 4
    blocks of padding.

    Args:
        n_blocks: Blocks of the tensor; on the flat path a multiple of ``MULTIPLE``.
        row_blocks: Blocks of a row, at least 1.
        reciprocal: ``(2**64 - 1) // row_blocks``, as 64 bits.
        first_block: First block of the tile.
    """
    here = tl.multiple_of(tl.minimum(n_blocks - first_block, NB).to(tl.int32), MULTIPLE if KIND == FLAT else 1)
    row = first_block - first_block
    left = n_blocks - first_block
    period = here
    place = here - here
    if KIND != FLAT:
        row = tl.umulhi(first_block.to(tl.uint64), reciprocal.to(tl.uint64)).to(tl.int64)  # or 1 less
        left = (row + 1) * row_blocks - first_block
        row = tl.where(left > 0, row, row + 1)
        left = tl.where(left > 0, left, left + row_blocks)
        period = tl.minimum(row_blocks, 2 * NB + 4).to(tl.int32)
        place = period - tl.minimum(left, period).to(tl.int32)
    return first_block, here, row, left, period, place


@triton.jit
def _rows_passed(tile, elements, SIZE: tl.constexpr):
    """Return how many rows below the tile's first row its ``elements`` are, with ``SIZE`` elements per block."""
    _, _, _, _, period, place = tile
    # x // d is the upper half of (x + 1) * ((2**32 - 1) // d) if x * d is far below 2**32, as here.
    reciprocal = 0xFFFFFFFF // (period * SIZE).to(tl.uint32)
    return tl.umulhi((elements + (place * SIZE + 1)).to(tl.uint32), reciprocal).to(tl.int32)


@triton.jit
def _left_out(row_blocks, TOGETHER: tl.constexpr):
    """Return the extra blocks of a row padded to a multiple of 4 instead of a multiple of ``TOGETHER``."""
    return (0 - row_blocks.to(tl.int32)) & (4 - TOGETHER)


@triton.jit
def first_drawn(tile, row_blocks, TOGETHER: tl.constexpr, KIND: tl.constexpr):
    """Return the random bits' index of a tile's first block: rows are padded to multiples of 4 blocks there.

    The tile's rows are padded to multiples of ``TOGETHER``, which is 1, 2 or 4.
    """
    first = tile[0]
    if KIND != FLAT and TOGETHER < 4:
        first += tile[2] * _left_out(row_blocks, TOGETHER)
    return first


@triton.jit
def index_drawn(tile, row_blocks, TOGETHER: tl.constexpr, NB: tl.constexpr):
    """Return the random bits' index of every ``TOGETHER``-th block: int64 ``[NB // TOGETHER]``."""
    blocks = tl.arange(0, NB // TOGETHER) * TOGETHER
    blocks += _rows_passed(tile, blocks, 1) * _left_out(row_blocks, TOGETHER)
    return first_drawn(tile, row_blocks, TOGETHER, ROWS) + blocks


@triton.jit
def _places(tile, width, row_blocks, SIZE: tl.constexpr, NB: tl.constexpr):
    """Return offsets of an array's elements from the tile's first (32 bits), and a mask: ``[NB * SIZE]``."""
    _, here, _, _, period, place = tile
    missing = (row_blocks * SIZE - width).to(tl.int32)
    elements = tl.arange(0, NB * SIZE)
    passed = _rows_passed(tile, elements, SIZE)
    column = elements + place * SIZE - passed * (period * SIZE)
    inside = (elements < here * SIZE) & (column < period * SIZE - missing)
    return elements - passed * missing, inside


@triton.jit
def is_run(tile, width, row_blocks, W: tl.constexpr, NB: tl.constexpr):
    """Return whether a tile of the row path is a ``RUN``: complete, in one row, and without padding."""
    return tile[3] * W >= row_blocks * W - width + NB * W


@triton.jit
def _start(tile, width, row_blocks, SIZE: tl.constexpr, KIND: tl.constexpr):
    """Return the index of the tile's first element in an array."""
    start = tile[0] * SIZE
    if KIND != FLAT:
        start -= tile[2] * (row_blocks * SIZE - width)
    return start


@triton.jit
def index_in_array(tile, width, row_blocks, SIZE: tl.constexpr, NB: tl.constexpr, KIND: tl.constexpr):
    """Return the indices of a tile's elements in an array: int64 ``[NB * SIZE]``."""
    places = tl.arange(0, NB * SIZE)
    if KIND == ROWS:
        places, _ = _places(tile, width, row_blocks, SIZE, NB)
    return _start(tile, width, row_blocks, SIZE, KIND) + places


@triton.jit
def inside_tile(tile, width, row_blocks, SIZE: tl.constexpr, NB: tl.constexpr, KIND: tl.constexpr):
    """Return the mask of a tile's elements that are in an array: ``[NB * SIZE]``."""
    if KIND == ROWS:
        _, inside = _places(tile, width, row_blocks, SIZE, NB)
    else:
        inside = tl.arange(0, NB * SIZE) < tile[1] * SIZE
    return inside


@triton.jit
def runs_passed(places, first, n, NB: tl.constexpr):
    """Return ``(first + places) // n`` (32 bits) for ``first < n`` and ``places`` up to ``NB``, by a product."""
    period = tl.minimum(n, 2 * NB + 4).to(tl.uint32)  # places reach at most one end of a longer n
    before = period - tl.minimum(n - first, period).to(tl.uint32)
    return tl.umulhi((places + 1).to(tl.uint32) + before, 0xFFFFFFFF // period).to(tl.int32)


@triton.jit
def factor_places(tile, row_blocks, padded, rows, columns, NB: tl.constexpr, KIND: tl.constexpr):
    """Return the indices of the row and column factors of a tile's blocks, and a mask of the blocks inside.

    All are ``[NB]``, the indices of 32 bits. Rows of matrices follow one another, and so do their columns.
    """
    start = _start(tile, row_blocks, padded, 1, KIND)
    places = tl.arange(0, NB)
    if KIND == ROWS:
        places, inside = _places(tile, row_blocks, padded, 1, NB)
    else:
        inside = places < tile[1]
    row = start // columns
    matrix = row // rows
    column = start - row * columns
    passed = runs_passed(places, column, columns, NB)
    matrices = runs_passed(passed, row - matrix * rows, rows, NB)
    first = (matrix * columns + column).to(tl.int32)
    return row.to(tl.int32) + passed, first + places + (matrices - passed) * columns.to(tl.int32), inside


@triton.jit
def load_tile(
    ptr,
    tile,
    width,
    row_blocks,
    SIZE: tl.constexpr,
    NB: tl.constexpr,
    KIND: tl.constexpr,
    MULTIPLE: tl.constexpr,
):
    """Load a tile of an array with ``SIZE`` elements per block and ``width`` per row: ``[NB * SIZE]``."""
    ptr += _start(tile, width, row_blocks, SIZE, KIND)
    places = tl.arange(0, NB * SIZE)
    if KIND == RUN:
        x = tl.load(ptr + places)
    elif KIND == ROWS:
        places, inside = _places(tile, width, row_blocks, SIZE, NB)
        x = tl.load(ptr + places, mask=inside, other=0)
    else:
        # MULTIPLE * SIZE consecutive elements are all inside or all outside, so one access can load them.
        x = tl.load(ptr + places, mask=places < tl.multiple_of(tile[1] * SIZE, MULTIPLE * SIZE), other=0)
    return x


@triton.jit
def store_tile(
    ptr,
    x,
    tile,
    width,
    row_blocks,
    SIZE: tl.constexpr,
    NB: tl.constexpr,
    KIND: tl.constexpr,
    MULTIPLE: tl.constexpr,
):
    """Store ``x [NB * SIZE]`` where :func:`load_tile` would read it."""
    ptr += _start(tile, width, row_blocks, SIZE, KIND)
    places = tl.arange(0, NB * SIZE)
    if KIND == RUN:
        tl.store(ptr + places, x)
    elif KIND == ROWS:
        places, inside = _places(tile, width, row_blocks, SIZE, NB)
        tl.store(ptr + places, x, mask=inside)
    else:
        tl.store(ptr + places, x, mask=places < tl.multiple_of(tile[1] * SIZE, MULTIPLE * SIZE))


@triton.jit
def array_ptr(pointers_ptr, which, i, n_tensors, dtype: tl.constexpr, ALIGN: tl.constexpr):
    """Return the address of one of tensor ``i``'s arrays, a multiple of ``ALIGN`` bytes."""
    return tl.multiple_of(tl.load(pointers_ptr + which * n_tensors + i).to(tl.pointer_type(dtype)), ALIGN)
