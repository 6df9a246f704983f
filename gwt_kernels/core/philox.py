"""Random bits by Philox, as a function of seed, parameter, step and element index only.

Philox4x32-7 (Salmon et al., SC 2011) is counter-based. The counter is (index of the call: 64 bits; step; purpose).
The key is :func:`gwt_kernels.core.hyper.key_of` of seed and parameter. A call returns four words of 32 bits.
A coefficient uses a word: the lower half for ``exp_avg``, the upper half for ``exp_avg_sq``. A weight uses a half.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

WEIGHTS, MOMENTS = 0, 1  # purposes
ROUNDS = 7
CALLS = 1 << 16  # per thread at once: their words fit its caches, and are enough to amortize an operator call
_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_INCREMENTS = (0x9E3779B9, 0xBB67AE85)


def philox(calls: Tensor, step: int, purpose: int, key: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return four words of 32 random bits for each of ``calls`` (int64, at least 0), as int64."""
    c0, c1, c2, c3 = _rounds(calls & _MASK, calls >> 32, step & _MASK, purpose, key)
    return c0, c1 & _MASK, c2, c3 & _MASK


def _rounds(c0: Any, c1: Any, c2: Any, c3: Any, key: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the words of counters; the upper 32 bits of the second and the fourth are arbitrary.

    A counter word that is equal for all calls may be a Python int, which saves tensor operations in two rounds.
    """
    k0, k1 = key & _MASK, key >> 32 & _MASK
    for _ in range(ROUNDS):
        low, high = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]  # 64 bits; the sign does not matter
        c0, c1, c2, c3 = _mixed(high, c1, k0), high, _mixed(low, c3, k1), low
        k0, k1 = (k0 + _INCREMENTS[0]) & _MASK, (k1 + _INCREMENTS[1]) & _MASK
    return c0, c1, c2, c3


def _mixed(product: Any, word: Any, key: int) -> Any:
    """Return the upper half of ``product`` xor the lower halves of ``word`` and ``key``: tensors or ints."""
    upper = product >> 32
    if isinstance(upper, int):
        upper, word = word, upper
    if isinstance(word, int):
        return (upper ^ (word ^ key) & _MASK) & _MASK
    return upper.bitwise_xor_(word).bitwise_xor_(key).bitwise_and_(_MASK)


def blocks(n: int, per_call: int, device: torch.device) -> Iterator[slice]:
    """Yield slices of ``n`` elements, ``per_call`` to a Philox call, whose scratch memory fits the caches."""
    size = per_call * CALLS * torch.get_num_threads() if device.type == "cpu" else max(1, n)
    for start in range(0, n, size):
        yield slice(start, min(start + size, n))


def _draw(first: int, stop: int, step: int, purpose: int, key: int, device: torch.device) -> Tensor:
    """Return the words of the calls ``first`` to ``stop - 1`` in order: int32 ``[4 * calls]``."""
    calls = torch.arange(first, stop, dtype=torch.int64, device=device)
    same = first >> 32 == (stop - 1) >> 32
    c0, c1, c2, c3 = _rounds(calls & _MASK, first >> 32 if same else calls >> 32, step & _MASK, purpose, key)
    # On little-endian machines the lower word comes first in memory, and so does its lower half.
    pairs = torch.stack([c0.add_(c1, alpha=1 << 32), c2.add_(c3, alpha=1 << 32)], -1)
    return pairs.view(-1).view(torch.int32)


def random_words(first: int, n: int, step: int, key: int, device: torch.device) -> Tensor:
    """Return 32 random bits, as int32, for the moment coefficients ``first`` to ``first + n - 1``: ``[n]``."""
    words = _draw(first // 4, -(-(first + n) // 4), step, MOMENTS, key, device)
    return words[first % 4 : first % 4 + n]


def random_halves(first: int, n: int, step: int, key: int, device: torch.device) -> Tensor:
    """Return 16 random bits, as int32, for the weights ``first`` to ``first + n - 1``: ``[n]``."""
    halves = _draw(first // 8, -(-(first + n) // 8), step, WEIGHTS, key, device).view(torch.int16)
    return halves[first % 8 : first % 8 + n].to(torch.int32).bitwise_and_(0xFFFF)


def random_words_at(index: Tensor, step: int, key: int) -> Tensor:
    """Return 32 random bits for each of the moment coefficients ``index``: int64 of its shape."""
    return _at(index, 4, step, MOMENTS, key)


def random_halves_at(index: Tensor, step: int, key: int) -> Tensor:
    """Return 16 random bits for each of the weights ``index``: int64 of its shape."""
    return _at(index, 8, step, WEIGHTS, key) >> (index % 2 * 16) & 0xFFFF


def _at(index: Tensor, per_call: int, step: int, purpose: int, key: int) -> Tensor:
    """Return the word of each index, by one Philox call per index."""
    words = torch.stack(philox(index // per_call, step, purpose, key))
    return words.gather(0, (index % per_call * 4 // per_call).unsqueeze(0)).squeeze(0)
