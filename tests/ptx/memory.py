"""The memories that kernels access: the host's, which is global memory, and each program's shared memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from tests.ptx.checks import GLOBAL, SHARED
from tests.ptx.tensors import LiveTensors
from tests.ptx.types import BITS, S64, U8, Fault

if TYPE_CHECKING:
    from tests.ptx.forms import Mask
    from tests.ptx.machine import Machine

Loaded = tuple[list[np.ndarray], np.ndarray | None]
"""Values, and in which threads they are unwritten; None: in none."""
_PAGE = 4096  # the lowest address that a process can have
_SHIFT = {1: 0, 2: 1, 4: 2, 8: 3}
_FAR = np.iinfo(np.int64).max


def _whole(dtype: np.dtype) -> np.ndarray:
    """Return the process's address space as an array; element ``i`` lies at ``_PAGE + i * itemsize``."""

    class Everything:
        __array_interface__: dict[str, Any] = {  # noqa: RUF012
            "data": (_PAGE, False),
            "shape": ((1 << 47) // dtype.itemsize - _PAGE,),
            "typestr": dtype.str,
            "version": 3,
        }

    return np.asarray(Everything())


_SPACE = {size: _whole(dtype) for size, dtype in BITS.items()}
_NOWHERE = np.zeros(64, U8)
_NOWHERE_AT = (_NOWHERE.ctypes.data + 31) // 32 * 32  # the address that inactive threads read


def _check_alignment(what: str, address: np.ndarray, size: int, mask: Mask) -> None:
    given = address if mask is None else np.where(mask, address, 0)
    if np.bitwise_or.reduce(given, axis=None) & (size - 1):
        off = given & (size - 1) != 0
        raise Fault(
            f"{what} access of {size} bytes at {int(given[off][0]):#x}, which is no multiple of {size}", off
        )


class HostMemory:
    """The host's memory as global memory of kernels. An access outside every tensor is a fault."""

    def __init__(self, tensors: LiveTensors) -> None:
        self.tensors = tensors

    def load(self, m: Machine, address: np.ndarray, bits: np.dtype, n: int, mask: Mask) -> Loaded:
        size = bits.itemsize
        self._check(address, size * n, mask)
        m.note(GLOBAL, address, size * n, mask, None)
        if mask is not None:
            address = np.where(mask, address, _NOWHERE_AT)
        at = (address - _PAGE) >> _SHIFT[size]
        return [_SPACE[size].take(at if k == 0 else at + k) for k in range(n)], None

    def store(self, m: Machine, address: np.ndarray, bits: np.dtype, values: list[np.ndarray], mask: Mask) -> None:
        size = bits.itemsize
        self._check(address, size * len(values), mask)
        m.note(GLOBAL, address, size * len(values), mask, values)
        _scatter(_SPACE[size], (address - _PAGE) >> _SHIFT[size], values, mask)

    def _check(self, address: np.ndarray, size: int, mask: Mask) -> None:
        _check_alignment("global", address, size, mask)
        if mask is None:
            low, high = address.min(axis=1), address.max(axis=1)
        else:
            low = np.where(mask, address, _FAR).min(axis=1)
            high = np.where(mask, address, -1).max(axis=1)
            low, high = low[high >= 0], high[high >= 0]
        if not self.tensors.inside(low, high + size).all():
            self._check_each(address, size, mask)

    def _check_each(self, address: np.ndarray, size: int, mask: Mask) -> None:
        """Check accesses of threads one by one, if a program's threads do not all access one tensor."""
        outside = ~self.tensors.inside(address.ravel(), address.ravel() + size).reshape(address.shape)
        outside = outside if mask is None else outside & mask
        if outside.any():
            first = int(np.broadcast_to(address, outside.shape)[outside][0])
            nearest = self.tensors.nearest(first)
            raise Fault(f"global access of {size} bytes at {first:#x}, outside of every tensor: {nearest}", outside)


class SharedMemory:
    """The shared memory of each program of a machine."""

    def __init__(self, programs: int, size: int) -> None:
        self.size = size
        self._stride = -(-max(size, 16) // 16) * 16
        self._bytes = np.zeros(programs * self._stride, U8)
        self._written = np.zeros(programs * self._stride, U8)
        self._first = np.arange(programs, dtype=S64)[:, None] * self._stride

    def load(self, m: Machine, address: np.ndarray, bits: np.dtype, n: int, mask: Mask) -> Loaded:
        at = self._place(m, address, bits, n, mask, None)
        if mask is not None:
            at = np.where(mask, at, 0)
        values, written = self._bytes.view(bits), self._written.view(bits)
        all_written = bits.type(int.from_bytes(b"\1" * bits.itemsize))
        unwritten = written.take(at) != all_written
        for k in range(1, n):
            unwritten = unwritten | (written.take(at + k) != all_written)
        return [values.take(at + k) for k in range(n)], unwritten if unwritten.any() else None

    def store(
        self, m: Machine, address: np.ndarray, bits: np.dtype, values: list[np.ndarray], mask: Mask, unknown: Mask
    ) -> None:
        """Write values; ``unknown`` values count as not written."""
        at = self._place(m, address, bits, len(values), mask, values)
        _scatter(self._bytes.view(bits), at, values, mask)
        ones = np.full((1, 1), int.from_bytes(b"\1" * bits.itemsize), bits)
        ones = ones if unknown is None else np.where(unknown, bits.type(0), ones)
        _scatter(self._written.view(bits), at, [ones] * len(values), mask)

    def _place(
        self, m: Machine, address: np.ndarray, bits: np.dtype, n: int, mask: Mask, values: list[np.ndarray] | None
    ) -> np.ndarray:
        size = bits.itemsize * n
        _check_alignment("shared", address, size, mask)
        outside = (address < 0) | (address + size > self.size)
        outside = outside if mask is None else outside & mask
        if outside.any():
            first = int(np.broadcast_to(address, outside.shape)[outside][0])
            raise Fault(
                f"shared access of {size} bytes at {first}, outside of the program's {self.size} bytes", outside
            )
        m.note(SHARED, address, size, mask, values)
        return (address + self._first) >> _SHIFT[bits.itemsize]


def _scatter(space: np.ndarray, at: np.ndarray, values: list[np.ndarray], mask: Mask) -> None:
    """Write values to consecutive elements; if several threads write to one, the last thread's value stays."""
    shape = np.broadcast_shapes(at.shape, values[0].shape, () if mask is None else mask.shape)
    at = np.broadcast_to(at, shape)
    chosen = None if mask is None else np.broadcast_to(mask, shape)
    at = at if chosen is None else at[chosen]
    for k, value in enumerate(values):
        value = np.broadcast_to(value, shape)
        space[at + k] = value if chosen is None else value[chosen]
