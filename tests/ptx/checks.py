"""Finds races: accesses of one byte by two threads, one of them to write, that nothing orders.

A barrier orders what the threads of a program do, and an instruction that all lanes of a warp reach together orders
what these do. Nothing orders two programs. Threads that write the same are no race, since it does not show; nor is a read
of which nothing comes: where several threads hold a value, all of them read it, and one stores what becomes of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from tests.ptx.flow import outcome
from tests.ptx.types import S64, U8, WARP, Fault

if TYPE_CHECKING:
    from tests.ptx.program import Program

GLOBAL, SHARED = "global", "shared"


class Access(NamedTuple):
    """One instruction's access by several programs' threads; arrays are ``[programs, threads]``, or 1 where all are alike.

    Attributes:
        phase: How many barriers each thread has passed.
        meeting: How many instructions of its whole warp.
        values: What is written, in pieces of one size; None where it is a load.
        first: The number of the first program.
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


class _Flat(NamedTuple):
    """Accesses of single threads, one after the other."""

    start: np.ndarray
    size: np.ndarray
    program: np.ndarray
    thread: np.ndarray
    phase: np.ndarray
    meeting: np.ndarray
    access: np.ndarray
    """Its index in the log."""
    element: np.ndarray
    """Its index among the access's threads."""

    def chosen(self, which: np.ndarray) -> _Flat:
        return _Flat(*(column[which] for column in self))


Parties = Callable[[_Flat, np.ndarray], tuple[list[np.ndarray], np.ndarray]]
"""Of entries and their bytes: what groups those that nothing orders, and who each entry is of."""


def check_races(
    program: Program, log: Sequence[Access], space: str, describe: Callable[[int], str] = lambda address: ""
) -> None:
    """Raise where accesses race.

    Args:
        program: What accesses.
        log: Its accesses of a launch, or of some of its programs where memory is shared.
        space: Whether addresses are each program's own.
        describe: Says where an address lies.

    Raises:
        Fault: names both instructions, and a thread of each.
    """
    if all(access.values is None for access in log):
        return
    flat = _flatten(log, space == SHARED)
    flat = flat.chosen(_suspect(flat, np.array([access.values is not None for access in log])))
    if not len(flat.start):
        return
    if space == GLOBAL:
        _check(program, log, flat, lambda x, byte: ([byte], x.program), describe)
        flat = flat.chosen(_matters(program, log, flat))
    _check(program, log, flat, lambda x, byte: ([byte, x.program, x.phase], x.thread // WARP), describe)
    own = lambda x, byte: ([byte, x.program, x.phase, x.thread // WARP, x.meeting], x.thread)  # noqa: E731
    _check(program, log, flat, own, describe)


def _check(
    program: Program, log: Sequence[Access], flat: _Flat, parties: Parties, describe: Callable[[int], str]
) -> None:
    """Raise where two parties race, of those that nothing orders."""
    if not len(flat.start):
        return
    byte, which = _spread(flat.start, flat.size)
    flat = flat.chosen(which)
    written = np.array([access.values is not None for access in log])[flat.access]
    racing = _racing(*parties(flat, byte), written, _values(log, flat, byte))
    if racing is not None:
        acts = [_act(program, log, flat, i, bool(written[i])) for i in racing]
        address = int(byte[racing[0]])
        space, where = log[0].space, describe(address)
        address = address % _BASE if space == SHARED else address
        place = f" ({where})" if where else ""
        raise Fault(
            f"{program.name}: a race in {space} memory at {address:#x}{place}: {acts[0]}, and {acts[1]}; "
            f"nothing orders them"
        )


def _matters(program: Program, log: Sequence[Access], flat: _Flat) -> np.ndarray:
    """Which entries are stores, or loads of which something comes in the thread, or in its warp if that is told."""
    keep = np.ones(len(flat.start), bool)
    for load in {log[i].instruction for i in np.unique(flat.access) if log[i].values is None}:
        found = outcome(program, load)
        if found.escapes:
            continue
        of_load = np.isin(flat.access, [i for i, a in enumerate(log) if a.instruction == load])
        stores = [a for a in log if a.instruction in found.stores]
        storing = np.zeros((max(a.first + a.shape[0] for a in log), program.threads), bool)
        for a in stores:
            part = storing[a.first : a.first + a.shape[0]]
            part |= True if a.mask is None else a.mask
        if found.spreads:
            storing = np.repeat(storing.reshape(len(storing), -1, WARP).any(axis=2), WARP, axis=1)
        keep &= ~of_load | storing[flat.program, flat.thread]
    return keep


_BASE = 1 << 32  # apart, so that programs' shared memories are not taken for one


def _flatten(log: Sequence[Access], shared: bool) -> _Flat:
    """One entry for each thread; where all programs or threads do the same, for the first and the last of them."""
    columns: list[list[np.ndarray]] = [[] for _ in _Flat._fields]
    for number, a in enumerate(log):
        p, t = np.broadcast_shapes(a.address.shape, () if a.mask is None else a.mask.shape, *_shapes(a.values))
        programs = np.arange(p) if p > 1 else np.unique([0, a.shape[0] - 1])
        threads = np.arange(t) if t > 1 else np.unique([0, a.shape[1] - 1])
        full = (len(programs), len(threads))
        element = np.broadcast_to(programs[:, None] * a.shape[1] + threads, full)
        taken = None if a.mask is None else np.broadcast_to(a.mask, full)
        address = a.address + _BASE * (programs[:, None] + a.first) if shared else a.address
        own = (
            address,
            np.array(a.size),
            programs[:, None] + a.first,
            threads[None],
            a.phase if a.phase.size == 1 else a.phase[np.ix_(programs, threads)],
            a.meeting if a.meeting.size == 1 else a.meeting[np.ix_(programs, threads)],
            np.array(number),
            element,
        )
        for column, values in zip(columns, own, strict=True):
            values = np.broadcast_to(values, full)
            column.append((values if taken is None else values[taken]).ravel())
    return _Flat(*map(np.concatenate, columns))


def _shapes(values: list[np.ndarray] | None) -> list[tuple[int, ...]]:
    return [] if values is None else [x.shape for x in values]


def _suspect(flat: _Flat, writes: np.ndarray) -> np.ndarray:
    """Which entries are of bytes that several threads access, one of them to write.

    Accesses are aligned to their sizes, so that two either are apart or one contains the other.
    """
    order = np.argsort(flat.start, kind="stable")
    start = flat.start[order]
    end = np.maximum.accumulate(start + flat.size[order])
    first = np.flatnonzero(np.concatenate([[True], start[1:] >= end[:-1]])) if len(start) else np.zeros(0, S64)
    if not len(first):
        return first
    thread = ((flat.program << 16) + flat.thread)[order]
    several = np.minimum.reduceat(thread, first) != np.maximum.reduceat(thread, first)
    written = np.logical_or.reduceat(writes[flat.access[order]], first)
    counts = np.diff(np.append(first, len(start)))
    return order[np.repeat(several & written, counts)]


def _spread(start: np.ndarray, size: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each byte of each entry, and the entry that it is of."""
    which = np.repeat(np.arange(len(start)), size)
    first = np.repeat(np.cumsum(size) - size, size)
    return start[which] + (np.arange(len(which)) - first), which


def _values(log: Sequence[Access], flat: _Flat, byte: np.ndarray) -> np.ndarray:
    """The byte that each entry writes; 0 where it reads."""
    result = np.zeros(len(byte), S64)
    offset = byte - flat.start
    for number in np.unique(flat.access):
        a = log[number]
        if a.values is not None:
            own = np.flatnonzero(flat.access == number)
            size = a.values[0].dtype.itemsize
            pieces = [np.broadcast_to(x, a.shape).ravel()[flat.element[own]] for x in a.values]
            text = np.stack(pieces, axis=1).view(U8).reshape(len(own), size * len(pieces))
            result[own] = text[np.arange(len(own)), offset[own]]
    return result


def _racing(
    group: list[np.ndarray], who: np.ndarray, written: np.ndarray, value: np.ndarray
) -> tuple[int, int] | None:
    """Two entries that race, of a group within which nothing is ordered but what one does alone."""
    order = np.lexsort(group[::-1])
    changes = [column[order][1:] != column[order][:-1] for column in group]
    first = np.flatnonzero(np.concatenate([[True], np.logical_or.reduce(changes)]))
    own, writes, values = who[order], written[order], value[order]
    far = np.iinfo(np.int64).max
    writers = [
        np.minimum.reduceat(np.where(writes, own, far), first),
        np.maximum.reduceat(np.where(writes, own, -1), first),
    ]
    alike = np.minimum.reduceat(np.where(writes, values, far), first) == np.maximum.reduceat(
        np.where(writes, values, -1), first
    )
    several = np.minimum.reduceat(own, first) != np.maximum.reduceat(own, first)
    any_written = np.logical_or.reduceat(writes, first)
    any_read = np.logical_or.reduceat(~writes, first)
    racing = several & any_written & ((writers[0] == writers[1]) | any_read | ~alike)
    if not racing.any():
        return None
    at = np.flatnonzero(racing)[0]
    entries = order[first[at] : first[at + 1] if at + 1 < len(first) else None]
    writer = next(i for i in entries if written[i])
    other = [i for i in entries if who[i] != who[writer] and not (written[i] and value[i] == value[writer])]
    if not other:  # the others write the same as this one, and one of them reads
        reader = next(i for i in entries if not written[i])
        writer = next(i for i in entries if written[i] and who[i] != who[reader])
        other = [reader]
    return writer, other[0]


def _act(program: Program, log: Sequence[Access], flat: _Flat, i: int, written: bool) -> str:
    text = program.text(log[flat.access[i]].instruction)
    what = "written" if written else "read"
    return f"{what} by {text} in thread {flat.thread[i]} of program {flat.program[i]}"
