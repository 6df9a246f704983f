"""Choose the backend for tensors, or the reason why a backend cannot run on them."""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
from typing import Any, Literal, get_args

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

from gwt_kernels.core.level import ROW, Level

Backend = Literal["triton", "torch", "compiled"]

_KEYS = torch._C._TorchDispatchModeKey

MAX_TRITON_LEVEL = 10
"""Deepest level of the Triton kernels: a block of ``2**10`` elements still fits one program's registers."""


def check_name(backend: object) -> None:
    """Raise unless ``backend`` is None or the name of a backend."""
    if backend is not None and not (isinstance(backend, str) and backend in get_args(Backend)):
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
    """Return the backend for tensors of ``dtype`` on ``device``.

    None chooses Triton for CUDA tensors that its kernels support, and torch for all others. ``"compiled"`` is
    resolved to torch, from which it differs only in the step (:func:`is_compiled`).

    Raises:
        ValueError: the name is unknown.
        RuntimeError: the requested backend cannot run on these tensors; the message has the reason.
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
    """Return the backend for an in-place update: as :func:`resolve`, but torch while operators are traced.

    Raises:
        ValueError, RuntimeError: as :func:`resolve`, or a :func:`tracer` cannot record the requested backend.
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
    """Return why the Triton backend cannot take tensors of ``dtype`` on ``device``; None if it can."""
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
    """Compile the step in C and return why it cannot take tensors on ``device``; None if it can."""
    if device.type != "cpu":
        return f"the tensors are on {device}, and the step in C is for a CPU"
    from gwt_kernels.backends.cpu import build

    try:
        build.library()
    except (OSError, RuntimeError) as error:
        return f"the step in C cannot be compiled: {error}"
    return None


def is_compiled(backend: str | None, device: torch.device) -> bool:
    """Return whether the step in C updates tensors that Triton does not: by request, or by default.

    By default traced steps use PyTorch's operators, which a graph can record, and a failed compilation warns once.
    """
    if backend is not None or tracer() is not None:
        return backend == "compiled"
    obstacle = compiler_obstacle(device)
    if obstacle is not None and device.type == "cpu":
        from gwt_kernels.backends.cpu import build

        build.warn_of(obstacle)
    return obstacle is None


def tracer() -> str | None:
    """Return the name of the active tracer of PyTorch's operators, which cannot record kernels or C; None if none.

    Tracers are ``torch.compile``, ``torch.export``, every dispatch mode (``make_fx``, ``FakeTensorMode``,
    ``MemTracker``, functional tensors, a user's own) and the transforms of ``torch.func``.
    """
    if torch.compiler.is_compiling():  # first, since torch.compile cannot trace the other conditions
        return "torch.compile"
    if torch._C._len_torch_dispatch_stack():
        return type(_get_current_dispatch_mode()).__name__
    return None if torch._C._functorch.peek_interpreter_stack() is None else "a transform of torch.func"


def is_symbolic() -> bool:
    """Return whether tensors may now be symbolic: fake tensors, proxies in a graph, batches of ``vmap``."""
    return is_graph() or _has_mode(_KEYS.FAKE)


def is_graph() -> bool:
    """Return whether a graph is being traced now, in which no decision can depend on a tensor's values."""
    return (
        torch.compiler.is_compiling()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or _has_mode(_KEYS.PROXY, _KEYS.FUNCTIONAL)
    )


def _has_mode(*keys: Any) -> bool:
    return bool(torch._C._len_torch_dispatch_stack()) and any(map(torch._C._get_dispatch_mode, keys))


def launches_on(device_type: str) -> bool:
    """Return whether Triton runs kernels on this type of device here.

    In Triton's interpreter, True for CPU tensors only; else for CUDA and the device of another active driver.
    """
    if interpreted():
        return device_type == "cpu"
    if device_type == "cuda":
        return True
    triton = sys.modules.get("triton")  # imported if a driver was made active
    try:
        return triton is not None and device_type == triton.runtime.driver.active.get_active_torch_device().type
    except RuntimeError:  # there is no driver
        return False


def interpreted() -> bool:
    """Return whether Triton uses its interpreter; the variable must be set before Triton is imported."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")
