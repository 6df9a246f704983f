"""Kernels that reduce one tensor's partial sums in a fixed order: update norm and limiter, and telemetry.

The kernels of ``step.py`` write the partial sums. Tables: ``schema.py``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gwt_kernels.backends.triton import schema


@triton.jit(do_not_specialize=["n_tensors"])
def limiter_kernel(
    pointers_ptr,
    scalars_ptr,
    first_chunk_ptr,
    partials_ptr,
    factors_ptr,
    n_tensors,
    BLOCK: tl.constexpr,
    CAN_SKIP: tl.constexpr,
):
    """Apply Fira's norm-growth limiter to one tensor's partial sums::

        n = sqrt(sum of partials)
        limit = max(n / (n_prev + 1e-8), gamma) / gamma        1 if n_prev is 0: no norm yet
        n_prev = n / limit

    ``factors [n]`` receives ``1 / limit``.
    """
    i = tl.program_id(0)
    if CAN_SKIP:  # noqa: SIM102  # a constexpr condition needs its own statement
        if tl.load(scalars_ptr + i * schema.N_SCALARS + schema.TAKEN) == 0.0:
            return
    norm = tl.sqrt_rn(_sum_of_partials(first_chunk_ptr, partials_ptr, i, BLOCK))
    gamma = tl.load(scalars_ptr + i * schema.N_SCALARS + schema.GAMMA)
    previous_ptr = tl.load(pointers_ptr + schema.NORM_PTR * n_tensors + i).to(tl.pointer_type(tl.float32))
    previous = tl.load(previous_ptr)
    growth = tl.maximum(tl.div_rn(norm, previous + 1e-8), gamma, propagate_nan=tl.PropagateNan.ALL)
    limit = tl.where(previous == 0.0, 1.0, tl.div_rn(growth, gamma))
    tl.store(previous_ptr, tl.div_rn(norm, limit))
    tl.store(factors_ptr + i, tl.div_rn(1.0, limit))


@triton.jit
def sum_kernel(first_chunk_ptr, partials_ptr, sums_ptr, BLOCK: tl.constexpr):
    """Reduce the partial sums of one tensor as the limiter does: ``sums [n]``."""
    i = tl.program_id(0)
    tl.store(sums_ptr + i, _sum_of_partials(first_chunk_ptr, partials_ptr, i, BLOCK))


@triton.jit
def _sum_of_partials(first_chunk_ptr, partials_ptr, i, BLOCK: tl.constexpr):
    chunk = tl.load(first_chunk_ptr + i)
    end = tl.load(first_chunk_ptr + i + 1)
    total = tl.zeros((BLOCK,), tl.float32)
    while chunk < end:
        chunks = chunk + tl.arange(0, BLOCK)
        total += tl.load(partials_ptr + chunks, mask=chunks < end, other=0.0)
        chunk += BLOCK
    return tl.sum(total, axis=0)


@triton.jit(do_not_specialize=["n_tensors", "n_programs"])
def observe_kernel(
    layout_ptr,
    rows_ptr,
    scalars_ptr,
    factors_ptr,
    sums_ptr,
    n_tensors,
    n_programs,
    BLOCK: tl.constexpr,
    LIMITED: tl.constexpr,
    CAN_SKIP: tl.constexpr,
):
    """Reduce the telemetry of one tensor's programs in a fixed order, and count the step: see ``telemetry.py``.

    ``rows`` int64 ``[n]``: addresses of float64 ``[6]``, written.
    """
    i = tl.program_id(0)
    row_ptr = tl.load(rows_ptr + i).to(tl.pointer_type(tl.float64))
    tl.store(row_ptr + schema.STEPS, tl.load(row_ptr + schema.STEPS) + 1.0)
    if CAN_SKIP:  # noqa: SIM102
        if tl.load(scalars_ptr + i * schema.N_SCALARS + schema.TAKEN) == 0.0:
            tl.store(row_ptr + schema.NONFINITE, tl.load(row_ptr + schema.NONFINITE) + 1.0)
            return
    program = tl.load(layout_ptr + i * schema.N_LAYOUT + schema.FIRST_PROGRAM)
    end = tl.load(layout_ptr + tl.minimum(i + 1, n_tensors - 1) * schema.N_LAYOUT + schema.FIRST_PROGRAM)
    end = tl.where(i + 1 < n_tensors, end, n_programs)
    details = tl.zeros((BLOCK,), tl.float64)
    approximation = tl.zeros((BLOCK,), tl.float64)
    update = tl.zeros((BLOCK,), tl.float64)
    while program < end:
        programs = program + tl.arange(0, BLOCK)
        details += tl.load(sums_ptr + programs * 3, mask=programs < end, other=0.0)
        approximation += tl.load(sums_ptr + programs * 3 + 1, mask=programs < end, other=0.0)
        update += tl.load(sums_ptr + programs * 3 + 2, mask=programs < end, other=0.0)
        program += BLOCK
    energy = tl.sum(details, axis=0) + tl.sum(approximation, axis=0)
    tl.store(row_ptr + schema.DETAILS, tl.sum(details, axis=0))
    tl.store(row_ptr + schema.APPROXIMATION, tl.sum(approximation, axis=0))
    tl.store(row_ptr + schema.UPDATE, tl.sum(update, axis=0))
    if LIMITED:
        tl.store(row_ptr + schema.LIMIT, 1.0 / tl.load(factors_ptr + i).to(tl.float64))
    finite = (energy == energy) & (energy < float("inf"))
    tl.store(row_ptr + schema.NONFINITE, tl.load(row_ptr + schema.NONFINITE) + tl.where(finite, 0.0, 1.0))
