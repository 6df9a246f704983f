"""Calls step.c for one tensor after another, each shared out among threads."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from gwt_kernels.compiled_backend.build import library
from gwt_kernels.hyper import Hyper, Rounding, Rule, Span
from gwt_kernels.torch_backend.step import limit_
from gwt_kernels.torch_backend.telemetry import Notes
from gwt_kernels.trust import check_bucket, check_lows, check_scales

__all__ = ["gwt_adamw_", "knows", "update_sums"]

# In the order of step.c's.
TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)
ROUNDINGS: tuple[Rounding, ...] = ("nearest", "stochastic", "split")
SUMS = 4  # numbers a tile
MAX_LEVEL = 10
SHARE = 64  # tiles, below which a thread is not worth its start


class CSpan(ctypes.Structure):
    """``gwt_span`` of step.c: a :class:`gwt_kernels.hyper.Span`."""

    _fields_ = tuple((name, ctypes.c_int64) for name in Span._fields)


class CStep(ctypes.Structure):
    """``gwt_step`` of step.c, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("p", "g", "m", "v", "low", "m_scales", "v_scales", "sums")),
        *((name, ctypes.c_int64) for name in ("rows", "width")),
        *((name, CSpan) for name in ("weights", "coefficients")),
        ("key", ctypes.c_uint64),
        ("step", ctypes.c_uint32),
        *((x, ctypes.c_int32) for x in ("p_type", "g_type", "m_type", "rounding", "level", "folded", "observed")),
        *((name, ctypes.c_float) for name in ("beta1", "rest1", "beta2", "rest2", "eps")),
        *((name, ctypes.c_float) for name in ("keep", "step_size", "factor", "per_sum", "per_root")),
    )


@functools.cache
def functions() -> ctypes.CDLL:
    """Those of step.c."""
    lib = library()
    lib.gwt_tiles.restype = ctypes.c_int64
    lib.gwt_sum.restype = lib.gwt_update_weights.restype = None
    lib.gwt_tiles.argtypes = (ctypes.POINTER(CStep),)
    lib.gwt_sum.argtypes = lib.gwt_update_weights.argtypes = (ctypes.POINTER(CStep), ctypes.c_int64, ctypes.c_int64)
    return lib


def knows(params: Sequence[Tensor], grads: Sequence[Tensor], exp_avgs: Sequence[Tensor], level: int) -> bool:
    """Whether step.c can take a bucket: arithmetic in float32, blocks that fit a tile, tensors with an address."""
    return (
        level <= MAX_LEVEL
        and params[0].dtype in TYPES[:3]
        and grads[0].dtype in TYPES[:3]
        and exp_avgs[0].dtype in (torch.float32, torch.bfloat16, torch.int8)
        and not any(map(is_traceable_wrapper_subclass, (*params, *grads)))
    )


def gwt_adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    limiter_norms: Sequence[Tensor | None],
    steps: Sequence[int],
    hypers: Sequence[Hyper],
    *,
    level: int,
    rule: Rule,
    rounding: Rounding,
    keys: Sequence[int],
    lows: Sequence[Tensor | None],
    scales: Sequence[tuple[Tensor, Tensor] | None],
    spans: Sequence[tuple[Span, Span] | None],
    limits: Sequence[Tensor | None],
    telemetry: Sequence[Tensor | None],
) -> None:
    """See :func:`gwt_kernels.functional.gwt_adamw_`; arguments are already checked."""
    _check(params, grads, exp_avgs, exp_avg_sqs, lows, scales, level)
    lib = functions()
    with _threads() as run:
        for p, g, m, v, norm, step, hyper, key, low, scale, span, limit, row in zip(
            params, grads, exp_avgs, exp_avg_sqs, limiter_norms, steps, hypers, keys, lows, scales, spans, limits,
            telemetry, strict=True,
        ):  # fmt: skip
            if p.numel() == 0:
                continue
            packed, gradient = p.contiguous(), g.resolve_neg().contiguous()
            own, sums = _step(lib, packed, gradient, m, v, scale, hyper, level, rule)
            own.low = None if low is None else low.data_ptr()
            own.key, own.step, own.rounding = key, step & 0xFFFFFFFF, ROUNDINGS.index(rounding)
            own.observed = row is not None
            if span is not None:
                own.weights, own.coefficients = CSpan(*span[0]), CSpan(*span[1])
            gamma = hyper.norm_growth_limit
            if level and rule == "gwt" and norm is not None and gamma is not None:
                run(lib.gwt_sum, own, len(sums))
                limit = limit_(norm, sums[:, 0].sum().sqrt_().to(norm.dtype), gamma)
            own.step_size = hyper.step_size(step, level) / (1.0 if limit is None else float(limit))
            run(lib.gwt_update_weights, own, len(sums))
            if packed is not p:
                p.copy_(packed)
            if row is not None:
                _note(row, sums.sum(0), hyper.signed_factor, 2**level, limit)


def update_sums(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    hypers: Sequence[Hyper],
    *,
    level: int,
    scales: Sequence[tuple[Tensor, Tensor] | None],
) -> Tensor:
    """See :func:`gwt_kernels.functional.update_sums`; arguments are already checked."""
    _check(params, grads, exp_avgs, exp_avg_sqs, [], scales, level)
    lib, totals = functions(), torch.zeros(len(params))
    with _threads() as run:
        for total, p, g, m, v, hyper, scale in zip(
            totals, params, grads, exp_avgs, exp_avg_sqs, hypers, scales, strict=True
        ):
            if p.numel():
                gradient = g.resolve_neg().contiguous()
                own, sums = _step(lib, p, gradient, m, v, scale, hyper, level, "gwt")
                run(lib.gwt_sum, own, len(sums))
                total.copy_(sums[:, 0].sum())
    return totals


def _check(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    lows: Sequence[Tensor | None],
    scales: Sequence[tuple[Tensor, Tensor] | None],
    level: int,
) -> None:
    """Raise unless step.c may trust the tensors: it writes to their addresses."""
    check_bucket((params, grads, exp_avgs, exp_avg_sqs), level)
    halves = [low for low in lows if low is not None]
    if halves:
        check_lows(params, halves)
    factors = [scale for scale in scales if scale is not None]
    if factors:
        check_scales(exp_avgs, list(zip(*factors, strict=True)), level)


def _step(
    lib: ctypes.CDLL,
    p: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    scales: tuple[Tensor, Tensor] | None,
    hyper: Hyper,
    level: int,
    rule: Rule,
) -> tuple[CStep, Tensor]:
    """What both passes need, and the tensor of the sums of its tiles."""
    block = 2**level
    width = p.shape[-1] if p.dim() and p.shape[-1] % block else p.numel()
    own = CStep(
        p=p.data_ptr(),
        g=g.data_ptr(),
        m=m.data_ptr(),
        v=v.data_ptr(),
        rows=p.numel() // width,
        width=width,
        weights=CSpan(0, p.numel(), 0),
        coefficients=CSpan(0, m.numel(), 0),
        p_type=TYPES.index(p.dtype),
        g_type=TYPES.index(g.dtype),
        m_type=TYPES.index(m.dtype),
        level=level,
        folded=rule == "foam",
        beta1=hyper.beta1,
        beta2=hyper.beta2,
        eps=hyper.eps,
        keep=1 - float(hyper.lr) * hyper.weight_decay,
        factor=hyper.signed_factor,
    )
    if rule == "foam" and level:  # the gradient is multiplied by the factor first
        own.rest1, own.rest2, own.per_sum = 1 - hyper.beta1, (1 - hyper.beta2) / block, 1 / block
    else:
        own.rest1, own.rest2 = (1 - hyper.beta1) * math.sqrt(block), (1 - hyper.beta2) * block
        own.per_sum, own.per_root = hyper.signed_factor / block, 1 / math.sqrt(block)
    if scales is not None:
        own.m_scales, own.v_scales = scales[0].data_ptr(), scales[1].data_ptr()
    sums = torch.empty(lib.gwt_tiles(own), SUMS, dtype=torch.float64)
    own.sums = sums.data_ptr()
    return own, sums


@contextlib.contextmanager
def _threads() -> Iterator[Callable[[Any, CStep, int], None]]:
    """What calls a function on all tiles, by as many threads as PyTorch's operators would use."""
    count = torch.get_num_threads()
    with contextlib.ExitStack() as stack:
        pool: list[Executor] = []

        def run(function: Any, step: CStep, tiles: int) -> None:
            shares = min(count, tiles // SHARE)
            if shares < 2:
                function(step, 0, tiles)
                return
            if not pool:  # of this step alone: a process may fork between two
                pool.append(stack.enter_context(ThreadPoolExecutor(count)))
            bounds = [tiles * i // shares for i in range(shares + 1)]
            list(pool[0].map(lambda first, stop: function(step, first, stop), bounds[:-1], bounds[1:]))

        yield run


def _note(row: Tensor, sums: Tensor, factor: float, width: int, limit: Tensor | None) -> None:
    """Telemetry's row of a step, from the sums of all tiles."""
    notes = Notes(row)
    row[0] = (sums[1] * factor**2 - sums[2] * width).clamp(min=0)
    row[1] = sums[2] * width
    row[2] = sums[3]
    if limit is not None:
        notes.limit(limit)
    notes.close()
