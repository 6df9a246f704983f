"""How moments are stored: their dtypes, what else the state then holds, which tensors a format fits."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gwt_kernels.core.hyper import quantum
from gwt_kernels.formats import int8

__all__ = ["FORMATS", "MOMENTS", "SCALES", "MomentFormat", "format_of", "wide"]

MOMENTS = ("exp_avg", "exp_avg_sq")
"""State entries that hold the first and the second moment."""
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
        decode: ``decode(m, v, scales, level)``: both moments as the numbers that they stand for.
        encode: ``encode(m, v, bits, level)``: both moments, and their scales, as they are stored; ``bits`` are 16
            random bits for each value of either, or None to round to the nearest.
    """

    name: str
    dtypes: tuple[torch.dtype, torch.dtype]
    scales: tuple[str, ...] = ()
    is_random: bool = False
    smallest: int = 0
    deepest: int | None = None
    decode: Callable[[Tensor, Tensor, Sequence[Tensor], int], tuple[Tensor, Tensor]] = field(
        default=lambda m, v, scales, level: (m, v)
    )
    encode: Callable[[Tensor, Tensor, tuple[Tensor, Tensor] | None, int], tuple[Tensor, ...]] | None = None

    @property
    def arithmetic(self) -> torch.dtype:
        """The dtype of the numbers that stored values stand for."""
        return torch.float32 if self.scales else self.dtypes[0]

    def fits(self, shape: Sequence[int], level: int) -> bool:
        """Whether moments of this shape, at a level, are worth storing so; others stay float32."""
        return math.prod(shape) >= self.smallest and (self.deepest is None or level <= self.deepest)

    def block_size(self, level: int) -> int:
        """Values that share a scale; 1 where there are none."""
        return quantum(level) if self.scales else 1

    def n_scales(self, shape: Sequence[int], level: int) -> int:
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
            decode=int8.decode,
            encode=int8.encode,
        ),
    )
}
"""By the option ``state_dtype``. A new format adds a line."""


def format_of(dtype: torch.dtype) -> MomentFormat | None:
    """The format whose first moment has this dtype; None where there is none."""
    return next((each for each in FORMATS.values() if each.dtypes[0] == dtype), None)


def wide(dtype: torch.dtype) -> MomentFormat:
    """The format of moments that nobody chose, of parameters of this dtype: float32, or float64 for float64."""
    return FORMATS[str(torch.promote_types(dtype, torch.float32)).removeprefix("torch.")]
