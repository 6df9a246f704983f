"""Kernels of a factored second moment: sums of squares over rows and columns, the factors, and the clip.

Each is launched once for the tensors of a bucket on one path. A tensor is a batch of matrices, each cut into
panels of ``chunk_rows`` rows and ``TC`` blocks. A program adds up one panel, ``TR`` rows at a time. These partial
sums lie in a workspace, and are added in a fixed order, without atomics. Pairs of neighbours come first
(``kernel_block_sums``), so that sums are the same whatever the dtypes and the alignment.

``panels`` int64 and ``numbers`` float64: see ``schema.py``; ``sums`` float32: for each tensor those of
:attr:`gwt_kernels.core.factored.Matrices.parts`. For the other tables see ``step.py``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gwt_kernels.backends.triton import schema
from gwt_kernels.backends.triton.tensors import weights_of
from gwt_kernels.backends.triton.tiles import FLAT, ROWS
from gwt_kernels.core import kernel
from gwt_kernels.formats import split
from gwt_kernels.rules import blocks

kernel.load()
kernel_block_sums = blocks.kernel_block_sums
join_low = split.kernel_join_low


@triton.jit(do_not_specialize=["n_tensors"])
def panel_kernel(
    owners_ptr,
    panels_ptr,
    pointers_ptr,
    scalars_ptr,
    parts_ptr,
    n_tensors,
    P: tl.constexpr,
    G: tl.constexpr,
    W: tl.constexpr,
    TR: tl.constexpr,
    TC: tl.constexpr,
    ALIGN: tl.constexpr,
    MULTIPLE: tl.constexpr,
    WEIGHTED: tl.constexpr,
    ROUNDING: tl.constexpr,
    CAN_SKIP: tl.constexpr,
):
    """Compute the sums of squares of the approximation in one panel, over each row and over each column.

    ``parts`` float32 receives them, and if ``WEIGHTED`` the sum of squares of the panel's weights. Rows are
    multiples of ``MULTIPLE`` elements long, and begin at multiples of ``ALIGN`` bytes, as in ``step.py``.
    """
    program = tl.program_id(0)
    i = tl.load(owners_ptr + program)
    scalars_ptr += i * schema.N_SCALARS
    if CAN_SKIP:  # noqa: SIM102  # a constexpr condition needs its own statement
        if tl.load(scalars_ptr + schema.TAKEN) == 0.0:
            return
    panels_ptr += i * schema.N_PANELS
    rows, columns = tl.load(panels_ptr + schema.PANEL_ROWS), tl.load(panels_ptr + schema.PANEL_COLUMNS)
    width = tl.multiple_of(tl.load(panels_ptr + schema.PANEL_WIDTH), MULTIPLE)
    row_chunks, col_chunks = tl.load(panels_ptr + schema.ROW_CHUNKS), tl.load(panels_ptr + schema.COL_CHUNKS)
    panel = program - tl.load(panels_ptr + schema.FIRST_PANEL)
    col_chunk = panel % col_chunks
    row_chunk = panel // col_chunks % row_chunks
    matrix = panel // (col_chunks * row_chunks)
    first_row = row_chunk * tl.load(panels_ptr + schema.CHUNK_ROWS)
    end_row = tl.minimum(first_row + tl.load(panels_ptr + schema.CHUNK_ROWS), rows)
    first_column = col_chunk * TC
    # 32 bits suffice for the numbers of rows and columns within a panel.
    left = tl.multiple_of(tl.minimum(width - first_column * W, TC * W).to(tl.int32), MULTIPLE)
    element = tl.arange(0, TC * W)[None, :]
    row = tl.arange(0, TR)
    start = (matrix * rows + first_row) * width + first_column * W
    p_ptr, g_ptr, low_ptr = weights_of(pointers_ptr, i, n_tensors, P, G, ALIGN, ROUNDING)
    p_ptr, g_ptr, low_ptr = p_ptr + start, g_ptr + start, low_ptr + start
    row_ptr = parts_ptr + tl.load(panels_ptr + schema.ROW_PARTS)
    row_ptr += (col_chunk * tl.load(panels_ptr + schema.MATRICES) + matrix) * rows + first_row
    grad_scale = tl.load(scalars_ptr + schema.GRAD_SCALE) * W**-0.5
    KIND: tl.constexpr = FLAT if MULTIPLE == 8 else ROWS  # lanes hold 16 bytes, or one element
    totals = tl.zeros((TR, TC), tl.float32)
    weights = tl.zeros((TR, TC * W), tl.float32)
    here = (end_row - first_row).to(tl.int32)
    for passed in tl.range(0, here, TR):
        places = row[:, None] * width + element
        inside = (row[:, None] < here - passed) & (element < left)
        g = tl.load(g_ptr + places, mask=inside, other=0.0).to(tl.float32) * grad_scale
        a = kernel_block_sums(tl.reshape(g, (TR * TC * W,)), W, TR * TC, KIND)
        squares = a * a
        sums = kernel_block_sums(squares, TC, TR, FLAT)
        tl.store(row_ptr + row, tl.reshape(sums, (TR,)), mask=row < here - passed)
        totals += tl.reshape(squares, (TR, TC))
        if WEIGHTED:
            p = tl.load(p_ptr + places, mask=inside, other=0.0)
            if ROUNDING == "split":
                p = join_low(p, tl.load(low_ptr + places, mask=inside, other=0))
            p = p.to(tl.float32)
            weights += p * p
            p_ptr += TR * width
            low_ptr += TR * width
        g_ptr += TR * width
        row_ptr += TR
    col_ptr = parts_ptr + tl.load(panels_ptr + schema.COL_PARTS)
    col_ptr += (matrix * row_chunks + row_chunk) * columns + first_column
    column = tl.arange(0, TC)
    sums = kernel_block_sums(tl.reshape(tl.trans(totals), (TC * TR,)), TR, TC, "flat")
    tl.store(col_ptr + column, tl.reshape(sums, (TC,)), mask=column < columns - first_column)
    if WEIGHTED:
        total = kernel_block_sums(tl.reshape(weights, (TR * TC * W,)), TR * TC * W, 1, "flat")
        tl.store(parts_ptr + tl.load(panels_ptr + schema.WEIGHT_PARTS) + panel, tl.sum(total, axis=0))


@triton.jit
def join_kernel(
    owners_ptr, panels_ptr, scalars_ptr, parts_ptr, sums_ptr, BLOCK: tl.constexpr, CAN_SKIP: tl.constexpr
):
    """Add up the panels' partial sums of ``BLOCK`` rows and columns of one tensor, in order."""
    program = tl.program_id(0)
    i = tl.load(owners_ptr + program)
    if CAN_SKIP:  # noqa: SIM102
        if tl.load(scalars_ptr + i * schema.N_SCALARS + schema.TAKEN) == 0.0:
            return
    panels_ptr += i * schema.N_PANELS
    columns, matrices = tl.load(panels_ptr + schema.PANEL_COLUMNS), tl.load(panels_ptr + schema.MATRICES)
    n_rows, n_columns = tl.load(panels_ptr + schema.PANEL_ROWS) * matrices, columns * matrices
    row_chunks, col_chunks = tl.load(panels_ptr + schema.ROW_CHUNKS), tl.load(panels_ptr + schema.COL_CHUNKS)
    place = (program - tl.load(panels_ptr + schema.FIRST_FACTORS)) * BLOCK + tl.arange(0, BLOCK)
    is_row = place < n_rows
    column = place - n_rows
    inside = column < n_columns
    first_col = tl.load(panels_ptr + schema.COL_PARTS) + column // columns * row_chunks * columns + column % columns
    first = tl.where(is_row, tl.load(panels_ptr + schema.ROW_PARTS) + place, first_col)
    pitch = tl.where(is_row, n_rows, columns)
    parts = tl.where(is_row, col_chunks, row_chunks)
    total = tl.zeros((BLOCK,), tl.float32)
    for part in tl.range(0, tl.maximum(row_chunks, col_chunks).to(tl.int32)):
        total += tl.load(parts_ptr + first + part * pitch, mask=inside & (part < parts), other=0.0)
    tl.store(sums_ptr + tl.load(panels_ptr + schema.SUMS) + place, total, mask=inside)


@triton.jit
def mean_kernel(
    owners_ptr,
    panels_ptr,
    scalars_ptr,
    numbers_ptr,
    parts_ptr,
    sums_ptr,
    BLOCK: tl.constexpr,
    WEIGHTED: tl.constexpr,
    CAN_SKIP: tl.constexpr,
):
    """Add up one matrix's new row factors, without ``eps``; for the first matrix also the tensor's squared weights.

    If columns are sharded, processes hold the same rows: each counts old factors by its share of the columns.
    """
    program = tl.program_id(0)
    i = tl.load(owners_ptr + program)
    scalars_ptr += i * schema.N_SCALARS
    if CAN_SKIP:  # noqa: SIM102
        if tl.load(scalars_ptr + schema.TAKEN) == 0.0:
            return
    panels_ptr += i * schema.N_PANELS
    numbers_ptr += i * schema.N_FACTOR_NUMBERS
    rows, columns = tl.load(panels_ptr + schema.PANEL_ROWS), tl.load(panels_ptr + schema.PANEL_COLUMNS)
    matrices = tl.load(panels_ptr + schema.MATRICES)
    matrix = program - tl.load(panels_ptr + schema.FIRST_MATRIX)
    sums_ptr += tl.load(panels_ptr + schema.SUMS)
    whole = tl.load(numbers_ptr + schema.WHOLE_COLUMNS)
    new = (tl.load(scalars_ptr + schema.REST2) / whole).to(tl.float32)
    old = (tl.load(scalars_ptr + schema.B2) * (columns / whole)).to(tl.float32)
    address = tl.load(panels_ptr + schema.ROW_PTR)
    row_ptr = address.to(tl.pointer_type(tl.float32))
    is_kept = tl.full((BLOCK,), address, tl.int64) != 0  # of the mask's shape, as Triton 3.9 interprets it
    total = tl.zeros((BLOCK,), tl.float32)
    for first in tl.range(0, rows.to(tl.int32), BLOCK):
        row = first + tl.arange(0, BLOCK)
        place, inside = matrix * rows + row, row < rows
        total += new * tl.load(sums_ptr + place, mask=inside, other=0.0)
        total += old * tl.load(row_ptr + place, mask=inside & is_kept, other=0.0)
    means_ptr = sums_ptr + (rows + columns) * matrices
    tl.store(means_ptr + matrix, tl.sum(kernel_block_sums(total, BLOCK, 1, "flat"), axis=0))
    if WEIGHTED:  # noqa: SIM102
        if matrix == 0:
            parts_ptr += tl.load(panels_ptr + schema.WEIGHT_PARTS)
            panels = matrices * tl.load(panels_ptr + schema.ROW_CHUNKS) * tl.load(panels_ptr + schema.COL_CHUNKS)
            total = tl.zeros((BLOCK,), tl.float32)
            for first in tl.range(0, panels.to(tl.int32), BLOCK):
                panel = first + tl.arange(0, BLOCK)
                total += tl.load(parts_ptr + panel, mask=panel < panels, other=0.0)
            tl.store(means_ptr + matrices, tl.sum(kernel_block_sums(total, BLOCK, 1, "flat"), axis=0))


@triton.jit
def factor_kernel(
    owners_ptr,
    panels_ptr,
    scalars_ptr,
    numbers_ptr,
    sums_ptr,
    gains_ptr,
    BLOCK: tl.constexpr,
    CAN_SKIP: tl.constexpr,
):
    """Update ``BLOCK`` row and column factors of one tensor from the sums, and write their reciprocal roots::

        R = b2*R + (1-b2)*(mean + eps)        gain = 1 / sqrt(R / mean(R))
        C = b2*C + (1-b2)*(mean + eps)        gain = 1 / sqrt(C)

    A tensor without row factors has row gains of 1. Gains are at most 1e22, so that for rows without any gradient
    the products with gains of columns, and with such a gradient, are finite.
    """
    program = tl.program_id(0)
    i = tl.load(owners_ptr + program)
    scalars_ptr += i * schema.N_SCALARS
    if CAN_SKIP:  # noqa: SIM102
        if tl.load(scalars_ptr + schema.TAKEN) == 0.0:
            return
    panels_ptr += i * schema.N_PANELS
    numbers_ptr += i * schema.N_FACTOR_NUMBERS
    rows, columns = tl.load(panels_ptr + schema.PANEL_ROWS), tl.load(panels_ptr + schema.PANEL_COLUMNS)
    matrices = tl.load(panels_ptr + schema.MATRICES)
    b2, rest2 = tl.load(scalars_ptr + schema.B2), tl.load(scalars_ptr + schema.REST2)
    eps = tl.load(numbers_ptr + schema.FACTOR_EPS).to(tl.float32)
    whole_rows = tl.load(numbers_ptr + schema.WHOLE_ROWS).to(tl.float32)
    whole_columns = tl.load(numbers_ptr + schema.WHOLE_COLUMNS).to(tl.float32)
    row_address = tl.load(panels_ptr + schema.ROW_PTR)
    row_ptr = row_address.to(tl.pointer_type(tl.float32))
    col_ptr = tl.load(panels_ptr + schema.COL_PTR).to(tl.pointer_type(tl.float32))
    sums_ptr += tl.load(panels_ptr + schema.SUMS)
    place = (program - tl.load(panels_ptr + schema.FIRST_FACTORS)) * BLOCK + tl.arange(0, BLOCK)
    n_rows = rows * matrices
    column = place - n_rows
    is_row, is_column = place < n_rows, (column >= 0) & (column < columns * matrices)
    has_row = is_row & (tl.full((BLOCK,), row_address, tl.int64) != 0)
    total = tl.load(sums_ptr + place, mask=is_row | is_column, other=0.0)
    old = tl.load(row_ptr + place, mask=has_row, other=0.0)
    old += tl.load(col_ptr + column, mask=is_column, other=0.0)
    n = tl.where(is_row, whole_columns, whole_rows)
    new = b2 * old + rest2 * (tl.div_rn(total, n) + eps)
    mean = tl.load(sums_ptr + n_rows + columns * matrices + place // rows, mask=has_row, other=0.0)
    mean = tl.div_rn(mean, tl.zeros_like(mean) + whole_rows) + rest2 * eps
    gain = tl.div_rn(tl.sqrt_rn(tl.where(is_row, mean, 1.0)), tl.sqrt_rn(new))
    gain = tl.minimum(gain, 1e22, propagate_nan=tl.PropagateNan.ALL)
    tl.store(row_ptr + place, new, mask=has_row)
    tl.store(col_ptr + column, new, mask=is_column)
    tl.store(gains_ptr + tl.load(panels_ptr + schema.ROW_GAINS) + place, tl.where(has_row, gain, 1.0), mask=is_row)
    tl.store(gains_ptr + tl.load(panels_ptr + schema.COL_GAINS) + column, gain, mask=is_column)


@triton.jit(do_not_specialize=["n_tensors"])
def rate_kernel(numbers_ptr, steps_ptr, scalars_ptr, n_tensors, BLOCK: tl.constexpr):
    """Compute the step's scalars that depend on a count on the device: ``steps`` int64 ``[n]``."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n_tensors
    numbers_ptr += i * schema.N_FACTOR_NUMBERS
    scalars_ptr += i * schema.N_SCALARS
    step = tl.maximum(tl.load(steps_ptr + i, mask=inside, other=1).to(tl.float64), 1.0)
    rest2 = tl.exp(tl.load(numbers_ptr + schema.DECAY_RATE, mask=inside, other=0.0) * tl.log(step))
    tl.store(scalars_ptr + schema.B2, (1.0 - rest2).to(tl.float32), mask=inside)
    tl.store(scalars_ptr + schema.REST2, rest2.to(tl.float32), mask=inside)
    largest = tl.load(numbers_ptr + schema.LARGEST_RATE, mask=inside, other=0.0)
    grows = tl.load(numbers_ptr + schema.RATE_GROWS, mask=inside, other=0.0) != 0.0
    rate = tl.minimum(tl.where(grows, largest * step, largest), 1.0 / tl.sqrt(step))
    is_relative = inside & (largest > 0.0)
    for which in tl.static_range(2):  # computed with a rate of 1
        number_ptr = scalars_ptr + (schema.STEP_SIZE if which else schema.DECAY)
        number = tl.load(number_ptr, mask=is_relative, other=0.0).to(tl.float64)
        tl.store(number_ptr, (number * rate).to(tl.float32), mask=is_relative)


@triton.jit(do_not_specialize=["n_tensors"])
def clip_kernel(
    panels_ptr,
    numbers_ptr,
    scalars_ptr,
    sums_ptr,
    squares_ptr,
    factors_ptr,
    n_tensors,
    BLOCK: tl.constexpr,
    WEIGHTED: tl.constexpr,
):
    """Complete a step's scalars from the sums of squares of a tensor's update and weights.

    ``squares`` float32 ``[n]`` are the update's. ``factors`` float32 ``[n]`` receives ``1 / clip``, and so does the
    scalar ``eps``, in which a factored rule expects it. With a least RMS, step size and decay are multiplied by it
    or the weights' RMS, whichever is larger.
    """
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n_tensors
    numbers_ptr += i * schema.N_FACTOR_NUMBERS
    scalars_ptr += i * schema.N_SCALARS
    n = tl.load(numbers_ptr + schema.WHOLE_MOMENTS, mask=inside, other=1.0).to(tl.float32)
    threshold = tl.load(numbers_ptr + schema.CLIP_THRESHOLD, mask=inside, other=1.0).to(tl.float32)
    rms = tl.sqrt_rn(tl.div_rn(tl.load(squares_ptr + i, mask=inside, other=0.0), n))
    clip = tl.maximum(tl.div_rn(rms, threshold), 1.0, propagate_nan=tl.PropagateNan.ALL)
    gain = tl.div_rn(tl.full((BLOCK,), 1.0, tl.float32), clip)
    tl.store(factors_ptr + i, gain, mask=inside)
    tl.store(scalars_ptr + schema.EPS, gain, mask=inside)
    if WEIGHTED:
        panels_ptr += i * schema.N_PANELS
        least = tl.load(numbers_ptr + schema.LEAST_RMS, mask=inside, other=-1.0).to(tl.float32)
        scaled = inside & (least >= 0.0)
        rows, columns = (
            tl.load(panels_ptr + schema.PANEL_ROWS, mask=scaled, other=0),
            tl.load(panels_ptr + schema.PANEL_COLUMNS, mask=scaled, other=0),
        )
        matrices = tl.load(panels_ptr + schema.MATRICES, mask=scaled, other=0)
        place = tl.load(panels_ptr + schema.SUMS, mask=scaled, other=0) + (rows + columns + 1) * matrices
        n = tl.load(numbers_ptr + schema.WHOLE_WEIGHTS, mask=inside, other=1.0).to(tl.float32)
        rms = tl.sqrt_rn(tl.div_rn(tl.load(sums_ptr + place, mask=scaled, other=0.0), n))
        rms = tl.maximum(rms, least, propagate_nan=tl.PropagateNan.ALL)
        for which in tl.static_range(2):
            number_ptr = scalars_ptr + (schema.STEP_SIZE if which else schema.DECAY)
            tl.store(number_ptr, tl.load(number_ptr, mask=scaled, other=0.0) * rms, mask=scaled)
