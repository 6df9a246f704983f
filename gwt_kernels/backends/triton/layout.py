"""How a tensor is cut into tiles: which path it takes, its blocks and rows, and the constants of the path."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton.language as tl
from torch import Tensor

from gwt_kernels.core.level import ROW, Level, block_width, blocks_of

__all__ = [
    "Rows",
    "alignment",
    "blocks_together",
    "is_flat",
    "row_variant",
    "rows_by_row",
    "rows_of",
    "tiles_of_program",
    "variant",
]

FLAT_TILE, FLAT_WARPS = 4096, 8  # elements that one program updates at a time, and its warps
# A lane of the row path takes one element at a time, and registers for as many addresses: 16 of them. What lanes
# of one warp exchange needs no barriers, and a short tile seldom holds the end of a row.
ROW_TILE, ROW_WARPS = 512, 1
ROW_TILES = 4  # that a program takes one after the other, for what it looks up of their tensor
WHOLE_ROW_TILE, WHOLE_ROW_LANES = 1024, 8  # elements of a whole row that a program, and that a lane takes at a time


def variant(level: int, flat: bool, quantized: bool = False) -> dict[str, Any]:
    """The compile-time constants of a path at a level, and the number of warps."""
    tile, warps = (FLAT_TILE, FLAT_WARPS) if flat else (ROW_TILE, ROW_WARPS)
    if flat and quantized and level < 2:
        tile //= 2  # of a whole one a lane would encode 8 moments or more at once, for which registers run out
    if not flat and (quantized or 2**level > tile):
        # For whole quanta, but where registers run out here too; for no more elements a lane in the longest blocks.
        tile, warps = 2 * tile if level else tile, 2 * warps
    return {"W": 2**level, "NB": max(1, tile >> level), "FLAT": flat, "num_warps": warps}


def row_variant(widest: int, level: Level, flat: bool) -> dict[str, Any]:
    """The compile-time constants of programs that take rows, ``widest`` elements at the most, and their warps.

    Of rows that fit, the tile does not decide how they are added up: zeros beyond them change no sum.
    """
    block = 1 if level == ROW else 2**level
    tile = min(WHOLE_ROW_TILE, max(32 * WHOLE_ROW_LANES, block, 1 << (widest - 1).bit_length()))
    size = {"TILE": tile} if level == ROW else {"W": block, "NB": tile // block}
    return {**size, "FLAT": flat, "num_warps": tile // (32 * WHOLE_ROW_LANES)}


def tiles_of_program(flat: bool) -> int:
    """How many tiles of a tensor a program of the step takes, one after the other."""
    return 1 if flat else ROW_TILES


def blocks_together(level: int, moments: tl.dtype, stochastic: bool) -> int:
    """How many blocks of a row draw from one call of Philox: 4 their moments, or as many as hold 8 weights.

    Args:
        level: Of the transform.
        moments: Their dtype; blocks of values run on from row to row, so that each draws by itself.
        stochastic: Whether weights are rounded so.
    """
    if moments == tl.bfloat16:
        return 4
    return max(1, 8 >> level) if stochastic and moments != tl.int8 else 1


def alignment(data: tl.dtype, moments: tl.dtype, level: Level, flat: bool) -> dict[str, int]:
    """Bytes that a thread accesses at once, of ``data`` (weights or gradients, the narrower) and of moments."""
    size = moments.primitive_bitwidth // 8
    if not flat:
        return {"ALIGN": data.primitive_bitwidth // 8, "MOMENT_ALIGN": size}
    blocks = 1 if level == ROW else max(1, 128 // data.primitive_bitwidth >> level)
    return {"ALIGN": 16, "MOMENT_ALIGN": min(16, blocks * size)}


def is_flat(p: Tensor, misaligned: bool, level: Level) -> bool:
    """Whether the flat path can take a tensor. Both paths update the same arrays, so this may change."""
    width = p.shape[-1] if p.dim() else 1
    if level == ROW:
        return not misaligned and width % 8 == 0
    whole_blocks = width % block_width(level, width) == 0
    return whole_blocks and not misaligned and p.numel() % 8 == 0


class Rows(NamedTuple):
    """How a tensor's blocks are counted: see ``tiles.py``."""

    n_blocks: int
    """With those that pad rows."""
    width: int
    row_blocks: int
    padded: int
    """Blocks of a row with those that pad it."""
    reciprocal: int
    """``(2**64 - 1) // padded``, as a signed number of as many bits."""


def rows_of(p: Tensor, width: int, together: int = 1) -> Rows:
    """Count the blocks of ``width`` elements of a tensor that is not empty, in rows of a multiple of ``together``.

    Whole blocks lie end to end, and count as one row.
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
    """The rows of a tensor that is not empty, counted one by one, and their blocks."""
    width = p.shape[-1] if p.dim() else 1
    row_blocks = blocks_of(level, width)
    whole = width % block_width(level, width) == 0
    return Rows(p.numel() // width, width, row_blocks, row_blocks if whole else -(-row_blocks // 4) * 4, 0)
