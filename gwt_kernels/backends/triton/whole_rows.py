"""Kernels of the step if a block is a row of any width: a program reads its row for sums, and then to update it.

The second read finds the row in a cache. The tables are those of ``step.py``; a row is a block, and the tile of a
program. A program takes ``TILE`` elements at a time. It adds them up lane by lane, and then in pairs of neighbours:
in one order whatever the dtypes. ``FLAT`` rows have a multiple of 8 elements, at addresses that are multiples of 16
bytes, and move in 128-bit accesses.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gwt_kernels.backends.triton import schema
from gwt_kernels.backends.triton.moments import moment_arrays
from gwt_kernels.backends.triton.philox import (
    random_halves,
    random_halves_at,
    random_halves_of_calls,
    random_words_at,
)
from gwt_kernels.backends.triton.tensors import arrays_of, draws_of, in_whole, numbers_of
from gwt_kernels.backends.triton.tiles import FLAT as _FLAT
from gwt_kernels.backends.triton.tiles import array_ptr as _array
from gwt_kernels.core import kernel
from gwt_kernels.formats import split, stochastic
from gwt_kernels.rules import blocks

kernel.load()
kernel_block_sums = blocks.kernel_block_sums
join_low, split_low = split.kernel_join_low, split.kernel_split_low
stochastic_round = stochastic.kernel_stochastic_round


@triton.jit(do_not_specialize=["n_tensors"])
def row_step_kernel(
    owners_ptr,
    layout_ptr,
    pointers_ptr,
    scalars_ptr,
    factors_ptr,
    sums_ptr,
    row_sums_ptr,
    n_tensors,
    P: tl.constexpr,
    G: tl.constexpr,
    M: tl.constexpr,
    V: tl.constexpr,
    TILE: tl.constexpr,
    FLAT: tl.constexpr,
    ALIGN: tl.constexpr,
    MOMENT_ALIGN: tl.constexpr,
    LIMITED: tl.constexpr,
    MOMENTS: tl.constexpr,
    SQUARES: tl.constexpr,
    UPDATE: tl.constexpr,
    ROUNDING: tl.constexpr,
    SPAN: tl.constexpr,
    SLOTS: tl.constexpr,
    CAN_SKIP: tl.constexpr,
    TELEMETRY: tl.constexpr,
    READS: tl.constexpr,
    GIVEN: tl.constexpr,
):
    """Take the step of one row, as ``step_kernel`` does of a tile: moments from its sums, then its weights.

    If ``GIVEN`` is above 0, other processes have parts of the row, and ``row_sums`` float32 ``[rows, GIVEN]`` has
    the sums over whole rows, before ``grad_scale``.
    """
    program = tl.program_id(0)
    if LIMITED:  # last rows first: the L2 cache still has what row_norm_kernel read last
        program = tl.num_programs(0) - 1 - program
    i = tl.load(owners_ptr + program)
    if CAN_SKIP:  # noqa: SIM102  # a constexpr condition needs its own statement
        if tl.load(scalars_ptr + i * schema.N_SCALARS + schema.TAKEN) == 0.0:
            return
    row = program - tl.load(layout_ptr + i * schema.N_LAYOUT + schema.FIRST_PROGRAM)
    width, start = row_place(layout_ptr, i, row, FLAT)
    scalars_ptr += i * schema.N_SCALARS
    step_size = tl.load(scalars_ptr + schema.STEP_SIZE)
    if LIMITED:
        step_size *= tl.load(factors_ptr + i)
    numbers = numbers_of(scalars_ptr)
    grad_scale, decay = tl.load(scalars_ptr + schema.GRAD_SCALE), tl.load(scalars_ptr + schema.DECAY)
    p_ptr, g_ptr, low_ptr, moments = arrays_of(
        pointers_ptr, i, n_tensors, P, G, M, ALIGN, MOMENT_ALIGN, ROUNDING, 0, SLOTS
    )
    AT_RANDOM: tl.constexpr = SLOTS > 0 and M == tl.bfloat16
    DRAWS: tl.constexpr = ROUNDING == "stochastic" or AT_RANDOM
    key, step, weights_span, moments_span = draws_of(pointers_ptr, i, n_tensors, DRAWS, SPAN)

    m_ptr, v_ptr = _moment_ptrs(moments, pointers_ptr, i, n_tensors, V, SLOTS)
    m, v = _load_moments(m_ptr, v_ptr, row, SLOTS)
    length = width
    if GIVEN:
        length, sums, squares = given_sums(layout_ptr, row_sums_ptr, i, row, grad_scale, GIVEN)
    else:
        sums, squares, _ = _sums(g_ptr + start, width, grad_scale, TILE, FLAT, SQUARES == "elements", False)
    mean, m, v, per_root = _new_moments(sums, squares, m, v, length, numbers, MOMENTS, SQUARES)
    tl.debug_barrier()  # all lanes have read the moments before one writes them
    places = row + tl.arange(0, 1)
    if AT_RANDOM:
        index = places
        if SPAN:
            index = in_whole(moments_span, places) if SPAN > 1 else places + moments_span[0]
        words = random_words_at(index, step, key)
        tl.store(m_ptr + places, stochastic_round(m, words & 0xFFFF, M))
        if V == tl.bfloat16 and SLOTS == 2:
            tl.store(v_ptr + places, stochastic_round(v, words >> 16, V))
    elif SLOTS > 0:
        tl.store(m_ptr + places, m.to(M))
    if V != tl.bfloat16 and SLOTS == 2:
        tl.store(v_ptr + places, v.to(V))

    details = tl.zeros((TILE,), tl.float32)
    applied = tl.zeros((TILE,), tl.float32)
    for column in tl.range(0, width, TILE):
        here = start + column
        inside = inside_row(width, column, TILE, FLAT)
        g = load_part(g_ptr + here, inside, TILE).to(tl.float32) * grad_scale
        if READS:
            p = load_part(p_ptr + here, inside, TILE)
            if ROUNDING == "split":
                p = join_low(p, load_part(low_ptr + here, inside, TILE))
            else:
                p = p.to(tl.float32)
        elements = tl.reshape(g, (1, TILE))
        residual = elements - mean[:, None]
        update = tl.reshape(UPDATE(elements, residual, m, v, step_size, numbers, per_root), (TILE,))
        if TELEMETRY:
            apart = tl.where(inside, tl.reshape(residual, (TILE,)), 0.0)
            details += apart * apart
            moved = tl.where(inside, update, 0.0)
            applied += moved * moved
        if READS:
            p = p - decay * p - update
        else:
            p = update
        if ROUNDING == "split":
            weight, low = split_low(p)
            store_part(low_ptr + here, low, inside, TILE)
            store_part(p_ptr + here, weight, inside, TILE)
        elif ROUNDING == "stochastic":
            if SPAN == 3:
                calls = in_whole(weights_span, here + tl.arange(0, TILE // 8) * 8) >> 3
                bits = random_halves_of_calls(calls, TILE, step, key)
            elif SPAN == 2:
                bits = random_halves_at(in_whole(weights_span, here + tl.arange(0, TILE)), step, key)
            elif FLAT:
                bits = random_halves(here + weights_span[0], TILE, step, key)
            else:
                bits = random_halves_at(here + weights_span[0] + tl.arange(0, TILE), step, key)
            store_part(p_ptr + here, stochastic_round(p, bits, P), inside, TILE)
        else:
            store_part(p_ptr + here, p.to(P), inside, TILE)
    if TELEMETRY:
        sums_ptr += program.to(tl.int64) * 3
        tl.store(sums_ptr, tl.sum(details, axis=0))
        tl.store(sums_ptr + 1, tl.sum(mean * mean, axis=0) * width.to(tl.float32))
        tl.store(sums_ptr + 2, tl.sum(applied, axis=0))


@triton.jit(do_not_specialize=["n_tensors", "tiles_per_chunk", "n_chunks"])
def row_norm_kernel(
    owners_ptr,
    layout_ptr,
    pointers_ptr,
    scalars_ptr,
    first_chunk_ptr,
    partials_ptr,
    grad_stats_ptr,
    row_sums_ptr,
    n_tensors,
    tiles_per_chunk,
    n_chunks,
    G: tl.constexpr,
    M: tl.constexpr,
    V: tl.constexpr,
    TILE: tl.constexpr,
    FLAT: tl.constexpr,
    ALIGN: tl.constexpr,
    MOMENT_ALIGN: tl.constexpr,
    SLOTS: tl.constexpr,
    CAN_SKIP: tl.constexpr,
    COLLECT_GRAD_STATS: tl.constexpr,
    MOMENTS: tl.constexpr,
    SQUARES: tl.constexpr,
    DIRECTION: tl.constexpr,
    GIVEN: tl.constexpr,
):
    """Compute a partial sum of squares of the rule's ``DIRECTION`` over some rows: see ``norm_kernel``."""
    chunk = tl.program_id(0)
    i = tl.load(owners_ptr + chunk)
    if CAN_SKIP:  # noqa: SIM102  # a constexpr condition needs its own statement
        if tl.load(scalars_ptr + i * schema.N_SCALARS + schema.TAKEN) == 0.0:
            return
    row = (chunk - tl.load(first_chunk_ptr + i)) * tiles_per_chunk
    end = tl.minimum(row + tiles_per_chunk, tl.load(layout_ptr + i * schema.N_LAYOUT + schema.N_BLOCKS))
    grad_scale = tl.load(scalars_ptr + i * schema.N_SCALARS + schema.GRAD_SCALE)
    numbers = numbers_of(scalars_ptr + i * schema.N_SCALARS)
    g_ptr = _array(pointers_ptr, schema.G_PTR, i, n_tensors, G, ALIGN)
    moments = moment_arrays(pointers_ptr, i, n_tensors, M, MOMENT_ALIGN, 0, SLOTS)
    total = tl.zeros((1,), tl.float32)
    sum_of_squares = tl.zeros((1,), tl.float32)
    largest = tl.zeros((TILE,), tl.int32)  # bits of magnitudes: those of infinity and NaN are above all others
    m_ptr, v_ptr = _moment_ptrs(moments, pointers_ptr, i, n_tensors, V, SLOTS)
    while row < end:
        width, start = row_place(layout_ptr, i, row, FLAT)
        m, v = _load_moments(m_ptr, v_ptr, row, SLOTS)
        SQUARED: tl.constexpr = SQUARES == "elements" or COLLECT_GRAD_STATS
        length = width
        if GIVEN:
            tl.static_assert(not COLLECT_GRAD_STATS)
            length, sums, squares = given_sums(layout_ptr, row_sums_ptr, i, row, grad_scale, GIVEN)
        else:
            sums, squares, sizes = _sums(g_ptr + start, width, grad_scale, TILE, FLAT, SQUARED, COLLECT_GRAD_STATS)
        _, m, v, _ = _new_moments(sums, squares, m, v, length, numbers, MOMENTS, SQUARES)
        a = DIRECTION(m, v, numbers)
        total += a * a
        if COLLECT_GRAD_STATS:
            sum_of_squares += squares
            largest = tl.maximum(largest, sizes)
        row += 1
    tl.store(partials_ptr + chunk, tl.sum(total, axis=0))
    if COLLECT_GRAD_STATS:
        tl.store(grad_stats_ptr + chunk, tl.sum(sum_of_squares, axis=0))
        tl.store(grad_stats_ptr + n_chunks + chunk, tl.where(tl.max(largest, axis=0) >= 0x7F800000, 1.0, 0.0))


@triton.jit
def row_place(layout_ptr, i, row, FLAT: tl.constexpr):
    """Return the width of a tensor's rows, and the index of a row's first element."""
    width = tl.load(layout_ptr + i * schema.N_LAYOUT + schema.WIDTH)
    start = row * width
    if FLAT:
        start = tl.multiple_of(start, 8)
    return width, start


@triton.jit
def row_sums_kernel(
    owners_ptr,
    layout_ptr,
    grads_ptr,
    sums_ptr,
    G: tl.constexpr,
    W: tl.constexpr,
    NB: tl.constexpr,
    FLAT: tl.constexpr,
    BY_BLOCKS: tl.constexpr,
    NUMBERS: tl.constexpr,
):
    """Sum one row's elements and, if ``NUMBERS`` is 2, their squares; or, ``BY_BLOCKS``, its blocks' squared means.

    ``owners`` int32 has the index of each row's tensor, ``layout`` int64 ``[n, 2]`` first row and width per tensor,
    ``grads`` int64 the addresses; ``sums`` is float32 ``[rows, NUMBERS]``. A row's last block may be incomplete.
    """
    TILE: tl.constexpr = NB * W
    row = tl.program_id(0)
    i = tl.load(owners_ptr + row)
    width = tl.load(layout_ptr + 2 * i + 1)
    start = (row - tl.load(layout_ptr + 2 * i)) * width
    g_ptr = tl.load(grads_ptr + i).to(tl.pointer_type(G))
    if FLAT:
        start = tl.multiple_of(start, 8)
        g_ptr = tl.multiple_of(g_ptr, 16)
    total = tl.zeros((NB if BY_BLOCKS else TILE,), tl.float32)
    squares = total
    for column in tl.range(0, width, TILE):
        g = load_part(g_ptr + start + column, inside_row(width, column, TILE, FLAT), TILE).to(tl.float32)
        if BY_BLOCKS:
            mean = kernel_block_sums(g, W, NB, _FLAT) * (1.0 / W)
            total += mean * mean
        else:
            total += g
        if NUMBERS == 2:
            squares += g * g
    sums_ptr += row.to(tl.int64) * NUMBERS + tl.arange(0, 1)
    tl.store(sums_ptr, kernel_block_sums(total, NB if BY_BLOCKS else TILE, 1, _FLAT))
    if NUMBERS == 2:
        tl.store(sums_ptr + 1, kernel_block_sums(squares, TILE, 1, _FLAT))


@triton.jit
def given_sums(layout_ptr, row_sums_ptr, i, row, factor, GIVEN: tl.constexpr):
    """Return a whole row's length, its sum times ``factor``, and its sum of squares times ``factor**2``.

    The sums are ``[1]``; the latter is given if ``GIVEN`` is 2.
    """
    layout_ptr += i * schema.N_LAYOUT
    row_sums_ptr += (tl.load(layout_ptr + schema.FIRST_ROW) + row) * GIVEN + tl.arange(0, 1)
    sums = tl.load(row_sums_ptr) * factor
    squares = sums
    if GIVEN == 2:
        squares = tl.load(row_sums_ptr + 1) * factor * factor
    return tl.load(layout_ptr + schema.ROW_LENGTH), sums, squares


@triton.jit
def _sums(
    g_ptr,
    width,
    grad_scale,
    TILE: tl.constexpr,
    FLAT: tl.constexpr,
    SQUARES: tl.constexpr,
    COLLECT_GRAD_STATS: tl.constexpr,
):
    """Return the sum of a row and that of its ``SQUARES``, both ``[1]``, and the bits of its largest magnitudes.

    The bits are 0 without ``COLLECT_GRAD_STATS``.
    """
    total = tl.zeros((TILE,), tl.float32)
    squares = tl.zeros((TILE,), tl.float32)
    largest = tl.zeros((TILE,), tl.int32)
    for column in tl.range(0, width, TILE):
        g = load_part(g_ptr + column, inside_row(width, column, TILE, FLAT), TILE).to(tl.float32) * grad_scale
        total += g
        if SQUARES:
            squares += g * g
        if COLLECT_GRAD_STATS:
            largest = tl.maximum(largest, g.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    sums = kernel_block_sums(total, TILE, 1, _FLAT)
    if SQUARES:
        squares = kernel_block_sums(squares, TILE, 1, _FLAT)
    else:
        squares = sums
    return sums, squares, largest


@triton.jit
def _new_moments(sums, squares, m, v, width, numbers, MOMENTS: tl.constexpr, SQUARES: tl.constexpr):
    """Return the mean of a row, its new moments by the rule, and ``1 / sqrt(width)``."""
    elements = tl.zeros_like(sums) + width.to(tl.float32)
    root = tl.sqrt_rn(elements)
    mean = tl.div_rn(sums, elements)
    square = tl.div_rn(squares, elements)
    if SQUARES == "coefficients":
        square = mean * mean * elements
    m, v = MOMENTS(mean, square, m, v, numbers, root)
    return mean, m, v, tl.div_rn(tl.full((1,), 1.0, tl.float32), root)


@triton.jit
def _moment_ptrs(moments, pointers_ptr, i, n_tensors, V: tl.constexpr, SLOTS: tl.constexpr):
    """Return the addresses of a tensor's ``m`` and ``v``, the latter in a dtype of its own."""
    v_ptr = moments[0]
    if SLOTS == 2:
        v_ptr = _array(pointers_ptr, schema.V_PTR, i, n_tensors, V, V.primitive_bitwidth // 8)
    return moments[0], v_ptr


@triton.jit
def _load_moments(m_ptr, v_ptr, row, SLOTS: tl.constexpr):
    """Load ``m`` and ``v`` of a row, in float32, ``[1]``: ``m`` twice if ``SLOTS`` is 1, zeros if it is 0."""
    places = row + tl.arange(0, 1)
    m = tl.zeros((1,), tl.float32)
    if SLOTS > 0:
        m = tl.load(m_ptr + places).to(tl.float32)
    v = m
    if SLOTS == 2:
        v = tl.load(v_ptr + places).to(tl.float32)
    return m, v


@triton.jit
def inside_row(width, column, TILE: tl.constexpr, FLAT: tl.constexpr):
    """Return the mask of elements from ``column`` on that are in the row: ``[TILE]``."""
    # A run of 8 elements is inside or outside as a whole, so one access can take all of it.
    here = tl.minimum(width - column, TILE).to(tl.int32)
    return tl.arange(0, TILE) < tl.multiple_of(here, 8 if FLAT else 1)


@triton.jit
def load_part(ptr, inside, TILE: tl.constexpr):
    return tl.load(ptr + tl.arange(0, TILE), mask=inside, other=0)


@triton.jit
def store_part(ptr, x, inside, TILE: tl.constexpr):
    tl.store(ptr + tl.arange(0, TILE), x, mask=inside)
