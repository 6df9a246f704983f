"""Recognise DTensors, and get this process's shard of one."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from torch import Tensor


def is_sharded(x: object) -> bool:
    """Return whether ``x`` is a DTensor."""
    return any_sharded([x])


def any_sharded(tensors: Iterable[object]) -> bool:
    """Return whether any of ``tensors`` is a DTensor."""
    # If the module was never imported, there are none; importing it takes longer than importing this package.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and any(issubclass(kind, module.DTensor) for kind in set(map(type, tensors)))


def local_of(x: Any) -> Tensor:
    """Return this process's shard of a DTensor, or ``x`` itself."""
    local: Tensor = x._local_tensor if is_sharded(x) else x  # to_local() makes a new object every time
    return local
