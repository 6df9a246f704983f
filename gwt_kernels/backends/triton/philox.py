"""Random bits by Philox, bit for bit as in ``core/philox.py``."""

from __future__ import annotations

import triton
import triton.language as tl

_WEIGHTS = tl.constexpr(0)
_MOMENTS = tl.constexpr(1)
_ROUNDS = tl.constexpr(7)


@triton.jit
def _philox(calls, step, purpose: tl.constexpr, key):
    """Return four words of 32 random bits for each of ``calls`` (int64)."""
    low = (calls & 0xFFFFFFFF).to(tl.uint32)
    high = (calls >> 32).to(tl.uint32)
    zero = low ^ low
    return tl.philox(key, low, high, zero + step.to(tl.uint32), zero + purpose, _ROUNDS)


@triton.jit
def random_words(first, N: tl.constexpr, step, key):
    """Return 32 random bits for each of ``N`` coefficients from ``first``, a multiple of ``min(N, 4)``: ``[N]``."""
    if N >= 4:
        words = random_words_of_calls((first >> 2) + tl.arange(0, N // 4), N, step, key)
    else:
        words = random_words_at(first + tl.arange(0, N), step, key)
    return words


@triton.jit
def random_words_of_calls(calls, N: tl.constexpr, step, key):
    """Return 32 random bits for each of the 4 coefficients of ``calls`` (int64 ``[N // 4]``): ``[N]``."""
    w0, w1, w2, w3 = _philox(calls, step, _MOMENTS, key)
    return tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (N,))


@triton.jit
def random_words_at(index, step, key):
    """Return 32 random bits for the coefficients ``index`` (int64, any shape), by one call per index."""
    w0, w1, w2, w3 = _philox(index >> 2, step, _MOMENTS, key)
    return _choose(w0, w1, w2, w3, index & 3)


@triton.jit
def random_halves(first, N: tl.constexpr, step, key):
    """Return 16 random bits for each of ``N`` weights from ``first``, both multiples of 8: ``[N]``."""
    return random_halves_of_calls((first >> 3) + tl.arange(0, N // 8), N, step, key)


@triton.jit
def random_halves_of_calls(calls, N: tl.constexpr, step, key):
    """Return 16 random bits for each of the 8 weights of ``calls`` (int64 ``[N // 8]``): ``[N]``."""
    w0, w1, w2, w3 = _philox(calls, step, _WEIGHTS, key)
    return tl.reshape(_halves(tl.join(tl.join(w0, w2), tl.join(w1, w3))), (N,)).to(tl.uint32)


@triton.jit
def random_halves_of_blocks(index, W: tl.constexpr, NB: tl.constexpr, step, key):
    """Return 16 random bits for each of the ``W >= 2`` weights of ``NB`` blocks: ``[NB * W]``.

    ``index [NB]`` (int64) has the blocks' first weights, multiples of ``min(W, 8)``.
    """
    if W >= 8:
        calls = tl.reshape((index >> 3)[:, None] + tl.arange(0, W // 8)[None, :], (NB * W // 8,))
        w0, w1, w2, w3 = _philox(calls, step, _WEIGHTS, key)
        words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    else:
        w0, w1, w2, w3 = _philox(index >> 3, step, _WEIGHTS, key)
        if W == 4:
            second = (index & 7) == 4
            words = tl.join(tl.where(second, w2, w0), tl.where(second, w3, w1))
        else:
            words = _choose(w0, w1, w2, w3, index >> 1 & 3)
    return tl.reshape(_halves(words), (NB * W,)).to(tl.uint32)


@triton.jit
def _halves(words):
    """Return the lower and the upper half of each word along a new last dimension."""
    return tl.join(words.to(tl.uint16), (words >> 16).to(tl.uint16))


@triton.jit
def random_halves_at(index, step, key):
    """Return 16 random bits for the weights ``index`` (int64, any shape), by one call per index."""
    w0, w1, w2, w3 = _philox(index >> 3, step, _WEIGHTS, key)
    word = _choose(w0, w1, w2, w3, index >> 1 & 3)
    return tl.where((index & 1) == 0, word & 0xFFFF, word >> 16)


@triton.jit
def _choose(w0, w1, w2, w3, which):
    return tl.where(which < 2, tl.where(which == 0, w0, w1), tl.where(which == 2, w2, w3))
