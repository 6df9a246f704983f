"""Triton functions in modules that do not import Triton, beside their PyTorch equivalents.

Only a backend imports Triton. Until then :func:`statement` only registers functions; :func:`load` then applies
``triton.jit`` to them and replaces them in their modules, where other kernels find them by name.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FunctionType
from typing import Any, TypeVar

_Function = TypeVar("_Function", bound=Callable[..., Any])
_WAITING: list[Callable[..., Any]] = []
_LOADED: dict[Callable[..., Any], Any] = {}


def statement(function: _Function) -> _Function:
    """Register a module-level Triton function; it refers to ``triton.language`` as ``tl``."""
    _WAITING.append(function)
    return function


def load() -> None:
    """Compile all registered functions with ``triton.jit``, before a kernel that calls them is compiled."""
    if not _WAITING:
        return
    import triton
    import triton.language as tl

    modules = {function.__module__ for function in (*_WAITING, *_LOADED)}
    while _WAITING:
        function = _WAITING.pop()
        _LOADED[function] = triton.jit(function)
    for module in modules:  # modules that define or call one of them
        names = vars(sys.modules[module])
        names["tl"] = tl
        names.update({name: _LOADED[x] for name, x in names.items() if _is_known(x)})


def _is_known(x: Any) -> bool:
    return isinstance(x, FunctionType) and x in _LOADED
