"""How weights and moments are read from the dtypes that they are kept in, and stored there."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gwt_kernels.hyper import Rounding
from gwt_kernels.torch_backend.rounding import join_low, random_halves, random_words, round_at_random, split_low

__all__ = ["Chunk", "Storage"]


class Chunk(NamedTuple):
    """Views of the same rows of a parameter and what belongs to it."""

    p: Tensor
    g: Tensor
    m: Tensor
    v: Tensor
    low: Tensor | None
    first: int
    """Index of the first weight in the whole parameter."""
    first_coefficient: int
    """Index of the first coefficient in the whole of the moments."""


class Storage(NamedTuple):
    """How one parameter's numbers are stored in one step."""

    rounding: Rounding
    step: int
    key: int

    def load(self, chunk: Chunk, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Weights and moments in ``dtype``: views where that is what they are kept in."""
        return self.load_weights(chunk, dtype), chunk.m.to(dtype), chunk.v.to(dtype)

    def load_weights(self, chunk: Chunk, dtype: torch.dtype) -> Tensor:
        return chunk.p.to(dtype) if chunk.low is None else join_low(chunk.p, chunk.low).to(dtype)

    def store_moments(self, chunk: Chunk, m: Tensor, v: Tensor) -> None:
        """Moments in bfloat16 are rounded at random, others to the nearest."""
        if chunk.m.dtype == torch.bfloat16:
            words = random_words(chunk.first_coefficient, m.numel(), self.step, self.key, m.device).view(m.shape)
            chunk.m.copy_(round_at_random(m.float(), words & 0xFFFF, torch.bfloat16))
            chunk.v.copy_(round_at_random(v.float(), words >> 16, torch.bfloat16))
        else:
            _copy(chunk.m, m)
            _copy(chunk.v, v)

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
