"""Where the tensors of this process lie that are alive, and which of them an address is nearest to."""

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
        """Which tensors still have their memory here; a storage may have been given up, or moved."""
        found = [(owner, _extent(x)) for owner in self.owners if (x := owner()) is not None]
        return [owner for owner, at in found if at is not None and self.start <= at[0] and at[1] <= self.end]


class LiveTensors:
    """The memory of all CPU tensors; looked up anew when an address is in none that is known.

    Python's collector knows all objects. To look only through those that are new, a look moves all to the oldest
    generation, where later looks need not go unless a collection has moved others there. A look takes time for
    the tensors that are new, however many are known.
    """

    def __init__(self) -> None:
        self._known: dict[int, weakref.ref] = {}  # by identity; a tensor that goes takes itself out
        self._collections: list[int] | None = None
        self._looks = 0
        self._ranges: list[_Range] = []  # in order, apart from each other
        self._starts: list[int] = []
        self._ends: list[int] = []
        self._bounds = np.zeros((2, 0), S64)  # both, to look many addresses up
        self._checked: set[int] = set()

    def begin(self) -> None:
        """A launch begins: tensors may have gone since the last."""
        self._checked.clear()

    def inside(self, low: np.ndarray, high: np.ndarray) -> np.ndarray:
        """Whether each run of bytes from ``low`` up to ``high`` lies in one storage of a tensor that is alive."""
        found = self._find(low, high)
        new = set(found.tolist()) - self._checked - {-1}
        gone = [i for i in new if not self._ranges[i].alive()]
        if gone or (found < 0).any():
            for i in sorted(gone, reverse=True):
                self._replace(i, i + 1)
            self._renew(everything=False)
            found = self._find(low, high)
            if (found < 0).any():  # a tensor that is known may have other memory now
                self._renew(everything=True)
                found = self._find(low, high)
            new = set(found.tolist()) - {-1}
        self._checked |= new
        return found >= 0

    def nearest(self, address: int) -> str:
        """Say which tensor an address is nearest to, and how far it is off."""
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
        """Look for new tensors, or look at those that are known again, too."""
        new = [x for x in self._new() if id(x) not in self._known]
        if everything:
            new += [x for owner in list(self._known.values()) if (x := owner()) is not None]
            new += [x.grad for x in new if x.is_leaf and x.grad is not None]  # C++ alone may know them
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
        """Put a range in its place; with those that share memory with it, as storages may, it is one."""
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
        """Tensors that the last look has not seen, and perhaps others."""
        self._looks += 1
        if self._looks % 512 == 0:
            gc.collect()  # while the driver is active, Python hardly ever does by itself
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
        objects.clear()  # it may be one of them, and would keep them all
        gc.freeze()
        gc.unfreeze()  # from where these two put them: into the oldest generation
        self._collections = _collections()
        return found


def _collections() -> list[int]:
    return [generation["collections"] for generation in gc.get_stats()[1:]]


def _extent(x: Tensor) -> tuple[int, int] | None:
    """The first and the last address of a tensor's storage; None where it has none in the host's memory."""
    try:
        if x.device.type != "cpu":
            return None
        storage = x.untyped_storage()
        start, n = storage.data_ptr(), storage.nbytes()
    except (RuntimeError, NotImplementedError, ValueError):  # of fake tensors and parameters without a shape yet
        return None
    return (start, start + n) if start and n else None


def _span(x: Tensor) -> tuple[int, int]:
    """Where the tensor's own elements lie."""
    last = sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True)) if x.numel() else -1
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()


def _name(x: Tensor) -> str:
    """What a dictionary calls a tensor: an optimizer's state, a module's parameters, an object's attribute."""
    for holder in gc.get_referrers(x):
        if isinstance(holder, dict):
            for key, value in holder.items():
                if value is x and isinstance(key, str) and not key.startswith("_"):
                    return f"{key!r}, "
    return ""
