"""Collectives of an optimizer's step on a mesh, in their order."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gwt_kernels.core.factored import FACTORS
from gwt_kernels.formats.moments import MOMENTS
from gwt_kernels.optim.state import head_rows_of, kept_dims, row_shape, takes_rows
from gwt_kernels.planner.mesh import FIRST, Axis, Division, Mesh, divisions_of_state, shape_of_part, torn_by
from gwt_kernels.planner.plan import Plan
from gwt_kernels.planner.sharded_plan import Collective
from gwt_kernels.rules import rule_of


class Placed(NamedTuple):
    """A planned model on a mesh, with the divisions of each parameter and the axes of the mesh that it is on."""

    planned: Plan
    mesh: Mesh
    divisions: Mapping[str, tuple[Division, ...]]
    axes: Mapping[str, tuple[str, ...]]

    def size(self, axes: Collection[str]) -> int:
        """Return the number of processes along some axes."""
        return math.prod(getattr(self.mesh, axis) for axis in axes)


class _Sums(NamedTuple):
    """Number of sums that a process has for a parameter, and the dimensions along which processes add them up.

    ``dims`` is None for all dimensions that shards divide.
    """

    n: int
    dims: Collection[int] | None = None


_Of = Callable[[Placed, str, Tensor, Mapping[str, Tensor], Mapping[str, Any]], _Sums | None]


def step_collectives(placed: Placed, clip: bool) -> Iterator[Collective]:
    """Yield the collectives of a step; with ``clip`` all parameters are assumed to be on the same mesh."""
    if not any(placed.divisions.values()):
        return  # replicas compute the same decision without communication
    yield from _added_up("sums over rows", placed, _row_sums)
    if clip:
        n = placed.size({axis for axes in placed.axes.values() for axis in axes})
        yield Collective("gradient norm, non-finite", False, "all-reduce", n, 1, 2 * 8)
    yield from _added_up("sums over heads", placed, _head_sums)
    yield from _added_up("limiter norms", placed, _limiter_norm)
    yield from _added_up("sums over rows and columns", placed, _factor_sums)
    yield from _added_up("updates' squares", placed, _update_square)


def _added_up(purpose: str, placed: Placed, of: _Of) -> Iterator[Collective]:
    """Yield the all-reduces of :class:`gwt_kernels.distributed.reduction.ShardSums`."""
    planned, sums = placed.planned, dict[str, _Sums]()
    for name, (p, state) in planned.states.items():
        if placed.divisions[name] and (found := of(placed, name, p, state, planned.groups[name])) is not None:
            sums[name] = found
    width = 8 if any(planned.states[name][0].dtype == torch.float64 for name in sums) else 4

    def rounds(names: Sequence[str]) -> list[tuple[int, int]]:
        numbers: Counter[Axis] = Counter()  # in order of first use
        for name in names:
            n, dims = sums[name]
            divided = sorted(placed.divisions[name], key=lambda division: placed.axes[name].index(division[0]))
            if dims is not None:
                divided = [division for dim in dims for division in divided if division[1] == dim]
            numbers.update({axis: n for axis, _ in divided})
        return [(getattr(placed.mesh, axis), n) for axis, n in numbers.items()]

    everywhere = [name for name in sums if placed.size(placed.axes[name]) == placed.mesh.size]
    chosen = rounds(everywhere)
    if len(chosen) > 1 and all(sums[name].dims is None for name in everywhere):
        chosen = [(placed.mesh.size, sum(sums[name].n for name in everywhere))]
    for processes, n in chosen + rounds([name for name in sums if name not in everywhere]):
        yield Collective(purpose, False, "all-reduce", processes, 1, width * n)


def _row_sums(
    placed: Placed, name: str, p: Tensor, state: Mapping[str, Tensor], group: Mapping[str, Any]
) -> _Sums | None:
    divisions = placed.divisions[name]
    divided = any(dim == p.dim() - 1 for _, dim in divisions)
    if not (takes_rows(group) and (divided or torn_by(p, divisions, placed.mesh, head_rows_of(group)))):
        return None
    rows = math.prod(shape_of_part(p.shape, divisions, placed.mesh, FIRST)[:-1])
    return _Sums(rows * rule_of(group["rule"]).row_numbers(group["level"]), (p.dim() - 1,))


def _head_sums(
    placed: Placed, name: str, p: Tensor, state: Mapping[str, Tensor], group: Mapping[str, Any]
) -> _Sums | None:
    divisions = placed.divisions[name]
    torn = torn_by(p, divisions, placed.mesh, head_rows_of(group))
    kept = divisions_of_state(kept_dims(MOMENTS[1], p, group, torn), divisions)
    n = math.prod(shape_of_part(row_shape(p, head_rows_of(group)), kept, placed.mesh, FIRST))
    return _Sums(n, torn) if torn else None


def _limiter_norm(
    placed: Placed, name: str, p: Tensor, state: Mapping[str, Tensor], group: Mapping[str, Any]
) -> _Sums | None:
    return _Sums(1) if "limiter_norm" in state else None


def _update_square(
    placed: Placed, name: str, p: Tensor, state: Mapping[str, Tensor], group: Mapping[str, Any]
) -> _Sums | None:
    return _Sums(1) if FACTORS[0] in state else None


def _factor_sums(
    placed: Placed, name: str, p: Tensor, state: Mapping[str, Tensor], group: Mapping[str, Any]
) -> _Sums | None:
    """Return how many sums of a factored tensor are added up over processes before its factors are known."""
    if FACTORS[0] not in state:
        return None
    row, col = (state[key] for key in FACTORS)
    dims = {dim for _, dim in placed.divisions[name]}
    rows, columns = row.dim() in dims, row.dim() - 1 in dims
    means = math.prod(row.shape[:-1]) if rows or columns else 0
    return _Sums(rows * row.numel() + columns * col.numel() + means + 1)
