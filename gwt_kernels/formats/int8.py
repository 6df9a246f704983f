"""Moments in one byte: codes with a float32 scale, the largest magnitude, per quantum of coefficients.

``exp_avg`` is ``sign * (c / 127)**2 * scale`` with a code ``sign * c`` of int8, ``exp_avg_sq`` is
``(c / 255)**4 * scale`` with a code ``c`` of uint8. The powers make codes dense near zero, where a relative error
of ``exp_avg_sq`` matters most; both were chosen by the measured error of the update (docs/precision.md). A value
between two codes becomes one of them at random, so that its expectation is the value; of ``exp_avg_sq`` only an
exact zero becomes zero. The decision is made in integers, so that all backends make the same one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from gwt_kernels.core.hyper import quantum

__all__ = ["decode", "decode_first", "decode_second", "encode", "encode_first", "encode_second"]

NEAREST = 0x8000
"""Bits that round to the nearest."""

_FIRST = 127 * 127  # largest code to its power
_SECOND = 255**4


def decode(m: Tensor, v: Tensor, scales: Sequence[Tensor], level: int) -> tuple[Tensor, Tensor]:
    """Both moments in float32, from their values and the scales of their blocks."""
    return decode_first(m, scales[0], level), decode_second(v, scales[1], level)


def encode(
    m: Tensor, v: Tensor, bits: tuple[Tensor, Tensor] | None, level: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Values of both moments (float32), then their scales, rounded by random ``bits``, or to the nearest."""
    if bits is None:
        bits = (torch.full(m.shape, NEAREST, dtype=torch.int32, device=m.device),) * 2
    first, first_scale = encode_first(m, bits[0], level)
    second, second_scale = encode_second(v, bits[1], level)
    return first, second, first_scale, second_scale


def decode_first(codes: Tensor, scales: Tensor, level: int) -> Tensor:
    """float32 ``exp_avg`` from int8 codes and the scales of their quanta."""
    c = _quanta(codes, level).to(torch.float32)
    return _like(codes, c.mul_(c.abs()).mul_(1 / _FIRST).mul_(scales.unsqueeze(1)))


def decode_second(codes: Tensor, scales: Tensor, level: int) -> Tensor:
    """float32 ``exp_avg_sq`` from uint8 codes and the scales of their quanta."""
    c = _quanta(codes, level).to(torch.float32)
    c.mul_(c).mul_(1 / 65025)  # and not square_, which knows no functionalization
    return _like(codes, c.mul_(c).mul_(scales.unsqueeze(1)))


def encode_first(m: Tensor, bits: Tensor, level: int) -> tuple[Tensor, Tensor]:
    """int8 codes and scales of ``m`` (float32), rounded by 16 random ``bits`` (int32) for each."""
    quanta, bits = _quanta(m, level), _quanta(bits, level)
    z, scales = _fractions(quanta.abs())
    z = z.mul_(_FIRST * 65536.0).to(torch.int32)
    c = z.bitwise_right_shift(16).to(torch.float32).sqrt_().to(torch.int32)
    # bits * (2*c + 1) < z - c**2 * 65536
    up = torch.addcmul(bits, torch.add(bits, c, alpha=0x8000), c, value=2).lt_(z)
    c.add_(up).mul_(quanta.sign().to(torch.int32))
    return _like(m, c.to(torch.int8)), scales


def encode_second(v: Tensor, bits: Tensor, level: int) -> tuple[Tensor, Tensor]:
    """uint8 codes and scales of ``v`` (float32, at least 0), rounded by 16 random ``bits`` (int32) for each."""
    quanta, bits = _quanta(v, level), _quanta(bits, level)
    z, scales = _fractions(quanta)
    z = z.mul_(float(_SECOND))
    c = z.sqrt().sqrt_().to(torch.int32)
    z = z.to(torch.int64).to(torch.int32)  # modulo 2**32, as all below: what is compared is small
    c.sub_(_fourth(c).sub_(z).gt_(0))  # roots round
    low = _fourth(c)
    gap = _fourth(c + 1).sub_(low)
    # bits * gap >> 16, where the product has 42 bits
    draw = gap.bitwise_and(0xFFFF).mul_(bits).bitwise_right_shift_(16).bitwise_and_(0xFFFF)
    draw.addcmul_(gap.bitwise_right_shift_(16), bits)
    c.add_(draw.lt_(z.sub_(low)))
    c = torch.maximum(c, quanta.sign().to(torch.int32))  # 1 at least, but for an exact zero
    return _like(v, c.to(torch.uint8)), scales


def _quanta(x: Tensor, level: int) -> Tensor:
    """A tensor flattened and cut into quanta ``[n, quantum]``, with zeros beyond its end."""
    size, flat = quantum(level), x.reshape(-1)
    missing = -flat.numel() % size
    return (F.pad(flat, (0, missing)) if missing else flat).view(-1, size)


def _like(x: Tensor, quanta: Tensor) -> Tensor:
    """The elements of ``quanta`` in the shape of ``x``."""
    return quanta.view(-1)[: x.numel()].view(x.shape)


def _fractions(magnitudes: Tensor) -> tuple[Tensor, Tensor]:
    """Magnitudes ``[n, quantum]`` over their quantum's largest, and the largest ``[n]``."""
    scales = magnitudes.amax(dim=1)
    return (magnitudes / scales.unsqueeze(1)).nan_to_num_(nan=0.0), scales


def _fourth(c: Tensor) -> Tensor:
    square = c * c
    return square.mul_(square)
