"""Orthogonalises matrices of which each process holds a part: gathers them, computes, and scatters the results.

Every matrix has one owner among the processes that share it, a replicated one too: that divides the work, and
replicas get the same bits. It travels in the dtype of the iteration. While batches travel, others are computed.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from gwt_kernels.core.dtensor import is_sharded, local_of
from gwt_kernels.core.laid_out import LaidOut, MatrixPiece, Places
from gwt_kernels.distributed import matrix_plan
from gwt_kernels.distributed.matrix_parts import Whole, copies_of, runs_of, starts_of, view_of
from gwt_kernels.distributed.matrix_plan import Layout, Unit
from gwt_kernels.distributed.sharding import check_shards, held_runs, reduced_over
from gwt_kernels.rules.newton_schulz import (
    WORKSPACE_BYTES,
    NewtonSchulz,
    check_workspace,
    orthogonalize_,
    views_of,
)


class MatrixParameter(NamedTuple):
    """A parameter whose matrices are orthogonalised. Every process that has a plain tensor computes it.

    Attributes:
        name: Its name in errors.
        tensor: The parameter. Only its shape and, for a DTensor, its placements matter.
        flatten: Whether it is one matrix: see :func:`gwt_kernels.rules.newton_schulz.views_of`.
        row_splits: Numbers of rows to cut its matrices into, or None: see there.
        factors: Factors on the results, one for each matrix that ``row_splits`` makes; 1 where there is none.
        has_grad: Whether this process has its gradient. A part without one counts as zeros on other processes.
    """

    name: str
    tensor: Tensor
    flatten: bool = False
    row_splits: tuple[int, ...] | None = None
    factors: tuple[float, ...] = ()
    has_grad: bool = True


_groups: WeakKeyDictionary[Any, list[Any]] = WeakKeyDictionary()
"""Process groups made here, keyed by the default process group, with which they are dropped."""

Stage = Callable[[Sequence[MatrixPiece], Sequence[Tensor]], None]


class MatrixExchange:
    """The stage between the two element-wise stages of a step: replace each matrix ``M`` by the orthogonal ``O``.

    All processes construct it from the same parameters in the same order, and take part in every :meth:`run`,
    whether they have gradients or not. Owners depend on order, shapes and placements alone.

    Args:
        params: Plain tensors and DTensors, of any meshes.
        newton_schulz: The iteration.
        workspace_bytes: Bytes for the matrices being computed and their temporaries; those that travel meanwhile
            may take as much again.

    Raises:
        TypeError, ValueError: a parameter cannot be gathered, has no matrices, or one needs more than
            ``workspace_bytes``; or an option is invalid.

    Attributes:
        owners: Ranks that orthogonalise each parameter, in the order of its units; none for plain tensors.
        loads: Work of each rank for shared matrices, as :meth:`NewtonSchulz.work` measures it.
        peak_bytes: The most bytes that this process needs at once, besides the parameters.
        pieces: This process's pieces of parameters that have a gradient here, batch after batch.
        sent_bytes: Bytes that this process sends in a step: parts to owners, and results as an owner.
        reduced_bytes: Bytes that it passes to all-reduces over replicas in a step.
    """

    def __init__(
        self,
        params: Sequence[MatrixParameter],
        newton_schulz: NewtonSchulz,
        workspace_bytes: int = WORKSPACE_BYTES,
    ) -> None:
        newton_schulz.check()
        for p in params:
            check_shards(p.tensor, p.name)
            if not p.tensor.is_floating_point():
                raise TypeError(
                    f"{p.name} has the dtype {p.tensor.dtype}: only floating-point matrices can be taken"
                )
            check_workspace(p.name, p.tensor.shape, newton_schulz, workspace_bytes, p.flatten, p.row_splits)
        self.owners: list[list[int]] = [[] for _ in params]
        self.loads: Counter[int] = Counter()
        self._batches: list[_Batch] = []
        self._order: list[int] = []
        # Each set of processes by itself, so that no choice depends on matrices that some of them do not have.
        for shares in _units(params, newton_schulz, workspace_bytes):
            loads: Counter[int] = Counter()
            batches: list[_Batch] = []
            travelling = []
            for peers, units in shares:
                owners = matrix_plan.assign(units, peers.ranks, loads)
                for unit, owner in zip(units, owners, strict=True):
                    self.owners[unit.index] += [owner] * peers.shared
                for batch in matrix_plan.batches_of(units, owners, peers.ranks, workspace_bytes):
                    batches.append(_Batch(batch, peers, params, newton_schulz, workspace_bytes))
                    travelling.append(batch.travelling * peers.shared)
            order = matrix_plan.schedule([batch.stages for batch in batches], travelling, workspace_bytes)
            self._order += [len(self._batches) + i for i in order]
            self._batches += batches
            self.loads += loads if shares[0][0].shared else Counter()
        self.pieces = [piece for batch in self._batches for piece in batch.pieces]
        self.peak_bytes = self._peak()
        self.sent_bytes = sum(batch.sent_bytes for batch in self._batches)
        self.reduced_bytes = sum(batch.reduced_bytes for batch in self._batches)

    @torch.no_grad()
    def run(self, make: Stage, use: Stage) -> None:
        """Run the stage for one step, batch after batch.

        Args:
            make: ``make(pieces, values)`` writes ``M`` into ``values``: contiguous, of the iteration's dtype.
            use: ``use(pieces, values)`` gets the same tensors, which now hold ``O``, until it returns.

        Neither gets pieces of parameters without a gradient here.
        """
        under_way: dict[int, Iterator[None]] = {}
        for i in self._order:
            if i not in under_way:
                under_way[i] = self._batches[i].steps(make, use)
            next(under_way[i], None)

    def attend(self) -> None:
        """Take part in a step of other processes when no parameter has a gradient here."""

        def nothing(pieces: Sequence[MatrixPiece], values: Sequence[Tensor]) -> None:
            raise AssertionError("a parameter has a gradient here")

        self.run(nothing, nothing)

    def _peak(self) -> int:
        done: Counter[int] = Counter()
        alive: dict[int, int] = {}
        peak = 0
        for i in self._order:
            batch = self._batches[i]
            alive[i] = batch.own_bytes
            computes = done[i] == batch.travels
            peak = max(peak, sum(alive.values()) + computes * batch.computing_bytes)
            done[i] += 1
            if done[i] == batch.stages:
                del alive[i]
        return peak


class _Peers:
    """The processes over which parameters are sharded in one way, and this process's place among them.

    Attributes:
        ranks: Ranks ``[replica][position]``.
        shared: Whether there are others than this process.
        place_of: Replica and position of each rank.
        place: Those of this process.
        group: Process group of this process's replica, in the order of ranks; None for a replica of one process.
        replicas: A process group for each dimension of the mesh with replicas.
    """

    def __init__(self, p: Any) -> None:
        self.shared = is_sharded(p) and p.device_mesh.size() > 1
        self.device = local_of(p).device
        self.ranks: tuple[tuple[int, ...], ...] = ((0,),)
        self.place, self.place_of = (0, 0), {0: (0, 0)}
        self.group, self.replicas = None, []
        if not self.shared:
            return
        import torch.distributed as dist

        mesh, rank = p.device_mesh, dist.get_rank()
        sharding = _sharding(p)
        others = [i for i in range(mesh.ndim) if i not in sharding]
        n_positions = math.prod(mesh.size(i) for i in sharding)
        self.ranks = tuple(map(tuple, mesh.mesh.permute(*others, *sharding).reshape(-1, n_positions).tolist()))
        self.place_of = {r: (i, at) for i, ranks in enumerate(self.ranks) for at, r in enumerate(ranks)}
        self.place = self.place_of[rank]
        self.replicas = [mesh.get_group(i) for i in others if mesh.size(i) > 1]
        if n_positions > 1:
            self.group = _group_of(mesh, sharding, sorted(self.ranks[self.place[0]]))


def _sharding(p: Any) -> list[int]:
    """Return the dimensions of the mesh that divide ``p``."""
    return [i for _, i in reduced_over(p)]


def _group_of(mesh: Any, sharding: Sequence[int], ranks: list[int]) -> Any:
    """Return the process group of ``ranks``, this process's replica; if there is none, these processes make it."""
    import torch.distributed as dist

    made = _groups.setdefault(dist.group.WORLD, [])
    candidates = [mesh.get_group(sharding[0])] if len(sharding) == 1 else []
    for group in [*candidates, dist.group.WORLD, *made]:
        if dist.get_process_group_ranks(group) == ranks:
            return group
    made.append(dist.new_group(ranks, use_local_synchronization=True))
    return made[-1]


def _units(
    params: Sequence[MatrixParameter], newton_schulz: NewtonSchulz, workspace_bytes: int
) -> list[list[tuple[_Peers, list[Unit]]]]:
    """Return for each set of processes the units of parameters that are sharded alike; plain tensors last."""
    peers: dict[tuple[object, ...], _Peers] = {}
    units: dict[tuple[object, ...], list[Unit]] = {}
    known: dict[tuple[object, ...], list[Unit]] = {}  # by kind of parameter; most layers are alike
    for index, p in enumerate(params):
        x: Any = p.tensor
        mesh = (x.device_mesh, *_sharding(x)) if is_sharded(x) and x.device_mesh.size() > 1 else ()
        key: tuple[object, ...] = mesh, local_of(x).device
        if key not in peers:
            peers[key], units[key] = _Peers(x), []
        splits = None if p.row_splits is None else tuple(p.row_splits)
        alike = key, tuple(x.shape), tuple(x.placements) if mesh else (), p.flatten, splits
        if alike not in known:
            layout = Layout(tuple(x.shape), p.flatten, splits, _held(x, peers[key]), peers[key].ranks)
            known[alike] = matrix_plan.units_of(0, layout, newton_schulz, workspace_bytes)
        units[key] += [replace(unit, index=index) for unit in known[alike]]
    shares: dict[tuple[int, ...], list[tuple[_Peers, list[Unit]]]] = {}
    for sharers, found in zip(peers.values(), units.values(), strict=True):
        members = tuple(sorted(itertools.chain(*sharers.ranks))) if sharers.shared else ()
        shares.setdefault(members, []).append((sharers, matrix_plan.in_order(found)))
    return sorted(shares.values(), key=lambda alike: not alike[0][0].shared)


def _held(p: Any, peers: _Peers) -> tuple[tuple[tuple[tuple[int, int], ...], ...], ...]:
    """Return what each position holds of ``p``: runs of indices per dimension."""
    if not peers.shared:
        return (tuple(((0, n),) for n in p.shape),)
    mesh, sharding = p.device_mesh, _sharding(p)
    held = []
    for at in itertools.product(*(range(mesh.size(i)) for i in sharding)):
        coordinate = [0] * mesh.ndim
        for i, place in zip(sharding, at, strict=True):
            coordinate[i] = place
        held.append(tuple(held_runs(p, coordinate)))
    return tuple(held)


class _Batch:
    """What this process does for a batch, planned once: sizes, offsets in its buffers, and its peers."""

    def __init__(
        self,
        batch: matrix_plan.Batch,
        peers: _Peers,
        params: Sequence[MatrixParameter],
        newton_schulz: NewtonSchulz,
        workspace_bytes: int,
    ) -> None:
        self._peers, self._newton_schulz = peers, newton_schulz
        self.travels = batch.travels
        self.stages = 1 + 2 * batch.travels + len(peers.replicas)
        replica, position = peers.place
        this_rank, ranks, place_of = peers.ranks[replica][position], sorted(peers.ranks[replica]), peers.place_of
        # Replicas order the parts that they hold alike: by the replica of the owner; in it by the owner's rank, but
        # last the parts whose owner is at this position. So the parts to send are contiguous.
        parts = [unit.parts[position] for unit in batch.units]
        order = sorted(
            (i for i, part in enumerate(parts) if part.numel),
            key=lambda i: (place_of[batch.owners[i]][0], place_of[batch.owners[i]][1] == position, batch.owners[i]),
        )
        starts = starts_of([parts[i].numel for i in order])
        place = dict(zip(order, starts, strict=False))
        indices = list(itertools.accumulate((p.has_grad for p in params), initial=0))
        taken = [params[batch.units[i].index].has_grad for i in order]
        self.pieces = [
            MatrixPiece(indices[batch.units[i].index], parts[i].start, parts[i].shape[0])
            for i in itertools.compress(order, taken)
        ]
        self._taken = None if all(taken) else taken
        self._places = Places([parts[i].shape for i in order], newton_schulz.dtype)
        sizes = Counter[int]()
        for i in order:
            sizes[batch.owners[i]] += parts[i].numel
        self._first = sum(n for rank, n in sizes.items() if place_of[rank][0] < replica)
        self._last = self._first + sum(sizes[rank] for rank in ranks)
        self._sent = [sizes[rank] * (rank != this_rank) for rank in ranks]
        # Parts arrive in the order of the processes that send them.
        owned = [i for i, owner in enumerate(batch.owners) if owner == this_rank]
        arriving = [(i, place_of[rank][1]) for rank in ranks if rank != this_rank for i in owned]
        arrived = [batch.units[i].parts[sender].numel for i, sender in arriving]
        arrival = dict(zip(arriving, starts_of(arrived), strict=False))
        self._arriving = [
            sum(batch.units[i].parts[place_of[rank][1]].numel for i in owned) * (rank != this_rank)
            for rank in ranks
        ]
        self._wholes: list[Whole] = []
        at = 0
        for i in owned:
            unit = batch.units[i]
            if unit.holder == position:
                self._wholes.append(Whole(unit, place[i], True, []))
                continue
            found = [(True, arrival[i, j], part) for j, part in enumerate(unit.parts) if j != position]
            found += [(False, place[i], parts[i])] if i in place else []
            self._wholes.append(Whole(unit, at, False, [x for x in found if x[2].numel]))
            at += unit.numel
        self._n_whole = at
        self._copies = copies_of(self._wholes)
        own_params = [(x, params[x.unit.index]) for x in self._wholes]
        self._cut = [(x, p) for x, p in own_params if p.row_splits is not None]
        self._runs = runs_of([(x, p.flatten) for x, p in own_params if p.row_splits is None])
        itemsize = newton_schulz.dtype.itemsize
        self.own_bytes = (self._places.numel + sum(self._arriving)) * itemsize
        in_use = sum(unit.nbytes for unit, *_ in self._wholes)
        self._temporary_bytes = min(batch.needed[this_rank], workspace_bytes) - in_use
        self.computing_bytes = self._n_whole * itemsize + self._temporary_bytes
        self.sent_bytes = batch.sent_bytes(peers.ranks[replica], position)
        self.reduced_bytes = batch.reduced_bytes(position) * len(peers.replicas)

    def steps(self, make: Stage, use: Stage) -> Iterator[None]:
        """Run the batch; yield after each start of a transfer, so that other batches go on meanwhile."""
        import torch.distributed as dist

        held = self._empty(self._places.numel)
        all_values = LaidOut(self._places, held)
        values: Sequence[Tensor] = all_values
        if self._taken is not None:
            held.zero_()
            values = list(itertools.compress(all_values, self._taken))
        if self.pieces:
            make(self.pieces, values)
        arrived = self._empty(sum(self._arriving))
        sent = held[self._first : self._first + sum(self._sent)]
        if self.travels:
            work = dist.all_to_all_single(
                arrived, sent, self._arriving, self._sent, group=self._peers.group, async_op=True
            )
            yield
            work.wait()
        self._orthogonalize(held, arrived)
        if self.travels:
            work = dist.all_to_all_single(
                sent, arrived, self._sent, self._arriving, group=self._peers.group, async_op=True
            )
            yield
            work.wait()
        if self._peers.replicas:
            held[: self._first].zero_()
            held[self._last :].zero_()
        for group in self._peers.replicas:  # one replica has the result, the others have 0
            work = dist.all_reduce(held, group=group, async_op=True)
            yield
            work.wait()
        if self.pieces:
            use(self.pieces, values)
        all_values.release()

    def _orthogonalize(self, held: Tensor, arrived: Tensor) -> None:
        """Assemble the matrices, orthogonalise them, and replace their parts by the results."""
        whole = self._empty(self._n_whole)
        matrices = [view_of(held if is_held else whole, at, shape) for is_held, at, shape in self._runs]
        multiplied: list[tuple[Tensor, float]] = []
        for (unit, at, is_held, _), p in self._cut:
            views = views_of(view_of(held if is_held else whole, at, unit.shape), p.flatten, p.row_splits)
            matrices += views
            multiplied += zip(views, p.factors, strict=False)
        inside, outside = [], []
        for n, shape, at, arrives, start, part in self._copies:
            x = view_of(whole, at, (n, *shape))
            y = view_of(arrived if arrives else held, start, (n, *part.shape))
            inside += [x[:, *to] for _, to in part.boxes]
            outside += [y[:, *of] for of, _ in part.boxes]
        if inside:
            torch._foreach_copy_(inside, outside)
        orthogonalize_(matrices, self._newton_schulz, self._temporary_bytes)
        for view, factor in multiplied:
            if factor != 1.0:
                view.mul_(factor)
        if inside:
            torch._foreach_copy_(outside, inside)

    def _empty(self, n: int) -> Tensor:
        return torch.empty(n, dtype=self._newton_schulz.dtype, device=self._peers.device)
