"""Layout of a tensor's tiles: its path, blocks and rows, and the compile-time constants of the path."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import triton.language as tl
from torch import Tensor

from gwt_kernels.core.level import ROW, Level, block_width, blocks_of
from gwt_kernels.formats.moments import MomentFormat

FLAT_TILE, FLAT_WARPS = 4096, 8  # elements that one program updates at a time, and its warps
# On the row path each element of a lane needs its own address in registers: 16 elements. Exchange within one warp
# needs no barriers, and a short tile rarely has the end of a row.
ROW_TILE, ROW_WARPS = 512, 1
# On the flat path a tile of one warp holds whole blocks of quantized moments, so that no barrier is needed to find
# their scales. At deeper levels registers would leave room for only 8 warps on a multiprocessor, or spill.
QUANTIZED_TILES = {0: 256, 1: 512, 2: 512, 3: 1024}
TILES_TOGETHER = 4  # consecutive short tiles of a program, which share the loads from their tensor's tables
WHOLE_ROW_TILE, WHOLE_ROW_LANES = 1024, 8  # elements of a whole row per tile, and per lane


def variant(level: int, flat: bool, quantized: bool = False) -> dict[str, Any]:
    """Return the compile-time constants of a path at a level, and the number of warps."""
    tile, warps = (FLAT_TILE, FLAT_WARPS) if flat else (ROW_TILE, ROW_WARPS)
    if flat and quantized and level in QUANTIZED_TILES:
        tile, warps = QUANTIZED_TILES[level], 1
    if not flat and (quantized or 2**level > tile):
        # Whole blocks of quantized values need twice the tile, except at level 0, where registers would spill.
        tile, warps = 2 * tile if level else tile, 2 * warps
    return {"W": 2**level, "NB": max(1, tile >> level), "FLAT": flat, "num_warps": warps}


def row_variant(widest: int, level: Level, flat: bool) -> dict[str, Any]:
    """Return the compile-time constants of programs that take rows of at most ``widest`` elements, and their warps.

    If rows fit the tile, its size does not change their sums: it only adds zeros beyond them.
    """
    block = 1 if level == ROW else 2**level
    tile = min(WHOLE_ROW_TILE, max(32 * WHOLE_ROW_LANES, block, 1 << (widest - 1).bit_length()))
    size = {"TILE": tile} if level == ROW else {"W": block, "NB": tile // block}
    return {**size, "FLAT": flat, "num_warps": tile // (32 * WHOLE_ROW_LANES)}


def tiles_of_program(level: int, flat: bool, quantized: bool) -> int:
    """Return the number of consecutive tiles that a program of the step updates."""
    # From level 3 on a loop over tiles of quantized moments would leave room for 12 warps instead of 16.
    return TILES_TOGETHER if not flat or (quantized and level < 3) else 1


def blocks_together(level: int, moments: MomentFormat, stochastic: bool) -> int:
    """Return how many blocks of a row share a call of Philox: 4 for moments, or those with 8 weights.

    Args:
        level: Level of the transform.
        moments: Format of the moments. Values with one scale may cross rows, so each coefficient draws by itself.
        stochastic: Whether weights are rounded stochastically.
    """
    if moments.scales:
        return 1
    if moments.is_random:
        return 4
    return max(1, 8 >> level) if stochastic else 1


def alignment(data: tl.dtype, moments: tl.dtype, level: Level, flat: bool) -> dict[str, int]:
    """Return the bytes of a thread's access to ``data`` (the wider of weights and gradients) and moments."""
    size = moments.primitive_bitwidth // 8
    if not flat:
        return {"ALIGN": data.primitive_bitwidth // 8, "MOMENT_ALIGN": size}
    blocks = 1 if level == ROW else max(1, 128 // data.primitive_bitwidth >> level)
    return {"ALIGN": 16, "MOMENT_ALIGN": min(16, blocks * size)}


def is_flat(p: Tensor, misaligned: bool, level: Level) -> bool:
    """Return whether the flat path can take a tensor, which may change from step to step."""
    width = p.shape[-1] if p.dim() else 1
    if level == ROW:
        return not misaligned and width % 8 == 0
    whole_blocks = width % block_width(level, width) == 0
    return whole_blocks and not misaligned and p.numel() % 8 == 0


class Rows(NamedTuple):
    """Numbers of a tensor's blocks: see ``tiles.py``."""

    n_blocks: int
    """Blocks, including the padding of rows."""
    width: int
    row_blocks: int
    padded: int
    """Blocks of a row including its padding."""
    reciprocal: int
    """``(2**64 - 1) // padded``, as a signed 64-bit number."""
    row_length: int = 0
    """For programs that take parts of rows: elements of a whole row if it is one block, else its blocks."""
    first_row: int = 0
    """For these programs: index of the tensor's first row among all rows of the bucket."""


def rows_of(p: Tensor, width: int, together: int = 1) -> Rows:
    """Count the blocks of ``width`` elements of a non-empty tensor, in rows padded to a multiple of ``together``.

    Rows of whole blocks count as one row.
    """
    n = p.shape[-1] if p.dim() else 1
    if n % width == 0:
        n = p.numel()
        together = 1
    row_blocks = -(-n // width)
    padded = -(-row_blocks // together) * together
    reciprocal = ((1 << 64) - 1) // padded
    signed = reciprocal - (1 << 64) if reciprocal >> 63 else reciprocal
    return Rows(p.numel() // n * padded, n, row_blocks, padded, signed)


def rows_by_row(p: Tensor, level: Level) -> Rows:
    """Count the rows of a tensor, one by one, and the blocks of a row."""
    width = p.shape[-1] if p.dim() else 1
    row_blocks = blocks_of(level, width)
    whole = width % block_width(level, width) == 0
    return Rows(math.prod(p.shape[:-1]), width, row_blocks, row_blocks if whole else -(-row_blocks // 4) * 4, 0)
