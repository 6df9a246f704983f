"""How weights and moments are read from the dtypes that they are kept in, and stored there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import compress
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gwt_kernels.core.hyper import Rounding, Span
from gwt_kernels.core.level import Level
from gwt_kernels.core.notes import Notes
from gwt_kernels.core.philox import blocks, random_halves, random_halves_at, random_words, random_words_at
from gwt_kernels.formats.moments import MomentFormat
from gwt_kernels.formats.split import join_low, split_low_
from gwt_kernels.formats.stochastic import stochastic_round
from gwt_kernels.rules.blocks import RowSums


class Chunk(NamedTuple):
    """Views of the same rows of a parameter and what belongs to it."""

    p: Tensor
    g: Tensor
    m: Any
    v: Any
    low: Tensor | None
    scales: tuple[Tensor, ...] | None
    """Of the moments' blocks of values, where these are quantized; a chunk begins with a whole block."""
    first: int
    """Index of the first weight in the whole parameter."""
    first_coefficient: int
    """Index of the first coefficient in the whole of the moments."""
    rows: RowSums | None = None
    """Sums over its rows, of which other processes hold parts."""

    @property
    def moments(self) -> list[Tensor]:
        """The first moment, and the second if there is one."""
        return [x for x in (self.m, self.v) if x is not None]


class Storage(NamedTuple):
    """How one parameter's numbers are stored in one step."""

    level: Level
    stored: MomentFormat
    rounding: Rounding
    step: int
    key: int
    spans: tuple[Span, Span] | None = None
    """Where weights and coefficients lie in the whole tensor, if these are a shard's."""
    notes: Notes | None = None
    """What is told about the step."""

    def load_moments(self, chunk: Chunk, dtype: torch.dtype) -> list[Tensor]:
        """The moments that there are, in ``dtype``: views where that is what they are kept in."""
        return [x.to(dtype) for x in self.stored.decode(chunk.moments, chunk.scales or (), self.level)]

    def load_weights(self, chunk: Chunk, dtype: torch.dtype) -> Tensor:
        return chunk.p.to(dtype) if chunk.low is None else join_low(chunk.p, chunk.low).to(dtype)

    def store_moments(self, chunk: Chunk, moments: Sequence[Tensor]) -> None:
        """Store moments as their format says: rounded at random, or to the nearest."""
        # What a rule keeps of rows alone is never narrow.
        narrow = [self.stored.is_random and x.dtype in self.stored.dtypes for x in chunk.moments]
        for place, x, is_narrow in zip(chunk.moments, moments, narrow, strict=True):
            if not is_narrow:
                _copy(place, x)
        if not any(narrow):
            return
        places = [x.view(-1) for x in compress(chunk.moments, narrow)]
        flat = [x.float().reshape(-1) for x in compress(moments, narrow)]
        n, device = flat[0].numel(), flat[0].device
        for part in blocks(n, 4, device):  # of whole blocks of values but for the last
            words = self._random_words(chunk.first_coefficient + part.start, part.stop - part.start, device)
            bits = words & 0xFFFF, (words >> 16).bitwise_and_(0xFFFF)
            floats = [x[part] for x in flat]
            if self.stored.codec is None:
                for place, x, draws in zip(places, floats, bits, strict=False):
                    place[part] = stochastic_round(x, draws, place.dtype)
                continue
            values, scales = self.stored.encode(floats, bits, self.level)
            q = self.stored.block_size(self.level)
            for place, x in zip(places, values, strict=True):
                place[part] = x
            for place, x in zip(chunk.scales or (), scales, strict=True):
                place[part.start // q : -(-part.stop // q)] = x

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
