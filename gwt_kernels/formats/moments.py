"""How moments are stored: their dtypes, what else the state then holds, which tensors a format fits."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gwt_kernels.core.hyper import quantum
from gwt_kernels.core.level import Level, depth_of
from gwt_kernels.formats import int8

__all__ = ["FORMATS", "MOMENTS", "SCALES", "MomentFormat", "format_of", "stored_as", "wide"]

NEAREST = 0x8000
"""Bits that round to the nearest."""

MOMENTS = ("exp_avg", "exp_avg_sq")
"""State entries that hold the first and the second moment, of which a rule may keep the first alone."""
SCALES = ("exp_avg_scale", "exp_avg_sq_scale")
"""State entries that hold the scales of quantized moments, one for each block of values."""


@dataclass(frozen=True)
class MomentFormat:
    """How the first and the second moment are stored.

    Attributes:
        name: The option ``state_dtype``.
        dtypes: Of the first and of the second moment.
        scales: State entries beside the moments: float32, one number for a block of values.
        is_random: Whether values are rounded stochastically.
        smallest: Coefficients below which a tensor keeps float32 moments.
        deepest: Level above which it does.
        decoders: ``decode(values, scales, level)`` of the first and of the second moment: the numbers that stored
        values
            stand for. None where they are these numbers.
        encoders: ``encode(x, bits, level)`` of either: stored values and their scales, with 16 random ``bits`` for
        each.
    """

    name: str
    dtypes: tuple[torch.dtype, torch.dtype]
    scales: tuple[str, ...] = ()
    is_random: bool = False
    smallest: int = 0
    deepest: int | None = None
    decoders: tuple[Callable[[Tensor, Tensor, Level], Tensor], ...] | None = None
    encoders: tuple[Callable[[Tensor, Tensor, Level], tuple[Tensor, Tensor]], ...] | None = None

    def decode(self, moments: Sequence[Tensor], scales: Sequence[Tensor], level: Level) -> list[Tensor]:
        """The numbers that stored moments, the first and, if there is one, the second, stand for."""
        if self.decoders is None:
            return list(moments)
        return [f(x, own, level) for f, x, own in zip(self.decoders, moments, scales, strict=False)]

    def encode(
        self, moments: Sequence[Tensor], bits: Sequence[Tensor] | None, level: Level
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Moments (float32) as they are stored, and their scales, rounded by random ``bits``, or to the nearest."""
        assert self.encoders is not None
        if bits is None:
            bits = [torch.full(x.shape, NEAREST, dtype=torch.int32, device=x.device) for x in moments]
        stored = [f(x, own, level) for f, x, own in zip(self.encoders, moments, bits, strict=False)]
        return [values for values, _ in stored], [scales for _, scales in stored]

    @property
    def arithmetic(self) -> torch.dtype:
        """The dtype of the numbers that stored values stand for."""
        return torch.float32 if self.scales else self.dtypes[0]

    def fits(self, shape: Sequence[int], level: Level) -> bool:
        """Whether moments of this shape, at a level, are worth storing so; others stay float32."""
        return math.prod(shape) >= self.smallest and (self.deepest is None or depth_of(level) <= self.deepest)

    def block_size(self, level: Level) -> int:
        """Values that share a scale; 1 where there are none."""
        return quantum(level) if self.scales else 1

    def scales_of(self, slots: Sequence[str]) -> tuple[str, ...]:
        """State entries that hold the scales of these moments."""
        return self.scales[: len(slots)]

    def n_scales(self, shape: Sequence[int], level: Level) -> int:
        """Scales of moments of this shape, each of the two."""
        return -(-math.prod(shape) // self.block_size(level))


def _floating(dtype: torch.dtype, is_random: bool = False) -> MomentFormat:
    return MomentFormat(str(dtype).removeprefix("torch."), (dtype, dtype), is_random=is_random)


FORMATS = {
    each.name: each
    for each in (
        _floating(torch.float32),
        _floating(torch.float64),
        _floating(torch.bfloat16, is_random=True),
        MomentFormat(
            "int8",
            (torch.int8, torch.uint8),
            SCALES,
            is_random=True,
            smallest=4096,
            deepest=6,
            decoders=(int8.decode_first, int8.decode_second),
            encoders=(int8.encode_first, int8.encode_second),
        ),
    )
}
"""By the option ``state_dtype``. A new format adds a line."""


_BY_DTYPE = {each.dtypes[0]: each for each in FORMATS.values()}


def format_of(dtype: torch.dtype) -> MomentFormat | None:
    """The format whose first moment has this dtype; None where there is none."""
    return _BY_DTYPE.get(dtype)


def stored_as(dtype: torch.dtype) -> MomentFormat:
    """How moments whose first one has this dtype are stored: to the nearest, where no format has it."""
    return format_of(dtype) or _floating(dtype)


def wide(dtype: torch.dtype) -> MomentFormat:
    """The format of moments that nobody chose, of parameters of this dtype: float32, or float64 for float64."""
    return FORMATS[str(torch.promote_types(dtype, torch.float32)).removeprefix("torch.")]
