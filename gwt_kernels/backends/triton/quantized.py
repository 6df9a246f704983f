"""Moments in one byte, code by code as in ``backends/torch/quantized.py``, without leaving registers."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["decode_first", "decode_second", "encode_first", "encode_second"]


@triton.jit
def _spread(scales, Q: tl.constexpr, N: tl.constexpr):
    """``[N // Q]`` to ``[N]``."""
    return tl.reshape(tl.broadcast_to(scales[:, None], (N // Q, Q)), (N,))


@triton.jit
def decode_first(codes, scales, Q: tl.constexpr, N: tl.constexpr):
    """``sign(c) * (c / 127)**2 * scale``."""
    c = codes.to(tl.float32)
    return c * tl.abs(c) * (1 / 16129) * _spread(scales, Q, N)


@triton.jit
def decode_second(codes, scales, Q: tl.constexpr, N: tl.constexpr):
    """``(c / 255)**4 * scale``."""
    c = codes.to(tl.float32)
    root = c * c * (1 / 65025)
    return root * root * _spread(scales, Q, N)


@triton.jit
def _fractions(magnitudes, Q: tl.constexpr, N: tl.constexpr):
    """The largest of each quantum ``[N // Q]``, and each magnitude over its quantum's ``[N]``."""
    scales = tl.max(tl.reshape(magnitudes, (N // Q, Q)), axis=1)
    spread = _spread(scales, Q, N)
    return scales, tl.where(spread > 0, tl.div_rn(magnitudes, spread), 0.0)


@triton.jit
def first_code(fractions, bits):
    """The size of a code of ``m``: 127 at the most, whatever the fraction."""
    z = (fractions * (16129.0 * 65536.0)).to(tl.int32)
    # Half way between integers no root is near an integer, so the fast one has the floor of the exact one.
    c = tl.sqrt((z >> 16).to(tl.float32) + 0.5).to(tl.int32)
    up = bits.to(tl.int32) * (2 * c + 1) < z - (c * c << 16)
    return tl.minimum(c + up.to(tl.int32), 127)


@triton.jit
def encode_first(m, bits, Q: tl.constexpr, N: tl.constexpr):
    """int8 codes ``[N]`` and scales ``[N // Q]``, rounded by 16 random ``bits`` for each."""
    scales, fractions = _fractions(tl.abs(m), Q, N)
    c = first_code(fractions, bits)
    return tl.where(m < 0, -c, c).to(tl.int8), scales


@triton.jit
def encode_second(v, bits, Q: tl.constexpr, N: tl.constexpr):
    """uint8 codes ``[N]`` and scales ``[N // Q]``, rounded by 16 random ``bits`` for each."""
    scales, fractions = _fractions(v, Q, N)
    z = fractions * 4228250625.0
    c = (tl.sqrt(tl.sqrt(z)) * (1 + 2**-20)).to(tl.uint32)  # fast roots, raised by more than they are off by
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
