"""Where a table's tensors and a tile's elements lie in memory: the index arithmetic that all kernels share.

A tile is ``NB`` blocks of a tensor, one after the other. On the flat path blocks lie end to end. On the row path a
row is ``row_blocks`` blocks, the last of which may be cut short, or lie beyond the row as a whole: it is padding
then. What lies beyond a row counts as zero.

``KIND`` is what is known of a tile when a kernel is compiled. ``FLAT``: it is of the flat path. ``RUN``: it is
whole, and lies within one row, as most do, so that no element has to be asked for. ``ROWS``: it is any; rows are
found by a product in place of a division.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "FLAT",
    "ROWS",
    "RUN",
    "array_ptr",
    "factor_places",
    "first_drawn",
    "index_drawn",
    "index_in_array",
    "inside_tile",
    "is_run",
    "load_tile",
    "store_tile",
    "tile_of",
]

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
    """The tile that starts with block ``first_block``, for the functions below.

    It is a tuple: its first block, the blocks from there to the tensor's end or the tile's (32 bits), the first
    block's row, the blocks from there to that row's end, the period ``c`` of rows in this tile, and where in it
    the first block lies (both 32 bits): the row of block ``b`` of the tile is ``(b + place) // c`` rows below the
    first one's. ``c`` is ``row_blocks`` but for rows longer than two tiles, of which only the end, with less than
    4 blocks of padding, may matter to one.

    Args:
        n_blocks: of the tensor; on the flat path a multiple of ``MULTIPLE``.
        row_blocks: of a row, at least 1.
        reciprocal: ``(2**64 - 1) // row_blocks``, as 64 bits.
        first_block: of the tile.
    """
    here = tl.multiple_of(tl.minimum(n_blocks - first_block, NB).to(tl.int32), MULTIPLE if KIND == FLAT else 1)
    row = first_block - first_block
    left = n_blocks - first_block
    period = here
    place = here - here
    if KIND != FLAT:
        row = tl.umulhi(first_block.to(tl.uint64), reciprocal.to(tl.uint64)).to(tl.int64)  # or one less
        left = (row + 1) * row_blocks - first_block
        row = tl.where(left > 0, row, row + 1)
        left = tl.where(left > 0, left, left + row_blocks)
        period = tl.minimum(row_blocks, 2 * NB + 4).to(tl.int32)
        place = period - tl.minimum(left, period).to(tl.int32)
    return first_block, here, row, left, period, place


@triton.jit
def _rows_passed(tile, elements, SIZE: tl.constexpr):
    """How many rows below the tile's first row its ``elements`` lie, of which a block has ``SIZE``."""
    _, _, _, _, period, place = tile
    # x // d is the upper half of (x + 1) * ((2**32 - 1) // d), where x * d is far below 2**32 as here.
    reciprocal = 0xFFFFFFFF // (period * SIZE).to(tl.uint32)
    return tl.umulhi((elements + (place * SIZE + 1)).to(tl.uint32), reciprocal).to(tl.int32)


@triton.jit
def _left_out(row_blocks, TOGETHER: tl.constexpr):
    """How many blocks more rows have that are padded to whole groups of 4 than to whole groups of ``TOGETHER``."""
    return (0 - row_blocks.to(tl.int32)) & (4 - TOGETHER)


@triton.jit
def first_drawn(tile, row_blocks, TOGETHER: tl.constexpr, KIND: tl.constexpr):
    """The index by which a tile's first block draws, in rows that are padded to whole groups of 4.

    In those of the tile they are padded to whole groups of ``TOGETHER``: 1, 2 or 4.
    """
    first = tile[0]
    if KIND != FLAT and TOGETHER < 4:
        first += tile[2] * _left_out(row_blocks, TOGETHER)
    return first


@triton.jit
def index_drawn(tile, row_blocks, TOGETHER: tl.constexpr, NB: tl.constexpr):
    """Likewise of the first block of each group: int64 ``[NB // TOGETHER]``."""
    blocks = tl.arange(0, NB // TOGETHER) * TOGETHER
    blocks += _rows_passed(tile, blocks, 1) * _left_out(row_blocks, TOGETHER)
    return first_drawn(tile, row_blocks, TOGETHER, ROWS) + blocks


@triton.jit
def _places(tile, width, row_blocks, SIZE: tl.constexpr, NB: tl.constexpr):
    """Where an array's elements lie from the tile's first on (32 bits), and which are inside ``[NB * SIZE]``."""
    _, here, _, _, period, place = tile
    missing = (row_blocks * SIZE - width).to(tl.int32)
    elements = tl.arange(0, NB * SIZE)
    passed = _rows_passed(tile, elements, SIZE)
    column = elements + place * SIZE - passed * (period * SIZE)
    inside = (elements < here * SIZE) & (column < period * SIZE - missing)
    return elements - passed * missing, inside


@triton.jit
def is_run(tile, width, row_blocks, W: tl.constexpr, NB: tl.constexpr):
    """Whether a tile of the row path is a ``RUN``: whole, in one row, and without what is missing at its end."""
    return tile[3] * W >= row_blocks * W - width + NB * W


@triton.jit
def _start(tile, width, row_blocks, SIZE: tl.constexpr, KIND: tl.constexpr):
    """Which element of an array is the tile's first."""
    start = tile[0] * SIZE
    if KIND != FLAT:
        start -= tile[2] * (row_blocks * SIZE - width)
    return start


@triton.jit
def index_in_array(tile, width, row_blocks, SIZE: tl.constexpr, NB: tl.constexpr, KIND: tl.constexpr):
    """Which elements of an array a tile's are: int64 ``[NB * SIZE]``."""
    places = tl.arange(0, NB * SIZE)
    if KIND == ROWS:
        places, _ = _places(tile, width, row_blocks, SIZE, NB)
    return _start(tile, width, row_blocks, SIZE, KIND) + places


@triton.jit
def inside_tile(tile, width, row_blocks, SIZE: tl.constexpr, NB: tl.constexpr, KIND: tl.constexpr):
    """Which elements of a tile are inside an array: ``[NB * SIZE]``."""
    if KIND == ROWS:
        _, inside = _places(tile, width, row_blocks, SIZE, NB)
    else:
        inside = tl.arange(0, NB * SIZE) < tile[1] * SIZE
    return inside


@triton.jit
def _passed(places, first, n, NB: tl.constexpr):
    """``(first + places) // n`` (32 bits) for ``first`` below ``n``, and ``places`` up to ``NB``, by a product."""
    period = tl.minimum(n, 2 * NB + 4).to(tl.uint32)  # where n is longer, there is but one end of it
    before = period - tl.minimum(n - first, period).to(tl.uint32)
    return tl.umulhi((places + 1).to(tl.uint32) + before, 0xFFFFFFFF // period).to(tl.int32)


@triton.jit
def factor_places(tile, row_blocks, padded, rows, columns, NB: tl.constexpr, KIND: tl.constexpr):
    """Where the row and column factors of a tile's blocks lie, of matrices of this size, and which are inside.

    All are ``[NB]``, the places of 32 bits. Rows of matrices follow one another, and so do their columns.
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
    passed = _passed(places, column, columns, NB)
    matrices = _passed(passed, row - matrix * rows, rows, NB)
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
    """A tile's elements of an array that has ``SIZE`` of them a block and ``width`` a row: ``[NB * SIZE]``."""
    ptr += _start(tile, width, row_blocks, SIZE, KIND)
    places = tl.arange(0, NB * SIZE)
    if KIND == RUN:
        x = tl.load(ptr + places)
    elif KIND == ROWS:
        places, inside = _places(tile, width, row_blocks, SIZE, NB)
        x = tl.load(ptr + places, mask=inside, other=0)
    else:
        # A run of MULTIPLE * SIZE elements is inside or outside as a whole, so one access can take all of it.
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
    """Address of one of tensor ``i``'s arrays, a multiple of ``ALIGN`` bytes."""
    return tl.multiple_of(tl.load(pointers_ptr + which * n_tensors + i).to(tl.pointer_type(dtype)), ALIGN)
