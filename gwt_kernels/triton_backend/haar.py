"""Kernels of the multi-level Haar transform: all levels in one launch, nothing intermediate in memory.

A program takes a tile of ``NB`` blocks of ``W = 2**LEVEL`` neighbours through all levels in registers.
``coeffs`` is the tuple ``(A, D_L, ..., D_1)``. The flat and the row path are those of ``step.py``: zeros beyond
a row's end stand for the zero that pads an odd length at each level.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gwt_kernels.triton_backend.tiles import tile_offsets

__all__ = ["dwt_kernel", "idwt_kernel"]

_SQRT_HALF = tl.constexpr(0.7071067811865476)


@triton.jit(do_not_specialize=["n_blocks", "width", "row_blocks"])
def dwt_kernel(
    x_ptr,
    coeffs,
    n_blocks,
    width,
    row_blocks,
    LEVEL: tl.constexpr,
    NB: tl.constexpr,
    FLAT: tl.constexpr,
    MULTIPLE: tl.constexpr,
):
    """``a[k], d[k] = (a[2k] + a[2k+1]) / sqrt(2), (a[2k] - a[2k+1]) / sqrt(2)``, level by level."""
    first_block = tl.program_id(0).to(tl.int64) * NB
    start, elements, inside, _, _ = tile_offsets(
        n_blocks, width, row_blocks, first_block, 2**LEVEL, NB, FLAT, MULTIPLE
    )
    a = tl.load(x_ptr + start + elements, mask=inside, other=0.0).to(tl.float32)
    for level in tl.static_range(1, LEVEL + 1):
        even, odd = tl.split(tl.reshape(a, (NB * 2 ** (LEVEL - level), 2)))
        a = (even + odd) * _SQRT_HALF
        _store(
            coeffs[LEVEL + 1 - level],
            (even - odd) * _SQRT_HALF,
            n_blocks,
            (width + (2**level - 1)) >> level,
            row_blocks,
            first_block,
            2 ** (LEVEL - level),
            NB,
            FLAT,
            MULTIPLE,
        )
    _store(coeffs[0], a, n_blocks, row_blocks, row_blocks, first_block, 1, NB, FLAT, MULTIPLE)


@triton.jit(do_not_specialize=["n_blocks", "width", "row_blocks"])
def idwt_kernel(
    x_ptr,
    coeffs,
    n_blocks,
    width,
    row_blocks,
    LEVEL: tl.constexpr,
    NB: tl.constexpr,
    FLAT: tl.constexpr,
    MULTIPLE: tl.constexpr,
):
    """``a[2k], a[2k+1] = (a[k] + d[k]) / sqrt(2), (a[k] - d[k]) / sqrt(2)``, from the coarsest level up."""
    first_block = tl.program_id(0).to(tl.int64) * NB
    a = _load(coeffs[0], n_blocks, row_blocks, row_blocks, first_block, 1, NB, FLAT, MULTIPLE)
    for i in tl.static_range(0, LEVEL):
        d = _load(
            coeffs[i + 1],
            n_blocks,
            (width + (2 ** (LEVEL - i) - 1)) >> (LEVEL - i),
            row_blocks,
            first_block,
            2**i,
            NB,
            FLAT,
            MULTIPLE,
        )
        a = tl.reshape(tl.join((a + d) * _SQRT_HALF, (a - d) * _SQRT_HALF), (NB * 2 ** (i + 1),))
    _store(x_ptr, a, n_blocks, width, row_blocks, first_block, 2**LEVEL, NB, FLAT, MULTIPLE)


@triton.jit
def _load(
    ptr,
    n_blocks,
    width,
    row_blocks,
    first_block,
    SIZE: tl.constexpr,
    NB: tl.constexpr,
    FLAT: tl.constexpr,
    MULTIPLE: tl.constexpr,
):
    """A tile's ``[NB * SIZE]`` elements of an array with ``SIZE`` elements a block, as float32."""
    start, elements, inside, _, _ = tile_offsets(n_blocks, width, row_blocks, first_block, SIZE, NB, FLAT, MULTIPLE)
    return tl.reshape(tl.load(ptr + start + elements, mask=inside, other=0.0).to(tl.float32), (NB * SIZE,))


@triton.jit
def _store(
    ptr,
    x,
    n_blocks,
    width,
    row_blocks,
    first_block,
    SIZE: tl.constexpr,
    NB: tl.constexpr,
    FLAT: tl.constexpr,
    MULTIPLE: tl.constexpr,
):
    """Store ``x [NB * SIZE]`` where :func:`_load` would read it, in the array's dtype."""
    start, elements, inside, _, _ = tile_offsets(n_blocks, width, row_blocks, first_block, SIZE, NB, FLAT, MULTIPLE)
    tl.store(ptr + start + elements, tl.reshape(x, elements.shape).to(ptr.dtype.element_ty), mask=inside)
