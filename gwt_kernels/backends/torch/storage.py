"""Loads and stores of weights and moments in their storage formats."""

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
    """Views of the same rows of a parameter, its gradient and its state."""

    p: Tensor
    g: Tensor
    m: Any
    v: Any
    low: Tensor | None
    scales: tuple[Tensor, ...] | None
    """Scales of the moments' blocks of values, if these are quantized; a chunk begins with a new block."""
    first: int
    """Index of the first weight in the parameter, or shard."""
    first_coefficient: int
    """Index of the first coefficient in its moments."""
    rows: RowSums | None = None
    """Sums over its rows, if other processes hold parts of them."""

    @property
    def moments(self) -> list[Tensor]:
        """The first moment, and the second if there is one."""
        return [x for x in (self.m, self.v) if x is not None]


class Storage(NamedTuple):
    """Format and rounding of one parameter's numbers in one step."""

    level: Level
    stored: MomentFormat
    rounding: Rounding
    step: int
    key: int
    spans: tuple[Span, Span] | None = None
    """Positions of weights and coefficients among random bits' indices, for shards and padded rows."""
    notes: Notes | None = None
    """Telemetry of the step."""

    def load_moments(self, chunk: Chunk, dtype: torch.dtype) -> list[Tensor]:
        """Return the moments in ``dtype``: the stored tensors themselves if they have it."""
        return [x.to(dtype) for x in self.stored.decode(chunk.moments, chunk.scales or (), self.level)]

    def load_weights(self, chunk: Chunk, dtype: torch.dtype) -> Tensor:
        return chunk.p.to(dtype) if chunk.low is None else join_low(chunk.p, chunk.low).to(dtype)

    def store_moments(self, chunk: Chunk, moments: Sequence[Tensor]) -> None:
        """Store moments in their format: rounded stochastically, or to the nearest."""
        # Moments of rows never have a narrow dtype.
        narrow = [self.stored.is_random and x.dtype in self.stored.dtypes for x in chunk.moments]
        for place, x, is_narrow in zip(chunk.moments, moments, narrow, strict=True):
            if not is_narrow:
                _copy(place, x)
        if not any(narrow):
            return
        places = [x.view(-1) for x in compress(chunk.moments, narrow)]
        flat = [x.float().reshape(-1) for x in compress(moments, narrow)]
        n, device = flat[0].numel(), flat[0].device
        for part in blocks(n, 4, device):  # whole blocks of values, except in the last part
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
        """Store weights with their rounding; ``p`` may be overwritten."""
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
    """Return the random bits of ``n`` elements of a tensor, or shard, from ``first`` on."""
    if span is None or span.run == span.pitch:
        return draw(first + (span.first if span else 0), n, step, key, device)
    element = torch.arange(first, first + n, dtype=torch.int64, device=device)
    index = element // span.run * span.pitch + element % span.run
    if span.pitch > 2 * span.run:
        return draw_at(span.first + index, step, key)
    # To draw also for the gaps between runs takes fewer calls than one call per element.
    low, high = (i // span.run * span.pitch + i % span.run for i in (first, first + n - 1))
    return draw(span.first + low, high - low + 1, step, key, device)[index - low]


def _copy(target: Tensor, value: Tensor) -> None:
    if value is not target:  # otherwise it was updated in place
        target.copy_(value)
