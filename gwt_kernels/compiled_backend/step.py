"""Hands a bucket to bucket.c: one call of C a step, whatever the number of tensors."""

from __future__ import annotations

import ctypes
import functools
import math
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from gwt_kernels.compiled_backend.build import library
from gwt_kernels.hyper import Hyper, Rounding, Rule
from gwt_kernels.single import Single
from gwt_kernels.torch_backend.telemetry import Notes
from gwt_kernels.trust import check_bucket, check_lows, check_scales

__all__ = ["gwt_adamw_", "knows", "update_sums"]

# In the order of step.h's.
TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)
ROUNDINGS: tuple[Rounding, ...] = ("nearest", "stochastic", "split")
MAX_LEVEL = 10

# ``gwt_step`` of step.h, field by field, with the formats of the struct module.
FIELDS = {
    **dict.fromkeys(("p", "g", "m", "v", "low", "m_scales", "v_scales", "norm"), "P"),
    **dict.fromkeys(("rows", "width"), "q"),
    **dict.fromkeys(("weights", "coefficients"), "qqq"),
    "key": "Q",
    "step": "I",
    **dict.fromkeys(("p_type", "g_type", "m_type", "rounding", "level", "folded", "observed"), "i"),
    **dict.fromkeys(("beta1", "rest1", "beta2", "rest2", "eps", "keep", "factor", "per_sum", "per_root"), "f"),
    **dict.fromkeys(("gamma", "limit", "step_size"), "f"),
    "full_step": "d",
    "sums": "dddd",
}
STEP = struct.Struct("".join(FIELDS.values()))
RESULTS = struct.Struct("f4xddddd")  # from the limit on
RESULTS_AT = STEP.size - RESULTS.size


@functools.cache
def functions() -> ctypes.CDLL:
    """Those of bucket.c."""
    lib = library()
    for function in (lib.gwt_update, lib.gwt_sum):
        function.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int)
        function.restype = ctypes.c_int
    return lib


def knows(singles: Sequence[Single], level: int) -> bool:
    """Whether the step in C can take a bucket: arithmetic in float32, blocks that fit a tile, tensors with an
    address."""
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


class Result(NamedTuple):
    """What C says of one tensor: the divisor of its update, and sums of squares in double."""

    limit: float
    full_step: float
    norm: float
    """Of ``m / (sqrt(v) + eps)``, where the limiter or :func:`update_sums` asked for it."""
    gradients: float
    means: float
    updates: float


def gwt_adamw_(singles: Sequence[Single], *, level: int, rule: Rule, rounding: Rounding) -> None:
    """See :func:`gwt_kernels.functional.gwt_adamw_`; arguments are already checked."""
    _check(singles, level)
    packed = Packed(singles, level, rule, rounding)
    results = packed.run(functions().gwt_update)
    changed = []
    for own, p in zip(packed.singles, packed.params, strict=True):
        if p is own.p:
            changed.append(p)
        else:
            own.p.copy_(p)
    increment_version(changed)  # for autograd, which else knows of no change
    for own, norm in packed.norms:
        own.copy_(norm)
    for own, result in zip(packed.singles, results, strict=True):
        if own.row is not None:
            notes = Notes(own.row)
            squares = torch.tensor(result, dtype=torch.float64, device="cpu")
            notes.squares_of_gradient(squares[3], squares[4])
            notes.squares_of_update(squares[5])
            notes.limit(squares[0])
            notes.close()


def update_sums(singles: Sequence[Single], *, level: int) -> Tensor:
    """See :func:`gwt_kernels.functional.update_sums`; arguments are already checked."""
    _check(singles, level)
    packed = Packed(singles, level, "gwt", "nearest")
    sums = iter(packed.run(functions().gwt_sum))
    totals = [next(sums).norm if own.p.numel() else 0.0 for own in singles]
    return torch.tensor(totals, dtype=torch.float32, device="cpu")


def _check(singles: Sequence[Single], level: int) -> None:
    """Raise unless C may trust the tensors: it writes to their addresses."""
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


class Packed:
    """A bucket as C takes it: an array of ``gwt_step``, without the tensors that are empty."""

    def __init__(self, singles: Sequence[Single], level: int, rule: Rule, rounding: Rounding) -> None:
        self.singles = [own for own in singles if own.p.numel()]
        self.params: list[Tensor] = []
        """What C writes to: copies of those that are not contiguous."""
        self.norms: list[tuple[Tensor, Tensor]] = []
        """Of the limiter, each with a copy in float32 that C writes to."""
        self._kept: list[Tensor] = []
        self._buffer = bytearray(STEP.size * len(self.singles))
        types = [TYPES.index(x.dtype) for x in singles[0][:3]]
        kind = (*types, ROUNDINGS.index(rounding), level, level > 0 and rule == "foam")
        shared: dict[tuple[int, int], tuple[tuple[float, ...], float]] = {}  # by most tensors
        for i, own in enumerate(self.singles):
            key = id(own.hyper), own.step
            if key not in shared:
                step_size = own.hyper.step_size(own.step, level) if own.step else 0.0  # for sums alone
                shared[key] = _numbers(own.hyper, level, rule), step_size
            self._pack(i * STEP.size, own, kind, *shared[key], level > 0 and rule == "gwt")

    def _pack(
        self, at: int, own: Single, kind: Any, numbers: tuple[float, ...], step_size: float, is_divided: bool
    ) -> None:
        p, g, m, v = own.p.resolve_neg().contiguous(), own.g.resolve_neg().contiguous(), own.m, own.v
        self.params.append(p)
        self._kept.append(g)
        hyper, block, count = own.hyper, 1 << kind[4], p.numel()
        width = p.shape[-1] if p.dim() and p.shape[-1] % block else count
        low = 0 if own.low is None else own.low.data_ptr()
        scales = (0, 0) if own.scales is None else (own.scales[0].data_ptr(), own.scales[1].data_ptr())
        addresses = (p.data_ptr(), g.data_ptr(), m.data_ptr(), v.data_ptr())
        if not all(addresses):
            raise ValueError(
                f"a tensor of shape {tuple(p.shape)}, its gradient or a moment has no memory: it was freed, so "
                f"bring it back before the step"
            )
        norm, gamma, limit = 0, 0.0, 1.0
        if is_divided and own.limit is not None:
            limit = float(own.limit)
        if is_divided and own.norm is not None and hyper.norm_growth_limit is not None:
            norm, gamma = self._norm(own.norm), hyper.norm_growth_limit
        weights, coefficients = ((0, count, 0), (0, m.numel(), 0)) if own.span is None else own.span
        STEP.pack_into(
            *(self._buffer, at, *addresses, low, *scales, norm, count // width, width, *weights, *coefficients),
            *(own.key, own.step & 0xFFFFFFFF, *kind, own.row is not None, *numbers, gamma, limit, 0.0),
            *(step_size, 0.0, 0.0, 0.0, 0.0),
        )

    def _norm(self, norm: Tensor) -> int:
        if norm.dtype != torch.float32 or norm.is_neg():
            own, norm = norm, norm.to(torch.float32).resolve_neg()
            self.norms.append((own, norm))
        return norm.data_ptr()

    def run(self, function: Any) -> list[Result]:
        """Call a function of bucket.c on all tensors; what it says of each."""
        count = len(self.singles)
        if not count:
            return []
        if function((ctypes.c_char * len(self._buffer)).from_buffer(self._buffer), count, torch.get_num_threads()):
            raise MemoryError(f"there is no memory for the sums of a step over {count} tensors")
        return [Result._make(RESULTS.unpack_from(self._buffer, i * STEP.size + RESULTS_AT)) for i in range(count)]


def _numbers(hyper: Hyper, level: int, rule: Rule) -> tuple[float, ...]:
    """From ``beta1`` to ``per_root``."""
    block, factor = 2**level, hyper.signed_factor
    keep = 1 - float(hyper.lr) * hyper.weight_decay
    rest1, rest2 = 1 - hyper.beta1, 1 - hyper.beta2
    if level and rule == "foam":  # the gradient is multiplied by the factor first
        return hyper.beta1, rest1, hyper.beta2, rest2 / block, hyper.eps, keep, factor, 1 / block, 0.0
    rest1, rest2, root = rest1 * math.sqrt(block), rest2 * block, math.sqrt(block)
    return hyper.beta1, rest1, hyper.beta2, rest2, hyper.eps, keep, factor, factor / block, 1 / root
