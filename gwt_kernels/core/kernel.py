"""Functions in Triton's language that stand beside their PyTorch statement, and wait there for Triton.

Nothing but a backend imports Triton. So a statement is kept as it is written, and :func:`load` makes of it what
``triton.jit`` would have made of it, under its name in its module, where other kernels find it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FunctionType
from typing import Any, TypeVar

__all__ = ["load", "statement"]

_Function = TypeVar("_Function", bound=Callable[..., Any])
_WAITING: list[Callable[..., Any]] = []
_LOADED: dict[Callable[..., Any], Any] = {}


def statement(function: _Function) -> _Function:
    """Mark a module's function as one in Triton's language, which it knows as ``tl``; it calls others by name."""
    _WAITING.append(function)
    return function


def load() -> None:
    """Give all that wait to Triton, before a kernel that calls them is compiled."""
    if not _WAITING:
        return
    import triton
    import triton.language as tl

    modules = {function.__module__ for function in (*_WAITING, *_LOADED)}
    while _WAITING:
        function = _WAITING.pop()
        _LOADED[function] = triton.jit(function)
    for module in modules:  # where a statement stands, and where another one calls it
        names = vars(sys.modules[module])
        names["tl"] = tl
        names.update({name: _LOADED[x] for name, x in names.items() if _is_known(x)})


def _is_known(x: Any) -> bool:
    return isinstance(x, FunctionType) and x in _LOADED
