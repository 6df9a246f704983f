"""Where the tensors of this process lie that are alive, and which of them an address is nearest to."""

from __future__ import annotations

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

    def is_alive(self) -> bool:
        """Whether a tensor still has memory that begins here; a storage may have been given up, or resized."""
        return any(_extent(x) is not None for owner in self.owners if (x := owner()) is not None)


class LiveTensors:
    """The memory of all CPU tensors; looked up anew when an address is in none that is known.

    Python's collector knows all objects. To look only through those that are new, a look moves all to the oldest
    generation, where later looks need not go unless a collection has moved others there.
    """

    def __init__(self) -> None:
        self._known: dict[int, _Range] = {}  # of each tensor, by its identity
        self._collections: list[int] | None = None
        self._looks = 0
        self._ranges: list[_Range] = []
        self._starts = self._ends = np.zeros(0, S64)
        self._checked: set[int] = set()

    def begin(self) -> None:
        """A launch begins: tensors may have gone since the last."""
        self._checked.clear()

    def inside(self, low: np.ndarray, high: np.ndarray) -> np.ndarray:
        """Whether each run of bytes from ``low`` up to ``high`` lies in one storage of a tensor that is alive."""
        found = self._find(low, high)
        new = set(found.tolist()) - self._checked - {-1}
        gone = any(not self._ranges[i].is_alive() for i in new)
        if gone or (found < 0).any():
            self._renew(everything=gone)
            found = self._find(low, high)
            if (found < 0).any() and not gone:  # a tensor that is known may have other memory now
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
        if not len(self._starts):
            return np.full(low.shape, -1)
        i = np.searchsorted(self._starts, low, "right") - 1
        return np.where((i >= 0) & (high <= self._ends[i]), i, -1)

    def _renew(self, everything: bool) -> None:
        """Look for new tensors, or look at those that are known again, too."""
        known = {i: each for i, each in self._known.items() if each.owners[0]() is not None}
        new = [x for x in self._new() if id(x) not in known]
        if everything:
            known, new = {}, [*new, *(x for each in known.values() if (x := each.owners[0]()) is not None)]
            new += [x.grad for x in new if x.is_leaf and x.grad is not None]  # C++ alone may know them
        for x in new:
            start, end = _extent(x) or (0, 0)
            known[id(x)] = _Range(start, end, [weakref.ref(x)])
        self._known, self._ranges = known, []
        for each in sorted((each for each in known.values() if each.end), key=lambda each: each[:2]):
            last = self._ranges[-1] if self._ranges else None
            if last is not None and each.start < last.end:  # storages may share memory
                self._ranges[-1] = _Range(last.start, max(last.end, each.end), [*last.owners, *each.owners])
            else:
                self._ranges.append(each)
        self._starts = np.array([each.start for each in self._ranges], S64)
        self._ends = np.array([each.end for each in self._ranges], S64)
        self._checked.clear()

    def _new(self) -> list[Tensor]:
        """Tensors that the last look has not seen, and perhaps others."""
        self._looks += 1
        if self._looks % 512 == 0:
            gc.collect()  # while the driver is active, Python hardly ever does by itself
        young = self._collections == _collections()
        objects = [x for g in (0, 1) for x in gc.get_objects(generation=g)] if young else gc.get_objects()
        kinds: dict[type, bool] = {}
        found = []
        for x in objects:
            kind = type(x)
            if kind not in kinds:
                kinds[kind] = issubclass(kind, Tensor)
            if kinds[kind]:
                found.append(x)
        del objects
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
    except (RuntimeError, NotImplementedError):  # fake tensors, and others that only look like one
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
