"""DTensors, whose elements are shared out over processes: which tensors are, and what this process holds."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from torch import Tensor

__all__ = ["any_sharded", "is_sharded", "local_of"]


def is_sharded(x: object) -> bool:
    """Whether ``x`` is a DTensor, of which this process may hold a part only."""
    return any_sharded([x])


def any_sharded(tensors: Iterable[object]) -> bool:
    """Whether there is a DTensor among ``tensors``."""
    # Where the module was never imported there are none, and importing it takes longer than all of this package.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and any(issubclass(kind, module.DTensor) for kind in set(map(type, tensors)))


def local_of(x: Any) -> Tensor:
    """What this process holds of ``x``: ``x`` itself, or its shard."""
    local: Tensor = x._local_tensor if is_sharded(x) else x  # to_local() would make a new object every time
    return local
