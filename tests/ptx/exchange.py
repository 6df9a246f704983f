"""Instructions that threads execute together: barriers, shuffles, reductions of a warp, moves of matrices."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from tests.ptx.forms import ALL, Execute, Mask, Operands, forms, moved, vector
from tests.ptx.types import DTYPES, F32, PRED, S64, U32, WARP, Fault, PtxError

if TYPE_CHECKING:
    from tests.ptx.machine import Machine

LANES = np.arange(WARP)


@forms("bar.sync", "barrier.sync", "barrier.sync.aligned")
def barrier(operands: Operands, parts: list[str]) -> Execute:
    if operands.text != ("0",):
        raise PtxError("barrier 0 of all threads is expected")
    return lambda m, mask: m.barrier(mask)


def _members(operands: Operands, text: str) -> Callable[[Machine, Mask], np.ndarray]:
    """Return a function for the lanes in an instruction's member mask, equal in all threads that reach it."""
    source = operands.source(text, U32)

    def named(m: Machine, mask: Mask) -> np.ndarray:
        x = m.read(source, U32, mask)
        if x.size > 1:
            x = (m.full(x) if mask is None else m.full(x)[m.full(mask)]).reshape(1, -1)
            if (x != x[0, 0]).any():
                raise Fault("threads that name different lanes of their warps")
        return (int(x[0, 0]) >> LANES & 1).astype(bool)

    return named


@forms("bar.warp.sync")
def warp_barrier(operands: Operands, parts: list[str]) -> Execute:
    operands.count(1)
    members = _members(operands, operands.text[0])
    return lambda m, mask: m.meet(members(m, mask), mask)


@forms("shfl.sync.{bfly,idx,up,down}.b32")
def shuffle(operands: Operands, parts: list[str]) -> Execute:
    """Read another lane's value, or the lane's own if that lane is outside its segment; a predicate says which."""
    operands.count(5)
    mode = parts[2]
    text, _, predicate = operands.text[0].partition("|")
    target = operands.target(text, U32)
    inside = operands.target(predicate, PRED) if predicate else None
    value, b, c = (operands.source(each, U32) for each in operands.text[1:4])
    named = _members(operands, operands.text[4])

    def execute(m: Machine, mask: Mask) -> None:
        members = named(m, mask)
        m.meet(members, mask)
        source, valid = sources(m, members, mask)
        m.write(target, _moved(m.read(value, U32, mask), source), mask)
        if inside is not None:
            m.write(inside, np.broadcast_to(valid, (*valid.shape[:1], m.warps, WARP)).reshape(len(valid), -1), mask)

    def sources(m: Machine, members: np.ndarray, mask: Mask) -> tuple[np.ndarray, np.ndarray]:
        """Return the lane that each lane reads, itself if the source is outside its segment; and the predicate."""
        by, clamp = m.read(b, U32, mask), m.read(c, U32, mask)
        lane = LANES[None, None]
        by, clamp = (_warps(each).astype(S64) for each in (by, clamp))
        segment = (clamp >> 8) & (WARP - 1)
        by, limit = by & (WARP - 1), clamp & (WARP - 1)
        last = (lane & segment) | (limit & ~segment)
        if mode == "up":
            source, valid = lane - by, lane - by >= last
        elif mode == "down":
            source, valid = lane + by, lane + by <= last
        elif mode == "bfly":
            source, valid = lane ^ by, (lane ^ by) <= last
        else:
            source = (lane & segment) | (by & ~segment)
            valid = source <= last
        source = np.where(valid, source, lane)
        if not members.all() and not members[source[np.broadcast_to(members, source.shape)]].all():
            raise Fault("a lane that takes no part is asked for its value")
        return source, valid

    def unknown(m: Machine, mask: Mask) -> np.ndarray | None:
        given = [m.unknown[x] for x in (b, c) if x in m.unknown]
        if any((x if mask is None else x * mask).any() for x in given):  # in active threads
            return np.full((1, 1), ALL)
        if value not in m.unknown:
            return None
        return _moved(m.unknown[value], sources(m, named(m, mask), mask)[0])

    operands.unknown = unknown
    return execute


def _moved(x: np.ndarray, source: np.ndarray) -> np.ndarray:
    """Return for each lane the value of its source lane in the same warp."""
    if x.shape[1] == 1:
        return x
    warps = _warps(x)
    if source.shape[:2] == (1, 1):
        result = warps[..., source[0, 0]]
    else:
        shape = np.broadcast_shapes(warps.shape, source.shape)
        result = np.take_along_axis(*(np.broadcast_to(each, shape) for each in (warps, source)), 2)
    return result.reshape(result.shape[0], -1)


def _warps(x: np.ndarray) -> np.ndarray:
    """Reshape ``[programs, threads]`` to ``[programs, warps, lanes]``."""
    return x.reshape(x.shape[0], -1, WARP) if x.shape[1] > 1 else x[..., None]


@forms("redux.sync.{add,min,max}.{s32,u32}", "redux.sync.{and,or,xor}.b32")
def reduce(operands: Operands, parts: list[str]) -> Execute:
    """Reduce over the lanes of the member mask, for instance to a sum, and write the result to each of them."""
    operands.count(3)
    dtype = DTYPES[parts[3]]
    function = {
        "add": np.add,
        "min": np.minimum,
        "max": np.maximum,
        "and": np.bitwise_and,
        "or": np.bitwise_or,
        "xor": np.bitwise_xor,
    }[parts[2]]
    target, value = operands.target(operands.text[0], dtype), operands.source(operands.text[1], dtype)
    named = _members(operands, operands.text[2])

    def execute(m: Machine, mask: Mask) -> None:
        members = named(m, mask)
        m.meet(members, mask)
        x = m.full(m.read(value, dtype, mask))
        m.write(target, _spread(function.reduce(_warps(x)[..., members], axis=-1, dtype=dtype)), mask)

    def unknown(m: Machine, mask: Mask) -> np.ndarray | None:
        if value not in m.unknown:
            return None
        return _spread(_warps(m.full(m.unknown[value]))[..., named(m, mask)].any(axis=-1)) * ALL

    operands.unknown = unknown
    return execute


def _spread(of_warps: np.ndarray) -> np.ndarray:
    """Repeat ``[programs, warps]`` for each lane, to ``[programs, threads]``."""
    return np.repeat(of_warps, WARP, axis=1)


@forms("redux.sync.{min,max}{,.abs}{,.NaN}.f32")
def reduce_floats(operands: Operands, parts: list[str]) -> Execute:
    """Reduce to the minimum or maximum, with ``.abs`` of absolute values; NaN are ignored without ``.NaN``."""
    operands.count(3)
    strict = np.minimum if parts[2] == "min" else np.maximum
    function = strict if "NaN" in parts else (np.fmin if parts[2] == "min" else np.fmax)
    target, value = operands.target(operands.text[0], F32), operands.source(operands.text[1], F32)
    named = _members(operands, operands.text[2])

    def execute(m: Machine, mask: Mask) -> None:
        members = named(m, mask)
        m.meet(members, mask)
        x = m.full(m.read(value, F32, mask))
        x = np.abs(x) if "abs" in parts else x
        m.write(target, _spread(function.reduce(_warps(x)[..., members], axis=-1)), mask)

    def unknown(m: Machine, mask: Mask) -> np.ndarray | None:
        if value not in m.unknown:
            return None
        return _spread(_warps(m.full(m.unknown[value]))[..., named(m, mask)].any(axis=-1)) * ALL

    operands.unknown = unknown
    return execute


def _matrices(operands: Operands, parts: list[str], address: str, registers: str) -> tuple[int, int, list[str]]:
    names = vector(registers)
    if len(names) != int(parts[4][1:]):
        raise PtxError(f"{parts[4][1:]} registers are expected")
    base, offset = operands.address(address, U32)
    return base, offset, names


def _rows(m: Machine, base: int, offset: int, matrix: int, mask: Mask) -> np.ndarray:
    """Return the addresses of threads' 4 bytes of 8 x 8 matrix i: row ``lane / 4``, given by lane ``8 i + row``."""
    m.meet(np.ones(WARP, bool), mask)
    given = moved(_warps(m.full(m.read(base, U32, mask))), offset)
    rows = given[..., 8 * matrix + LANES // 4]
    if (rows % 16).any():
        raise Fault(f"a row of a matrix at {int(rows[rows % 16 != 0][0])}, which is no multiple of 16 bytes")
    return (rows + 4 * (LANES % 4)).reshape(given.shape[0], -1)


def _transposed(x: np.ndarray) -> np.ndarray:
    """Transpose an 8 x 8 matrix of 16-bit elements, of which each lane of a warp holds two."""
    halves = np.ascontiguousarray(x).view("<u2").reshape(x.shape[0], -1, 8, 8)
    return np.ascontiguousarray(halves.swapaxes(2, 3)).reshape(x.shape[0], -1).view(U32)


@forms("ldmatrix.sync.aligned.m8n8.{x1,x2,x4}{,.trans}.shared.b16")
def load_matrix(operands: Operands, parts: list[str]) -> Execute:
    operands.count(2)
    base, offset, names = _matrices(operands, parts, operands.text[1], operands.text[0])
    targets = [operands.target(name, U32) for name in names]

    def execute(m: Machine, mask: Mask) -> None:
        found = [m.shared.load(m, _rows(m, base, offset, i, mask), U32, 1, mask) for i in range(len(targets))]
        for target, ((x,), unwritten) in zip(targets, found, strict=True):
            m.write(target, _transposed(x) if "trans" in parts else x, mask)
            m.forget([target], unwritten, mask)

    return execute


@forms("stmatrix.sync.aligned.m8n8.{x1,x2,x4}{,.trans}.shared.b16")
def store_matrix(operands: Operands, parts: list[str]) -> Execute:
    operands.count(2)
    base, offset, names = _matrices(operands, parts, operands.text[0], operands.text[1])
    sources = [operands.source(name, U32) for name in names]

    def execute(m: Machine, mask: Mask) -> None:
        for i, source in enumerate(sources):
            x = m.full(m.read(source, U32, mask))
            x = _transposed(x) if "trans" in parts else x
            m.shared.store(m, _rows(m, base, offset, i, mask), U32, [x], mask, m.unknown.get(source))

    return execute
