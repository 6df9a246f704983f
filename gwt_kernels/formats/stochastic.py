"""Stochastic rounding of float32 to 16 bits, whose expectation is the exact number."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gwt_kernels.core.kernel import statement

if TYPE_CHECKING:
    import triton.language as tl

_LARGEST_BF16 = 0x7F7F0000  # as float32 bits; larger numbers are not rounded up, so that none becomes infinite
_LARGEST = torch.finfo(torch.float32).max


def stochastic_round(x: Tensor, bits: Tensor, dtype: torch.dtype) -> Tensor:
    """Round ``x`` to bfloat16 or float16, up or down with probabilities that make the expectation ``x``.

    Args:
        x: float32 tensor.
        bits: 16 random bits for each element, int32 of ``x``'s shape.
        dtype: Result dtype. Finite numbers beyond its largest number become that number; infinity and NaN stay.
    """
    if dtype == torch.bfloat16:
        raw = _one_nan(x).view(torch.int32)
        below = raw.bitwise_and(0x7FFFFFFF).lt_(_LARGEST_BF16)
        raw.add_(below.mul_(bits)).bitwise_right_shift_(16)
        return raw.to(torch.int16).view(torch.bfloat16)
    # float16: count in units in the last place, which are constant below 2**-14. All of this is exact.
    size = x.abs()
    infinite = torch.gt(size, _LARGEST, out=torch.empty_like(size)).mul_(size)  # infinity, NaN, or 0
    size.clamp_(max=65504.0)
    exponent = size.view(torch.int32).bitwise_right_shift(23).clamp_(min=113)
    per_unit = exponent.neg_().add_(264).bitwise_left_shift_(23).view(torch.float32)
    size.mul_(per_unit)
    whole = size.floor()
    up = bits.to(torch.float32).lt_(size.sub_(whole).mul_(65536.0))
    return whole.add_(up).div_(per_unit).maximum(infinite).copysign_(x).to(torch.float16)


def _one_nan(x: Tensor) -> Tensor:
    """Return a copy with every NaN as ``0x7FC00000``, whose upper half is a NaN too."""
    return torch.nan_to_num(x, nan=math.nan, posinf=math.inf, neginf=-math.inf)


# In Triton ---------------------------------------------------------------------------------------------------


@statement
def kernel_stochastic_round(x, bits, dtype: tl.constexpr):
    """Round ``x`` (float32) stochastically to bfloat16 or float16, by 16 random ``bits``."""
    raw = x.to(tl.uint32, bitcast=True)
    if dtype == tl.bfloat16:
        noise = tl.where((raw & 0x7FFFFFFF) < 0x7F7F0000, bits, 0)
        raw = tl.where(x != x, 0x7FC00000, raw + noise)
        rounded = (raw >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        magnitude = tl.minimum(tl.abs(x), 65504.0)
        exponent = tl.maximum(magnitude.to(tl.uint32, bitcast=True) >> 23, 113)
        per_unit = ((264 - exponent) << 23).to(tl.float32, bitcast=True)
        units = magnitude * per_unit
        whole = tl.floor(units)
        up = bits.to(tl.float32) < (units - whole) * 65536.0
        rounded = tl.div_rn(whole + up.to(tl.float32), per_unit).to(tl.uint32, bitcast=True) | (raw & 0x80000000)
        finite = (raw & 0x7FFFFFFF) < 0x7F800000
        rounded = tl.where(finite, rounded, raw).to(tl.float32, bitcast=True).to(tl.float16)
    return rounded
