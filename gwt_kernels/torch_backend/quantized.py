"""Moments in one byte: codes with a float32 scale, the largest magnitude, per quantum of coefficients.

``exp_avg`` is ``sign * (c / 127)**2 * scale`` with a code ``sign * c`` of int8, ``exp_avg_sq`` is
``(c / 255)**4 * scale`` with a code ``c`` of uint8. The powers make codes dense near zero, where a relative error
of ``exp_avg_sq`` matters most; both were chosen by the measured error of the update (docs/precision.md). A value
between two codes becomes one of them at random, so that its expectation is the value; of ``exp_avg_sq`` only an
exact zero becomes zero. The decision is made in integers, so that both backends make the same one.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from gwt_kernels.hyper import quantum

__all__ = ["decode_first", "decode_second", "encode_first", "encode_second"]

_FIRST = 127 * 127  # largest code to its power
_SECOND = 255**4


def scales_of(x: Tensor, level: int) -> Tensor:
    """The largest magnitude of each quantum of a flattened tensor."""
    size = quantum(level)
    flat = x.reshape(-1).abs()
    return F.pad(flat, (0, -flat.numel() % size)).view(-1, size).amax(dim=1)


def _spread(scales: Tensor, like: Tensor, level: int) -> Tensor:
    return scales.repeat_interleave(quantum(level))[: like.numel()].view(like.shape)


def decode_first(codes: Tensor, scales: Tensor, level: int) -> Tensor:
    """float32 ``exp_avg`` from int8 codes and the scales of their quanta."""
    c = codes.to(torch.float32)
    return c * c.abs() * (1 / _FIRST) * _spread(scales, codes, level)


def decode_second(codes: Tensor, scales: Tensor, level: int) -> Tensor:
    """float32 ``exp_avg_sq`` from uint8 codes and the scales of their quanta."""
    c = codes.to(torch.float32)
    root = c * c * (1 / 65025)
    return root * root * _spread(scales, codes, level)


def encode_first(m: Tensor, bits: Tensor, level: int) -> tuple[Tensor, Tensor]:
    """int8 codes and scales of ``m`` (float32), rounded by 16 random ``bits`` for each."""
    scales = scales_of(m, level)
    z = _fraction(m.abs(), _spread(scales, m, level)).mul_(_FIRST * 65536.0).to(torch.int64)
    c = (z >> 16).to(torch.float32).sqrt_().to(torch.int64)
    up = bits * (2 * c + 1) < z - (c * c << 16)
    return ((c + up) * m.sign().to(torch.int64)).to(torch.int8), scales


def encode_second(v: Tensor, bits: Tensor, level: int) -> tuple[Tensor, Tensor]:
    """uint8 codes and scales of ``v`` (float32, at least 0), rounded by 16 random ``bits`` for each."""
    scales = scales_of(v, level)
    z = _fraction(v, _spread(scales, v, level)).mul_(float(_SECOND))
    c = z.sqrt().sqrt_().to(torch.int64)
    z = z.to(torch.int64)
    c -= (c**4 > z).to(torch.int64)  # roots round
    low, high = c**4, (c + 1) ** 4
    up = bits * (high - low) >> 16 < z - low
    return torch.where(v > 0, (c + up).clamp_(1, 255), 0).to(torch.uint8), scales


def _fraction(x: Tensor, scale: Tensor) -> Tensor:
    return torch.where(scale > 0, x / scale, 0.0)
