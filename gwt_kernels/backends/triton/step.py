"""Kernels of the fused step: one launch per pass and path for a whole bucket of tensors.

A bucket is described by tables in device memory, with one entry per tensor except in ``owners``:

``owners``    int32 ``[programs]``: index of each program's tensor
``layout``, ``pointers``, ``scalars``: see ``schema.py``

A *block* is ``W = 2**level`` neighbours that share one moment, a *tile* the ``NB`` blocks that a program
updates at a time. Two paths differ only in where the elements of a block lie. The *flat* path takes tensors
whose rows are whole blocks, whose size is a multiple of 8 and whose addresses are multiples of 16 bytes: there
blocks lie end to end, and a tile is one contiguous, aligned run. The *row* path takes any tensor: the last
block of a row may be incomplete, and elements beyond the row count as zero. There a lane takes one element at a
time, and one block's moments at a time, so that the lanes of a warp access neighbours.

For the indices of random bits, rows that are not whole blocks are padded to a multiple of 4 blocks
(``hyper.padded_spans``). Tiles contain only as much padding as lets a call of Philox serve 4 coefficients, or 8
weights, that are neighbours in a tile (``layout.blocks_together``): more would shift moments off their sectors.

``ALIGN`` and ``MOMENT_ALIGN`` are bytes that addresses are known to be multiples of, and so the widest access
that the compiler may choose. A thread that holds 16 bytes of weights should hold the moments of just those
blocks: wider accesses to the moments would have to be exchanged through shared memory, with barriers. If weights
and gradients differ in dtype, the wider one is accessed by 16 bytes, and the narrower one by as many elements.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gwt_kernels.backends.triton import schema
from gwt_kernels.backends.triton.moments import load_moments, moment_arrays, store_moments
from gwt_kernels.backends.triton.philox import (
    random_halves,
    random_halves_at,
    random_halves_of_blocks,
    random_halves_of_calls,
    random_words,
    random_words_at,
    random_words_of_calls,
)
from gwt_kernels.backends.triton.tensors import arrays_of, draws_of, in_whole, numbers_of, run_in_whole
from gwt_kernels.backends.triton.tiles import FLAT as _FLAT
from gwt_kernels.backends.triton.tiles import (
    ROWS,
    RUN,
    first_drawn,
    index_drawn,
    index_in_array,
    inside_tile,
    is_run,
    load_tile,
    store_tile,
    tile_of,
)
from gwt_kernels.backends.triton.tiles import array_ptr as _array
from gwt_kernels.core import kernel
from gwt_kernels.formats import split, stochastic
from gwt_kernels.rules import blocks

kernel.load()
kernel_block_means, kernel_block_sums = blocks.kernel_block_means, blocks.kernel_block_sums
kernel_residuals = blocks.kernel_residuals
join_low, split_low = split.kernel_join_low, split.kernel_split_low
stochastic_round = stochastic.kernel_stochastic_round


@triton.jit(do_not_specialize=["n_tensors"])
def step_kernel(
    owners_ptr,
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
    TILES: tl.constexpr,
    FLAT: tl.constexpr,
    ALIGN: tl.constexpr,
    MOMENT_ALIGN: tl.constexpr,
    LIMITED: tl.constexpr,
    MOMENTS: tl.constexpr,
    SQUARES: tl.constexpr,
    UPDATE: tl.constexpr,
    ROUNDING: tl.constexpr,
    SPAN: tl.constexpr,
    Q: tl.constexpr,
    SLOTS: tl.constexpr,
    CAN_SKIP: tl.constexpr,
    TELEMETRY: tl.constexpr,
    READS: tl.constexpr,
):
    """Take the step of tiles: transform, moments, inverse transform and weights, all read and written once.

    With the update ``u`` of the rule, whose statements are ``MOMENTS`` and ``UPDATE`` (``rules/``)::

        p_i = p_i - lr*weight_decay * p_i - step_size * factor * u_i

    ``factor`` is the reciprocal of the limiter's divisor, or 1 without limiter. Unless the rule ``READS`` weights,
    ``u_i`` replaces them.

    ``ROUNDING`` of the weights is ``"nearest"``, ``"stochastic"``, or ``"split"``, with the low halves of float32
    weights in a separate array. Moments in bfloat16 round stochastically; so do quantized ones, which have a scale
    per ``Q`` values. Random bits depend on the index in the whole tensor. For shards ``SPAN`` is 1 if that is the
    shard's index plus a multiple of 8 (weights) and of 4 (moments), 2 if it is any, and 3, on the flat path, if
    groups of 8 weights and of 4 coefficients are contiguous in both.

    A program takes ``TILES`` tiles of a tensor, one after the other, and loads their common data once. With
    ``TELEMETRY``, ``sums`` float32 ``[programs, 3]`` receives the sums of squares of their details, of their
    approximation coefficients and of their update without weight decay.
    """
    program = tl.program_id(0)
    if LIMITED:  # last tiles first: the L2 cache still has what norm_kernel read last
        program = tl.num_programs(0) - 1 - program
    i = tl.load(owners_ptr + program)
    if CAN_SKIP:  # noqa: SIM102  # a constexpr condition needs its own statement
        if tl.load(scalars_ptr + i * schema.N_SCALARS + schema.TAKEN) == 0.0:
            return
    n_blocks, width, row_blocks, padded, reciprocal = _layout(layout_ptr, i, FLAT)
    first = (program - tl.load(layout_ptr + i * schema.N_LAYOUT + schema.FIRST_PROGRAM)) * (TILES * NB)
    scalars_ptr += i * schema.N_SCALARS
    step_size = tl.load(scalars_ptr + schema.STEP_SIZE)
    if LIMITED:
        step_size *= tl.load(factors_ptr + i)
    numbers = numbers_of(scalars_ptr)
    rates = tl.load(scalars_ptr + schema.GRAD_SCALE), tl.load(scalars_ptr + schema.DECAY), step_size
    arrays = arrays_of(pointers_ptr, i, n_tensors, P, G, M, ALIGN, MOMENT_ALIGN, ROUNDING, Q, SLOTS)
    draws = draws_of(pointers_ptr, i, n_tensors, ROUNDING == "stochastic" or M == tl.bfloat16 or Q, SPAN)
    MULTIPLE: tl.constexpr = 8 // W if W < 8 else 1
    if TILES == 1:
        tile = tile_of(n_blocks, padded, reciprocal, first, NB, _FLAT, MULTIPLE)
        sums = _update(
            tile, width, row_blocks, padded, arrays, numbers, rates, draws, P, M, W, NB, MOMENTS, SQUARES,
            UPDATE, ROUNDING, SPAN, Q, SLOTS, TELEMETRY, READS, _FLAT,
        )  # fmt: skip
    else:
        zero = tl.zeros((), tl.float32)
        sums = zero, zero, zero
        here = tl.minimum(TILES * NB, n_blocks - first)
        # The compiler must move nothing out of the loop: each lane's offsets would occupy registers throughout.
        for passed in tl.range(0, here, NB, disable_licm=True):
            tile = tile_of(n_blocks, padded, reciprocal, first + passed, NB, _FLAT if FLAT else ROWS, MULTIPLE)
            if FLAT:
                own = _update(
                    tile, width, row_blocks, padded, arrays, numbers, rates, draws, P, M, W, NB, MOMENTS, SQUARES,
                    UPDATE, ROUNDING, SPAN, Q, SLOTS, TELEMETRY, READS, _FLAT,
                )  # fmt: skip
            elif is_run(tile, width, padded, W, NB):
                own = _update(
                    tile, width, row_blocks, padded, arrays, numbers, rates, draws, P, M, W, NB, MOMENTS, SQUARES,
                    UPDATE, ROUNDING, SPAN, Q, SLOTS, TELEMETRY, READS, RUN,
                )  # fmt: skip
            else:
                own = _update(
                    tile, width, row_blocks, padded, arrays, numbers, rates, draws, P, M, W, NB, MOMENTS, SQUARES,
                    UPDATE, ROUNDING, SPAN, Q, SLOTS, TELEMETRY, READS, ROWS,
                )  # fmt: skip
            sums = sums[0] + own[0], sums[1] + own[1], sums[2] + own[2]
    if TELEMETRY:
        sums_ptr += program.to(tl.int64) * 3
        tl.store(sums_ptr, sums[0])
        tl.store(sums_ptr + 1, sums[1])
        tl.store(sums_ptr + 2, sums[2])


@triton.jit
def _update(
    tile,
    width,
    row_blocks,
    padded,
    arrays,
    numbers,
    rates,
    draws,
    P: tl.constexpr,
    M: tl.constexpr,
    W: tl.constexpr,
    NB: tl.constexpr,
    MOMENTS: tl.constexpr,
    SQUARES: tl.constexpr,
    UPDATE: tl.constexpr,
    ROUNDING: tl.constexpr,
    SPAN: tl.constexpr,
    Q: tl.constexpr,
    SLOTS: tl.constexpr,
    TELEMETRY: tl.constexpr,
    READS: tl.constexpr,
    KIND: tl.constexpr,
):
    """Take the step of one tile of a kind, and return its sums for telemetry: see ``step_kernel``."""
    first_block = tile[0]
    MULTIPLE: tl.constexpr = 8 // W if W < 8 else 1
    p_ptr, g_ptr, low_ptr, moments = arrays
    grad_scale, decay, step_size = rates
    key, step, weights_span, moments_span = draws

    if READS:
        p = load_tile(p_ptr, tile, width, padded, W, NB, KIND, MULTIPLE)
        if ROUNDING == "split":
            p = join_low(p, load_tile(low_ptr, tile, width, padded, W, NB, KIND, MULTIPLE))
        else:
            p = p.to(tl.float32)
    g = load_tile(g_ptr, tile, width, padded, W, NB, KIND, MULTIPLE).to(tl.float32) * grad_scale
    # Moments are loaded last: the compiler distributes the results of a block over lanes as the last load on which
    # they depend.
    m, v = load_moments(moments, tile, row_blocks, padded, NB, KIND, MULTIPLE, Q, SLOTS)
    mean, m, v = _moments(g, m, v, numbers, W, NB, MOMENTS, SQUARES, KIND)
    residual = kernel_residuals(g, mean, W, NB)
    if M == tl.bfloat16 or Q:
        if SPAN == 3 and NB >= 4:
            calls = run_in_whole(moments_span, first_block, NB, 4) >> 2
            bits = random_words_of_calls(calls, NB, step, key)
        elif SPAN > 1:
            index = index_in_array(tile, row_blocks, padded, 1, NB, KIND)
            bits = random_words_at(in_whole(moments_span, index), step, key)
        elif Q and KIND != _FLAT:
            bits = random_words_at(index_drawn(tile, row_blocks, 1, NB) + moments_span[0], step, key)
        else:
            bits = random_words(first_block + moments_span[0], NB, step, key)
    else:
        bits = 0
    if KIND != _FLAT and NB < 32:  # several lanes read one block: all must have done so before one writes it
        tl.debug_barrier()
    store_moments(m, v, bits, moments, tile, row_blocks, padded, M, NB, KIND, MULTIPLE, Q, SLOTS)

    update = UPDATE(tl.reshape(g, (NB, W)), residual, m, v, step_size, numbers, W**-0.5)
    update = tl.reshape(update, (NB * W,))
    details = tl.zeros((), tl.float32)
    approximation, applied = details, details
    if TELEMETRY:
        if W > 1:
            details = tl.sum(tl.reshape(residual * residual, (NB * W,)), axis=0)
        approximation = tl.sum(mean * mean, axis=0) * W
        inside = tl.where(inside_tile(tile, width, padded, W, NB, KIND), update, 0.0)
        applied = tl.sum(inside * inside, axis=0)
    if READS:
        p = p - decay * p - update
    else:
        p = update
    if ROUNDING == "split":
        weight, low = split_low(p)
        store_tile(low_ptr, low, tile, width, padded, W, NB, KIND, MULTIPLE)
        store_tile(p_ptr, weight, tile, width, padded, W, NB, KIND, MULTIPLE)
    elif ROUNDING == "stochastic":
        TOGETHER: tl.constexpr = 1 if Q else 4 if M == tl.bfloat16 else MULTIPLE  # as in layout.blocks_together
        if SPAN == 3:
            calls = run_in_whole(weights_span, first_block * W, NB * W, 8) >> 3
            bits = random_halves_of_calls(calls, NB * W, step, key)
        elif SPAN == 2:
            index = index_in_array(tile, width, padded, W, NB, KIND)
            bits = random_halves_at(in_whole(weights_span, index), step, key)
        elif (KIND == ROWS or (Q and KIND == RUN)) and TOGETHER < 4 and W > 1:
            index = index_drawn(tile, row_blocks, TOGETHER, NB) * W + weights_span[0]
            bits = random_halves_of_blocks(index, W * TOGETHER, NB // TOGETHER, step, key)
        else:
            first = first_drawn(tile, row_blocks, TOGETHER, KIND)
            bits = random_halves(first * W + weights_span[0], NB * W, step, key)
        store_tile(p_ptr, stochastic_round(p, bits, P), tile, width, padded, W, NB, KIND, MULTIPLE)
    else:
        store_tile(p_ptr, p.to(P), tile, width, padded, W, NB, KIND, MULTIPLE)
    return details, approximation, applied


@triton.jit(do_not_specialize=["n_tensors", "tiles_per_chunk", "n_chunks"])
def norm_kernel(
    owners_ptr,
    layout_ptr,
    pointers_ptr,
    scalars_ptr,
    first_chunk_ptr,
    partials_ptr,
    grad_stats_ptr,
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
    SLOTS: tl.constexpr,
    CAN_SKIP: tl.constexpr,
    COLLECT_GRAD_STATS: tl.constexpr,
    MOMENTS: tl.constexpr,
    SQUARES: tl.constexpr,
    DIRECTION: tl.constexpr,
):
    """Compute a partial sum of squares of the rule's ``DIRECTION`` over a chunk of tiles, with this step's moments.

    ``owners`` int32 ``[n_chunks]`` are indices of the chunks' tensors, ``first_chunk`` int64 ``[n + 1]`` the
    tensors' first chunks. Only ``partials [n_chunks]`` are written: ``step_kernel`` computes the moments again and
    stores them. With ``COLLECT_GRAD_STATS``, ``grad_stats [2, n_chunks]`` receives, like the partial sums of
    ``squares_kernel``, the gradients' sum of squares, and more than 0 if one is infinite or NaN.
    """
    chunk = tl.program_id(0)
    i = tl.load(owners_ptr + chunk)
    if CAN_SKIP:  # noqa: SIM102  # a constexpr condition needs its own statement
        if tl.load(scalars_ptr + i * schema.N_SCALARS + schema.TAKEN) == 0.0:
            return
    n_blocks, width, row_blocks, padded, reciprocal = _layout(layout_ptr, i, FLAT)
    block = (chunk - tl.load(first_chunk_ptr + i)) * tiles_per_chunk * NB
    end = tl.minimum(block + tiles_per_chunk * NB, n_blocks)
    MULTIPLE: tl.constexpr = 8 // W if W < 8 else 1
    grad_scale = tl.load(scalars_ptr + i * schema.N_SCALARS + schema.GRAD_SCALE)
    numbers = numbers_of(scalars_ptr + i * schema.N_SCALARS)
    g_ptr = _array(pointers_ptr, schema.G_PTR, i, n_tensors, G, ALIGN)
    moments = moment_arrays(pointers_ptr, i, n_tensors, M, MOMENT_ALIGN, Q, SLOTS)
    total = tl.zeros((NB,), tl.float32)
    squares = tl.zeros((NB,), tl.float32)
    largest = tl.zeros((NB,), tl.int32)  # bits of magnitudes: those of infinity and NaN are above all others
    while block < end:
        tile = tile_of(n_blocks, padded, reciprocal, block, NB, _FLAT if FLAT else ROWS, MULTIPLE)
        if FLAT:
            g, a = _parts(
                tile, width, row_blocks, padded, g_ptr, moments, grad_scale, numbers, W, NB, Q, SLOTS, MOMENTS,
                SQUARES, DIRECTION, _FLAT,
            )  # fmt: skip
        elif is_run(tile, width, padded, W, NB):
            g, a = _parts(
                tile, width, row_blocks, padded, g_ptr, moments, grad_scale, numbers, W, NB, Q, SLOTS, MOMENTS,
                SQUARES, DIRECTION, RUN,
            )  # fmt: skip
        else:
            g, a = _parts(
                tile, width, row_blocks, padded, g_ptr, moments, grad_scale, numbers, W, NB, Q, SLOTS, MOMENTS,
                SQUARES, DIRECTION, ROWS,
            )  # fmt: skip
        total += a * a
        if COLLECT_GRAD_STATS:
            squares += kernel_block_sums(g * g, W, NB, _FLAT)
            sizes = tl.reshape(g.to(tl.int32, bitcast=True) & 0x7FFFFFFF, (NB, W))
            largest = tl.maximum(largest, tl.max(sizes, axis=1))
        block += NB
    # Pairs here too, so that the limiter's divisor is the same whatever the dtypes of the arrays.
    tl.store(partials_ptr + chunk, tl.sum(kernel_block_sums(total, NB, 1, _FLAT), axis=0))
    if COLLECT_GRAD_STATS:
        tl.store(grad_stats_ptr + chunk, tl.sum(kernel_block_sums(squares, NB, 1, _FLAT), axis=0))
        tl.store(grad_stats_ptr + n_chunks + chunk, tl.where(tl.max(largest, axis=0) >= 0x7F800000, 1.0, 0.0))


@triton.jit
def _parts(
    tile,
    width,
    row_blocks,
    padded,
    g_ptr,
    moments,
    grad_scale,
    numbers,
    W: tl.constexpr,
    NB: tl.constexpr,
    Q: tl.constexpr,
    SLOTS: tl.constexpr,
    MOMENTS: tl.constexpr,
    SQUARES: tl.constexpr,
    DIRECTION: tl.constexpr,
    KIND: tl.constexpr,
):
    """Return a tile's scaled gradients ``[NB * W]``, and the rule's direction ``[NB]``, 0 beyond the last block."""
    MULTIPLE: tl.constexpr = 8 // W if W < 8 else 1
    g = load_tile(g_ptr, tile, width, padded, W, NB, KIND, MULTIPLE).to(tl.float32) * grad_scale
    m, v = load_moments(moments, tile, row_blocks, padded, NB, KIND, MULTIPLE, Q, SLOTS)
    _, m, v = _moments(g, m, v, numbers, W, NB, MOMENTS, SQUARES, KIND)
    direction = DIRECTION(m, v, numbers)
    if KIND != RUN:
        direction = tl.where(inside_tile(tile, row_blocks, padded, 1, NB, KIND), direction, 0.0)
    return g, direction


@triton.jit
def _moments(
    g,
    m,
    v,
    numbers,
    W: tl.constexpr,
    NB: tl.constexpr,
    MOMENTS: tl.constexpr,
    SQUARES: tl.constexpr,
    KIND: tl.constexpr,
):
    """Return the means of a tile's blocks, and their new moments by the rule, which may take the ``SQUARES``."""
    mean, square, m = kernel_block_means(g, m, W, NB, KIND, SQUARES)
    m, v = MOMENTS(mean, square, m, v, numbers, W**0.5)
    return mean, m, v


@triton.jit
def _layout(layout_ptr, i, FLAT: tl.constexpr):
    """Return a tensor's number of blocks, and its rows' width, blocks, padded blocks and reciprocal of these."""
    layout_ptr += i * schema.N_LAYOUT
    n_blocks = tl.load(layout_ptr + schema.N_BLOCKS)
    width, row_blocks, padded, reciprocal = n_blocks, n_blocks, n_blocks, n_blocks
    if not FLAT:  # the flat path needs no rows
        width, row_blocks = tl.load(layout_ptr + schema.WIDTH), tl.load(layout_ptr + schema.ROW_BLOCKS)
        padded, reciprocal = tl.load(layout_ptr + schema.PADDED), tl.load(layout_ptr + schema.RECIPROCAL)
    return n_blocks, width, row_blocks, padded, reciprocal
