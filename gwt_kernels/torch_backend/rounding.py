"""Random bits by Philox, and float32 values in 16 bits: rounded at random, or with the other bits beside them.

Philox4x32-7 (Salmon et al., SC 2011) is counter-based: the bits of an element depend on seed, step and the
element's index alone. The counter is (index of the call, 64 bits; step; purpose), the key what
:func:`gwt_kernels.hyper.key_of` makes of seed and parameter. A call gives four words of 32 bits: one per moment
coefficient, of which the lower half serves ``exp_avg`` and the upper half ``exp_avg_sq``; or a half per weight.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "MOMENTS",
    "WEIGHTS",
    "join_low",
    "philox",
    "random_halves",
    "random_words",
    "round_at_random",
    "split_low",
]

WEIGHTS, MOMENTS = 0, 1  # purposes
ROUNDS = 7
BLOCK = 1 << 14  # calls
_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_INCREMENTS = (0x9E3779B9, 0xBB67AE85)

_LARGEST_BF16 = 0x7F7F0000  # as float32; what lies beyond is not rounded upwards, so that nothing becomes infinite
_NAN = 0x7FC00000


def philox(calls: Tensor, step: int, purpose: int, key: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four words of 32 random bits, as int64, for each of ``calls`` (int64, at least 0)."""
    c0, c1 = calls & _MASK, calls >> 32
    c2, c3 = torch.full_like(calls, step & _MASK), torch.full_like(calls, purpose)
    k0, k1 = key & _MASK, key >> 32 & _MASK
    for _ in range(ROUNDS):
        low = c0.mul_(_MULTIPLIERS[0])  # 64 bits, of which the sign does not matter
        high = c2.mul_(_MULTIPLIERS[1])
        c0 = (high >> 32).bitwise_xor_(c1).bitwise_xor_(k0).bitwise_and_(_MASK)
        c2 = (low >> 32).bitwise_xor_(c3).bitwise_xor_(k1).bitwise_and_(_MASK)
        c1, c3 = high, low  # their upper halves go at the next mask
        k0, k1 = (k0 + _INCREMENTS[0]) & _MASK, (k1 + _INCREMENTS[1]) & _MASK
    return c0, c1 & _MASK, c2, c3 & _MASK


def _draw(first: int, stop: int, step: int, purpose: int, key: int, device: torch.device) -> Tensor:
    """The words of the calls from ``first`` to before ``stop``: int32 ``[calls, 4]``, block by block."""
    words = torch.empty(stop - first, 4, dtype=torch.int32, device=device)
    block = BLOCK if device.type == "cpu" else max(1, stop - first)
    for start in range(first, stop, block):
        end = min(start + block, stop)
        calls = torch.arange(start, end, device=device)
        for i, word in enumerate(philox(calls, step, purpose, key)):
            words[start - first : end - first, i] = word
    return words


def random_words(first: int, n: int, step: int, key: int, device: torch.device) -> Tensor:
    """32 random bits for each of the moment coefficients ``first`` to ``first + n - 1``: int64 ``[n]``."""
    words = _draw(first // 4, -(-(first + n) // 4), step, MOMENTS, key, device).view(-1)
    return words[first % 4 : first % 4 + n].to(torch.int64).bitwise_and_(_MASK)


def random_halves(first: int, n: int, step: int, key: int, device: torch.device) -> Tensor:
    """16 random bits for each of the weights ``first`` to ``first + n - 1``: int32 ``[n]``."""
    words = _draw(first // 8, -(-(first + n) // 8), step, WEIGHTS, key, device)
    halves = torch.stack((words, words >> 16), dim=-1).bitwise_and_(0xFFFF).view(-1)
    return halves[first % 8 : first % 8 + n]


def round_at_random(x: Tensor, bits: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` in bfloat16 or float16: up or down with the probabilities that make the expectation ``x``.

    Args:
        x: float32.
        bits: 16 random bits for each element, integers of ``x``'s shape.
        dtype: to round to. What lies beyond its largest number becomes that; infinity and NaN stay.
    """
    if dtype == torch.bfloat16:
        raw = x.view(torch.int32)
        noise = torch.where((raw & 0x7FFFFFFF) < _LARGEST_BF16, bits.to(torch.int32), 0)
        raw = torch.where(x.isnan(), _NAN, raw + noise)
        return (raw >> 16).to(torch.int16).view(torch.bfloat16)
    # float16: in units of its last place, which below 2**-14 is fixed. All of this is exact.
    magnitude = x.abs().clamp(max=65504.0)
    exponent = (magnitude.view(torch.int32) >> 23).clamp(min=113)
    per_unit = ((264 - exponent) << 23).view(torch.float32)
    units = magnitude * per_unit
    whole = units.floor()
    up = bits.to(torch.float32) < (units - whole) * 65536.0
    rounded = (whole + up) / per_unit
    return torch.where(x.isfinite(), rounded.copysign(x), x).to(torch.float16)


def split_low(x: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest bfloat16 to a float32 (of two, the larger) and the difference of their bits, int16."""
    raw = torch.where(x.isnan(), _NAN, x.view(torch.int32))
    high = (raw + 0x8000) >> 16
    return high.to(torch.int16).view(torch.bfloat16), (raw - (high << 16)).to(torch.int16)


def join_low(weight: Tensor, low: Tensor) -> Tensor:
    """The float32 that :func:`split_low` made two tensors of."""
    return ((weight.view(torch.int16).to(torch.int32) << 16) + low).view(torch.float32)
