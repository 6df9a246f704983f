"""Moments as 8-bit quantized values, with a float32 scale, the largest magnitude, per block of coefficients.

``exp_avg`` is ``sign * (c / 127)**2 * scale`` with the quantized value ``sign * c`` (int8), ``exp_avg_sq`` is
``(c / 255)**4 * scale`` with the quantized value ``c`` (uint8). The powers make quantized values dense near zero,
where a relative error of ``exp_avg_sq`` matters most; both were chosen by the measured error of the update
(docs/precision.md). Rounding is stochastic and unbiased, except that only an exact zero of ``exp_avg_sq`` becomes
zero. It is computed in integers, so all backends round alike.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from gwt_kernels.core.kernel import statement
from gwt_kernels.core.level import ROW, Level

if TYPE_CHECKING:
    import triton.language as tl

_FIRST = 127 * 127  # largest quantized value to its power
_SECOND = 255**4


def block_size(level: Level) -> int:
    """Return the number of values that share a scale; tiles of both kernel paths hold whole blocks of that size."""
    return 1 if level == ROW else max(1, min(128, 1024 >> level))


def decode_first(codes: Tensor, scales: Tensor, level: Level) -> Tensor:
    """Return float32 ``exp_avg`` from int8 quantized values and their blocks' scales."""
    c = _quanta(codes, level).to(torch.float32)
    return _like(codes, c.mul_(c.abs()).mul_(1 / _FIRST).mul_(scales.unsqueeze(1)))


def decode_second(codes: Tensor, scales: Tensor, level: Level) -> Tensor:
    """Return float32 ``exp_avg_sq`` from uint8 quantized values and their blocks' scales."""
    c = _quanta(codes, level).to(torch.float32)
    c.mul_(c).mul_(1 / 65025)  # square_ does not support functionalization
    return _like(codes, c.mul_(c).mul_(scales.unsqueeze(1)))


def encode_first(m: Tensor, bits: Tensor, level: Level) -> tuple[Tensor, Tensor]:
    """Return int8 values and scales of ``m`` (float32), rounded by 16 random ``bits`` (int32) each."""
    quanta, bits = _quanta(m, level), _quanta(bits, level)
    z, scales = _fractions(quanta.abs())
    z = z.mul_(_FIRST * 65536.0).to(torch.int32)
    c = z.bitwise_right_shift(16).to(torch.float32).sqrt_().to(torch.int32)
    # bits * (2*c + 1) < z - c**2 * 65536
    up = torch.addcmul(bits, torch.add(bits, c, alpha=0x8000), c, value=2).lt_(z)
    c.add_(up).mul_(quanta.sign().to(torch.int32))
    return _like(m, c.to(torch.int8)), scales


def encode_second(v: Tensor, bits: Tensor, level: Level) -> tuple[Tensor, Tensor]:
    """Return uint8 values and scales of ``v`` (float32, >= 0), rounded by 16 random ``bits`` (int32) each."""
    quanta, bits = _quanta(v, level), _quanta(bits, level)
    z, scales = _fractions(quanta)
    z = z.mul_(float(_SECOND))
    c = z.sqrt().sqrt_().to(torch.int32)
    z = z.to(torch.int64).to(torch.int32)  # modulo 2**32, as all below: compared differences are small
    c.sub_(_fourth(c).sub_(z).gt_(0))  # a rounded root may be 1 too large
    low = _fourth(c)
    gap = _fourth(c + 1).sub_(low)
    # bits * gap >> 16, where the product has 42 bits
    draw = gap.bitwise_and(0xFFFF).mul_(bits).bitwise_right_shift_(16).bitwise_and_(0xFFFF)
    draw.addcmul_(gap.bitwise_right_shift_(16), bits)
    c.add_(draw.lt_(z.sub_(low)))
    c = torch.maximum(c, quanta.sign().to(torch.int32))  # at least 1, except for an exact zero
    return _like(v, c.to(torch.uint8)), scales


def _quanta(x: Tensor, level: Level) -> Tensor:
    """Return a tensor as flat blocks ``[n, block size]``, padded with zeros."""
    size, flat = block_size(level), x.reshape(-1)
    missing = -flat.numel() % size
    return (F.pad(flat, (0, missing)) if missing else flat).view(-1, size)


def _like(x: Tensor, quanta: Tensor) -> Tensor:
    """Return the elements of blocks in the shape of ``x``."""
    return quanta.view(-1)[: x.numel()].view(x.shape)


def _fractions(magnitudes: Tensor) -> tuple[Tensor, Tensor]:
    """Return magnitudes ``[n, block size]`` divided by the largest of their block, and the largest, ``[n]``."""
    scales = magnitudes.amax(dim=1)
    return (magnitudes / scales.unsqueeze(1)).nan_to_num_(nan=0.0), scales


def _fourth(c: Tensor) -> Tensor:
    square = c * c
    return square.mul_(square)


# In Triton, with the results of the above ---------------------------------------------------------------------


@statement
def kernel_spread(scales, Q: tl.constexpr, N: tl.constexpr):
    """Repeat each of ``[N // Q]`` scales ``Q`` times: ``[N]``."""
    return tl.reshape(tl.broadcast_to(scales[:, None], (N // Q, Q)), (N,))


@statement
def kernel_decode_first(codes, scales, Q: tl.constexpr, N: tl.constexpr):
    """Return ``sign(c) * (c / 127)**2 * scale``."""
    c = codes.to(tl.float32)
    return c * tl.abs(c) * (1 / 16129) * kernel_spread(scales, Q, N)


@statement
def kernel_decode_second(codes, scales, Q: tl.constexpr, N: tl.constexpr):
    """Return ``(c / 255)**4 * scale``."""
    c = codes.to(tl.float32)
    root = c * c * (1 / 65025)
    return root * root * kernel_spread(scales, Q, N)


@statement
def kernel_fractions(magnitudes, Q: tl.constexpr, N: tl.constexpr):
    """Return the largest magnitude of each block ``[N // Q]``, and magnitudes divided by it ``[N]``.

    It compares bits, so that a NaN is larger than any number, as in PyTorch: a GPU's maximum of floats ignores NaN.
    """
    sizes = magnitudes.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    scales = tl.max(tl.reshape(sizes, (N // Q, Q)), axis=1).to(tl.float32, bitcast=True)
    spread = kernel_spread(scales, Q, N)
    return scales, tl.where(spread > 0, tl.div_rn(magnitudes, spread), 0.0)


@statement
def kernel_first_code(fractions, bits):
    """Return the magnitude of a quantized value of ``m``, at most 127 for any fraction."""
    z = (fractions * (16129.0 * 65536.0)).to(tl.int32)
    # With 0.5 added no root is near an integer, so the fast root has the floor of the exact one.
    c = tl.sqrt((z >> 16).to(tl.float32) + 0.5).to(tl.int32)
    bits = bits.to(tl.int32)
    up = ((c << 16) + 2 * bits) * c + bits < z  # bits * (2*c + 1) < z - c**2 * 65536
    return tl.minimum(c + up.to(tl.int32), 127)


@statement
def kernel_encode_first(m, bits, Q: tl.constexpr, N: tl.constexpr):
    """Return int8 quantized values ``[N]`` and scales ``[N // Q]``, rounded by 16 random ``bits`` each."""
    scales, fractions = kernel_fractions(tl.abs(m), Q, N)
    c = kernel_first_code(fractions, bits)
    return tl.where(m < 0, -c, c).to(tl.int8), scales


@statement
def kernel_encode_second(v, bits, Q: tl.constexpr, N: tl.constexpr):
    """Return uint8 quantized values ``[N]`` and scales ``[N // Q]``, rounded by 16 random ``bits`` each."""
    scales, fractions = kernel_fractions(v, Q, N)
    z = fractions * 4228250625.0
    c = (tl.sqrt(tl.sqrt(z)) * (1 + 2**-20)).to(tl.uint32)  # fast roots, raised by more than their error
    z = z.to(tl.int64).to(tl.uint32)
    square = c * c
    c -= (square * square > z).to(tl.uint32)
    square = c * c
    low = square * square
    square = (c + 1) * (c + 1)
    up = tl.umulhi(bits << 16, square * square - low) < z - low
    c += up.to(tl.uint32)
    c = tl.minimum(tl.maximum(c, 1), 255)
    return tl.where(v > 0, c, 0).to(tl.uint8), scales
