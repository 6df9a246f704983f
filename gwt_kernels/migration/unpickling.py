"""Read checkpoint files without executing what is in them: the classes that they may hold, and errors on others."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib
import re
import sys
import types
from collections.abc import Callable, Iterable
from pathlib import Path, PosixPath, PurePosixPath, PureWindowsPath
from typing import Any

import torch

_Allowed = list[Callable[..., Any] | tuple[Callable[..., Any], str]]

_PLAIN = (
    *(argparse.Namespace, types.SimpleNamespace),
    *(datetime.date, datetime.datetime, datetime.time, datetime.timedelta, datetime.timezone),
    *(bool, dict, float, frozenset, int, list, range, slice, str, tuple),
)
_PATHS = (PosixPath, PurePosixPath, PureWindowsPath)
_BLOCKED = ("nt", "os", "posix", "sys")  # modules from which torch.load allows nothing
_REMEDY = (
    "give the optimizer's state alone, as torch.save(optimizer.state_dict(), FILE) writes it where it was made"
)


def load(path: Path, allow: Iterable[str] = ()) -> Any:
    """Return what ``torch.save`` wrote, on the CPU, read with ``weights_only=True``.

    In addition to what PyTorch allows, files may hold classes of plain data of the standard library, such as
    ``argparse.Namespace`` and paths, and numpy's arrays and scalars. Numpy's own unpickling would trust what the
    file says about their memory. So scalars are rebuilt here, and other objects of numpy stay as the file describes
    them until they are written again.

    Args:
        path: A file that exists and is not empty.
        allow: Names of further classes, ``module.Class``. They are imported, and making them executes their code.

    Raises:
        ValueError: the file is no checkpoint, is truncated, or holds something else; a class is unknown.
    """
    allowed = [*_plain_data(), *map(_class_named, allow)]
    with torch.serialization.safe_globals(allowed):
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch.load raises whatever the bytes lead it to
            refused = _refused_in(path, str(error))
            raise ValueError(_explained(path, refused) if refused else _unread(path, error)) from error


def _explained(path: Path, refused: list[str]) -> str:
    """Return the message for a file that holds these classes or functions."""
    held = f"{path} holds {', '.join(refused)}, which is more than tensors and plain data"
    for name in refused:
        module, _, attribute = name.rpartition(".")
        of_a_script = module == "__main__" and not hasattr(sys.modules["__main__"], attribute)
        if of_a_script or module.split(".")[0] in (*_BLOCKED, "builtins"):  # these are functions
            return f"{held}, and {name} cannot be allowed: {_REMEDY}"
    allow = " ".join(f"--allow {name}" for name in refused)
    return f"{held}: if you trust the file, since making a class executes its code, add {allow}; or {_REMEDY}"


def _unread(path: Path, error: Exception) -> str:
    """Return the message for a file that cannot be read, with the reason at the end of torch's message."""
    said = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).rpartition("WeightsUnpickler error:")[2]
    said = " ".join(said.partition("\n\nCheck the documentation")[0].split())
    held = re.search(r"Can only (?:\w+) .*?<class '([^']+)'>", said)
    if held is not None:
        return f"{path} holds a {held[1]}, which torch.load cannot fill, even if it is allowed: {_REMEDY}"
    reason = (said if len(said) <= 300 else said[:300].rpartition(" ")[0] + " ...") or type(error).__name__
    return (
        f"{path} is not a checkpoint of tensors and plain data as torch.save writes it, or it is cut short "
        f"({reason}): {_REMEDY}"
    )


def _refused_in(path: Path, message: str) -> list[str]:
    """Return the classes and functions in a file that are not allowed."""
    with contextlib.suppress(Exception):  # also of bytes that are no checkpoint
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(str(path)))
    # A file in the format before torch 1.6 is no archive, and only its first one is known.
    found = re.search(r"GLOBAL (\S+) (?:was not an allowed|whose module)", message)
    return [] if found is None else [found[1] if "." in found[1] else f"builtins.{found[1]}"]


def _class_named(name: str) -> tuple[Callable[..., Any], str]:
    """Return the class that ``--allow`` names, and its name in the file.

    Raises:
        ValueError: there is no such class.
    """
    module, _, attribute = name.rpartition(".")
    if not module:
        raise ValueError(f"--allow {name!r} is not module.Class, such as argparse.Namespace")
    if module.split(".")[0] in _BLOCKED:
        raise ValueError(f"--allow {name}: PyTorch allows nothing of that module in a file: {_REMEDY}")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # also the module's own
        raise ValueError(
            f"--allow {name}: there is no such class to import ({error}): put its module on PYTHONPATH, or "
            f"{_REMEDY}"
        ) from error
    if not isinstance(found, type):
        raise ValueError(f"--allow {name} is no class but a {type(found).__name__}: {_REMEDY}")
    return found, name


class _Unread:
    """A numpy object as the file describes it, which is written as it was."""

    def __init__(self, make: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        self.make, self.arguments = make, arguments
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __repr__(self) -> str:
        return "a numpy array, which is not read: make it a tensor or a number"

    def __reduce__(self) -> tuple[Any, ...]:
        return self.make, self.arguments, self.state


def _as_dict(*default: Any) -> dict[Any, Any]:
    """Return a plain dict, which torch.load can fill, in place of a defaultdict, which it cannot."""
    return {}


def _plain_data() -> _Allowed:
    """Return classes of plain data, and functions that rebuild numpy's, under the names that they have in files."""
    allowed: _Allowed = [(each, f"{each.__module__}.{each.__name__}") for each in _PLAIN]
    for module in ("pathlib", "pathlib._local"):  # Python 3.13's
        allowed += [(each, f"{module}.{each.__name__}") for each in _PATHS]
    allowed.append((_as_dict, "collections.defaultdict"))
    try:
        import numpy as np
    except ModuleNotFoundError:
        return allowed
    make_array: Any = np.empty(0).__reduce__()[0]
    make_scalar: Any = np.float64().__reduce__()[0]

    def dtype(*arguments: Any) -> _Unread:
        return _Unread(np.dtype, arguments)

    def ndarray(*arguments: Any) -> Any:
        raise ValueError("a numpy array is not made so")

    def array(kind: Any, *arguments: Any) -> _Unread:
        if kind is not ndarray:
            raise ValueError("a subclass of numpy's arrays: make it a plain array")
        return _Unread(make_array, (np.ndarray, *arguments))

    def scalar(kind: Any, data: Any) -> Any:
        plain = np.dtype(kind.arguments[0])
        if plain.kind not in "biufcSU" or not isinstance(data, bytes) or len(data) != plain.itemsize:
            return _Unread(make_scalar, (kind, data))
        return np.frombuffer(data, plain.newbyteorder(kind.state[1] if kind.state else "="))[0]

    allowed += [(dtype, "numpy.dtype"), (ndarray, "numpy.ndarray"), (_Unread, "")]  # "": no file can name it
    for module in ("numpy._core.multiarray", "numpy.core.multiarray"):
        allowed += [(array, f"{module}._reconstruct"), (scalar, f"{module}.scalar")]
    return allowed
