"""Int8 moments for the kernel oracle: generated, dequantized and compared with exact values in float64."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gwt_kernels.formats.int8 import block_size

DECODING = 3 * torch.finfo(torch.float32).eps  # relative error: a constant and products, one of them squared


class Quantizer(NamedTuple):
    """A quantizer: ``c`` stands for ``sign(c) * (abs(c) / largest)**power * scale`` (docs/precision.md)."""

    dtype: torch.dtype
    largest: int
    power: int
    least: int
    """Smallest quantized value that a check starts from."""

    def dequantize(self, values: Tensor, scales: Tensor) -> Tensor:
        """Dequantize values, each with its own scale."""
        c = values.double()
        return c.sign() * (c.abs() / self.largest) ** self.power * scales

    def gap(self, magnitudes: Tensor, scales: Tensor) -> Tensor:
        """Return the distance between the quantized neighbours of each magnitude: the stochastic rounding error."""
        c = (self.largest * (magnitudes / scales) ** (1 / self.power)).floor().clamp(max=self.largest - 1)
        return ((c + 1) ** self.power - c**self.power) / self.largest**self.power * scales


QUANTIZERS = Quantizer(torch.int8, 127, 2, -127), Quantizer(torch.uint8, 255, 4, 215)
"""Quantizers of ``exp_avg`` and ``exp_avg_sq``; as in mid-training, the latter is far from zero."""


def draw(shape: tuple[int, ...], level: int, device: torch.device, generator: torch.Generator) -> list[Tensor]:
    """Draw random quantized values of both moments, then their scales."""
    options = {"device": device, "generator": generator}
    values = [torch.randint(q.least, q.largest + 1, shape, dtype=q.dtype, **options) for q in QUANTIZERS]
    blocks = -(-values[0].numel() // block_size(level))
    scales = [torch.empty(blocks, device=device).uniform_(1.0, 1.5, generator=generator) for _ in QUANTIZERS]
    return values + scales


def spread(scales: Tensor, like: Tensor, first: int, level: int) -> Tensor:
    """Expand the scales to one per coefficient of ``like``, which begins at coefficient ``first`` of the tensor."""
    return scales.double()[_blocks(like, first, level)]


def largest(bands: Tensor, into: Tensor, first: int, level: int) -> None:
    """Raise the entries of ``into``, one per block, to the largest magnitude of the block's coefficients."""
    into.scatter_reduce_(0, _blocks(bands, first, level).reshape(-1), bands.reshape(-1), "amax")


def ratio(quantizer: Quantizer, values: Tensor, scales: Tensor, exact: Tensor, bound: Tensor) -> Tensor:
    """Return the largest error of ``values`` over one rounding step plus ``bound``; NaN if any value is NaN."""
    around = quantizer.gap(exact.abs() + bound, scales)
    return ((quantizer.dequantize(values, scales) - exact).abs() / (bound + around)).max()


def _blocks(like: Tensor, first: int, level: int) -> Tensor:
    index = torch.arange(first, first + like.numel(), device=like.device)
    return (index // block_size(level)).view(like.shape)
