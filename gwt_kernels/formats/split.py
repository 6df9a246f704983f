"""Float32 master weights in two tensors: bfloat16 weights, and 16 error-correction bits of each."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gwt_kernels.core.kernel import statement

if TYPE_CHECKING:
    import triton.language as tl


def split_low(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the nearest bfloat16 of a float32 (ties upwards in magnitude) and its error-correction bits, int16."""
    weight, low = torch.empty_like(x, dtype=torch.bfloat16), torch.empty_like(x, dtype=torch.int16)
    split_low_(x.clone(), weight, low)
    return weight, low


def split_low_(x: Tensor, weight: Tensor, low: Tensor) -> None:
    """Store in ``weight`` and ``low`` what :func:`split_low` returns; ``x`` is overwritten."""
    raw = x.nan_to_num_(nan=math.nan, posinf=math.inf, neginf=-math.inf).view(torch.int32)
    low.copy_(raw)
    # The lower 16 bits as a signed number are negative exactly if the upper ones are rounded up.
    weight.view(torch.int16).copy_(raw.add_(0x8000).bitwise_right_shift_(16))


def join_low(weight: Tensor, low: Tensor) -> Tensor:
    """Return the float32 tensor that :func:`split_low` split."""
    return low.to(torch.int32).add_(weight.view(torch.int16).to(torch.int32), alpha=1 << 16).view(torch.float32)


# In Triton ---------------------------------------------------------------------------------------------------


@statement
def kernel_split_low(x):
    """Return a bfloat16 and error-correction bits like :func:`split_low`."""
    raw = tl.where(x != x, 0x7FC00000, x.to(tl.uint32, bitcast=True))
    high = (raw + 0x8000) >> 16
    low = (raw - (high << 16)).to(tl.int32, bitcast=True)
    return high.to(tl.uint16).to(tl.bfloat16, bitcast=True), low.to(tl.int16)


@statement
def kernel_join_low(weight, low):
    """Return the float32 that ``kernel_split_low`` split."""
    high = weight.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
    return (high + low.to(tl.int32).to(tl.uint32, bitcast=True)).to(tl.float32, bitcast=True)
