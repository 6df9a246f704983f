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

    What is there at the first look is looked through once: Python's collector leaves it out from then on.
    """

    def __init__(self) -> None:
        self._old: list[weakref.ref] | None = None
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
            self._renew()
            found = self._find(low, high)
            new = set(found.tolist()) - {-1}
        self._checked |= new
        return found >= 0

    def nearest(self, address: int) -> str:
        """Say which tensor an address is nearest to, and how far it is off."""
        self._renew()
        best, text = None, "there is no tensor"
        for owner in {id(x): x for each in self._ranges for r in each.owners if (x := r()) is not None}.values():
            start, end = _span(owner)
            off = max(start - address, address - end + 1, 0)
            if best is None or off < best:
                where = f"{start - address} bytes before" if address < start else f"{address - end} bytes past the end of"
                where = "within" if not off else where
                best, text = off, f"{where} {_name(owner)}the {owner.dtype} tensor of shape {tuple(owner.shape)} at {start:#x}"
        return text.replace("torch.", "")

    def _find(self, low: np.ndarray, high: np.ndarray) -> np.ndarray:
        if not len(self._starts):
            return np.full(low.shape, -1)
        i = np.searchsorted(self._starts, low, "right") - 1
        return np.where((i >= 0) & (high <= self._ends[i]), i, -1)

    def _renew(self) -> None:
        if self._old is None:
            self._old = _tensors()
            gc.freeze()
        self._old = [x for x in self._old if x() is not None]
        found = []
        for owner in (*self._old, *_tensors()):
            x = owner()
            if x is not None and (extent := _extent(x)) is not None:
                found.append((*extent, owner))
        found.sort(key=lambda each: each[:2])
        self._ranges = []
        for start, end, owner in found:
            if self._ranges and start < self._ranges[-1].end:  # storages may share memory
                last = self._ranges[-1]
                self._ranges[-1] = _Range(last.start, max(last.end, end), [*last.owners, owner])
            else:
                self._ranges.append(_Range(start, end, [owner]))
        self._starts = np.array([each.start for each in self._ranges], S64)
        self._ends = np.array([each.end for each in self._ranges], S64)
        self._checked.clear()


def _tensors() -> list[weakref.ref]:
    kinds: dict[type, bool] = {}
    found = []
    for x in gc.get_objects():
        kind = type(x)
        if kind not in kinds:
            kinds[kind] = issubclass(kind, Tensor)
        if kinds[kind]:
            found.append(weakref.ref(x))
            grad = x.grad if x.is_leaf else None
            if grad is not None:
                found.append(weakref.ref(grad))
    return found


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


