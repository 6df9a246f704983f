"""Kernel of the step if blocks of a row share a second moment: a program reads its row for that, then to update it.

As in ``whole_rows.py``, except that a row is ``row_blocks`` blocks of ``W`` elements, the last of which may be
incomplete. A tile is ``NB`` blocks. Indices of random bits count rows as padded (``hyper.padded_spans``).
"""

from __future__ import annotations

import triton
import triton.language as tl

from gwt_kernels.backends.triton import schema
from gwt_kernels.backends.triton.philox import (
    random_halves,
    random_halves_at,
    random_halves_of_calls,
    random_words_at,
)
from gwt_kernels.backends.triton.tensors import arrays_of, draws_of, in_whole, numbers_of
from gwt_kernels.backends.triton.tiles import FLAT as _FLAT
from gwt_kernels.backends.triton.tiles import ROWS
from gwt_kernels.backends.triton.tiles import array_ptr as _array
from gwt_kernels.backends.triton.whole_rows import given_sums, inside_row, load_part, row_place, store_part
from gwt_kernels.core import kernel
from gwt_kernels.formats import split, stochastic
from gwt_kernels.rules import blocks

kernel.load()
kernel_block_means, kernel_block_sums = blocks.kernel_block_means, blocks.kernel_block_sums
kernel_residuals = blocks.kernel_residuals
join_low, split_low = split.kernel_join_low, split.kernel_split_low
stochastic_round = stochastic.kernel_stochastic_round


@triton.jit(do_not_specialize=["n_tensors"])
def shared_step_kernel(
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
    W: tl.constexpr,
    NB: tl.constexpr,
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
    GIVEN: tl.constexpr,
):
    """Take the step of one row, as ``step_kernel`` does of a tile: the second moment first, then all else.

    If sums are ``GIVEN``, ``row_sums`` float32 ``[rows]`` has the sums of the squares of the blocks' means. The
    rule has no limiter and two moments, and takes the mean square of a row's approximation coefficients.
    """
    tl.static_assert(SQUARES == "coefficients" and SLOTS == 2 and not LIMITED)
    TILE: tl.constexpr = NB * W
    program = tl.program_id(0)
    i = tl.load(owners_ptr + program)
    if CAN_SKIP:  # noqa: SIM102  # a constexpr condition needs its own statement
        if tl.load(scalars_ptr + i * schema.N_SCALARS + schema.TAKEN) == 0.0:
            return
    row = program - tl.load(layout_ptr + i * schema.N_LAYOUT + schema.FIRST_PROGRAM)
    width, start = row_place(layout_ptr, i, row, FLAT)
    row_blocks = tl.load(layout_ptr + i * schema.N_LAYOUT + schema.ROW_BLOCKS)
    padded = tl.load(layout_ptr + i * schema.N_LAYOUT + schema.PADDED)
    scalars_ptr += i * schema.N_SCALARS
    step_size, numbers = tl.load(scalars_ptr + schema.STEP_SIZE), numbers_of(scalars_ptr)
    grad_scale, decay = tl.load(scalars_ptr + schema.GRAD_SCALE), tl.load(scalars_ptr + schema.DECAY)
    p_ptr, g_ptr, low_ptr, moments = arrays_of(
        pointers_ptr, i, n_tensors, P, G, M, ALIGN, MOMENT_ALIGN, ROUNDING, 0, SLOTS
    )
    m_ptr = moments[0] + row * row_blocks
    v_ptr = _array(pointers_ptr, schema.V_PTR, i, n_tensors, V, V.primitive_bitwidth // 8) + row + tl.arange(0, 1)
    DRAWS: tl.constexpr = ROUNDING == "stochastic" or M == tl.bfloat16
    key, step, weights_span, moments_span = draws_of(pointers_ptr, i, n_tensors, DRAWS, SPAN)

    KIND: tl.constexpr = _FLAT if FLAT else ROWS
    length = row_blocks
    if GIVEN:
        length, total, _ = given_sums(layout_ptr, row_sums_ptr, i, row, grad_scale * grad_scale, GIVEN)
    else:
        total = tl.zeros((NB,), tl.float32)
        for column in tl.range(0, width, TILE):
            g = load_part(g_ptr + start + column, inside_row(width, column, TILE, FLAT), TILE)
            mean = kernel_block_means(g.to(tl.float32) * grad_scale, total, W, NB, KIND, "")[0]
            total += mean * mean
        total = kernel_block_sums(total, NB, 1, _FLAT)
    square = tl.div_rn(total * W, tl.zeros_like(total) + length.to(tl.float32))
    before = tl.load(v_ptr).to(tl.float32)
    v = before

    details = tl.zeros((TILE,), tl.float32)
    approximation = tl.zeros((NB,), tl.float32)
    applied = tl.zeros((TILE,), tl.float32)
    end = width
    if GIVEN:
        end = tl.maximum(width, 1)  # rows without columns here have a second moment too
    for column in tl.range(0, end, TILE):
        here = start + column
        inside = inside_row(width, column, TILE, FLAT)
        g = load_part(g_ptr + here, inside, TILE).to(tl.float32) * grad_scale
        p = load_part(p_ptr + here, inside, TILE)
        if ROUNDING == "split":
            p = join_low(p, load_part(low_ptr + here, inside, TILE))
        else:
            p = p.to(tl.float32)
        block = column // W
        held = inside_row(row_blocks, block, NB, False)
        m = load_part(m_ptr + block, held, NB).to(tl.float32)
        mean, _same, m = kernel_block_means(g, m, W, NB, KIND, "")
        residual = kernel_residuals(g, mean, W, NB)
        m, v = MOMENTS(mean, square, m, before, numbers, W**0.5)
        tl.debug_barrier()  # several lanes may read one block: all must have done so before one writes it
        if M == tl.bfloat16:
            if SPAN > 1:
                index = in_whole(moments_span, row * row_blocks + block + tl.arange(0, NB))
            else:
                index = row * padded + block + moments_span[0] + tl.arange(0, NB)
            words = random_words_at(index, step, key)
            store_part(m_ptr + block, stochastic_round(m, words & 0xFFFF, M), held, NB)
        else:
            store_part(m_ptr + block, m.to(M), held, NB)
        update = UPDATE(tl.reshape(g, (NB, W)), residual, m, v, step_size, numbers, W**-0.5)
        update = tl.reshape(update, (TILE,))
        if TELEMETRY:
            if W > 1:
                apart = tl.reshape(residual, (TILE,))
                details += apart * apart
            approximation += mean * mean
            moved = tl.where(inside, update, 0.0)
            applied += moved * moved
        p = p - decay * p - update
        if ROUNDING == "split":
            weight, low = split_low(p)
            store_part(low_ptr + here, low, inside, TILE)
            store_part(p_ptr + here, weight, inside, TILE)
        elif ROUNDING == "stochastic":
            first = row * (padded * W) + column + weights_span[0]
            if SPAN == 3:
                calls = in_whole(weights_span, here + tl.arange(0, TILE // 8) * 8) >> 3
                bits = random_halves_of_calls(calls, TILE, step, key)
            elif SPAN == 2:
                bits = random_halves_at(in_whole(weights_span, here + tl.arange(0, TILE)), step, key)
            elif FLAT:
                bits = random_halves(tl.multiple_of(first, 8), TILE, step, key)
            else:
                bits = random_halves_at(first + tl.arange(0, TILE), step, key)
            store_part(p_ptr + here, stochastic_round(p, bits, P), inside, TILE)
        else:
            store_part(p_ptr + here, p.to(P), inside, TILE)
    tl.debug_barrier()
    tl.store(v_ptr, v.to(V))
    if TELEMETRY:
        sums_ptr += program.to(tl.int64) * 3
        tl.store(sums_ptr, tl.sum(details, axis=0))
        tl.store(sums_ptr + 1, tl.sum(approximation, axis=0) * W)
        tl.store(sums_ptr + 2, tl.sum(applied, axis=0))
