"""Count the bytes of new tensors that are alive at once, on any device."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["Peak"]


class Peak(TorchDispatchMode):
    """The largest number of bytes, at any one time, in storages created within the block."""

    def __init__(self) -> None:
        super().__init__()
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {_storage_of(x)._cdata for x in tree_leaves([args, kwargs]) if isinstance(x, Tensor)}
        result = function(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and _storage_of(x)._cdata not in given:
                storage = _storage_of(x)
                self._alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self._alive = {key: value for key, value in self._alive.items() if not value[0].expired()}
        self.bytes = max(self.bytes, sum(n for _, n in self._alive.values()))
        return result


def _storage_of(x: Tensor) -> Any:
    return x.untyped_storage()
