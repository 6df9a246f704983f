"""Which backend runs on which tensors, and why another one cannot."""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
from typing import Any, Literal, get_args

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

from gwt_kernels.core.level import ROW, Level

__all__ = [
    "HEADS",
    "MAX_TRITON_LEVEL",
    "Backend",
    "check_name",
    "is_compiled",
    "is_graph",
    "is_symbolic",
    "resolve",
    "resolve_update",
    "tracer",
    "triton_obstacle",
]

Backend = Literal["triton", "torch", "compiled"]

_KEYS = torch._C._TorchDispatchModeKey

HEADS = "its kernels know no second moment of several rows: use head_rows=1, or backend='torch', or None to choose"
"""Why the Triton backend cannot take rows that share a second moment."""
MAX_TRITON_LEVEL = 10
"""Deepest level of the Triton kernels: a block of ``2**10`` neighbours still fits one program's registers."""


def check_name(backend: str | None) -> None:
    """Raise unless ``backend`` is None or the name of a backend."""
    if backend is not None and backend not in get_args(Backend):
        raise ValueError(
            f"unknown backend {backend!r}: use one of {', '.join(map(repr, get_args(Backend)))}, or None to choose"
        )


def resolve(
    backend: str | None,
    device: torch.device,
    dtype: torch.dtype,
    level: Level,
    wavelet: str = "haar",
    boundary: str = "zero",
) -> Backend:
    """The backend for tensors of ``dtype`` on ``device``.

    None chooses Triton for CUDA tensors that its kernels can take, and torch for everything else; so does
    ``"compiled"``, which differs from torch in the step alone (:func:`is_compiled`).

    Raises:
        ValueError: the name is unknown.
        RuntimeError: what was asked for cannot run on these tensors; the message says why.
    """
    check_name(backend)
    if backend == "torch" or (backend is None and device.type != "cuda"):
        return "torch"
    if backend == "compiled":
        obstacle = compiler_obstacle(device)
        if obstacle is None:
            return "torch"
        raise RuntimeError(
            f"backend='compiled' cannot run here: {obstacle}; use backend='torch', or None to choose"
        )
    obstacle = triton_obstacle(device, dtype, level, wavelet, boundary)
    if obstacle is None:
        return "triton"
    if backend is None:
        return "torch"
    raise RuntimeError(f"backend='triton' cannot run here: {obstacle}; use backend='torch', or None to choose")


def resolve_update(
    backend: str | None,
    device: torch.device,
    dtype: torch.dtype,
    level: Level,
    wavelet: str = "haar",
    boundary: str = "zero",
) -> Backend:
    """The backend for an update in place: as :func:`resolve`, but torch where operators are traced
    (:func:`tracer`).

    Raises:
        ValueError, RuntimeError: as :func:`resolve`, or what traces would not see what was asked for.
    """
    if backend != "torch" and tracer() is not None:
        if backend is None:
            return "torch"
        if is_symbolic():
            raise RuntimeError(
                f"backend={backend!r} cannot run under {tracer()}, which would not see the update: use "
                f"backend=None, which takes PyTorch's operators there"
            )
    return resolve(backend, device, dtype, level, wavelet, boundary)


@functools.lru_cache(maxsize=256)
def triton_obstacle(
    device: torch.device, dtype: torch.dtype, level: Level = 0, wavelet: str = "haar", boundary: str = "zero"
) -> str | None:
    """Why the Triton backend cannot take tensors of ``dtype`` on ``device``; None where it can."""
    if level and wavelet != "haar":
        return f"its kernels know the Haar wavelet only, not {wavelet!r}"
    if level and boundary != "zero":
        return f"its kernels know boundary='zero' only, not {boundary!r}"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"its arithmetic is float32, so tensors of {dtype} would lose precision"
    if level != ROW and level > MAX_TRITON_LEVEL:
        return f"level {level} is above {MAX_TRITON_LEVEL}, the deepest its kernels hold in registers"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if device.type == "cuda" and interpreted():
        return "TRITON_INTERPRET is set, and the interpreter cannot follow pointers into a CUDA device's memory"
    if not launches_on(device.type):
        return f"the tensors are on {device}, and Triton runs on CUDA devices (or under TRITON_INTERPRET=1)"
    return None


@functools.lru_cache(maxsize=16)
def compiler_obstacle(device: torch.device) -> str | None:
    """Why the step in C cannot take tensors on ``device``; None where it can, and then it is compiled."""
    if device.type != "cpu":
        return f"the tensors are on {device}, and the step in C is for a CPU"
    from gwt_kernels.backends.cpu import build

    try:
        build.library()
    except (OSError, RuntimeError) as error:
        return f"the step in C cannot be compiled: {error}"
    return None


def is_compiled(backend: str | None, device: torch.device) -> bool:
    """Whether tensors that Triton does not take are stepped in C: where it was asked for, or no backend was.

    Warns once where no backend was, there is a compiler, and what it should make cannot be had.
    What is traced without asking for it goes through PyTorch's operators, of which a graph can be made.
    """
    if backend is not None or tracer() is not None:
        return backend == "compiled"
    obstacle = compiler_obstacle(device)
    if obstacle is not None and device.type == "cpu":
        from gwt_kernels.backends.cpu import build

        build.warn_of(obstacle)
    return obstacle is None


def tracer() -> str | None:
    """Name what traces PyTorch's operators now, and would not see kernels or C; None where nothing does.

    ``torch.compile`` and ``torch.export``, every dispatch mode (``make_fx``, ``FakeTensorMode``, ``MemTracker``,
    functional tensors, a user's own) and the transforms of ``torch.func``.
    """
    if torch.compiler.is_compiling():  # asked first, as what compiles cannot follow the other questions
        return "torch.compile"
    if torch._C._len_torch_dispatch_stack():
        return type(_get_current_dispatch_mode()).__name__
    return None if torch._C._functorch.peek_interpreter_stack() is None else "a transform of torch.func"


def is_symbolic() -> bool:
    """Whether tensors may stand for others now: fakes without numbers, proxies in a graph, batches of ``vmap``."""
    return is_graph() or _has_mode(_KEYS.FAKE)


def is_graph() -> bool:
    """Whether a graph is being made now, in which nothing can be decided by the numbers in a tensor."""
    return (
        torch.compiler.is_compiling()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or _has_mode(_KEYS.PROXY, _KEYS.FUNCTIONAL)
    )


def _has_mode(*keys: Any) -> bool:
    return bool(torch._C._len_torch_dispatch_stack()) and any(map(torch._C._get_dispatch_mode, keys))


def launches_on(device_type: str) -> bool:
    """Whether Triton runs kernels on tensors of this type of device here.

    It does on CUDA's, and where its interpreter, or another driver that was made active, takes the tensors.
    """
    if interpreted():
        return device_type == "cpu"
    if device_type == "cuda":
        return True
    triton = sys.modules.get("triton")  # who made a driver active has imported it
    try:
        return triton is not None and device_type == triton.runtime.driver.active.get_active_torch_device().type
    except RuntimeError:  # there is no driver
        return False


def interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter; the variable has to be set before Triton is imported."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")
