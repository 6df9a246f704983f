"""Storage formats of moments: dtypes, scales, and the tensors that each format fits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gwt_kernels.core.level import Level, depth_of
from gwt_kernels.formats import int8

NEAREST = 0x8000
"""Value of 16 random bits that rounds to the nearest."""

MOMENTS = ("exp_avg", "exp_avg_sq")
"""State keys of the first and the second moment; a rule may keep only the first."""
SCALES = ("exp_avg_scale", "exp_avg_sq_scale")
"""State keys of the scales of quantized moments, one scale per block of values."""


@dataclass(frozen=True)
class MomentFormat:
    """A storage format of the first and the second moment.

    Attributes:
        name: The option ``state_dtype``.
        dtypes: dtypes of the first and the second moment.
        scales: State keys of the scales: float32, one per block of values.
        is_random: Whether values are rounded stochastically.
        smallest: Fewest coefficients of a tensor in this format; smaller ones keep float32 moments.
        deepest: Deepest level in this format; tensors at deeper ones keep float32 moments.
        codec: Module that decodes and encodes values, in PyTorch and in Triton, such as :mod:`.int8`; None if the
            values are the numbers themselves.
        c_type: Number of the first moment's dtype in ``backends/cpu/step.h``; None if the step in C lacks it.
    """

    name: str
    dtypes: tuple[torch.dtype, torch.dtype]
    scales: tuple[str, ...] = ()
    is_random: bool = False
    smallest: int = 0
    deepest: int | None = None
    codec: Any = None
    c_type: int | None = None

    def decode(self, moments: Sequence[Tensor], scales: Sequence[Tensor], level: Level) -> list[Tensor]:
        """Return the numbers of stored moments: the first, and the second if there is one."""
        if self.codec is None:
            return list(moments)
        decoders = self.codec.decode_first, self.codec.decode_second
        return [f(x, scale, level) for f, x, scale in zip(decoders, moments, scales, strict=False)]

    def encode(
        self, moments: Sequence[Tensor], bits: Sequence[Tensor] | None, level: Level
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Return stored values and scales of float32 moments, rounded by random ``bits``, or to the nearest."""
        assert self.codec is not None
        if bits is None:
            bits = [torch.full(x.shape, NEAREST, dtype=torch.int32, device=x.device) for x in moments]
        encoders = self.codec.encode_first, self.codec.encode_second
        stored = [f(x, x_bits, level) for f, x, x_bits in zip(encoders, moments, bits, strict=False)]
        return [values for values, _ in stored], [scales for _, scales in stored]

    @property
    def arithmetic(self) -> torch.dtype:
        """dtype of the decoded numbers."""
        return torch.float32 if self.scales else self.dtypes[0]

    def fits(self, shape: Sequence[int], level: Level) -> bool:
        """Return whether moments of this shape and level use this format; others stay float32."""
        return math.prod(shape) >= self.smallest and (self.deepest is None or depth_of(level) <= self.deepest)

    def block_size(self, level: Level) -> int:
        """Return the number of values that share a scale; 1 without scales."""
        return 1 if self.codec is None else int(self.codec.block_size(level))

    def scales_of(self, slots: Sequence[str]) -> tuple[str, ...]:
        """Return the state keys of these moments' scales."""
        return self.scales[: len(slots)]

    def n_scales(self, shape: Sequence[int], level: Level) -> int:
        """Return the number of scales of one moment of this shape."""
        return -(-math.prod(shape) // self.block_size(level))


def _floating(dtype: torch.dtype, **properties: Any) -> MomentFormat:
    return MomentFormat(str(dtype).removeprefix("torch."), (dtype, dtype), **properties)


FORMATS = {
    each.name: each
    for each in (
        _floating(torch.float32, c_type=0),
        _floating(torch.float64),
        _floating(torch.bfloat16, is_random=True, c_type=1),
        MomentFormat(
            "int8",
            (torch.int8, torch.uint8),
            SCALES,
            is_random=True,
            smallest=4096,
            deepest=6,
            codec=int8,
            c_type=3,
        ),
    )
}
"""Formats by the option ``state_dtype``. A new format adds an entry."""


_BY_DTYPE = {each.dtypes[0]: each for each in FORMATS.values()}


def format_of(dtype: torch.dtype) -> MomentFormat | None:
    """Return the format whose first moment has this dtype; None if there is none."""
    return _BY_DTYPE.get(dtype)


def stored_as(dtype: torch.dtype) -> MomentFormat:
    """Return the format whose first moment has this dtype, or else a new one, rounded to the nearest."""
    return format_of(dtype) or _floating(dtype)


def wide(dtype: torch.dtype) -> MomentFormat:
    """Return the default format for parameters of this dtype: float32, or float64 for float64."""
    return FORMATS[str(torch.promote_types(dtype, torch.float32)).removeprefix("torch.")]
