"""Decide which process orthogonalises which matrices, and in which batches, from shapes and placements alone.

A *unit* is what one process orthogonalises: a parameter's matrix, or a range of the first dimension of a batch of
matrices. A mesh has *replicas* of a parameter, and each replica divides it over *positions*, one for each process.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from gwt_kernels.rules.newton_schulz import NewtonSchulz, matrix_shapes

OVERLAPPED = 3
"""Batches that are under way at once: one arrives while the next is computed and the one after it is collected."""
FEWEST_BATCHES = 4
"""Fewest batches of matrices that travel, where these are large and each batch has a unit for every process."""
SMALLEST_BATCH = 1 << 20
"""Bytes of a process's matrices that are worth a batch: fewer arrive before the host begins the next one."""

Runs = tuple[tuple[int, int], ...]
"""First index and length of each run of indices, in rising order."""


@dataclass(frozen=True)
class Layout:
    """How a parameter is shared out, the same on every process.

    Attributes:
        shape: Shape of the whole parameter.
        flatten: Whether it is one matrix: see :func:`gwt_kernels.rules.newton_schulz.views_of`.
        row_splits: Numbers of rows to cut its matrices into, or None: see there.
        held: What each position holds: runs of indices per dimension.
        ranks: Ranks ``[replica][position]``.
    """

    shape: tuple[int, ...]
    flatten: bool
    row_splits: tuple[int, ...] | None
    held: tuple[tuple[Runs, ...], ...]
    ranks: tuple[tuple[int, ...], ...]

    @property
    def is_batch(self) -> bool:
        """Whether the first dimension is one of a batch of matrices."""
        return len(self.shape) > 2 and not self.flatten


class Part(NamedTuple):
    """What a position holds of a unit: ``shape[0]`` indices of its shard's first dimension, from ``start`` on.

    Attributes:
        start: The first of these indices.
        shape: Shape of the part; all dimensions but the first are the shard's.
        boxes: Pairs of slices, of the part and of the unit, that are the same elements.
    """

    start: int
    shape: tuple[int, ...]
    boxes: tuple[tuple[tuple[slice, ...], tuple[slice, ...]], ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Unit:
    """Matrices that one process orthogonalises.

    Attributes:
        index: Index of the parameter.
        shape: Shape of the unit, with as many dimensions as the parameter.
        parts: What each position holds of it.
        work: A measure of the time that it takes.
        flops: Floating-point operations of its products.
        workspace: Bytes of temporaries for all its matrices at once, and of copies if ``row_splits`` cuts them.
        itemsize: Bytes of an element.
    """

    index: int
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    work: int
    flops: int
    workspace: int
    itemsize: int

    @cached_property
    def nbytes(self) -> int:
        return self.numel * self.itemsize

    @cached_property
    def held(self) -> int:
        """Bytes of the largest part."""
        return max(part.numel for part in self.parts) * self.itemsize

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @cached_property
    def holder(self) -> int | None:
        """The position that holds all of it, or None."""
        return next((i for i, part in enumerate(self.parts) if part.numel == self.numel), None)


def units_of(index: int, layout: Layout, newton_schulz: NewtonSchulz, workspace_bytes: int) -> list[Unit]:
    """Return the units of a parameter; none if it has no elements.

    A batch is cut where shards of its first dimension end, and further, so that there is a unit for every process
    and each fits into ``workspace_bytes`` with its temporaries, if possible.
    """
    if not math.prod(layout.shape):
        return []
    return [
        _unit(index, layout, first, stop, newton_schulz)
        for first, stop in _cuts(layout, newton_schulz, workspace_bytes)
    ]


def _cuts(layout: Layout, newton_schulz: NewtonSchulz, workspace_bytes: int) -> Iterator[tuple[int, int]]:
    if not layout.is_batch:
        yield 0, layout.shape[0]
        return
    owners = len(layout.ranks) * len(layout.ranks[0])
    runs = sorted({run for dims in layout.held for run in dims[0]})
    one = _unit(0, layout, 0, 1, newton_schulz)
    fits = max(1, workspace_bytes // (one.nbytes + one.workspace))
    for first, length in runs:
        each = min(fits, -(-length // -(-owners // len(runs))))
        yield from ((i, min(i + each, first + length)) for i in range(first, first + length, each))


def _unit(index: int, layout: Layout, first: int, stop: int, newton_schulz: NewtonSchulz) -> Unit:
    shape = (stop - first, *layout.shape[1:])
    matrices = matrix_shapes(shape, layout.flatten, layout.row_splits)
    numbers = [(math.prod(s[:-2]), s[-2], s[-1]) for s in matrices]
    return Unit(
        index,
        shape,
        tuple(_part(dims, first, stop) for dims in layout.held),
        sum(n * newton_schulz.work(r, c) for n, r, c in numbers),
        sum(n * newton_schulz.flops(r, c) for n, r, c in numbers),
        sum(n * newton_schulz.temporary_bytes(r, c, copied=len(numbers) > 1) for n, r, c in numbers),
        newton_schulz.dtype.itemsize,
    )


def _part(held: Sequence[Runs], first: int, stop: int) -> Part:
    """Return the held part of the indices ``first`` to ``stop - 1`` of the first dimension."""
    clipped = [(max(i, first), min(i + n, stop)) for i, n in held[0]]
    rows = tuple((i - first, end - i) for i, end in clipped if i < end)
    start = sum(min(n, max(0, first - i)) for i, n in held[0])
    dims = (rows, *held[1:])
    boxes = [tuple(zip(*box, strict=True)) for box in itertools.product(*map(_placed, dims))]
    return Part(
        start, tuple(sum(n for _, n in dim) for dim in dims), tuple((held_box, whole) for held_box, whole in boxes)
    )


def _placed(runs: Runs) -> Iterator[tuple[slice, slice]]:
    """Yield the position of each run among the held indices, and among all."""
    start = 0
    for first, length in runs:
        yield slice(start, start + length), slice(first, first + length)
        start += length


def assign(units: Sequence[Unit], ranks: Sequence[Sequence[int]], loads: Counter[int]) -> list[int]:
    """Return the owner rank of each of ``units``, which come in the order of :func:`in_order`.

    A unit that one position holds goes to the process with the least work there, in any replica, unless that is
    more than a fair share; all others, the most work first, to the process with the least work.

    Args:
        units: Units of one mesh.
        ranks: Ranks ``[replica][position]``.
        loads: The work of each process so far, which this adds to.
    """
    everyone = [rank for replica in ranks for rank in replica]
    work = sum(unit.work for unit in units) + sum(loads[rank] for rank in everyone)
    share = max([-(-work // len(everyone)), *(unit.work for unit in units)])
    owners: dict[int, int] = {}
    for i, unit in enumerate(units):
        position = unit.holder
        if position is not None and len(ranks[0]) > 1:
            least = min((replica[position] for replica in ranks), key=lambda rank: loads[rank])
            if loads[least] + unit.work <= share:
                owners[i] = least
                loads[least] += unit.work
    heap = [(loads[rank], i, rank) for i, rank in enumerate(everyone)]
    heapq.heapify(heap)
    for i, unit in enumerate(units):
        if i not in owners:
            load, place, owners[i] = heap[0]
            heapq.heapreplace(heap, (load + unit.work, place, owners[i]))
    for load, _, rank in heap:
        loads[rank] = load
    return [owners[i] for i in range(len(units))]


def in_order(units: Sequence[Unit]) -> list[Unit]:
    """Return the units with the most work first; if equal, one shape after another, in the parameters' order."""
    return sorted(units, key=lambda unit: (-unit.work, unit.shape))


@dataclass
class Batch:
    """Units that travel and are computed together.

    Attributes:
        units: Units in the order of :func:`in_order`.
        owners: The rank that orthogonalises each.
        travels: Whether a process sends a part of a unit to another process of its replica.
        held: Bytes of the shards on a process, at most.
        needed: Bytes of matrices and temporaries, by owner.
        arriving: Bytes of matrices that come from other processes, by owner.
    """

    units: list[Unit] = field(default_factory=list)
    owners: list[int] = field(default_factory=list)
    travels: bool = False
    held: int = 0
    needed: Counter[int] = field(default_factory=Counter)
    arriving: Counter[int] = field(default_factory=Counter)

    @property
    def travelling(self) -> int:
        """The most bytes that a process keeps while the batch is under way."""
        return self.held + max(self.arriving.values(), default=0)

    def sent_bytes(self, replica: Sequence[int], position: int) -> int:
        """Return the bytes that a process of ``replica`` sends: parts to owners there, and results as an owner."""
        if not self.travels:
            return 0
        total = 0
        for unit, owner in zip(self.units, self.owners, strict=True):
            held = unit.parts[position].numel
            if owner == replica[position]:
                total += (unit.numel - held) * unit.itemsize
            elif owner in replica:
                total += held * unit.itemsize
        return total

    def reduced_bytes(self, position: int) -> int:
        """Return the bytes that a process passes to one all-reduce over replicas."""
        return sum(unit.parts[position].numel * unit.itemsize for unit in self.units)

    def add(self, unit: Unit, owner: int, moves: bool) -> None:
        self.units.append(unit)
        self.owners.append(owner)
        self.travels |= moves
        self.held += unit.held
        self.needed[owner] += unit.nbytes + unit.workspace
        self.arriving[owner] += unit.nbytes * moves


def batches_of(
    units: Sequence[Unit], owners: Sequence[int], ranks: Sequence[Sequence[int]], workspace_bytes: int
) -> list[Batch]:
    """Return consecutive units in batches that fit into ``workspace_bytes`` with their temporaries.

    :data:`OVERLAPPED` of them can travel at once. If units are too large for that, a batch has one unit an owner,
    as many as can travel together.
    """
    position = {rank: i for replica in ranks for i, rank in enumerate(replica)}
    alone = len(position) == 1
    share = sum(unit.nbytes for unit in units) // len(position)
    fewest = 1 if alone else min(FEWEST_BATCHES, max(1, share // SMALLEST_BATCH))
    limit = max(len(position), -(-len(units) // fewest))
    batches = [Batch()]
    for unit, owner in zip(units, owners, strict=True):
        last = batches[-1]
        moves = unit.holder != position[owner]
        arriving = max(last.travelling - last.held, last.arriving[owner] + unit.nbytes * moves)
        at_once = OVERLAPPED if owner in last.needed else 1
        travels = alone or at_once * (last.held + unit.held + arriving) <= workspace_bytes
        fits = owner not in last.needed or last.needed[owner] + unit.nbytes + unit.workspace <= workspace_bytes
        if last.units and not (travels and fits and len(last.units) < limit):
            batches.append(Batch())
        batches[-1].add(unit, owner, moves)
    return batches if units else []


def schedule(stages: Sequence[int], travelling: Sequence[int], workspace_bytes: int) -> list[int]:
    """Return the order in which batches advance by one stage; each appears as often as it has stages.

    After a batch starts, the earlier ones advance, the newest first, so that one travels while another is computed.
    Before that, the oldest ones end until all under way take ``workspace_bytes`` at most, or it is alone.
    """
    order: list[int] = []
    left: dict[int, int] = {}

    def go_on(batch: int) -> None:
        order.append(batch)
        left[batch] -= 1
        if not left[batch]:
            del left[batch]

    for batch, count in enumerate(stages):
        while left and sum(travelling[i] for i in left) + travelling[batch] > workspace_bytes:
            go_on(min(left))
        left[batch] = count
        for i in sorted(left, reverse=True):
            go_on(i)
    while left:
        for i in sorted(left, reverse=True):
            go_on(i)
    return order
