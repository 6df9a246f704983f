"""Moments of a tile's blocks: their addresses, and how kernels load and store them."""

from __future__ import annotations

import triton
import triton.language as tl

from gwt_kernels.backends.triton import schema
from gwt_kernels.backends.triton.tables import TRITON_DTYPES
from gwt_kernels.backends.triton.tiles import array_ptr as _array
from gwt_kernels.backends.triton.tiles import factor_places, load_tile, store_tile
from gwt_kernels.core import kernel
from gwt_kernels.formats import stochastic
from gwt_kernels.formats.moments import FORMATS

FACTORED = 4
"""Added to ``SLOTS``, the number of moments, if a second moment is factored."""

kernel.load()
# Kernels know one format with scales, the one for which Q is not 0.
(_quantized,) = (each for each in FORMATS.values() if each.codec is not None)
decode_first, decode_second = _quantized.codec.kernel_decode_first, _quantized.codec.kernel_decode_second
encode_first, encode_second = _quantized.codec.kernel_encode_first, _quantized.codec.kernel_encode_second
_SECOND = tl.constexpr(TRITON_DTYPES[_quantized.dtypes[1]])
stochastic_round = stochastic.kernel_stochastic_round


@triton.jit
def moment_arrays(
    pointers_ptr,
    i,
    n_tensors,
    M: tl.constexpr,
    MOMENT_ALIGN: tl.constexpr,
    Q: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Return the addresses of a tensor's ``m`` and, if ``SLOTS`` is 2, ``v``, and of scales of quantized values.

    A factored ``v`` is replaced by the addresses and sizes of ``schema.FACTORS``, for factors' reciprocal roots.
    """
    m_ptr = _array(pointers_ptr, schema.M_PTR, i, n_tensors, M, MOMENT_ALIGN)
    if SLOTS >= 4:
        record_ptr = tl.load(pointers_ptr + schema.V_PTR * n_tensors + i).to(tl.pointer_type(tl.int64))
        row_ptr = tl.load(record_ptr + schema.ROW_GAINS_PTR).to(tl.pointer_type(tl.float32))
        col_ptr = tl.load(record_ptr + schema.COL_GAINS_PTR).to(tl.pointer_type(tl.float32))
        v_ptr = (
            row_ptr,
            col_ptr,
            tl.load(record_ptr + schema.MATRIX_ROWS),
            tl.load(record_ptr + schema.MATRIX_COLUMNS),
        )
        m_scale_ptr, v_scale_ptr = m_ptr, m_ptr  # the latter is not read
        if Q:
            m_scale_ptr = _array(pointers_ptr, schema.M_SCALES_PTR, i, n_tensors, tl.float32, 4)
    elif SLOTS < 2:
        v_ptr, m_scale_ptr, v_scale_ptr = m_ptr, m_ptr, m_ptr  # not read, except the scales
        if Q:
            m_scale_ptr = _array(pointers_ptr, schema.M_SCALES_PTR, i, n_tensors, tl.float32, 4)
    elif Q:
        v_ptr = _array(pointers_ptr, schema.V_PTR, i, n_tensors, _SECOND, MOMENT_ALIGN)
        m_scale_ptr = _array(pointers_ptr, schema.M_SCALES_PTR, i, n_tensors, tl.float32, 4)
        v_scale_ptr = _array(pointers_ptr, schema.V_SCALES_PTR, i, n_tensors, tl.float32, 4)
    else:
        v_ptr = _array(pointers_ptr, schema.V_PTR, i, n_tensors, M, MOMENT_ALIGN)
        m_scale_ptr, v_scale_ptr = m_ptr, v_ptr  # not read
    return m_ptr, v_ptr, m_scale_ptr, v_scale_ptr


@triton.jit
def load_moments(
    moments,
    tile,
    row_blocks,
    padded,
    NB: tl.constexpr,
    KIND: tl.constexpr,
    MULTIPLE: tl.constexpr,
    Q: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Load ``m`` and ``v`` of a tile's blocks, in float32, 0 beyond the last; any ``v`` if none is kept.

    For a factored ``v`` return ``1 / sqrt(v)``.
    """
    m_ptr, v_ptr, m_scale_ptr, v_scale_ptr = moments
    m = tl.zeros((NB,), tl.float32)
    if SLOTS % 4:
        m = load_tile(m_ptr, tile, row_blocks, padded, 1, NB, KIND, MULTIPLE).to(tl.float32)
    v = m
    if SLOTS >= 4:
        row_ptr, col_ptr, rows, columns = v_ptr
        row, column, inside = factor_places(tile, row_blocks, padded, rows, columns, NB, KIND)
        v = tl.load(row_ptr + row, mask=inside, other=0.0) * tl.load(col_ptr + column, mask=inside, other=0.0)
    if SLOTS == 2:
        v = load_tile(v_ptr, tile, row_blocks, padded, 1, NB, KIND, MULTIPLE).to(tl.float32)
    if Q:
        quanta, known = _quanta(tile, NB, Q)
        m = decode_first(m, tl.load(m_scale_ptr + quanta, mask=known, other=0.0), Q, NB)
        if SLOTS == 2:
            v = decode_second(v, tl.load(v_scale_ptr + quanta, mask=known, other=0.0), Q, NB)
    return m, v


@triton.jit
def store_moments(
    m,
    v,
    bits,
    moments,
    tile,
    row_blocks,
    padded,
    M: tl.constexpr,
    NB: tl.constexpr,
    KIND: tl.constexpr,
    MULTIPLE: tl.constexpr,
    Q: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Store ``m`` and, if ``SLOTS`` is 2, ``v``, to nearest or by random ``bits``; ``m`` takes the lower half."""
    m_ptr, v_ptr, m_scale_ptr, v_scale_ptr = moments
    if Q:
        quanta, known = _quanta(tile, NB, Q)
        m, m_scales = encode_first(m, bits & 0xFFFF, Q, NB)
        if SLOTS == 2:
            # Beyond the tile v is 0, but NaN if the scale is infinite: that scale would become NaN.
            v = tl.where(tl.arange(0, NB) < tile[1], v, 0.0)
            v, v_scales = encode_second(v, bits >> 16, Q, NB)
        tl.store(m_scale_ptr + quanta, m_scales, mask=known)
        if SLOTS == 2:
            tl.store(v_scale_ptr + quanta, v_scales, mask=known)
    elif M == tl.bfloat16:
        m = stochastic_round(m, bits & 0xFFFF, M)
        if SLOTS == 2:
            v = stochastic_round(v, bits >> 16, M)
    else:
        m = m.to(M)
        if SLOTS == 2:
            v = v.to(M)
    if SLOTS % 4:
        store_tile(m_ptr, m, tile, row_blocks, padded, 1, NB, KIND, MULTIPLE)
    if SLOTS == 2:
        store_tile(v_ptr, v, tile, row_blocks, padded, 1, NB, KIND, MULTIPLE)


@triton.jit
def _quanta(tile, NB: tl.constexpr, Q: tl.constexpr):
    """Return the indices of the scales of a tile's values, and a mask of those that exist: ``[NB // Q]``."""
    places = tl.arange(0, NB // Q)
    return tile[0] // Q + places, places * Q < tile[1]
