"""Heads, the rows that share a second moment. A torn head is one of which several shards hold parts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch

from gwt_kernels.core.dtensor import local_of
from gwt_kernels.distributed.sharding import indices_of, largest_blocks, sharded_dims
from gwt_kernels.rules.blocks import Heads


def torn_dims(p: Any, head_rows: int | None) -> tuple[int, ...]:
    """Return the dimensions along which shards of ``p`` tear heads of ``head_rows`` rows (None: of all rows).

    Along these dimensions every process keeps the second moments of all heads.
    """
    rows = p.dim() - 2
    return torn_of(sharded_dims(p), rows, lambda: largest_blocks(p, rows), head_rows)


def torn_of(sharded: Iterable[int], rows: int, block: Callable[[], int], head_rows: int | None) -> tuple[int, ...]:
    """Return :func:`torn_dims` of a tensor whose dimension ``rows`` comes before the last.

    Args:
        sharded: Dimensions that its shards divide.
        rows: Dimension of its rows.
        block: Returns the length of the largest blocks of rows that no shard splits.
        head_rows: As for :func:`torn_dims`.
    """
    if head_rows == 1:
        return ()
    if head_rows is None:
        return tuple(sorted(dim for dim in set(sharded) if dim <= rows))
    return (rows,) if rows in sharded and block() % head_rows else ()


def heads_here(p: Any, head_rows: int | None) -> Heads:
    """Return how many rows this process has of each head of ``p`` whose second moment it keeps."""
    shape, rows = local_of(p).shape, p.dim() - 2
    if head_rows is None:
        return Heads([math.prod(shape[:-1])], max(1, math.prod(p.shape[:-1])))
    owners = indices_of(p, rows, p.shape[rows]) // head_rows
    counts = torch.bincount(owners, minlength=p.shape[rows] // head_rows)
    return Heads(counts.tolist() * math.prod(shape[:-2]), head_rows)
