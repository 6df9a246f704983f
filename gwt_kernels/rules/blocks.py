"""Blocks of neighbours in PyTorch: their sums, and rows padded to whole blocks."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

__all__ = ["block_sums", "pad_to_multiple"]


def block_sums(g: Tensor, level: int) -> Tensor:
    """Sums of ``2**level`` neighbours along the last dimension, zeros beyond its end: ``[..., nb]``.

    Pairwise additions of strided halves: on a CPU several times as fast as a sum over a short last axis.
    """
    for _ in range(level):
        g = pad_to_multiple(g, 2)
        g = g[..., 0::2] + g[..., 1::2]
    return g


def pad_to_multiple(x: Tensor, width: int) -> Tensor:
    """``x`` with zeros on the right up to a whole number of blocks."""
    missing = -x.shape[-1] % width
    return F.pad(x, (0, missing)) if missing else x
