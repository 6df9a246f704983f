"""Count what processes compute and send for matrices that one orthogonalises for all, without starting any."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from gwt_kernels.distributed import matrix_plan
from gwt_kernels.distributed.matrix_plan import Layout, Runs, Unit
from gwt_kernels.optim.matrices import MatrixOptions, matrix_options
from gwt_kernels.optim.state import takes_rows
from gwt_kernels.optim.step_plan import bucket_options
from gwt_kernels.planner.mesh import Division, Mesh
from gwt_kernels.planner.plan import Plan

Axes = tuple[str, ...]
"""Axes of a mesh, in its order."""


@dataclass(frozen=True)
class MatrixWork:
    """Costs of Newton-Schulz in a step: three for each process in the order of ranks, then collectives.

    Attributes:
        flops: Floating-point operations of the process's products.
        sent_bytes: Bytes that it sends: parts to owners of matrices, and results as an owner.
        reduced_bytes: Bytes that it passes to all-reduces over replicas.
        exchanges: Number of all-to-alls, by the number of processes that take part.
        exchanged_bytes: Bytes that the busiest process sends in these.
        reductions: Number of all-reduces, by the number of processes that take part.
        added_bytes: Bytes of the busiest process in these.
    """

    flops: tuple[int, ...]
    sent_bytes: tuple[int, ...]
    reduced_bytes: tuple[int, ...]
    exchanges: Mapping[int, int]
    exchanged_bytes: Mapping[int, int]
    reductions: Mapping[int, int]
    added_bytes: Mapping[int, int]

    def as_dict(self) -> dict[str, Any]:
        """Return the numbers by process, for JSON."""
        return {key: list(getattr(self, key)) for key in ("flops", "sent_bytes", "reduced_bytes")}


class _Parameter(NamedTuple):
    """Shape of a parameter with matrices, the axes of the mesh that it is on, and its divisions."""

    shape: tuple[int, ...]
    axes: Axes
    divisions: tuple[Division, ...]

    @property
    def dividing(self) -> Axes:
        """The axes that divide the parameter."""
        dividing = [axis for axis, _ in self.divisions]
        return tuple(axis for axis in self.axes if axis in dividing)


_MOST_PROCESSES = 2**16


class _Tally:
    """Add up what the processes of a mesh do for matrices."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self.flops, self.sent, self.reduced = ([0] * mesh.size for _ in range(3))
        self.exchanges, self.reductions = Counter[int](), Counter[int]()
        self.exchanged, self.added = (list[Counter[int]](Counter() for _ in range(mesh.size)) for _ in range(2))

    def add(self, params: Sequence[_Parameter], options: MatrixOptions) -> None:
        """Count what :class:`gwt_kernels.distributed.matrices.MatrixExchange` does for parameters of a bucket."""
        peers: dict[tuple[Axes, Axes], list[_Parameter]] = {}
        for p in params:
            peers.setdefault((p.axes, p.dividing), []).append(p)
        loads: dict[Axes, Counter[int]] = {}
        for (axes, dividing), alike in peers.items():
            self._share(axes, dividing, alike, options, loads.setdefault(axes, Counter()))

    def _share(
        self, axes: Axes, dividing: Axes, params: Sequence[_Parameter], options: MatrixOptions, loads: Counter[int]
    ) -> None:
        """Count for parameters on ``axes`` that are divided along the same axes ``dividing``."""
        sizes = [getattr(self._mesh, axis) for axis in axes]
        others = [axis for axis in axes if axis not in dividing]
        order = [axes.index(axis) for axis in (*others, *dividing)]
        n_positions = math.prod(getattr(self._mesh, axis) for axis in dividing)
        places = torch.arange(math.prod(sizes), dtype=torch.int64, device="cpu").view(sizes or [1])
        ranks = tuple(map(tuple, (places.permute(order) if axes else places).reshape(-1, n_positions).tolist()))
        units = self._units(params, dividing, ranks, options)
        owners = matrix_plan.assign(units, ranks, loads)
        flops: Counter[int] = Counter()
        for unit, owner in zip(units, owners, strict=True):
            flops[owner] += unit.flops
        replicas = [getattr(self._mesh, axis) for axis in others]
        batches = matrix_plan.batches_of(units, owners, ranks, options.workspace_bytes)
        self.exchanges[n_positions] += 2 * sum(batch.travels for batch in batches)
        for n in replicas:
            self.reductions[n] += len(batches)
        sent, reduced = {}, {}
        for replica in ranks:
            for position, rank in enumerate(replica):
                sent[rank] = sum(batch.sent_bytes(replica, position) for batch in batches)
                reduced[rank] = sum(batch.reduced_bytes(position) for batch in batches)
        for everywhere, rank in self._ranks(axes):
            self.flops[everywhere] += flops[rank]
            self.sent[everywhere] += sent[rank]
            self.reduced[everywhere] += reduced[rank] * len(replicas)
            self.exchanged[everywhere][n_positions] += sent[rank]
            self.added[everywhere].update(dict.fromkeys(replicas, 0))
            for n in replicas:
                self.added[everywhere][n] += reduced[rank]

    def _units(
        self,
        params: Sequence[_Parameter],
        dividing: Axes,
        ranks: tuple[tuple[int, ...], ...],
        options: MatrixOptions,
    ) -> list[Unit]:
        known: dict[_Parameter, list[Unit]] = {}
        units: list[Unit] = []
        for index, p in enumerate(params):
            if p not in known:
                held = tuple(_held(p, self._mesh, dividing))
                layout = Layout(p.shape, options.flatten, options.row_splits, held, ranks)
                known[p] = matrix_plan.units_of(0, layout, options.newton_schulz, options.workspace_bytes)
            units += [replace(unit, index=index) for unit in known[p]]
        return matrix_plan.in_order(units)

    def _ranks(self, axes: Axes) -> Iterable[tuple[int, int]]:
        """Yield every process, and its place among those that differ from it along ``axes`` alone."""
        for rank, at in enumerate(itertools.product(*map(range, self._mesh))):
            place = 0
            for axis, i in zip(self._mesh._fields, at, strict=True):
                if axis in axes:
                    place = place * getattr(self._mesh, axis) + i
            yield rank, place


def work_of(
    planned: Plan, mesh: Mesh, divisions: Mapping[str, tuple[Division, ...]], every: Mapping[str, Axes]
) -> MatrixWork | None:
    """Return the costs of the matrices of a step; None if the optimizer has no matrices.

    ``every`` has the axes of ``mesh`` that each parameter is on.
    """
    buckets: dict[Any, tuple[MatrixOptions, list[_Parameter]]] = {}
    for name, (p, state) in planned.states.items():
        group = planned.groups[name]
        options = matrix_options(group)
        if options is None:
            continue
        axes = every[name]
        shares_rows = takes_rows(group) and any(dim == p.dim() - 1 for _, dim in divisions[name])
        key = bucket_options(group), p.dtype, state["exp_avg"].dtype, bool(axes), shares_rows
        buckets.setdefault(key, (options, []))[1].append(_Parameter(tuple(p.shape), axes, divisions[name]))
    if not buckets:
        return None
    if mesh.size > _MOST_PROCESSES:
        raise ValueError(
            f"mesh {mesh} has {mesh.size} processes, of which each has matrices of its own to count: plan for "
            f"{_MOST_PROCESSES} at most, or for another rule"
        )
    tally = _Tally(mesh)
    for options, params in buckets.values():
        tally.add(params, options)
    return MatrixWork(
        tuple(tally.flops),
        tuple(tally.sent),
        tuple(tally.reduced),
        {n: calls for n, calls in tally.exchanges.items() if calls},
        {n: max(each[n] for each in tally.exchanged) for n in tally.exchanges},
        dict(tally.reductions),
        {n: max(each[n] for each in tally.added) for n in tally.reductions},
    )


def _held(p: _Parameter, mesh: Mesh, dividing: Axes) -> Iterable[tuple[Runs, ...]]:
    """Yield what each position holds: see :class:`gwt_kernels.distributed.matrix_plan.Layout`."""
    for at in itertools.product(*(range(getattr(mesh, axis)) for axis in dividing)):
        place = dict(zip(dividing, at, strict=True))
        spans = [(0, n) for n in p.shape]
        for axis, dim in p.divisions:
            first, length = spans[dim]
            each = -(-length // getattr(mesh, axis))
            start = min(each * place[axis], length)
            spans[dim] = first + start, min(each, length - start)
        yield tuple(((first, n),) if n else () for first, n in spans)
