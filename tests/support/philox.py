"""Philox4x32 in Python's integers, and Random123's known answers: the oracle of random bits."""

from __future__ import annotations

Words = tuple[int, int, int, int]

# (counter, key, words) of philox4x32 with 7 rounds: kat_vectors of Random123 (Salmon et al., SC 2011).
KNOWN: tuple[tuple[Words, tuple[int, int], Words], ...] = (
    ((0,) * 4, (0, 0), (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A),
    ),
)


def philox4x32(counter: Words, key: tuple[int, int], rounds: int = 7) -> Words:
    """Return four random words of 32 bits."""
    a, b, c, d = counter
    k, q = key
    for i in range(rounds):
        if i:
            k, q = (k + 0x9E3779B9) % 2**32, (q + 0xBB67AE85) % 2**32
        first, second = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = (second >> 32) ^ b ^ k, second % 2**32, (first >> 32) ^ d ^ q, first % 2**32
    return a, b, c, d


def words(indices: range, step: int, purpose: int, key: int, per_call: int = 4) -> list[int]:
    """Return random words by element index, or with ``per_call=8`` their lower and upper halves."""
    result = []
    for index in indices:
        call, lane = divmod(index, per_call)
        counter = (call % 2**32, call >> 32, step % 2**32, purpose)
        four = philox4x32(counter, (key % 2**32, key >> 32))
        result.append(four[lane] if per_call == 4 else four[lane // 2] >> 16 * (lane % 2) & 0xFFFF)
    return result
