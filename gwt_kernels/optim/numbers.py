"""Checks of numbers among options: each error names the option, its value and the remedy."""

from __future__ import annotations

import contextlib
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from gwt_kernels.backends import choice

SLACK = 1e-12
"""Largest distance below 0 that counts as 0: schedulers round so, as ``LinearLR(optimizer, 1 / 3, 0.0)`` does."""
LARGEST = torch.finfo(torch.float32).max
"""Largest number allowed: kernels take float32."""


def from_zero(name: str, value: Any, slack: float) -> Any:
    """Return the number, or 0 if it is below 0 by at most ``slack``; raise a ValueError if it is out of range."""
    if isinstance(value, Tensor) or 0.0 <= value <= LARGEST:
        return value
    if -slack <= value < 0.0:
        return 0.0
    if name.startswith("beta"):
        raise ValueError(f"{name} must be at least 0 and below 1, got {value}")
    raise ValueError(f"{name} must be finite and at least 0, got {value}")


def learning_rate(lr: Any, capturable: bool) -> float | Tensor:
    """Return the rate as a number; if ``capturable``, a float32 scalar on a device as it is."""
    if not (capturable and isinstance(lr, Tensor)):
        return number("lr", lr)
    if lr.device.type == "cpu" and not choice.launches_on("cpu"):  # in Triton's interpreter it is the device
        return number("lr", lr)
    if lr.dtype != torch.float32:
        raise TypeError(f"lr must be a number or a float32 tensor of one element, got a {lr.dtype} tensor")
    _check_single("lr", lr)
    return lr


def _check_single(name: str, value: Tensor) -> None:
    if value.numel() != 1:  # PyTorch's optimizers raise the same type of error
        raise ValueError(f"{name} must be one number, got a tensor of shape {tuple(value.shape)}")


def _as_tensor(name: str, value: Any) -> Tensor:
    """Return a NumPy array of numbers as a tensor; refuse everything else, booleans included."""
    if hasattr(value, "__array__"):
        with contextlib.suppress(TypeError, ValueError):  # not an array of numbers
            found = torch.from_numpy(value.__array__())
            if found.dtype != torch.bool:
                return found
    raise TypeError(f"{name} must be a real number, got {value!r}")


def number(name: str, value: Any) -> float:
    if type(value) is float:  # the common case; the other checks are slower
        return value
    if isinstance(value, Tensor):
        _check_single(name, value)
        if value.is_complex() or value.dtype == torch.bool:
            raise TypeError(f"{name} must be a real number, got a {value.dtype} tensor")
        if value.device.type != "cpu":
            raise TypeError(
                f"{name} is a tensor on {value.device}, which step() would have to wait for: pass a float or a "
                f"tensor on the CPU" + (", or capturable=True" if name == "lr" else "")
            )
        return float(value)
    if isinstance(value, bool) or not isinstance(value, Real):
        return number(name, _as_tensor(name, value))
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} must be finite, got an integer of {len(str(value))} digits") from None


def plain(value: Any) -> Any:
    """Return scalars of other libraries, such as NumPy, as Python's, also in tuples and lists; others unchanged."""
    if type(value) in (tuple, list):
        return type(value)(map(plain, value))
    if isinstance(value, (bool, Tensor)) or type(value) in (int, float):
        return value
    if isinstance(value, Real):
        return int(value) if isinstance(value, Integral) else float(value)
    return value.item() if getattr(value, "shape", None) == () and hasattr(value, "item") else value
