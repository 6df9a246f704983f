"""Launch the kernels of the transform."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gwt_kernels.backends.triton.compiling import UNFUSED
from gwt_kernels.backends.triton.haar import dwt_kernel, idwt_kernel
from gwt_kernels.backends.triton.layout import is_flat, rows_of, variant
from gwt_kernels.backends.triton.tables import addresses, device_guard, misalignments


def haar_dwt(x: Tensor, level: int) -> list[Tensor]:
    """See :func:`gwt_kernels.haar_dwt`; arguments are already checked."""
    if level == 0:
        return [x.clone(memory_format=torch.contiguous_format)]
    x = x.contiguous()
    widths = [-(-x.shape[-1] // 2**i) for i in (level, *range(level, 0, -1))]
    coeffs = [x.new_empty(*x.shape[:-1], width) for width in widths]
    _launch(dwt_kernel, x, coeffs)
    return coeffs


def haar_idwt(coeffs: list[Tensor], length: int) -> Tensor:
    """See :func:`gwt_kernels.haar_idwt`; arguments are already checked."""
    if len(coeffs) == 1:
        return coeffs[0].clone(memory_format=torch.contiguous_format)
    coeffs = [c.contiguous() for c in coeffs]
    x = coeffs[0].new_empty(*coeffs[0].shape[:-1], length)
    _launch(idwt_kernel, x, coeffs)
    return x


def _launch(kernel: Any, x: Tensor, coeffs: Sequence[Tensor]) -> None:
    if x.numel() == 0:
        return
    level = len(coeffs) - 1
    flat = is_flat(x, any(misalignments(addresses([x, *coeffs]))), level)
    options = variant(level, flat)
    rows = rows_of(x, 2**level)
    multiple = max(1, 8 // options.pop("W"))
    with device_guard(x.device):
        kernel[(-(-rows.n_blocks // options["NB"]),)](
            x, tuple(coeffs), rows.n_blocks, rows.width, rows.row_blocks, rows.reciprocal, LEVEL=level,
            MULTIPLE=multiple, **options, **UNFUSED,
        )  # fmt: skip
