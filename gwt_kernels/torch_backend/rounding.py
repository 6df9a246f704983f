"""Random bits by Philox, and float32 values in 16 bits: rounded at random, or with the other bits beside them.

Philox4x32-7 (Salmon et al., SC 2011) is counter-based: the bits of an element depend on seed, step and the
element's index alone. The counter is (index of the call, 64 bits; step; purpose), the key what
:func:`gwt_kernels.hyper.key_of` makes of seed and parameter. A call gives four words of 32 bits: one per moment
coefficient, of which the lower half serves ``exp_avg`` and the upper half ``exp_avg_sq``; or a half per weight.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "MOMENTS",
    "WEIGHTS",
    "blocks",
    "join_low",
    "philox",
    "random_halves",
    "random_halves_at",
    "random_words",
    "random_words_at",
    "round_at_random",
    "split_low",
    "split_low_",
]

WEIGHTS, MOMENTS = 0, 1  # purposes
ROUNDS = 7
CALLS = 1 << 16  # at once by a thread: their words stay in its caches, and operators pay
_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_INCREMENTS = (0x9E3779B9, 0xBB67AE85)

_LARGEST_BF16 = 0x7F7F0000  # as float32; what lies beyond is not rounded upwards, so that nothing becomes infinite
_LARGEST = torch.finfo(torch.float32).max


def philox(calls: Tensor, step: int, purpose: int, key: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four words of 32 random bits for each of ``calls`` (int64, at least 0), as int64."""
    c0, c1, c2, c3 = _rounds(calls & _MASK, calls >> 32, step & _MASK, purpose, key)
    return c0, c1 & _MASK, c2, c3 & _MASK


def _rounds(c0: Any, c1: Any, c2: Any, c3: Any, key: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The words of counters, with other bits above the 32 of the second and the fourth.

    What is the same for all counters may stay an integer of Python's, and then costs nothing for two rounds.
    """
    k0, k1 = key & _MASK, key >> 32 & _MASK
    for _ in range(ROUNDS):
        low, high = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]  # 64 bits, of which the sign does not matter
        c0, c1, c2, c3 = _mixed(high, c1, k0), high, _mixed(low, c3, k1), low
        k0, k1 = (k0 + _INCREMENTS[0]) & _MASK, (k1 + _INCREMENTS[1]) & _MASK
    return c0, c1, c2, c3


def _mixed(product: Any, word: Any, key: int) -> Any:
    """The upper half of ``product`` xor the lower ones of ``word`` and ``key``: tensors, or integers."""
    upper = product >> 32
    if isinstance(upper, int):
        upper, word = word, upper
    if isinstance(word, int):
        return (upper ^ (word ^ key) & _MASK) & _MASK
    return upper.bitwise_xor_(word).bitwise_xor_(key).bitwise_and_(_MASK)


def blocks(n: int, per_call: int, device: torch.device) -> Iterator[slice]:
    """Parts of ``n`` elements, of which a call serves ``per_call``: for no more scratch memory than caches take."""
    size = per_call * CALLS * torch.get_num_threads() if device.type == "cpu" else max(1, n)
    for start in range(0, n, size):
        yield slice(start, min(start + size, n))


def _draw(first: int, stop: int, step: int, purpose: int, key: int, device: torch.device) -> Tensor:
    """The words of the calls from ``first`` to before ``stop``, in their order: int32 ``[4 * calls]``."""
    calls = torch.arange(first, stop, dtype=torch.int64, device=device)
    same = first >> 32 == (stop - 1) >> 32
    c0, c1, c2, c3 = _rounds(calls & _MASK, first >> 32 if same else calls >> 32, step & _MASK, purpose, key)
    # The lower word, and below the lower half of it, is the first in the memory of every machine that runs this.
    pairs = torch.stack([c0.add_(c1, alpha=1 << 32), c2.add_(c3, alpha=1 << 32)], -1)
    return pairs.view(-1).view(torch.int32)


def random_words(first: int, n: int, step: int, key: int, device: torch.device) -> Tensor:
    """32 random bits, as int32, for each of the moment coefficients ``first`` to ``first + n - 1``: ``[n]``."""
    words = _draw(first // 4, -(-(first + n) // 4), step, MOMENTS, key, device)
    return words[first % 4 : first % 4 + n]


def random_halves(first: int, n: int, step: int, key: int, device: torch.device) -> Tensor:
    """16 random bits, as int32, for each of the weights ``first`` to ``first + n - 1``: ``[n]``."""
    halves = _draw(first // 8, -(-(first + n) // 8), step, WEIGHTS, key, device).view(torch.int16)
    return halves[first % 8 : first % 8 + n].to(torch.int32).bitwise_and_(0xFFFF)


# Below, numbers of 0 and 1 stand for conditions: on a CPU torch.where and tensors of bool cost several times as
# much as arithmetic.


def random_words_at(index: Tensor, step: int, key: int) -> Tensor:
    """32 random bits for each of the moment coefficients of the given indices: int64 of ``index``'s shape."""
    return _at(index, 4, step, MOMENTS, key)


def random_halves_at(index: Tensor, step: int, key: int) -> Tensor:
    """16 random bits for each of the weights of the given indices: int64 of ``index``'s shape."""
    return _at(index, 8, step, WEIGHTS, key) >> (index % 2 * 16) & 0xFFFF


def _at(index: Tensor, per_call: int, step: int, purpose: int, key: int) -> Tensor:
    """The word that holds the bits of each index, from a call for each of them."""
    words = torch.stack(philox(index // per_call, step, purpose, key))
    return words.gather(0, (index % per_call * 4 // per_call).unsqueeze(0)).squeeze(0)


def round_at_random(x: Tensor, bits: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` in bfloat16 or float16: up or down with the probabilities that make the expectation ``x``.

    Args:
        x: float32.
        bits: 16 random bits for each element, int32 of ``x``'s shape.
        dtype: to round to. What lies beyond its largest number becomes that; infinity and NaN stay.
    """
    if dtype == torch.bfloat16:
        raw = _one_nan(x).view(torch.int32)
        below = raw.bitwise_and(0x7FFFFFFF).lt_(_LARGEST_BF16)
        raw.add_(below.mul_(bits)).bitwise_right_shift_(16)
        return raw.to(torch.int16).view(torch.bfloat16)
    # float16: in units of its last place, which below 2**-14 is fixed. All of this is exact.
    size = x.abs()
    infinite = torch.gt(size, _LARGEST, out=torch.empty_like(size)).mul_(size)  # infinity, NaN, and 0 else
    size.clamp_(max=65504.0)
    exponent = size.view(torch.int32).bitwise_right_shift(23).clamp_(min=113)
    per_unit = exponent.neg_().add_(264).bitwise_left_shift_(23).view(torch.float32)
    size.mul_(per_unit)
    whole = size.floor()
    up = bits.to(torch.float32).lt_(size.sub_(whole).mul_(65536.0))
    return whole.add_(up).div_(per_unit).maximum(infinite).copysign_(x).to(torch.float16)


def split_low(x: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest bfloat16 to a float32 (of two, the larger) and the difference of their bits, int16."""
    weight, low = torch.empty_like(x, dtype=torch.bfloat16), torch.empty_like(x, dtype=torch.int16)
    split_low_(x.clone(), weight, low)
    return weight, low


def split_low_(x: Tensor, weight: Tensor, low: Tensor) -> None:
    """Store in ``weight`` and ``low`` what :func:`split_low` returns; ``x`` is overwritten."""
    raw = x.nan_to_num_(nan=math.nan, posinf=math.inf, neginf=-math.inf).view(torch.int32)
    low.copy_(raw)
    # The lower 16 bits as a signed number are negative just where the upper ones are rounded up.
    weight.view(torch.int16).copy_(raw.add_(0x8000).bitwise_right_shift_(16))


def _one_nan(x: Tensor) -> Tensor:
    """A copy with the NaN of bits ``0x7FC00000`` for every NaN, so that half of the bits are one too."""
    return torch.nan_to_num(x, nan=math.nan, posinf=math.inf, neginf=-math.inf)


def join_low(weight: Tensor, low: Tensor) -> Tensor:
    """The float32 that :func:`split_low` made two tensors of."""
    return low.to(torch.int32).add_(weight.view(torch.int16).to(torch.int32), alpha=1 << 16).view(torch.float32)
