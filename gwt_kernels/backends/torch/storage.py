"""How weights and moments are read from the dtypes that they are kept in, and stored there."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from gwt_kernels.core.hyper import Rounding, Span
from gwt_kernels.core.notes import Notes
from gwt_kernels.core.philox import blocks, random_halves, random_halves_at, random_words, random_words_at
from gwt_kernels.formats.moments import MomentFormat
from gwt_kernels.formats.split import join_low, split_low_
from gwt_kernels.formats.stochastic import stochastic_round

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
    stored: MomentFormat
    rounding: Rounding
    step: int
    key: int
    spans: tuple[Span, Span] | None = None
    """Where weights and coefficients lie in the whole tensor, if these are a shard's."""
    notes: Notes | None = None
    """What is told about the step."""

    def load(self, chunk: Chunk, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Weights and moments in ``dtype``: views where that is what they are kept in."""
        return self.load_weights(chunk, dtype), *self.load_moments(chunk, dtype)

    def load_moments(self, chunk: Chunk, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        m, v = self.stored.decode(chunk.m, chunk.v, chunk.scales or (), self.level)
        return m.to(dtype), v.to(dtype)

    def load_weights(self, chunk: Chunk, dtype: torch.dtype) -> Tensor:
        return chunk.p.to(dtype) if chunk.low is None else join_low(chunk.p, chunk.low).to(dtype)

    def store_moments(self, chunk: Chunk, m: Tensor, v: Tensor) -> None:
        """Moments in bfloat16 and int8 are rounded at random, others to the nearest."""
        if not self.stored.is_random:
            _copy(chunk.m, m)
            _copy(chunk.v, v)
            return
        first, second = chunk.m.view(-1), chunk.v.view(-1)
        m, v = m.float().reshape(-1), v.float().reshape(-1)
        for part in blocks(m.numel(), 4, m.device):  # of whole quanta but for the last
            words = self._random_words(chunk.first_coefficient + part.start, part.stop - part.start, m.device)
            bits = words & 0xFFFF, (words >> 16).bitwise_and_(0xFFFF)
            if self.stored.encode is None:
                first[part] = stochastic_round(m[part], bits[0], torch.bfloat16)
                second[part] = stochastic_round(v[part], bits[1], torch.bfloat16)
                continue
            first[part], second[part], *scales = self.stored.encode(m[part], v[part], bits, self.level)
            q = self.stored.block_size(self.level)
            for place, values in zip(chunk.scales or (), scales, strict=True):
                place[part.start // q : -(-part.stop // q)] = values

    def store_weights(self, chunk: Chunk, p: Tensor) -> None:
        """``p`` may be overwritten."""
        if chunk.low is not None:
            split_low_(p.float(), chunk.p, chunk.low)
        elif self.rounding == "stochastic":
            flat = p.float().reshape(-1)
            rounded = chunk.p.contiguous().view(-1)
            for part in blocks(flat.numel(), 8, p.device):
                bits = self._random_halves(chunk.first + part.start, part.stop - part.start, p.device)
                rounded[part] = stochastic_round(flat[part], bits, chunk.p.dtype)
            if not chunk.p.is_contiguous():
                chunk.p.copy_(rounded.view(chunk.p.shape))
        else:
            _copy(chunk.p, p)

    def _random_halves(self, first: int, n: int, device: torch.device) -> Tensor:
        span = None if self.spans is None else self.spans[0]
        return _drawn(random_halves, random_halves_at, span, first, n, self.step, self.key, device)

    def _random_words(self, first: int, n: int, device: torch.device) -> Tensor:
        span = None if self.spans is None else self.spans[1]
        return _drawn(random_words, random_words_at, span, first, n, self.step, self.key, device)


def _drawn(
    draw: Callable[..., Tensor],
    draw_at: Callable[..., Tensor],
    span: Span | None,
    first: int,
    n: int,
    step: int,
    key: int,
    device: torch.device,
) -> Tensor:
    """Random bits of ``n`` elements of a tensor, or shard, from ``first`` on."""
    if span is None or span.run == span.pitch:
        return draw(first + (span.first if span else 0), n, step, key, device)
    element = torch.arange(first, first + n, dtype=torch.int64, device=device)
    index = element // span.run * span.pitch + element % span.run
    if span.pitch > 2 * span.run:
        return draw_at(span.first + index, step, key)
    # Fewer calls draw what lies between runs too than one for each element.
    low, high = (i // span.run * span.pitch + i % span.run for i in (first, first + n - 1))
    return draw(span.first + low, high - low + 1, step, key, device)[index - low]


def _copy(target: Tensor, value: Tensor) -> None:
    if value is not target:  # else it was updated in place
        target.copy_(value)
