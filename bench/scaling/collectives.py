"""A recorder of all collectives that are called, by any code."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

# By torch's name of a collective: its kind, and the index of the argument with the data of all processes.
_KINDS = {
    "allreduce_": ("all-reduce", 0),
    "_allgather_base_": ("all-gather", 0),
    "_reduce_scatter_base_": ("reduce-scatter", 1),
}


class Recorder(TorchDispatchMode):
    """Dispatch mode that records each collective: kind (torch's name for rare ones), number of processes, bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func.overloadpacket.__name__
            kind, whole = _KINDS.get(name, (name, 0))
            x = args[whole][0] if isinstance(args[whole], list) else args[whole]
            group = next(dist.ProcessGroup.unbox(a) for a in args if isinstance(a, torch.ScriptObject))
            self.calls.append((kind, group.size(), x.nbytes))
        return func(*args, **(kwargs or {}))
