"""Lookups of a tensor in the tables of a step: addresses of its arrays, its numbers, and its random bits."""

from __future__ import annotations

import triton
import triton.language as tl

from gwt_kernels.backends.triton import schema
from gwt_kernels.backends.triton.moments import moment_arrays
from gwt_kernels.backends.triton.tiles import array_ptr as _array
from gwt_kernels.backends.triton.tiles import runs_passed


@triton.jit
def arrays_of(
    pointers_ptr,
    i,
    n_tensors,
    P: tl.constexpr,
    G: tl.constexpr,
    M: tl.constexpr,
    ALIGN: tl.constexpr,
    MOMENT_ALIGN: tl.constexpr,
    ROUNDING: tl.constexpr,
    Q: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Return the addresses of a tensor's weights, gradients, low halves and moments."""
    p_ptr, g_ptr, low_ptr = weights_of(pointers_ptr, i, n_tensors, P, G, ALIGN, ROUNDING)
    return p_ptr, g_ptr, low_ptr, moment_arrays(pointers_ptr, i, n_tensors, M, MOMENT_ALIGN, Q, SLOTS)


@triton.jit
def weights_of(
    pointers_ptr, i, n_tensors, P: tl.constexpr, G: tl.constexpr, ALIGN: tl.constexpr, ROUNDING: tl.constexpr
):
    """Return addresses of weights, gradients and low halves; ``ALIGN`` is that of the wider of the first two."""
    WIDER: tl.constexpr = (
        P.primitive_bitwidth if P.primitive_bitwidth > G.primitive_bitwidth else G.primitive_bitwidth
    )
    p_ptr = _array(pointers_ptr, schema.P_PTR, i, n_tensors, P, ALIGN * P.primitive_bitwidth // WIDER)
    low_ptr = p_ptr  # not read
    if ROUNDING == "split":
        low_ptr = _array(pointers_ptr, schema.LOW_PTR, i, n_tensors, tl.int16, ALIGN * 16 // WIDER)
    g_ptr = _array(pointers_ptr, schema.G_PTR, i, n_tensors, G, ALIGN * G.primitive_bitwidth // WIDER)
    return p_ptr, g_ptr, low_ptr


@triton.jit
def draws_of(pointers_ptr, i, n_tensors, DRAWS: tl.constexpr, SPAN: tl.constexpr):
    """Return what a tensor's random bits depend on: key, step, and the spans of its weights and of its moments."""
    key = tl.zeros((), tl.int64)
    step = key
    if DRAWS:
        key = tl.load(pointers_ptr + schema.KEY * n_tensors + i)
        step = tl.load(pointers_ptr + schema.STEP * n_tensors + i)
    weights = _span(pointers_ptr, schema.WEIGHTS_SPAN, i, n_tensors, SPAN)
    return key, step, weights, _span(pointers_ptr, schema.MOMENTS_SPAN, i, n_tensors, SPAN)


@triton.jit
def _span(pointers_ptr, which, i, n_tensors, SPAN: tl.constexpr):
    """Return a shard's first element in the whole tensor, its run and its pitch; unless ``SPAN`` needs them, 0."""
    first = tl.zeros((), tl.int64)
    run, pitch = first, first
    if SPAN:
        first += tl.load(pointers_ptr + which * n_tensors + i)
    if SPAN > 1:
        run += tl.load(pointers_ptr + (which + 1) * n_tensors + i)
        pitch += tl.load(pointers_ptr + (which + 2) * n_tensors + i)
    return first, run, pitch


@triton.jit
def in_whole(span, index):
    """Return the indices in the whole tensor of a shard's elements (int64, any shape)."""
    first, run, pitch = span
    return first + index + index // run * (pitch - run)


@triton.jit
def run_in_whole(span, start, N: tl.constexpr, EVERY: tl.constexpr):
    """Return the indices in the whole tensor of every ``EVERY``-th of a shard's ``N`` elements from ``start``.

    They are int64 ``[N // EVERY]``. One 64-bit division serves all of them.
    """
    first, run, pitch = span
    runs = start // run
    places = tl.arange(0, N // EVERY) * EVERY
    passed = runs_passed(places, start - runs * run, run, N)
    return first + start + places + (runs + passed) * (pitch - run)


@triton.jit
def numbers_of(scalars_ptr):
    """Return ``b1, 1 - b1, b2, 1 - b2, eps, detail_scale`` of a tensor."""
    b1, rest1 = tl.load(scalars_ptr + schema.B1), tl.load(scalars_ptr + schema.REST1)
    b2, rest2 = tl.load(scalars_ptr + schema.B2), tl.load(scalars_ptr + schema.REST2)
    return b1, rest1, b2, rest2, tl.load(scalars_ptr + schema.EPS), tl.load(scalars_ptr + schema.DETAIL_SCALE)
