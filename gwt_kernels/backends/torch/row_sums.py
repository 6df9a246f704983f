"""Sums over the parts of rows that a process holds, by PyTorch's operators."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gwt_kernels.backends.bucket import Bucket
from gwt_kernels.backends.torch.haar import compute_dtype
from gwt_kernels.backends.torch.step import CHUNK
from gwt_kernels.core.level import ROW
from gwt_kernels.rules.blocks import block_sums, width_of


def row_sums(bucket: Bucket, grads: Sequence[Tensor]) -> Tensor:
    """Return this process's parts of :attr:`gwt_kernels.backends.bucket.StepInputs.row_sums`."""
    dtype = compute_dtype(bucket.params[0].dtype)
    sums = torch.empty(sum(bucket.n_rows), bucket.row_numbers, dtype=dtype, device=bucket.device)
    for g, n, sums_of_tensor in zip(grads, bucket.n_rows, torch.split(sums, bucket.n_rows), strict=True):
        width = g.shape[-1] if g.dim() else 1
        at_once = max(1, CHUNK // max(width, 1))
        for part, out in zip(
            torch.split(g.reshape(n, width), at_once), torch.split(sums_of_tensor, at_once), strict=True
        ):
            x = part.to(dtype)
            if bucket.level == ROW:
                out[:, 0] = x.sum(1)
            else:
                out[:, 0] = block_sums(x, bucket.level).div_(width_of(x, bucket.level)).square().sum(1)
            if bucket.row_numbers > 1:
                out[:, 1] = x.square().sum(1)
    return sums
