"""Kernels of the step decision, and of the scalars of a step that depend on it."""

from __future__ import annotations

import triton
import triton.language as tl

from gwt_kernels.backends.triton import schema
from gwt_kernels.backends.triton.tiles import array_ptr


@triton.jit(do_not_specialize=["n_tensors", "n_chunks", "tiles_per_chunk"])
def squares_kernel(
    owners_ptr,
    table_ptr,
    partials_ptr,
    n_tensors,
    n_chunks,
    tiles_per_chunk,
    G: tl.constexpr,
    TILE: tl.constexpr,
    ALIGN: tl.constexpr,
    MULTIPLE: tl.constexpr,
):
    """Compute a gradient chunk's sum of squares, and its number of infinite or NaN elements.

    ``owners`` int32 ``[n_chunks]``: index of each chunk's gradient.
    ``table`` int64 ``[3, n]``: addresses of gradients (multiples of ``ALIGN`` bytes), their sizes (multiples of
    ``MULTIPLE`` elements) and their first chunks. ``partials`` float32 ``[2, n_chunks]``.
    """
    chunk = tl.program_id(0)
    i = tl.load(owners_ptr + chunk)
    g_ptr = array_ptr(table_ptr, 0, i, n_tensors, G, ALIGN)
    start = (chunk - tl.load(table_ptr + 2 * n_tensors + i)) * tiles_per_chunk * TILE
    size = tl.load(table_ptr + n_tensors + i)
    end = tl.minimum(start + tiles_per_chunk * TILE, size)
    elements = tl.arange(0, TILE)
    total = tl.zeros((TILE,), tl.float32)
    bad = tl.zeros((TILE,), tl.float32)
    while start < end:
        inside = elements < tl.multiple_of(tl.minimum(end - start, TILE).to(tl.int32), MULTIPLE)
        g = tl.load(g_ptr + start + elements, mask=inside, other=0.0).to(tl.float32)
        total += g * g
        bad += tl.where((g.to(tl.int32, bitcast=True) & 0x7F800000) == 0x7F800000, 1.0, 0.0)
        start += TILE
    tl.store(partials_ptr + chunk, tl.sum(total, axis=0))
    tl.store(partials_ptr + n_chunks + chunk, tl.sum(bad, axis=0))


@triton.jit(do_not_specialize=["n_chunks"])
def total_kernel(partials_ptr, total_ptr, n_chunks, FIRST: tl.constexpr, BLOCK: tl.constexpr):
    """Set ``total`` float64 ``[2]`` to the sums of ``partials [2, n_chunks]``, or add them unless ``FIRST``."""
    which = tl.program_id(0)
    sums = tl.zeros((BLOCK,), tl.float64)
    chunk = 0
    while chunk < n_chunks:
        chunks = chunk + tl.arange(0, BLOCK)
        part = tl.load(partials_ptr + which * n_chunks + chunks, mask=chunks < n_chunks, other=0.0)
        sums += part.to(tl.float64)
        chunk += BLOCK
    total = tl.sum(sums, axis=0)
    if not FIRST:
        total += tl.load(total_ptr + which)
    tl.store(total_ptr + which, total)


@triton.jit(do_not_specialize=["max_norm"])
def decide_kernel(
    total_ptr,
    grad_scale_ptr,
    found_inf_ptr,
    skipped_ptr,
    control_ptr,
    max_norm,
    SUMMED: tl.constexpr,
    CLIPPED: tl.constexpr,
    CHECKED: tl.constexpr,
    SCALED: tl.constexpr,
    FOUND: tl.constexpr,
):
    """See :func:`gwt_kernels.backends.step_decision.decide`; pointers without their flag are not read."""
    inverse = tl.full((), 1.0, tl.float64)
    if SCALED:
        inverse = 1.0 / tl.load(grad_scale_ptr).to(tl.float64)
    norm = tl.full((), float("nan"), tl.float64)
    if SUMMED:
        norm = tl.sqrt(tl.load(total_ptr)) * inverse
    factor = inverse
    if CLIPPED:
        factor *= tl.minimum(max_norm / (norm + 1e-6), 1.0, propagate_nan=tl.PropagateNan.ALL)
    go = tl.full((), 1.0, tl.float64)
    if CHECKED:
        go = tl.where(tl.load(total_ptr + 1) > 0.0, 0.0, go)
    if FOUND:
        go = tl.where(tl.load(found_inf_ptr) > 0.0, 0.0, go)
    tl.store(skipped_ptr, tl.load(skipped_ptr) + 1.0 - go)
    tl.store(control_ptr, factor)
    tl.store(control_ptr + 1, go)
    tl.store(control_ptr + 2, norm)


@triton.jit(do_not_specialize=["n_tensors", "steps_ptr"])
def rows_kernel(
    addresses_ptr,
    constants_ptr,
    control_ptr,
    steps_ptr,
    scalars_ptr,
    n_tensors,
    CONTROLLED: tl.constexpr,
    COUNTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Count the step of every tensor, unless it is skipped, and write the step's row of scalars.

    Without ``COUNTS`` the stored count does not change.

    ``addresses`` int64 ``[2, n]``: of step counts (float64) and of learning rates (float32; 0 for a constant)
    ``constants`` float64 ``[n, 10]``: see ``schema.py``
    ``control``   float64 ``[3]``, if ``CONTROLLED``: factor on gradients, whether to step, norm
    ``steps``     int64 ``[n]``, written: the number of this step
    ``scalars``   float32 ``[n, 12]``, written: see ``schema.py``
    """
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n_tensors
    count_ptrs = tl.load(addresses_ptr + i, mask=inside, other=0).to(tl.pointer_type(tl.float64))
    lr_address = tl.load(addresses_ptr + n_tensors + i, mask=inside, other=0)
    row = constants_ptr + i * schema.N_CONSTANTS
    lr = tl.load(row + schema.LR_C, mask=inside, other=0.0)
    is_tensor = inside & (lr_address != 0)
    lr_read = tl.load(lr_address.to(tl.pointer_type(tl.float32)), mask=is_tensor, other=0.0).to(tl.float64)
    lr = tl.where(is_tensor, lr_read, lr)
    b1 = tl.load(row + schema.B1_C, mask=inside, other=0.5)
    b2 = tl.load(row + schema.B2_C, mask=inside, other=0.5)
    sign = tl.load(row + schema.SIGN_C, mask=inside, other=0.0)
    go = tl.full((), 1.0, tl.float64)
    if CONTROLLED:
        sign *= tl.load(control_ptr)
        go = tl.load(control_ptr + 1)
    step = tl.load(count_ptrs, mask=inside, other=0.0) + go
    if COUNTS:
        tl.store(count_ptrs, step, mask=inside)
    tl.store(steps_ptr + i, step.to(tl.int64), mask=inside)
    correction1 = 1.0 - tl.exp(step * tl.log(b1))
    correction2 = 1.0 - tl.exp(step * tl.log(b2))
    corrects_bias = tl.load(row + schema.CORRECTS_BIAS_C, mask=inside, other=0.0)  # 2: inside the root
    corrects = corrects_bias != 0.0
    eps = tl.load(row + schema.EPS_C, mask=inside, other=0.0)
    eps = tl.where(corrects_bias == 2.0, eps * tl.sqrt(correction2), eps)
    detail_scale = tl.load(row + schema.DETAIL_SCALE_C, mask=inside, other=0.0)
    detail_scale = tl.where(corrects_bias == 2.0, detail_scale * correction1, detail_scale)
    step_size = tl.where(corrects, lr * tl.sqrt(correction2) / correction1, lr)
    step_size *= tl.load(row + schema.SCALE_C, mask=inside, other=0.0)
    out = scalars_ptr + i * schema.N_SCALARS
    tl.store(out + schema.B1, b1.to(tl.float32), mask=inside)
    tl.store(out + schema.REST1, (1.0 - b1).to(tl.float32), mask=inside)
    tl.store(out + schema.B2, b2.to(tl.float32), mask=inside)
    tl.store(out + schema.REST2, (1.0 - b2).to(tl.float32), mask=inside)
    tl.store(out + schema.EPS, eps.to(tl.float32), mask=inside)
    tl.store(
        out + schema.DECAY,
        (lr * tl.load(row + schema.WEIGHT_DECAY_C, mask=inside, other=0.0)).to(tl.float32),
        mask=inside,
    )
    tl.store(out + schema.STEP_SIZE, step_size.to(tl.float32), mask=inside)
    tl.store(out + schema.GAMMA, tl.load(row + schema.GAMMA_C, mask=inside, other=0.0).to(tl.float32), mask=inside)
    tl.store(out + schema.GRAD_SCALE, sign.to(tl.float32), mask=inside)
    tl.store(out + schema.DETAIL_SCALE, detail_scale.to(tl.float32), mask=inside)
    tl.store(out + schema.TAKEN, (go + tl.zeros_like(sign)).to(tl.float32), mask=inside)
