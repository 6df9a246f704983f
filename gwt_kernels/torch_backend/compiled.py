"""``backend="compiled"``: random bits and the roundings that cost most, through torch.compile, on a CPU.

What is compiled are the functions of rounding.py and quantized.py themselves. They work with integers and with
floating point operations that round once, so their results are the same, bit for bit; the arithmetic of the step
stays PyTorch's own, because compiled code would round it elsewhere.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gwt_kernels.hyper import quantum
from gwt_kernels.torch_backend import quantized, rounding
from gwt_kernels.torch_backend.storage import Kernels

__all__ = ["KERNELS"]

SMALLEST = 4096  # elements for which a call of compiled code pays; tensors of 0 and 1 would be compiled apart, too


class _Compiled:
    """A function that is compiled when it is first called, for tensors of all sizes."""

    failed = False

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    @functools.cached_property
    def _compiled(self) -> Callable[..., Any]:
        # Threads are counted when it runs, not when it is compiled.
        options: dict[str, Any] = {"cpp.dynamic_threads": True}
        return torch.compile(self._function, fullgraph=True, dynamic=True, options=options)

    def __call__(self, *arguments: Any) -> Any:
        if not _Compiled.failed:
            try:
                return self._compiled(*arguments)
            except Exception as error:  # the compiler's, of many kinds; a step that has begun has to be finished
                _Compiled.failed = True
                warnings.warn(
                    f"backend='compiled' could not compile and goes on as 'torch', with the same results, until "
                    f"this process ends: {type(error).__name__}: {error}",
                    RuntimeWarning,
                    stacklevel=2,
                )
        return self._function(*arguments)


@_Compiled
def _pairs(n: int, numbers: Tensor) -> Tensor:
    first, step, purpose, key = numbers.unbind()
    calls = torch.arange(n, device=numbers.device) + first
    return rounding.pairs(calls, calls >> 32, step.expand(n), purpose.expand(n), key)


@_Compiled
def _round_pairs(raw: Tensor, words: Tensor) -> Tensor:
    """Two weights in an int64, to two in an int32: smaller integers would cost the vectors."""
    wide = words.to(torch.int64)
    return (_rounded(raw >> 32, wide >> 16 & 0xFFFF) << 16 | _rounded(raw, wide & 0xFFFF) & 0xFFFF).to(torch.int32)


@_Compiled
def _round_moments(m: Tensor, v: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
    return _rounded(m, words & 0xFFFF), _rounded(v, words >> 16 & 0xFFFF)


def _rounded(raw: Tensor, bits: Tensor) -> Tensor:
    """Bits of float32, views as which would cost the vectors, to those of bfloat16."""
    return torch.where(raw & 0x7FFFFFFF > 0x7F800000, 0x7FC0, rounding.upper_halves(raw, bits))


@_Compiled
def _round_float16(x: Tensor, raw: Tensor, bits: Tensor) -> Tensor:
    """Bits of float16: :func:`gwt_kernels.torch_backend.rounding.round_at_random` without views, which it needs."""
    size = raw & 0x7FFFFFFF
    # 13 bits fall away, and round up what they exceed. Below 2**-14 the last place is fixed.
    rounded = (size.clamp(max=0x477FE000) + 0x1FFF - (bits >> 3) >> 13) - (112 << 10)
    units = x.abs().clamp(max=2.0**-14) * 2.0**24
    whole = units.floor()
    small = (whole + torch.where(bits < (units - whole) * 65536.0, 1.0, 0.0)).to(torch.int32)
    rounded = torch.where(size < 113 << 23, small, rounded)
    rounded = torch.where(size < 0x7F800000, rounded, torch.where(size > 0x7F800000, 0x7E00, 0x7C00))
    return rounded | raw >> 16 & 0x8000


def draw(first: int, stop: int, step: int, purpose: int, key: int, device: torch.device) -> Tensor:
    """See :func:`gwt_kernels.torch_backend.rounding.draw`."""
    if stop - first < SMALLEST:
        return rounding.draw(first, stop, step, purpose, key, device)
    # Numbers that change come in a tensor: nothing is compiled again for the next ones.
    pairs: Tensor = _pairs(stop - first, torch.tensor([first, step & 0xFFFFFFFF, purpose, key], device=device))
    return pairs


def round_weights(x: Tensor, first: int, step: int, key: int, dtype: torch.dtype) -> Tensor:
    """See :func:`gwt_kernels.torch_backend.rounding.round_weights`."""
    n = x.numel()
    if n < SMALLEST:
        return rounding.round_weights(x, first, step, key, dtype)
    if dtype != torch.bfloat16:
        bits = rounding.random_halves(first, n, step, key, x.device, draw)
        half: Tensor = _round_float16(x, x.view(torch.int32), bits)
        return half.to(torch.int16).view(dtype)
    before, after = first % 8, -(first + n) % 8
    if before or after:
        x = F.pad(x, (before, after))
    words = draw(first // 8, (first + n + after) // 8, step, rounding.WEIGHTS, key, x.device)
    rounded: Tensor = _round_pairs(x.view(torch.int64), words.view(-1).view(torch.int32))
    return rounded.view(torch.bfloat16)[before : before + n]


def round_moments(m: Tensor, v: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
    """See :func:`gwt_kernels.torch_backend.rounding.round_moments`."""
    if m.numel() < SMALLEST:
        return rounding.round_moments(m, v, words)
    first, second = _round_moments(m.view(torch.int32), v.view(torch.int32), words)
    return first.to(torch.int16).view(torch.bfloat16), second.to(torch.int16).view(torch.bfloat16)


def encode(m: Tensor, v: Tensor, words: Tensor, level: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :func:`gwt_kernels.torch_backend.quantized.encode`."""
    n, encoder = m.numel(), _ENCODERS.get(quantum(level))
    if n < SMALLEST or encoder is None:
        return quantized.encode(m, v, words, level)
    missing = -n % quantum(level)
    if missing:  # whole quanta alone are compiled
        m, v, words = F.pad(m, (0, missing)), F.pad(v, (0, missing)), F.pad(words, (0, missing))
    first, first_scales, second, second_scales = encoder(m, v, words)
    return first[:n], first_scales, second[:n], second_scales


# Of their own each, as PyTorch counts compilations of one function, and stops at eight.
_ENCODERS = {
    quantum(3): _Compiled(lambda m, v, words: quantized.encode(m, v, words, 3)),
    quantum(4): _Compiled(lambda m, v, words: quantized.encode(m, v, words, 4)),
    quantum(5): _Compiled(lambda m, v, words: quantized.encode(m, v, words, 5)),
    quantum(6): _Compiled(lambda m, v, words: quantized.encode(m, v, words, 6)),
}

KERNELS = Kernels(draw, round_weights, round_moments, encode, calls=1 << 17)  # scratch memory is less
