"""How weights and moments are read from the dtypes that they are kept in, and stored there."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gwt_kernels.hyper import Rounding
from gwt_kernels.torch_backend.quantized import decode_first, decode_second, encode_first, encode_second
from gwt_kernels.torch_backend.rounding import join_low, random_halves, random_words, round_at_random, split_low

__all__ = ["Chunk", "Storage"]


class Chunk(NamedTuple):
    """Views of the same rows of a parameter and what belongs to it."""

    p: Tensor
    g: Tensor
    m: Tensor
    v: Tensor
    low: Tensor | None
    scales: tuple[Tensor, Tensor] | None
    """Of the quanta of ``m`` and ``v``, where these are codes; a chunk begins with a whole quantum."""
    first: int
    """Index of the first weight in the whole parameter."""
    first_coefficient: int
    """Index of the first coefficient in the whole of the moments."""


class Storage(NamedTuple):
    """How one parameter's numbers are stored in one step."""

    level: int
    rounding: Rounding
    step: int
    key: int

    def load(self, chunk: Chunk, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Weights and moments in ``dtype``: views where that is what they are kept in."""
        return self.load_weights(chunk, dtype), *self.load_moments(chunk, dtype)

    def load_moments(self, chunk: Chunk, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        if chunk.scales is None:
            return chunk.m.to(dtype), chunk.v.to(dtype)
        m = decode_first(chunk.m, chunk.scales[0], self.level)
        return m.to(dtype), decode_second(chunk.v, chunk.scales[1], self.level).to(dtype)

    def load_weights(self, chunk: Chunk, dtype: torch.dtype) -> Tensor:
        return chunk.p.to(dtype) if chunk.low is None else join_low(chunk.p, chunk.low).to(dtype)

    def store_moments(self, chunk: Chunk, m: Tensor, v: Tensor) -> None:
        """Moments in bfloat16 and int8 are rounded at random, others to the nearest."""
        if chunk.m.dtype not in (torch.bfloat16, torch.int8):
            _copy(chunk.m, m)
            _copy(chunk.v, v)
            return
        words = random_words(chunk.first_coefficient, m.numel(), self.step, self.key, m.device).view(m.shape)
        if chunk.scales is None:
            chunk.m.copy_(round_at_random(m.float(), words & 0xFFFF, torch.bfloat16))
            chunk.v.copy_(round_at_random(v.float(), words >> 16, torch.bfloat16))
            return
        for encode, moment, bits, codes, scales in (
            (encode_first, m, words & 0xFFFF, chunk.m, chunk.scales[0]),
            (encode_second, v, words >> 16, chunk.v, chunk.scales[1]),
        ):
            encoded, new_scales = encode(moment.float(), bits, self.level)
            codes.copy_(encoded)
            scales.copy_(new_scales)

    def store_weights(self, chunk: Chunk, p: Tensor) -> None:
        if chunk.low is not None:
            weights, low = split_low(p.float())
            chunk.p.copy_(weights)
            chunk.low.copy_(low)
        elif self.rounding == "stochastic":
            halves = random_halves(chunk.first, p.numel(), self.step, self.key, p.device).view(p.shape)
            chunk.p.copy_(round_at_random(p.float(), halves, chunk.p.dtype))
        else:
            _copy(chunk.p, p)


def _copy(target: Tensor, value: Tensor) -> None:
    if value is not target:  # else it was updated in place
        target.copy_(value)
