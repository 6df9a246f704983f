"""Moments in one byte, for the kernel oracle: made, decoded and compared with exact values, in float64."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gwt_kernels.core.hyper import quantum

DECODING = 3 * torch.finfo(torch.float32).eps  # relative: a constant and products, one of them squared


class Code(NamedTuple):
    """A code ``c`` stands for ``sign(c) * (abs(c) / largest)**power * scale`` (docs/precision.md)."""

    dtype: torch.dtype
    largest: int
    power: int
    least: int
    """Of the codes that a check starts from."""

    def values(self, codes: Tensor, scales: Tensor) -> Tensor:
        """What codes stand for, each with its own scale."""
        c = codes.double()
        return c.sign() * (c.abs() / self.largest) ** self.power * scales

    def gap(self, magnitudes: Tensor, scales: Tensor) -> Tensor:
        """How far apart the codes around each magnitude are: a value becomes one of them at random."""
        c = (self.largest * (magnitudes / scales) ** (1 / self.power)).floor().clamp(max=self.largest - 1)
        return ((c + 1) ** self.power - c**self.power) / self.largest**self.power * scales


CODES = Code(torch.int8, 127, 2, -127), Code(torch.uint8, 255, 4, 215)
"""Of ``exp_avg``, and of ``exp_avg_sq``, which as in mid-training is nowhere near zero."""


def draw(shape: tuple[int, ...], level: int, device: torch.device, generator: torch.Generator) -> list[Tensor]:
    """Codes of both moments, of any values, then their scales."""
    options = {"device": device, "generator": generator}
    codes = [torch.randint(code.least, code.largest + 1, shape, dtype=code.dtype, **options) for code in CODES]
    quanta = -(-codes[0].numel() // quantum(level))
    return [*codes, *(torch.empty(quanta, device=device).uniform_(1.0, 1.5, generator=generator) for _ in CODES)]


def spread(scales: Tensor, like: Tensor, first: int, level: int) -> Tensor:
    """The scale of each coefficient of ``like``, the first of which is coefficient ``first`` of all."""
    return scales.double()[_quanta(like, first, level)]


def largest(bands: Tensor, into: Tensor, first: int, level: int) -> None:
    """Raise the entries of ``into``, one a quantum, to the largest of its coefficients."""
    into.scatter_reduce_(0, _quanta(bands, first, level).reshape(-1), bands.reshape(-1), "amax")


def ratio(code: Code, codes: Tensor, scales: Tensor, exact: Tensor, bound: Tensor) -> Tensor:
    """The largest error of ``codes`` over what rounding to a neighbour and ``bound`` explain; NaN where one is."""
    around = code.gap(exact.abs() + bound, scales)
    return ((code.values(codes, scales) - exact).abs() / (bound + around)).max()


def _quanta(like: Tensor, first: int, level: int) -> Tensor:
    index = torch.arange(first, first + like.numel(), device=like.device)
    return (index // quantum(level)).view(like.shape)
