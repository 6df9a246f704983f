"""Random bits by Philox, and float32 values stored in 16 bits, bit for bit as in ``backends/torch/rounding.py``."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "join_low",
    "random_halves",
    "random_halves_at",
    "random_halves_of_blocks",
    "random_words",
    "random_words_at",
    "split_low",
    "stochastic_round",
]

_WEIGHTS = tl.constexpr(0)
_MOMENTS = tl.constexpr(1)
_ROUNDS = tl.constexpr(7)


@triton.jit
def _philox(calls, step, purpose: tl.constexpr, key):
    """Four words of 32 random bits for each of ``calls`` (int64)."""
    low = (calls & 0xFFFFFFFF).to(tl.uint32)
    high = (calls >> 32).to(tl.uint32)
    zero = low ^ low
    return tl.philox(key, low, high, zero + step.to(tl.uint32), zero + purpose, _ROUNDS)


@triton.jit
def random_words(first, N: tl.constexpr, step, key):
    """32 random bits for each of ``N`` coefficients from ``first`` on, which ``min(N, 4)`` divides: ``[N]``."""
    if N >= 4:
        w0, w1, w2, w3 = _philox(first // 4 + tl.arange(0, N // 4), step, _MOMENTS, key)
        words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (N,))
    else:
        words = random_words_at(first + tl.arange(0, N), step, key)
    return words


@triton.jit
def random_words_at(index, step, key):
    """32 random bits for the coefficients of the given indices (int64), of any shape: a call for each of them."""
    w0, w1, w2, w3 = _philox(index // 4, step, _MOMENTS, key)
    return _choose(w0, w1, w2, w3, index % 4)


@triton.jit
def random_halves(first, N: tl.constexpr, step, key):
    """16 random bits for each of ``N`` weights from ``first`` on; 8 divides both: ``[N]``."""
    w0, w1, w2, w3 = _philox(first // 8 + tl.arange(0, N // 8), step, _WEIGHTS, key)
    return tl.reshape(_halves(tl.join(tl.join(w0, w2), tl.join(w1, w3))), (N,))


@triton.jit
def random_halves_of_blocks(index, W: tl.constexpr, NB: tl.constexpr, step, key):
    """16 random bits for each of the ``W`` weights, 2 or more, of ``NB`` blocks: ``[NB * W]``.

    ``index [NB]`` (int64) are those of their first weights, multiples of ``min(W, 8)``.
    """
    if W >= 8:
        calls = tl.reshape((index // 8)[:, None] + tl.arange(0, W // 8)[None, :], (NB * W // 8,))
        w0, w1, w2, w3 = _philox(calls, step, _WEIGHTS, key)
        words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    else:
        w0, w1, w2, w3 = _philox(index // 8, step, _WEIGHTS, key)
        if W == 4:
            second = index % 8 == 4
            words = tl.join(tl.where(second, w2, w0), tl.where(second, w3, w1))
        else:
            words = _choose(w0, w1, w2, w3, index % 8 // 2)
    return tl.reshape(_halves(words), (NB * W,))


@triton.jit
def _halves(words):
    """The lower and the upper half of each word: one more dimension, the last."""
    return tl.join(words & 0xFFFF, words >> 16)


@triton.jit
def random_halves_at(index, step, key):
    """16 random bits for the weights of the given indices (int64), of any shape: a call for each of them."""
    w0, w1, w2, w3 = _philox(index // 8, step, _WEIGHTS, key)
    lane = index % 8
    word = _choose(w0, w1, w2, w3, lane // 2)
    return tl.where(lane % 2 == 0, word & 0xFFFF, word >> 16)


@triton.jit
def _choose(w0, w1, w2, w3, which):
    return tl.where(which < 2, tl.where(which == 0, w0, w1), tl.where(which == 2, w2, w3))


@triton.jit
def stochastic_round(x, bits, dtype: tl.constexpr):
    """``x`` (float32) in bfloat16 or float16, up or down at random by 16 ``bits``, without bias."""
    raw = x.to(tl.uint32, bitcast=True)
    if dtype == tl.bfloat16:
        noise = tl.where((raw & 0x7FFFFFFF) < 0x7F7F0000, bits, 0)
        raw = tl.where(x != x, 0x7FC00000, raw + noise)
        rounded = (raw >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        magnitude = tl.minimum(tl.abs(x), 65504.0)
        exponent = tl.maximum(magnitude.to(tl.uint32, bitcast=True) >> 23, 113)
        per_unit = ((264 - exponent) << 23).to(tl.float32, bitcast=True)
        units = magnitude * per_unit
        whole = tl.floor(units)
        up = bits.to(tl.float32) < (units - whole) * 65536.0
        rounded = tl.div_rn(whole + up.to(tl.float32), per_unit).to(tl.uint32, bitcast=True) | (raw & 0x80000000)
        finite = (raw & 0x7FFFFFFF) < 0x7F800000
        rounded = tl.where(finite, rounded, raw).to(tl.float32, bitcast=True).to(tl.float16)
    return rounded


@triton.jit
def split_low(x):
    """The nearest bfloat16 to a float32 (of two, the larger) and the difference of their bits, int16."""
    raw = tl.where(x != x, 0x7FC00000, x.to(tl.uint32, bitcast=True))
    high = (raw + 0x8000) >> 16
    low = (raw - (high << 16)).to(tl.int32, bitcast=True)
    return high.to(tl.uint16).to(tl.bfloat16, bitcast=True), low.to(tl.int16)


@triton.jit
def join_low(weight, low):
    """The float32 that ``split_low`` made two of."""
    high = weight.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
    return (high + low.to(tl.int32).to(tl.uint32, bitcast=True)).to(tl.float32, bitcast=True)
