"""Addresses of the live tensors of this process, and the tensor that is nearest to an address."""

from __future__ import annotations

import bisect
import gc
import weakref
from typing import NamedTuple

import numpy as np
from torch import Tensor

from tests.ptx.types import S64


class _Range(NamedTuple):
    start: int
    end: int
    owners: list[weakref.ref]

    def alive(self) -> list[weakref.ref]:
        """Return the tensors that still have their memory here; a storage may have been freed, or moved."""
        found = [(owner, _extent(x)) for owner in self.owners if (x := owner()) is not None]
        return [owner for owner, at in found if at is not None and self.start <= at[0] and at[1] <= self.end]


class LiveTensors:
    """The memory of all CPU tensors, searched for again when an address is in no known tensor.

    Python's garbage collector knows all objects. To search new objects only, a search moves all objects to the
    oldest generation, which later searches skip unless a collection has moved others there. So a search takes time
    for new tensors only, however many are known.
    """

    def __init__(self) -> None:
        self._known: dict[int, weakref.ref] = {}  # by identity; a tensor that is deleted removes itself
        self._collections: list[int] | None = None
        self._looks = 0
        self._ranges: list[_Range] = []  # sorted and disjoint
        self._starts: list[int] = []
        self._ends: list[int] = []
        self._bounds = np.zeros((2, 0), S64)  # both, to look up many addresses
        self._checked: set[int] = set()

    def begin(self) -> None:
        """Begin a launch: check all ranges again, since tensors may have been deleted since the last one."""
        self._checked.clear()

    def inside(self, low: np.ndarray, high: np.ndarray) -> np.ndarray:
        """Return whether the bytes from each ``low`` up to ``high`` lie in one storage of a live tensor."""
        found = self._find(low, high)
        new = set(found.tolist()) - self._checked - {-1}
        gone = [i for i in new if not self._ranges[i].alive()]
        if gone or (found < 0).any():
            for i in sorted(gone, reverse=True):
                self._replace(i, i + 1)
            self._renew(everything=False)
            found = self._find(low, high)
            if (found < 0).any():  # a known tensor may have other memory now
                self._renew(everything=True)
                found = self._find(low, high)
            new = set(found.tolist()) - {-1}
        self._checked |= new
        return found >= 0

    def nearest(self, address: int) -> str:
        """Return a text that names the tensor nearest to an address, and its distance."""
        self._renew(everything=True)
        owners = [x for each in self._ranges for owner in each.owners if (x := owner()) is not None]
        if not owners:
            return "there is none"

        def off(x: Tensor) -> int:
            start, end = _span(x)
            return max(start - address, address - end + 1, 0)

        found = min(owners, key=off)
        start, end = _span(found)
        where = "within"
        if off(found):
            before = address < start
            where = f"{start - address} bytes before" if before else f"{address - end} bytes past the end of"
        kind = str(found.dtype).removeprefix("torch.")
        return f"{where} {_name(found)}the {kind} tensor of shape {tuple(found.shape)} at {start:#x}"

    def _find(self, low: np.ndarray, high: np.ndarray) -> np.ndarray:
        starts, ends = self._bounds
        if not len(starts):
            return np.full(low.shape, -1)
        i = np.searchsorted(starts, low, "right") - 1
        return np.where((i >= 0) & (high <= ends[i]), i, -1)

    def _renew(self, everything: bool) -> None:
        """Search for new tensors and, if ``everything``, update the known ones too."""
        new = [x for x in self._new() if id(x) not in self._known]
        if everything:
            new += [x for owner in list(self._known.values()) if (x := owner()) is not None]
            new += [x.grad for x in new if x.is_leaf and x.grad is not None]  # only C++ may refer to them
            self._known.clear()
            self._replace(0, len(self._ranges))
        for x in new:
            key = id(x)
            owner = weakref.ref(x, lambda _, key=key: self._known.pop(key, None))
            self._known[key] = owner
            if (at := _extent(x)) is not None:
                self._add(_Range(*at, [owner]))
        self._bounds = np.array([self._starts, self._ends], S64)
        self._checked.clear()

    def _add(self, new: _Range) -> None:
        """Insert a range, merged with the ranges that share memory with it, as storages may."""
        first = bisect.bisect_right(self._ends, new.start)
        last = bisect.bisect_left(self._starts, new.end)
        for each in self._ranges[first:last]:
            if owners := each.alive():
                new = _Range(min(new.start, each.start), max(new.end, each.end), [*owners, *new.owners])
        self._replace(first, last, new)

    def _replace(self, first: int, last: int, *ranges: _Range) -> None:
        self._ranges[first:last] = ranges
        self._starts[first:last] = [each.start for each in ranges]
        self._ends[first:last] = [each.end for each in ranges]

    def _new(self) -> list[Tensor]:
        """Return the tensors created since the last search, and perhaps others."""
        self._looks += 1
        if self._looks % 512 == 0:
            gc.collect()  # Python hardly ever does so while the driver is active
        young = self._collections == _collections()
        objects = gc.get_objects(generation=0) if young else gc.get_objects()
        objects += gc.get_objects(generation=1) if young else []
        kinds: dict[type, bool] = {}
        found = []
        for x in objects:
            kind = type(x)
            if kind not in kinds:
                kinds[kind] = issubclass(kind, Tensor)
            if kinds[kind]:
                found.append(x)
        objects.clear()  # the list may contain itself, and would keep all objects alive
        gc.freeze()
        gc.unfreeze()  # freeze and unfreeze move objects into the oldest generation
        self._collections = _collections()
        return found


def _collections() -> list[int]:
    return [generation["collections"] for generation in gc.get_stats()[1:]]


def _extent(x: Tensor) -> tuple[int, int] | None:
    """Return the start and the end of a tensor's storage; None if it has none in the host's memory."""
    try:
        if x.device.type != "cpu":
            return None
        storage = x.untyped_storage()
        start, n = storage.data_ptr(), storage.nbytes()
    except (RuntimeError, NotImplementedError, ValueError):  # fake tensors, parameters without a shape yet
        return None
    return (start, start + n) if start and n else None


def _span(x: Tensor) -> tuple[int, int]:
    """Return the start and the end of a tensor's own elements."""
    last = sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True)) if x.numel() else -1
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()


def _name(x: Tensor) -> str:
    """Return a tensor's key in a dictionary: optimizer state, a module's parameters, an object's attributes."""
    for holder in gc.get_referrers(x):
        if isinstance(holder, dict):
            for key, value in holder.items():
                if value is x and isinstance(key, str) and not key.startswith("_"):
                    return f"{key!r}, "
    return ""
