"""Kernels of the multi-level Haar transform: all levels in one launch, without intermediate results in memory.

A program transforms a tile of ``NB`` blocks of ``W = 2**LEVEL`` elements in registers. ``coeffs`` is the tuple
``(A, D_L, ..., D_1)``. The flat and the row path are those of ``tiles.py``: zeros beyond the end of a row equal the
zero that pads an odd length at each level.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gwt_kernels.backends.triton.tiles import FLAT as _FLAT
from gwt_kernels.backends.triton.tiles import ROWS, RUN, is_run, load_tile, store_tile, tile_of

_SQRT_HALF = tl.constexpr(0.7071067811865476)


@triton.jit(do_not_specialize=["n_blocks", "width", "row_blocks", "reciprocal"])
def dwt_kernel(
    x_ptr,
    coeffs,
    n_blocks,
    width,
    row_blocks,
    reciprocal,
    LEVEL: tl.constexpr,
    NB: tl.constexpr,
    FLAT: tl.constexpr,
    MULTIPLE: tl.constexpr,
):
    """Compute ``a[k], d[k] = (a[2k] + a[2k+1]) / sqrt(2), (a[2k] - a[2k+1]) / sqrt(2)``, level by level."""
    first_block = tl.program_id(0).to(tl.int64) * NB
    tile = tile_of(n_blocks, row_blocks, reciprocal, first_block, NB, _FLAT if FLAT else ROWS, MULTIPLE)
    if FLAT:
        _dwt(x_ptr, coeffs, tile, width, row_blocks, LEVEL, NB, _FLAT, MULTIPLE)
    elif is_run(tile, width, row_blocks, 2**LEVEL, NB):
        _dwt(x_ptr, coeffs, tile, width, row_blocks, LEVEL, NB, RUN, MULTIPLE)
    else:
        _dwt(x_ptr, coeffs, tile, width, row_blocks, LEVEL, NB, ROWS, MULTIPLE)


@triton.jit
def _dwt(
    x_ptr,
    coeffs,
    tile,
    width,
    row_blocks,
    LEVEL: tl.constexpr,
    NB: tl.constexpr,
    KIND: tl.constexpr,
    MULTIPLE: tl.constexpr,
):
    a = load_tile(x_ptr, tile, width, row_blocks, 2**LEVEL, NB, KIND, MULTIPLE).to(tl.float32)
    for level in tl.static_range(1, LEVEL + 1):
        pairs = tl.reshape(a, (NB * 2 ** (LEVEL - level), 2))
        if KIND == _FLAT or NB * 2 ** (LEVEL - level) >= 32:
            even, odd = tl.split(pairs)
            a = (even + odd) * _SQRT_HALF
            d = (even - odd) * _SQRT_HALF
        else:  # fewer pairs than lanes: a split would keep copies of them in ever more registers
            a = tl.sum(pairs, axis=1) * _SQRT_HALF
            d = tl.sum(pairs * (1 - 2 * tl.arange(0, 2)), axis=1) * _SQRT_HALF
        ptr = coeffs[LEVEL + 1 - level]
        d = d.to(ptr.dtype.element_ty)
        band_width = (width + (2**level - 1)) >> level
        store_tile(ptr, d, tile, band_width, row_blocks, 2 ** (LEVEL - level), NB, KIND, MULTIPLE)
    a = a.to(coeffs[0].dtype.element_ty)
    store_tile(coeffs[0], a, tile, row_blocks, row_blocks, 1, NB, KIND, MULTIPLE)


@triton.jit(do_not_specialize=["n_blocks", "width", "row_blocks", "reciprocal"])
def idwt_kernel(
    x_ptr,
    coeffs,
    n_blocks,
    width,
    row_blocks,
    reciprocal,
    LEVEL: tl.constexpr,
    NB: tl.constexpr,
    FLAT: tl.constexpr,
    MULTIPLE: tl.constexpr,
):
    """Compute ``a[2k], a[2k+1] = (a[k] + d[k]) / sqrt(2), (a[k] - d[k]) / sqrt(2)``, from the coarsest level up."""
    first_block = tl.program_id(0).to(tl.int64) * NB
    tile = tile_of(n_blocks, row_blocks, reciprocal, first_block, NB, _FLAT if FLAT else ROWS, MULTIPLE)
    if FLAT:
        _idwt(x_ptr, coeffs, tile, width, row_blocks, LEVEL, NB, _FLAT, MULTIPLE)
    elif is_run(tile, width, row_blocks, 2**LEVEL, NB):
        _idwt(x_ptr, coeffs, tile, width, row_blocks, LEVEL, NB, RUN, MULTIPLE)
    else:
        _idwt(x_ptr, coeffs, tile, width, row_blocks, LEVEL, NB, ROWS, MULTIPLE)


@triton.jit
def _idwt(
    x_ptr,
    coeffs,
    tile,
    width,
    row_blocks,
    LEVEL: tl.constexpr,
    NB: tl.constexpr,
    KIND: tl.constexpr,
    MULTIPLE: tl.constexpr,
):
    a = load_tile(coeffs[0], tile, row_blocks, row_blocks, 1, NB, KIND, MULTIPLE).to(tl.float32)
    for i in tl.static_range(0, LEVEL):
        band_width = (width + (2 ** (LEVEL - i) - 1)) >> (LEVEL - i)
        d = load_tile(coeffs[i + 1], tile, band_width, row_blocks, 2**i, NB, KIND, MULTIPLE).to(tl.float32)
        a = tl.reshape(tl.join((a + d) * _SQRT_HALF, (a - d) * _SQRT_HALF), (NB * 2 ** (i + 1),))
    a = a.to(x_ptr.dtype.element_ty)
    store_tile(x_ptr, a, tile, width, row_blocks, 2**LEVEL, NB, KIND, MULTIPLE)
