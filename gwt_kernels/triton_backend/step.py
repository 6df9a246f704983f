"""Kernels of the fused GWT-Adam step: one launch per pass for a whole bucket of tensors.

A bucket is described by tables in device memory with one entry per tensor:

``layout``    int64 ``[4, n]``: first tile, number of blocks, width of a row, blocks per row
``pointers``  int64 ``[up to 16, n]``: addresses of p, g, m (exp_avg), v (exp_avg_sq) and the limiter's norm; then
              the key of the random bits, the addresses of the weights' low halves and of the scales of m and v,
              the step, and for shards first element, run and pitch in the whole tensor, of p and of m and v; as
              many as are read
``scalars``   float32 ``[n, 10]``: b1, 1-b1, b2, 1-b2, eps, lr*weight_decay, step size, gamma, factor on the
              gradient (negative to ascend it), and 0 where the step is skipped, which is read if ``SKIPPABLE``

A *block* is ``W = 2**level`` neighbours that share one moment, a *tile* the ``NB`` blocks that a program
updates at a time. Two paths differ only in where the elements of a block lie. The *flat* path takes tensors
whose rows are whole blocks, whose size is a multiple of 8 and whose addresses are multiples of 16 bytes: there
blocks lie end to end, and a tile is one contiguous, aligned run. The *row* path takes any tensor: the last
block of a row may be cut short, and what lies beyond the row counts as zero.

``ALIGN`` and ``MOMENT_ALIGN`` are bytes that addresses are known to be multiples of, and so the widest access
that the compiler may choose. A thread that holds 16 bytes of weights should hold the moments of just those
blocks: wider accesses to the moments would have to be exchanged through shared memory, with barriers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gwt_kernels.triton_backend.control import N_SCALARS
from gwt_kernels.triton_backend.quantized import decode_first, decode_second, encode_first, encode_second
from gwt_kernels.triton_backend.rounding import (
    join_low,
    random_halves,
    random_halves_at,
    random_words,
    random_words_at,
    round_at_random,
    split_low,
)
from gwt_kernels.triton_backend.tiles import array_ptr as _array
from gwt_kernels.triton_backend.tiles import owner as _owner
from gwt_kernels.triton_backend.tiles import tile_offsets

__all__ = ["norm_kernel", "step_kernel"]

_P = tl.constexpr(0)
_G = tl.constexpr(1)
_M = tl.constexpr(2)
_V = tl.constexpr(3)
_KEY = tl.constexpr(5)
_LOW = tl.constexpr(6)
_M_SCALES = tl.constexpr(7)
_V_SCALES = tl.constexpr(8)
_STEP = tl.constexpr(9)
_WEIGHTS_SPAN = tl.constexpr(10)
_MOMENTS_SPAN = tl.constexpr(13)


@triton.jit(do_not_specialize=["n_tensors"])
def step_kernel(
    layout_ptr,
    pointers_ptr,
    scalars_ptr,
    factors_ptr,
    sums_ptr,
    n_tensors,
    P: tl.constexpr,
    G: tl.constexpr,
    M: tl.constexpr,
    W: tl.constexpr,
    NB: tl.constexpr,
    FLAT: tl.constexpr,
    ALIGN: tl.constexpr,
    MOMENT_ALIGN: tl.constexpr,
    LIMITED: tl.constexpr,
    FOLDED: tl.constexpr,
    ROUNDING: tl.constexpr,
    SPAN: tl.constexpr,
    Q: tl.constexpr,
    SKIPPABLE: tl.constexpr,
    OBSERVED: tl.constexpr,
):
    """Transform, moments, inverse transform and weights of one tile, everything read and written once.

    With ``mean`` the mean of a block of ``W`` gradients::

        A = sqrt(W) * mean
        m = b1*m + (1-b1)*A
        v = b2*v + (1-b2)*A*A
        u_i = (g_i - mean + m / sqrt(W)) / (sqrt(v) + eps)         at W = 1: m / (sqrt(v) + eps)
        p_i = p_i - lr*weight_decay * p_i - step_size * factor * u_i

    ``factor`` is the reciprocal of the limiter's divisor, or 1 where there is no limiter. The folded rule
    (``FOLDED``, with ``W`` above 1) has, with ``r_i = g_i - mean``::

        m = b1*m + (1-b1)*mean
        v = b2*v + (1-b2)*mean(g*g)
        u_i = (m + r_i) / (sqrt(v + r_i*r_i) + eps)

    ``ROUNDING`` of the weights: ``"nearest"``, ``"stochastic"``, or ``"split"``, where the low halves of float32
    weights lie in an array of their own. Moments in bfloat16 round stochastically; in int8 they are codes with a
    scale per ``Q`` of them (``quantized.py``), and round stochastically too. Random bits depend on the index in
    the whole tensor; for shards, ``SPAN`` is 1 where that is the shard's shifted by a multiple of 8 (weights, on
    the flat path) and of 4 (moments), and 2 where it is any.

    Where ``OBSERVED``, ``sums`` float32 ``[n_tiles, 3]`` receives the sums of squares of the tile's details, of its
    approximation coefficients and of its update, weight decay apart.
    """
    tile = tl.program_id(0)
    if LIMITED:  # last tiles first: what norm_kernel read last is in the L2 cache still
        tile = tl.num_programs(0) - 1 - tile
    i = _owner(layout_ptr, tile, n_tensors)
    if SKIPPABLE:  # noqa: SIM102  # what is known when compiling comes first, in a statement of its own
        if tl.load(scalars_ptr + i * N_SCALARS + 9) == 0.0:
            return
    first_block = (tile - tl.load(layout_ptr + i)) * NB
    start, elements, inside, blocks, block_inside = _tile(layout_ptr, i, n_tensors, first_block, W, NB, FLAT)
    p_ptrs = _array(pointers_ptr, _P, i, n_tensors, P, ALIGN) + start + elements
    g_ptrs = _array(pointers_ptr, _G, i, n_tensors, G, ALIGN) + start + elements

    p = tl.load(p_ptrs, mask=inside, other=0.0)
    if ROUNDING == "split":
        low_ptrs = _array(pointers_ptr, _LOW, i, n_tensors, tl.int16, ALIGN) + start + elements
        p = join_low(p, tl.load(low_ptrs, mask=inside, other=0))
    else:
        p = p.to(tl.float32)
    if ROUNDING == "stochastic" or M == tl.bfloat16 or Q:
        key = tl.load(pointers_ptr + _KEY * n_tensors + i)
        step = tl.load(pointers_ptr + _STEP * n_tensors + i)
    m_ptrs, v_ptrs, m_scale_ptrs, v_scale_ptrs = _moment_ptrs(
        pointers_ptr, i, n_tensors, first_block, blocks, M, MOMENT_ALIGN, NB, Q
    )
    m, v = _load_moments(m_ptrs, v_ptrs, m_scale_ptrs, v_scale_ptrs, block_inside, NB, Q)
    g = _gradient(g_ptrs, inside, scalars_ptr + i * N_SCALARS)
    mean, residual, m, v, denominator = _moments(g, m, v, scalars_ptr + i * N_SCALARS, W, NB, FOLDED)
    if M == tl.bfloat16 or Q:
        if SPAN == 2:
            index = _in_whole(pointers_ptr, _MOMENTS_SPAN, i, n_tensors, first_block + blocks)
            bits = random_words_at(index, step, key)
        else:
            bits = random_words(
                first_block + _shift(pointers_ptr, _MOMENTS_SPAN, i, n_tensors, SPAN), NB, step, key
            )
    else:
        bits = 0
    _store_moments(m, v, bits, m_ptrs, v_ptrs, m_scale_ptrs, v_scale_ptrs, block_inside, M, NB, Q)

    decay = tl.load(scalars_ptr + i * N_SCALARS + 5)
    step_size = tl.load(scalars_ptr + i * N_SCALARS + 6)
    if LIMITED:
        step_size *= tl.load(factors_ptr + i)
    if FOLDED and W > 1:
        eps = tl.load(scalars_ptr + i * N_SCALARS + 4)
        denominators = tl.sqrt_rn(v[:, None] + residual * residual) + eps  # [NB, W]
        update = tl.div_rn(step_size * (residual + m[:, None]), denominators)
    else:
        gain = tl.div_rn(tl.zeros_like(denominator) + step_size, denominator)  # [NB]
        if W == 1:
            update = m * gain
        else:
            update = (residual + (m * W**-0.5)[:, None]) * gain[:, None]  # [NB, W]
    if OBSERVED:
        row_ptr = sums_ptr + tile.to(tl.int64) * 3
        if W == 1:
            tl.store(row_ptr, 0.0)
        else:
            tl.store(row_ptr, tl.sum(tl.reshape(residual * residual, (NB * W,)), axis=0))
        tl.store(row_ptr + 1, tl.sum(mean * mean, axis=0) * W)
        applied = tl.where(inside, tl.reshape(update, p.shape), 0.0)
        tl.store(row_ptr + 2, tl.sum(tl.reshape(applied * applied, (NB * W,)), axis=0))
    p = p - decay * p - tl.reshape(update, p.shape)
    if ROUNDING == "split":
        weight, low = split_low(p)
        tl.store(low_ptrs, low, mask=inside)
        tl.store(p_ptrs, weight, mask=inside)
    elif ROUNDING == "stochastic":
        if SPAN == 2:
            index = _in_whole(pointers_ptr, _WEIGHTS_SPAN, i, n_tensors, start + elements)
            bits = random_halves_at(index, step, key)
        else:
            start += _shift(pointers_ptr, _WEIGHTS_SPAN, i, n_tensors, SPAN)
            if FLAT:
                bits = random_halves(start, NB * W, step, key)
            else:
                bits = random_halves_at(start + elements, step, key)
        tl.store(p_ptrs, round_at_random(p, bits, P), mask=inside)
    else:
        tl.store(p_ptrs, p.to(P), mask=inside)


@triton.jit(do_not_specialize=["n_tensors", "tiles_per_chunk", "n_chunks"])
def norm_kernel(
    layout_ptr,
    pointers_ptr,
    scalars_ptr,
    first_chunk_ptr,
    partials_ptr,
    seen_ptr,
    n_tensors,
    tiles_per_chunk,
    n_chunks,
    G: tl.constexpr,
    M: tl.constexpr,
    W: tl.constexpr,
    NB: tl.constexpr,
    FLAT: tl.constexpr,
    ALIGN: tl.constexpr,
    MOMENT_ALIGN: tl.constexpr,
    Q: tl.constexpr,
    SKIPPABLE: tl.constexpr,
    LOOKS: tl.constexpr,
):
    """One partial sum of ``(m / (sqrt(v) + eps))**2`` over a chunk of tiles, with the moments of this step.

    Writes ``partials [n_chunks]`` alone: ``step_kernel`` computes the moments again and stores them. Where it
    ``LOOKS`` at the gradients, ``seen [2, n_chunks]`` receives what ``squares_kernel`` would find of them: the sum
    of their squares, and more than 0 where one is infinite or NaN.
    """
    chunk = tl.program_id(0)
    i = _owner(first_chunk_ptr, chunk, n_tensors)
    if SKIPPABLE:  # noqa: SIM102  # what is known when compiling comes first, in a statement of its own
        if tl.load(scalars_ptr + i * N_SCALARS + 9) == 0.0:
            return
    block = (chunk - tl.load(first_chunk_ptr + i)) * tiles_per_chunk * NB
    end = tl.minimum(block + tiles_per_chunk * NB, tl.load(layout_ptr + n_tensors + i))
    g_ptr = _array(pointers_ptr, _G, i, n_tensors, G, ALIGN)
    total = tl.zeros((NB,), tl.float32)
    squares = tl.zeros((NB,), tl.float32)
    largest = tl.zeros((NB,), tl.int32)  # bits of a size: those of infinity and NaN are above all others
    while block < end:
        start, elements, inside, blocks, block_inside = _tile(layout_ptr, i, n_tensors, block, W, NB, FLAT)
        m_ptrs, v_ptrs, m_scale_ptrs, v_scale_ptrs = _moment_ptrs(
            pointers_ptr, i, n_tensors, block, blocks, M, MOMENT_ALIGN, NB, Q
        )
        m, v = _load_moments(m_ptrs, v_ptrs, m_scale_ptrs, v_scale_ptrs, block_inside, NB, Q)
        g = _gradient(g_ptr + start + elements, inside, scalars_ptr + i * N_SCALARS)
        # The folded rule has no limiter.
        _, _, m, _, denominator = _moments(g, m, v, scalars_ptr + i * N_SCALARS, W, NB, False)
        a = m / tl.where(block_inside, denominator, float("inf"))  # 0 where there is no block
        total += a * a
        if LOOKS:
            squares += tl.sum(tl.reshape(g * g, (NB, W)), axis=1)
            sizes = tl.reshape(g.to(tl.int32, bitcast=True) & 0x7FFFFFFF, (NB, W))
            largest = tl.maximum(largest, tl.max(sizes, axis=1))
        block += NB
    tl.store(partials_ptr + chunk, tl.sum(total, axis=0))
    if LOOKS:
        tl.store(seen_ptr + chunk, tl.sum(squares, axis=0))
        tl.store(seen_ptr + n_chunks + chunk, tl.where(tl.max(largest, axis=0) >= 0x7F800000, 1.0, 0.0))


@triton.jit
def _shift(pointers_ptr, which, i, n_tensors, SPAN: tl.constexpr):
    """How far a shard's first element is from the whole tensor's."""
    shift = tl.zeros((), tl.int64)
    if SPAN:
        shift += tl.load(pointers_ptr + which * n_tensors + i)
    return shift


@triton.jit
def _in_whole(pointers_ptr, which, i, n_tensors, index):
    """The indices in the whole tensor of a shard's elements (int64, any shape)."""
    first = tl.load(pointers_ptr + which * n_tensors + i)
    run = tl.load(pointers_ptr + (which + 1) * n_tensors + i)
    pitch = tl.load(pointers_ptr + (which + 2) * n_tensors + i)
    return first + index // run * pitch + index % run


@triton.jit
def _gradient(g_ptrs, inside, scalars_ptr):
    """A tile's gradients in float32, times their factor."""
    return tl.load(g_ptrs, mask=inside, other=0.0).to(tl.float32) * tl.load(scalars_ptr + 8)


@triton.jit
def _moments(
    g,
    m,
    v,
    scalars_ptr,
    W: tl.constexpr,
    NB: tl.constexpr,
    FOLDED: tl.constexpr,
):
    """``mean`` ``[NB]``, ``g - mean`` ``[NB, W]``, the new ``m``, ``v`` and ``sqrt(v) + eps`` ``[NB]``: float32."""
    if W == 1:
        a = tl.reshape(g, (NB,))
        square = a * a
        mean = a
        residual = g
    else:
        g = tl.reshape(g, (NB, W))
        mean = tl.sum(g, axis=1) * (1.0 / W)
        if FOLDED:
            a = mean
            square = tl.sum(g * g, axis=1) * (1.0 / W)
        else:
            a = mean * W**0.5
            square = a * a
        residual = g - mean[:, None]
    m = tl.load(scalars_ptr) * m + tl.load(scalars_ptr + 1) * a
    v = tl.load(scalars_ptr + 2) * v + tl.load(scalars_ptr + 3) * square
    return mean, residual, m, v, tl.sqrt_rn(v) + tl.load(scalars_ptr + 4)


@triton.jit
def _moment_ptrs(
    pointers_ptr,
    i,
    n_tensors,
    first_block,
    blocks,
    M: tl.constexpr,
    MOMENT_ALIGN: tl.constexpr,
    NB: tl.constexpr,
    Q: tl.constexpr,
):
    """Where ``m`` and ``v`` of a tile's blocks lie ``[NB]``, and the scales of codes ``[NB // Q]``."""
    m_ptrs = _array(pointers_ptr, _M, i, n_tensors, M, MOMENT_ALIGN) + first_block + blocks
    if Q:
        quanta = first_block // Q + tl.arange(0, NB // Q)
        v_ptrs = _array(pointers_ptr, _V, i, n_tensors, tl.uint8, MOMENT_ALIGN) + first_block + blocks
        m_scale_ptrs = _array(pointers_ptr, _M_SCALES, i, n_tensors, tl.float32, 4) + quanta
        v_scale_ptrs = _array(pointers_ptr, _V_SCALES, i, n_tensors, tl.float32, 4) + quanta
    else:
        v_ptrs = _array(pointers_ptr, _V, i, n_tensors, M, MOMENT_ALIGN) + first_block + blocks
        m_scale_ptrs, v_scale_ptrs = m_ptrs, v_ptrs  # not read
    return m_ptrs, v_ptrs, m_scale_ptrs, v_scale_ptrs


@triton.jit
def _load_moments(m_ptrs, v_ptrs, m_scale_ptrs, v_scale_ptrs, inside, NB: tl.constexpr, Q: tl.constexpr):
    """``m`` and ``v`` of a tile's blocks, in float32; zeros beyond the last."""
    m = tl.load(m_ptrs, mask=inside, other=0).to(tl.float32)
    v = tl.load(v_ptrs, mask=inside, other=0).to(tl.float32)
    if Q:
        known = _quanta_inside(inside, NB, Q)
        m = decode_first(m, tl.load(m_scale_ptrs, mask=known, other=0.0), Q, NB)
        v = decode_second(v, tl.load(v_scale_ptrs, mask=known, other=0.0), Q, NB)
    return m, v


@triton.jit
def _store_moments(
    m,
    v,
    bits,
    m_ptrs,
    v_ptrs,
    m_scale_ptrs,
    v_scale_ptrs,
    inside,
    M: tl.constexpr,
    NB: tl.constexpr,
    Q: tl.constexpr,
):
    """Store ``m`` and ``v``: to the nearest, or by random ``bits``, of which ``m`` gets the lower half."""
    if Q:
        known = _quanta_inside(inside, NB, Q)
        m, m_scales = encode_first(tl.where(inside, m, 0.0), bits & 0xFFFF, Q, NB)
        v, v_scales = encode_second(tl.where(inside, v, 0.0), bits >> 16, Q, NB)
        tl.store(m_scale_ptrs, m_scales, mask=known)
        tl.store(v_scale_ptrs, v_scales, mask=known)
    elif M == tl.bfloat16:
        m, v = round_at_random(m, bits & 0xFFFF, M), round_at_random(v, bits >> 16, M)
    else:
        m, v = m.to(M), v.to(M)
    tl.store(m_ptrs, m, mask=inside)
    tl.store(v_ptrs, v, mask=inside)


@triton.jit
def _quanta_inside(inside, NB: tl.constexpr, Q: tl.constexpr):
    """Which quanta have a coefficient that is inside."""
    return tl.max(tl.reshape(inside, (NB // Q, Q)).to(tl.int32), axis=1) > 0


@triton.jit
def _tile(layout_ptr, i, n_tensors, first_block, W: tl.constexpr, NB: tl.constexpr, FLAT: tl.constexpr):
    """Where the tile that starts with ``first_block`` lies in tensor ``i``: see ``tile_offsets``."""
    n_blocks = tl.load(layout_ptr + n_tensors + i)
    width = tl.load(layout_ptr + 2 * n_tensors + i)
    row_blocks = tl.load(layout_ptr + 3 * n_tensors + i)
    MULTIPLE: tl.constexpr = 8 // W if FLAT and W < 8 else 1
    return tile_offsets(n_blocks, width, row_blocks, first_block, W, NB, FLAT, MULTIPLE)
