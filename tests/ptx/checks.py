"""Find races: unordered accesses of one byte by two threads, at least one of which writes.

A barrier orders the accesses of a program's threads, and an instruction that all lanes of a warp reach together
those of the warp. Nothing orders two programs. Threads that write equal values do not race, since the result is the
same. Nor, within a program, do loads from global memory whose value is not used: where several threads hold copies
of a value, all load it, and one stores the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from tests.ptx.flow import outcome
from tests.ptx.types import BITS, S64, U8, U64, WARP, Fault

if TYPE_CHECKING:
    from tests.ptx.program import Program

GLOBAL, SHARED = "global", "shared"


class Access(NamedTuple):
    """Memory access of one instruction by the threads of several programs.

    Arrays are ``[programs, threads]``, with size 1 for a dimension along which all values are equal.

    Attributes:
        phase: Number of barriers that each thread has passed.
        meeting: Number of warp-synchronous instructions that each thread has executed.
        values: Stored values, as elements of one size; None for a load.
        first: Index of the first program.
    """

    space: str
    address: np.ndarray
    size: int
    mask: np.ndarray | None
    phase: np.ndarray
    meeting: np.ndarray
    values: list[np.ndarray] | None
    instruction: int
    first: int
    shape: tuple[int, int]


class _Entries(NamedTuple):
    """Accesses of single threads, one entry each.

    Attributes:
        start: Address of the first byte; in shared memory an offset separates programs, and phases.
        who: Thread index plus 65,536 times the program index.
        access: Index in the log.
    """

    start: np.ndarray
    size: np.ndarray
    who: np.ndarray
    access: np.ndarray
    written: np.ndarray

    @property
    def program(self) -> np.ndarray:
        return self.who >> 16

    @property
    def thread(self) -> np.ndarray:
        return self.who & 0xFFFF

    def chosen(self, which: np.ndarray) -> _Entries:
        return _Entries(*(column[which] for column in self))

    def suspects(self, who: np.ndarray) -> _Entries:
        """Return the entries at bytes that several of ``who`` access and at least one of them writes.

        Accesses are aligned to their sizes, so two of them are disjoint or one contains the other.
        """
        order = np.argsort(self.start, kind="stable")
        start = self.start[order]
        end = np.maximum.accumulate(start + self.size[order])
        first = np.flatnonzero(np.concatenate([[len(start) > 0], start[1:] >= end[:-1]]))
        if not len(first):
            return self
        several = np.minimum.reduceat(who[order], first) != np.maximum.reduceat(who[order], first)
        several &= np.logical_or.reduceat(self.written[order], first)
        return self.chosen(order[np.repeat(several, np.diff(np.append(first, len(start))))])


def check_races(
    program: Program, log: Sequence[Access], space: str, describe: Callable[[int], str] = lambda address: ""
) -> None:
    """Raise if accesses race.

    Args:
        program: The kernel.
        log: Accesses of a whole launch or, for shared memory, of some of its programs.
        space: ``GLOBAL``, or ``SHARED``, where each program has its own addresses.
        describe: Function that returns where an address lies, for the message.

    Raises:
        Fault: two accesses race; the message names both instructions, and a thread of each.
    """
    if all(access.values is None for access in log):
        return
    entries = _entries(log)
    if space == GLOBAL:
        of_programs = entries.suspects(entries.program)
        _check(program, log, of_programs, [], of_programs.program, describe)
    entries = entries.suspects(entries.who)
    if space == GLOBAL and len(entries.start):
        entries = entries.chosen(_matters(program, log, entries))
        entries = entries.suspects(entries.who)
    if len(entries.start):
        phase, meeting = (_column(log, entries, name) for name in ("phase", "meeting"))
        warp = entries.thread // WARP
        _check(program, log, entries, [entries.program, phase], warp, describe)
        _check(program, log, entries, [entries.program, phase, warp, meeting], entries.thread, describe)


def _check(
    program: Program,
    log: Sequence[Access],
    entries: _Entries,
    group: list[np.ndarray],
    who: np.ndarray,
    describe: Callable[[int], str],
) -> None:
    """Raise if accesses of one group race, in which only those with equal ``who`` are ordered."""
    if not len(entries.start):
        return
    unit = min(8, int(entries.size.min()))  # sizes are powers of two, and no access is smaller
    count = entries.size // unit
    which = np.repeat(np.arange(len(count)), count)
    piece = np.arange(len(which)) - np.repeat(np.cumsum(count) - count, count)
    entries = entries.chosen(which)
    place, group, who = entries.start + unit * piece, [column[which] for column in group], who[which]
    racing = _racing([place, *group], who, entries.written, _values(log, entries, piece, unit))
    if racing is not None:
        acts = [_act(program, log, entries, i) for i in racing]
        address, space = int(place[racing[0]]), log[0].space
        where = describe(address)
        address = address % _BASE if space == SHARED else address
        near = f" ({where})" if where else ""
        raise Fault(
            f"{program.name}: a race in {space} memory at {address:#x}{near}: {acts[0]}, and {acts[1]}; "
            f"nothing orders them"
        )


def _matters(program: Program, log: Sequence[Access], entries: _Entries) -> np.ndarray:
    """Return a mask of stores, and of loads whose value its thread (or warp, if shuffled) may store, or escapes."""
    keep = np.ones(len(entries.start), bool)
    for load in {log[i].instruction for i in np.unique(entries.access) if log[i].values is None}:
        found = outcome(program, load)
        if found.escapes:
            continue
        of_load = np.isin(entries.access, [i for i, a in enumerate(log) if a.instruction == load])
        storing = np.zeros((max(a.first + a.shape[0] for a in log), program.threads), bool)
        for a in log:
            if a.instruction in found.stores:
                part = storing[a.first : a.first + a.shape[0]]
                part |= True if a.mask is None else a.mask
        if found.spreads:
            storing = np.repeat(storing.reshape(len(storing), -1, WARP).any(axis=2), WARP, axis=1)
        keep &= ~of_load | storing[entries.program, entries.thread]
    return keep


_BASE = 1 << 32  # an offset that separates the shared memories of programs, and phases


def _entries(log: Sequence[Access]) -> _Entries:
    """Return one entry per thread; where all programs or threads access alike, for the first and the last only."""
    starts, whos, counts = [], [], []
    phases = 1 + max(int(a.phase.max()) for a in log)
    for a in log:
        shapes = [a.address.shape] + ([] if a.mask is None else [a.mask.shape])
        p, t = np.broadcast_shapes(*shapes, *([] if a.values is None else [x.shape for x in a.values]))
        programs = np.arange(p) if p > 1 else np.unique([0, a.shape[0] - 1])
        threads = np.arange(t) if t > 1 else np.unique([0, a.shape[1] - 1])
        address = a.address
        if a.space == SHARED:
            phase = a.phase if a.phase.size == 1 else a.phase[np.ix_(programs, threads)]
            address = address + _BASE * ((programs[:, None] + a.first) * phases + phase)
        who = ((programs[:, None] + a.first) << 16) + threads
        address = np.broadcast_to(address, who.shape)
        if a.mask is not None:
            taken = np.broadcast_to(a.mask, who.shape)
            address, who = address[taken], who[taken]
        starts.append(address.ravel())
        whos.append(who.ravel())
        counts.append(who.size)
    number = np.repeat(np.arange(len(log)), counts)
    size, written = np.array([a.size for a in log]), np.array([a.values is not None for a in log])
    return _Entries(np.concatenate(starts), size[number], np.concatenate(whos), number, written[number])


def _by_access(
    log: Sequence[Access], entries: _Entries, chosen: np.ndarray
) -> Iterator[tuple[Access, np.ndarray, tuple[np.ndarray, np.ndarray]]]:
    """Yield each access of the chosen entries, the indices of its entries, and their indices in its arrays."""
    order = chosen[np.argsort(entries.access[chosen], kind="stable")]
    numbers, starts = np.unique(entries.access[order], return_index=True)
    for number, own in zip(numbers.tolist(), np.split(order, starts[1:]), strict=True):
        who = entries.who[own]
        yield log[number], own, ((who >> 16) - log[number].first, who & 0xFFFF)


def _column(log: Sequence[Access], entries: _Entries, name: str) -> np.ndarray:
    """Return a field of the log for the thread of each entry."""
    result = np.zeros(len(entries.start), S64)
    for a, own, place in _by_access(log, entries, np.arange(len(result))):
        result[own] = np.broadcast_to(getattr(a, name), a.shape)[place]
    return result


def _values(log: Sequence[Access], entries: _Entries, piece: np.ndarray, unit: int) -> np.ndarray:
    """Return the ``unit`` bytes that each entry writes in its piece, as an integer; 0 for a load."""
    result = np.zeros(len(entries.start), S64)
    for a, own, place in _by_access(log, entries, np.flatnonzero(entries.written)):
        values = np.stack([np.broadcast_to(x, a.shape)[place] for x in a.values or ()], axis=1)
        pieces = values.view(U8).reshape(len(own), a.size).view(BITS[unit])
        result[own] = pieces[np.arange(len(own)), piece[own]].astype(U64).view(S64)
    return result


def _racing(
    group: list[np.ndarray], who: np.ndarray, written: np.ndarray, value: np.ndarray
) -> tuple[int, int] | None:
    """Return two entries that race, a writer first; None if no entries race."""
    order = np.lexsort(group[::-1])
    changes = [column[order][1:] != column[order][:-1] for column in group]
    first = np.flatnonzero(np.concatenate([[True], np.logical_or.reduce(changes)]))
    own, writes, values = who[order], written[order], value[order]
    low, high = np.iinfo(S64).min, np.iinfo(S64).max

    def alike(x: np.ndarray) -> np.ndarray:
        """Return whether all writers of each group have equal values."""
        least = np.minimum.reduceat(np.where(writes, x, high), first)
        return least == np.maximum.reduceat(np.where(writes, x, low), first)

    several = np.minimum.reduceat(own, first) != np.maximum.reduceat(own, first)
    any_written = np.logical_or.reduceat(writes, first)
    any_read = np.logical_or.reduceat(~writes, first)
    racing = several & any_written & (alike(own) | any_read | ~alike(values))
    if not racing.any():
        return None
    at = np.flatnonzero(racing)[0]
    entries = order[first[at] : first[at + 1] if at + 1 < len(first) else None]
    writer = next(i for i in entries if written[i])
    other = [i for i in entries if who[i] != who[writer] and not (written[i] and value[i] == value[writer])]
    if not other:  # all others write its value, so the reader is its own thread
        reader = next(i for i in entries if not written[i])
        writer = next(i for i in entries if written[i] and who[i] != who[reader])
        other = [reader]
    return writer, other[0]


def _act(program: Program, log: Sequence[Access], entries: _Entries, i: int) -> str:
    text = program.text(log[entries.access[i]].instruction)
    what = "written" if entries.written[i] else "read"
    return f"{what} by {text} in thread {entries.thread[i]} of program {entries.program[i]}"
