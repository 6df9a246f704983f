"""Sums over processes for factored second moments, between the stages of a step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gwt_kernels.core.factored import Matrices
from gwt_kernels.core.send import send
from gwt_kernels.distributed.reduction import ShardSums
from gwt_kernels.distributed.sharding import places_in_whole, reduced_over


class FactorPlaces(NamedTuple):
    """Indices of a bucket's sums among those of all parameters.

    Attributes:
        sent: Indices in the bucket's first vector of what processes add up; the rest is complete.
        at: Indices of the same in the vector of all.
        squares: Indices of the bucket's second vector in that of all.
    """

    sent: Tensor
    at: Tensor
    squares: Tensor


class FactorReduction:
    """Sums over rows and columns of all factored, sharded parameters on one device, in two collectives a step.

    The first has each row's sum if shards divide columns, each column's sum if they divide rows, each matrix's sum
    of row factors if they divide either, and the weights' sum of squares.

    The second has one number a parameter, the sum of the update's squares, by which the update is clipped:
    ``sum(A_ij**2 * mean(R) / (R_i * C_j))``. ``R`` and ``C`` are known only after the first. As they contain
    earlier steps, ``A*A`` of ``[[2, 0], [0, 2]]`` and of ``[[1, 1], [1, 1]]``, whose sums over rows and columns
    are the same, have different sums of the update's squares.

    Args:
        params: All parameters on one device that are sharded over several processes and whose second moment is
            factored, as :class:`gwt_kernels.distributed.reduction.ShardSums` takes them.
        shapes: Shapes of their whole moments.
    """

    def __init__(self, params: Sequence[Any], shapes: Sequence[Sequence[int]]) -> None:
        self._place = {id(p): i for i, p in enumerate(params)}
        self._parts = [_parts(p, shape) for p, shape in zip(params, shapes, strict=True)]
        lengths = [sum(whole for _, _, whole, is_sent in parts if is_sent) for parts in self._parts]
        self._firsts = [0, *accumulate(lengths)]
        self._sums, self._squares = ShardSums(params, lengths), ShardSums(params)

    def places_of(self, params: Sequence[Tensor]) -> FactorPlaces:
        """Return the indices of the sums of a bucket of ``params``."""
        sent, at, first = [], [], 0
        places = [self._place[id(p)] for p in params]
        for i in places:
            first_at = self._firsts[i]
            for local, index, whole, is_sent in self._parts[i]:
                if is_sent:
                    sent.append(torch.arange(first, first + local, dtype=torch.int64, device="cpu"))
                    at.append(first_at + index)
                    first_at += whole
                first += local
        device = self._sums.device
        squares = torch.tensor(places, dtype=torch.int64, device="cpu")
        return FactorPlaces(send(torch.cat(sent), device), send(torch.cat(at), device), send(squares, device))

    def drive(self, steps: Sequence[tuple[FactorPlaces, Iterator[Tensor]]]) -> None:
        """Take the steps of all buckets, stage by stage: see :class:`gwt_kernels.backends.runner.StagedRunner`."""
        for sums, is_first in ((self._sums, True), (self._squares, False)):
            vector = sums.zeros()
            stops = [(places, next(stages, None)) for places, stages in steps]
            for places, values in stops:
                if values is not None and is_first:
                    vector[places.at] = values[places.sent].to(vector.dtype)
                elif values is not None:
                    vector[places.squares] = values.to(vector.dtype)
            sums.start(vector)
            total = sums.finish()
            assert total is not None
            for places, values in stops:
                if values is not None and is_first:
                    values[places.sent] = total[places.at].to(values.dtype)
                elif values is not None:
                    values.copy_(total[places.squares])
        for _, stages in steps:
            next(stages, None)


def _parts(p: Any, shape: Sequence[int]) -> list[tuple[int, Tensor, int, bool]]:
    """Return for each of ``Matrices.parts`` of one parameter ``(n, index, whole, is_sent)``.

    ``n`` sums are on this process, at ``index`` among ``whole`` in all; ``is_sent``: other processes add to them.
    """
    dims = len(shape)
    shared = {placement.dim for placement in (p.placements[i] for _, i in reduced_over(p))}
    batch, rows, column = tuple(range(dims - 2)), tuple(range(dims - 1)), dims - 1
    one = torch.zeros(1, dtype=torch.int64, device="cpu")
    kept: list[tuple[int, ...]] = [rows, (*batch, column) if dims else (), batch, ()]
    is_sent = [column in shared, column - 1 in shared, bool({column, column - 1} & shared), True]
    wholes = Matrices.of(shape).parts
    parts = []
    for kept_dims, sent, whole in zip(kept, is_sent, wholes, strict=True):
        index = places_in_whole(p, [shape[d] for d in kept_dims], kept_dims).view(-1) if kept_dims else one
        parts.append((len(index), index, whole, sent))
    return parts
