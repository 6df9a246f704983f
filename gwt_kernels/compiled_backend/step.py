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
from torch.autograd.graph import increment_version

from gwt_kernels.compiled_backend.build import library
from gwt_kernels.core.notes import Notes
from gwt_kernels.hyper import Rounding, Rule, Span
from gwt_kernels.rules.limiter import limit_
from gwt_kernels.single import Single
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


def knows(singles: Sequence[Single], level: int) -> bool:
    """Whether step.c can take a bucket: arithmetic in float32, blocks that fit a tile, tensors with an address."""
    p, g, m, *_ = singles[0]
    return (
        level <= MAX_LEVEL
        and p.dtype in TYPES[:3]
        and g.dtype in TYPES[:3]
        and m.dtype in (torch.float32, torch.bfloat16, torch.int8)
        and all(_has_memory(x) for own in singles for x in (own.p, own.g))
    )


def _has_memory(x: Tensor) -> bool:
    """Whether the address of ``x`` is that of its numbers: not so of fakes, wrappers, and what ``vmap`` batches."""
    plain = type(x).__torch_dispatch__ is Tensor.__torch_dispatch__
    return plain and torch._C._has_storage(x) and not x._is_zerotensor()


def gwt_adamw_(singles: Sequence[Single], *, level: int, rule: Rule, rounding: Rounding) -> None:
    """See :func:`gwt_kernels.functional.gwt_adamw_`; arguments are already checked."""
    _check(singles, level)
    lib = functions()
    with _threads() as run:
        for own in singles:
            if own.p.numel() == 0:
                continue
            p, g = own.p.resolve_neg().contiguous(), own.g.resolve_neg().contiguous()
            hyper, limit = own.hyper, own.limit
            given, sums = _step(lib, own._replace(p=p, g=g), level, rule)
            given.rounding = ROUNDINGS.index(rounding)
            gamma = hyper.norm_growth_limit
            if not level or rule != "gwt":
                limit = None
            elif own.norm is not None and gamma is not None:
                run(lib.gwt_sum, given, len(sums))
                limit = limit_(own.norm, sums[:, 0].sum().sqrt_().to(own.norm.dtype), gamma)
            given.step_size = hyper.step_size(own.step, level) / (1.0 if limit is None else float(limit))
            run(lib.gwt_update_weights, given, len(sums))
            if p is own.p:
                increment_version(p)  # for autograd, which else knows of no change
            else:
                own.p.copy_(p)
            if own.row is not None:
                notes = Notes(own.row)
                _, squares, means, updates = sums.sum(0)
                notes.squares_of_gradient(squares * hyper.signed_factor**2, means * 2**level)
                notes.squares_of_update(updates)
                if limit is not None:
                    notes.limit(limit)
                notes.close()


def update_sums(singles: Sequence[Single], *, level: int) -> Tensor:
    """See :func:`gwt_kernels.functional.update_sums`; arguments are already checked."""
    _check(singles, level)
    lib, totals = functions(), torch.zeros(len(singles), dtype=torch.float32, device="cpu")
    with _threads() as run:
        for total, own in zip(totals, singles, strict=True):
            if own.p.numel():
                g = own.g.resolve_neg().contiguous()
                given, sums = _step(lib, own._replace(g=g), level, "gwt")
                run(lib.gwt_sum, given, len(sums))
                total.copy_(sums[:, 0].sum())
    return totals


def _check(singles: Sequence[Single], level: int) -> None:
    """Raise unless step.c may trust the tensors: it writes to their addresses."""
    params, exp_avgs = [own.p for own in singles], [own.m for own in singles]
    check_bucket((params, [own.g for own in singles], exp_avgs, [own.v for own in singles]), level)
    lows = [own.low for own in singles if own.low is not None]
    if lows:
        check_lows(params, lows)
    scales = [own.scales for own in singles if own.scales is not None]
    if exp_avgs[0].dtype == torch.int8:
        if len(scales) != len(singles):
            raise ValueError("int8 moments need scales: pass a pair of tensors for every parameter")
        check_scales(exp_avgs, list(zip(*scales, strict=True)), level)


def _step(lib: ctypes.CDLL, own: Single, level: int, rule: Rule) -> tuple[CStep, Tensor]:
    """What both passes need, and the tensor of the sums of its tiles."""
    p, g, m, v = own[:4]
    hyper, block = own.hyper, 2**level
    width = p.shape[-1] if p.dim() and p.shape[-1] % block else p.numel()
    given = CStep(
        p=p.data_ptr(),
        g=g.data_ptr(),
        m=m.data_ptr(),
        v=v.data_ptr(),
        low=None if own.low is None else own.low.data_ptr(),
        rows=p.numel() // width,
        width=width,
        weights=CSpan(0, p.numel(), 0),
        coefficients=CSpan(0, m.numel(), 0),
        key=own.key,
        step=own.step & 0xFFFFFFFF,
        p_type=TYPES.index(p.dtype),
        g_type=TYPES.index(g.dtype),
        m_type=TYPES.index(m.dtype),
        level=level,
        folded=rule == "foam",
        observed=own.row is not None,
        beta1=hyper.beta1,
        beta2=hyper.beta2,
        eps=hyper.eps,
        keep=1 - float(hyper.lr) * hyper.weight_decay,
        factor=hyper.signed_factor,
    )
    if rule == "foam" and level:  # the gradient is multiplied by the factor first
        given.rest1, given.rest2, given.per_sum = 1 - hyper.beta1, (1 - hyper.beta2) / block, 1 / block
    else:
        given.rest1, given.rest2 = (1 - hyper.beta1) * math.sqrt(block), (1 - hyper.beta2) * block
        given.per_sum, given.per_root = hyper.signed_factor / block, 1 / math.sqrt(block)
    if own.span is not None:
        given.weights, given.coefficients = CSpan(*own.span[0]), CSpan(*own.span[1])
    if own.scales is not None:
        given.m_scales, given.v_scales = own.scales[0].data_ptr(), own.scales[1].data_ptr()
    if not (given.p and given.g and given.m and given.v):
        raise ValueError(
            f"a tensor of shape {tuple(p.shape)}, its gradient or a moment has no memory: it was freed, so bring "
            f"it back before the step"
        )
    sums = torch.empty(lib.gwt_tiles(given), SUMS, dtype=torch.float64, device="cpu")
    given.sums = sums.data_ptr()
    return given, sums


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
                executor = stack.enter_context(ThreadPoolExecutor(count))
                try:
                    executor.submit(int)
                except RuntimeError:  # no more threads once the main one has ended, though others may still train
                    function(step, 0, tiles)
                    return
                pool.append(executor)
            bounds = [tiles * i // shares for i in range(shares + 1)]
            list(pool[0].map(lambda first, stop: function(step, first, stop), bounds[:-1], bounds[1:]))

        yield run
