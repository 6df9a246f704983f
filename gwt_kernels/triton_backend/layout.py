"""How a tensor is cut into tiles: which path it takes, its blocks and rows, and the constants of the path."""

from __future__ import annotations

from typing import Any

import triton.language as tl
from torch import Tensor

__all__ = ["alignment", "block_layout", "check_row", "is_flat", "variant"]

FLAT_TILE, FLAT_WARPS = 4096, 8  # elements that one program updates at a time, and its warps
ROW_TILE, ROW_WARPS = 1024, 4  # a row takes more registers per element: offsets, masks and a division
MAX_ROW = 1 << 29  # width up to which offsets within a tile of the row path fit 32 bits


def variant(level: int, flat: bool, quantized: bool = False) -> dict[str, Any]:
    """The compile-time constants of a path at a level, and the number of warps."""
    tile, warps = (FLAT_TILE, FLAT_WARPS) if flat else (ROW_TILE, ROW_WARPS)
    if flat and quantized and level < 2:
        tile //= 2  # of a whole one a lane would encode 8 moments or more at once, for which registers run out
    return {"W": 2**level, "NB": max(1, tile >> level), "FLAT": flat, "num_warps": warps}


def alignment(data: tl.dtype, moments: tl.dtype, level: int, flat: bool) -> dict[str, int]:
    """Bytes that a thread accesses at once, of ``data`` (weights or gradients, the narrower) and of moments."""
    size = moments.primitive_bitwidth // 8
    if not flat:
        return {"ALIGN": data.primitive_bitwidth // 8, "MOMENT_ALIGN": size}
    blocks = max(1, 128 // data.primitive_bitwidth >> level)
    return {"ALIGN": 16, "MOMENT_ALIGN": min(16, blocks * size)}


def is_flat(p: Tensor, misaligned: bool, level: int) -> bool:
    """Whether the flat path can take a tensor. Both paths update the same arrays, so this may change."""
    whole_blocks = p.dim() == 0 or p.shape[-1] % 2**level == 0
    return whole_blocks and not misaligned and p.numel() % 8 == 0


def block_layout(p: Tensor, width: int) -> tuple[int, int, int]:
    """Number of blocks, elements per row and blocks per row. Whole blocks lie end to end: any row will do."""
    n = p.shape[-1] if p.dim() else 1
    if n % width == 0:
        return p.numel() // width, width, 1
    row_blocks = -(-n // width)
    return p.numel() // n * row_blocks, n, row_blocks


def check_row(width: int, level: int) -> None:
    """Raise unless offsets within a tile of such rows fit 32 bits."""
    if width % 2**level and width > MAX_ROW:
        raise RuntimeError(
            f"the Triton backend takes rows of up to {MAX_ROW} elements where 2**level does not divide them, "
            f"got {width}: use backend='torch'"
        )
