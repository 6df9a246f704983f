"""Multi-level Haar transform and its inverse in plain PyTorch."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["haar_dwt", "haar_idwt"]

SQRT_HALF = math.sqrt(0.5)


def haar_dwt(x: Tensor, level: int) -> list[Tensor]:
    """See :func:`gwt_kernels.haar_dwt`; arguments are already checked."""
    if level == 0:
        return [x.clone(memory_format=torch.contiguous_format)]
    approximation = x.contiguous().to(compute_dtype(x.dtype))
    details = []
    for _ in range(level):
        if approximation.shape[-1] % 2:
            approximation = F.pad(approximation, (0, 1))
        even, odd = approximation[..., 0::2], approximation[..., 1::2]
        details.append(((even - odd) * SQRT_HALF).to(x.dtype))
        approximation = (even + odd) * SQRT_HALF
    return [approximation.to(x.dtype), *reversed(details)]


def haar_idwt(coeffs: list[Tensor], length: int) -> Tensor:
    """See :func:`gwt_kernels.haar_idwt`; arguments are already checked."""
    if len(coeffs) == 1:
        return coeffs[0].clone(memory_format=torch.contiguous_format)
    dtype = coeffs[0].dtype
    x = coeffs[0].to(compute_dtype(dtype))
    for detail in coeffs[1:]:
        d = detail.to(x.dtype)
        a = x[..., : d.shape[-1]]
        x = torch.stack(((a + d) * SQRT_HALF, (a - d) * SQRT_HALF), dim=-1).flatten(-2)
    return x[..., :length].to(dtype).contiguous()


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the arithmetic for tensors of ``dtype``: float32 at least."""
    return torch.promote_types(dtype, torch.float32)
