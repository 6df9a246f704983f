"""Multi-level Haar transform and its inverse in plain PyTorch."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

SQRT_HALF = math.sqrt(0.5)


def haar_dwt(x: Tensor, level: int) -> list[Tensor]:
    """See :func:`gwt_kernels.haar_dwt`; arguments are already checked."""
    if level == 0:
        return [x.clone(memory_format=torch.contiguous_format)]
    approximation = x.contiguous().to(compute_dtype(x.dtype))
    details = []
    for _ in range(level):
        padded = approximation
        if not _is_certain(approximation.shape[-1] % 2 == 0):
            padded = F.pad(approximation, (0, 1))  # the slices below drop the zero if the width is even
        even, odd = approximation[..., 0::2], padded[..., 1::2]
        details.append(((even - odd) * SQRT_HALF).to(x.dtype))
        approximation = (even + odd) * SQRT_HALF
    return [approximation.to(x.dtype), *reversed(details)]


def haar_idwt(coeffs: list[Tensor], length: int) -> Tensor:
    """See :func:`gwt_kernels.haar_idwt`; arguments are already checked."""
    if len(coeffs) == 1:
        return coeffs[0].clone(memory_format=torch.contiguous_format)
    dtype = coeffs[0].dtype
    a = coeffs[0].to(compute_dtype(dtype))
    widths = [*(c.shape[-1] for c in coeffs[2:]), length]
    for detail, width in zip(coeffs[1:], widths, strict=True):
        d = detail.to(a.dtype)
        a = _alternate((a + d) * SQRT_HALF, (a - d) * SQRT_HALF, width)
    return a.to(dtype).contiguous()


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the arithmetic for tensors of ``dtype``: at least float32."""
    return torch.promote_types(dtype, torch.float32)


def _alternate(even: Tensor, odd: Tensor, width: int) -> Tensor:
    """Return ``[even[0], odd[0], even[1], ...]``, cut to ``width`` columns.

    A graph with symbolic width gathers the columns, since a view's strides depend on whether columns are cut.
    """
    pairs = even.shape[-1]
    if _is_certain(width <= 2 * pairs):
        both = torch.stack((even, odd), dim=-1)
        return both.reshape(*even.shape[:-1], 2 * pairs).narrow(-1, 0, width)  # flatten() has no batching rule
    column = torch.arange(width, dtype=torch.int64, device=even.device)
    return torch.cat((even, odd), dim=-1).index_select(-1, column // 2 + column % 2 * pairs)


def _is_certain(condition: bool | torch.SymBool) -> bool:
    """Return whether a condition on sizes holds for all sizes of the graph that is being traced."""
    if isinstance(condition, bool) and not torch.compiler.is_compiling():
        return condition
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(condition)
