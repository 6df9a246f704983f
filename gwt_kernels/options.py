"""Checks of a parameter group's options: each error names the option, its value and the remedy."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from gwt_kernels import backends
from gwt_kernels.hyper import Hyper, Rounding, check_rounding, check_rule
from gwt_kernels.torch_backend.literal import filter_bank

__all__ = [
    "STRUCTURAL",
    "check_group",
    "check_max_grad_norm",
    "hyper_of",
    "published_limit",
    "rounding_of",
    "state_dtype_name",
    "state_dtype_of",
]

_LARGEST = torch.finfo(torch.float32).max  # kernels take the numbers as float32

STRUCTURAL = ("level", "rule", "wavelet", "state_dtype")
"""Options that decide the shape or the meaning of the state: a checkpoint has to agree on them."""

STATE_DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "int8": torch.int8}


def check_group(group: Mapping[str, Any], *, capturable: bool = False) -> None:
    """Raise unless every option of the group is one that the optimizer can honour.

    Raises:
        TypeError: an option has the wrong type.
        ValueError: an option has a value that is out of range or unknown.
        ModuleNotFoundError: the wavelet needs PyWavelets, which is not installed.
    """
    hyper_of(group, capturable=capturable)
    level = group["level"]
    if isinstance(level, bool) or not isinstance(level, int):
        raise TypeError(f"level must be an integer, got {level!r}")
    if level < 0:
        raise ValueError(f"level must not be negative, got {level}: 0 is plain AdamW")
    check_rule(group["rule"], "haar")
    if group["rule"] == "foam" and group["norm_growth_limit"] is not None:
        raise ValueError(
            f"norm_growth_limit is {group['norm_growth_limit']}, but rule='foam' has no limiter: leave it out, or "
            f"pass None"
        )
    if not isinstance(group["wavelet"], str):
        raise ValueError(f"unknown wavelet {group['wavelet']!r}: use 'haar', or a name of PyWavelets such as 'db2'")
    if group["wavelet"] != "haar":
        filter_bank(group["wavelet"])
        check_rule(group["rule"], group["wavelet"])
    name = state_dtype_name(group["state_dtype"])
    if name in ("bfloat16", "int8") and group["wavelet"] != "haar":
        raise ValueError(f"state_dtype=torch.{name} knows no wavelet {group['wavelet']!r}: use None, or 'haar'")
    if group["weight_rounding"] is not None:
        check_rounding(group["weight_rounding"], torch.bfloat16, group["wavelet"])
    seed = group["seed"]
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise ValueError(f"seed must be an integer of at least 0 and below 2**32, got {seed!r}")
    backends.check_name(group["backend"])


def check_max_grad_norm(max_grad_norm: float | None) -> None:
    """Raise unless gradients can be clipped to this global norm."""
    if max_grad_norm is not None and not _number("max_grad_norm", max_grad_norm) > 0:
        raise ValueError(
            f"max_grad_norm must be above 0, got {max_grad_norm}: None turns clipping off, and float('inf') "
            f"measures the norm alone"
        )


def published_limit(rule: str) -> float | None:
    """The limiter's gamma that belongs to a rule: the folded one has no limiter."""
    return None if rule == "foam" else 1.01


def rounding_of(param: Tensor, weight_rounding: Rounding | None) -> Rounding:
    """How a parameter's updated weights are stored: to the nearest by default.

    Raises:
        ValueError: weights of this dtype cannot be rounded so.
    """
    rounding = "nearest" if weight_rounding is None else weight_rounding
    check_rounding(rounding, param.dtype, "haar")
    return rounding


def hyper_of(group: Mapping[str, Any], *, capturable: bool = False) -> Hyper:
    """The group's numbers as floats, checked; a learning rate on the device as it is where ``capturable``.

    Raises:
        TypeError: a number is not a real number, or a tensor that only the device could read.
        ValueError: a number is out of range.
    """
    betas = group["betas"]
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise TypeError(f"betas must be a pair of numbers, got {betas!r}")
    if not isinstance(group["maximize"], bool):
        raise TypeError(f"maximize must be True or False, got {group['maximize']!r}")
    gamma = group["norm_growth_limit"]
    hyper = Hyper(
        lr=_learning_rate(group["lr"], capturable),
        beta1=_number("betas[0]", betas[0]),
        beta2=_number("betas[1]", betas[1]),
        eps=_number("eps", group["eps"]),
        weight_decay=_number("weight_decay", group["weight_decay"]),
        scale=_number("scale", group["scale"]),
        norm_growth_limit=None if gamma is None else _number("norm_growth_limit", gamma),
        maximize=group["maximize"],
    )
    for name in ("lr", "eps", "weight_decay"):
        value = getattr(hyper, name)
        if isinstance(value, Tensor):
            continue
        if not 0.0 <= value <= _LARGEST:
            raise ValueError(f"{name} must be finite and at least 0, got {value}")
    for i, beta in enumerate((hyper.beta1, hyper.beta2)):
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"betas[{i}] must be at least 0 and below 1, got {beta}")
    if not 0.0 < hyper.scale <= _LARGEST:
        raise ValueError(f"scale must be finite and above 0, got {hyper.scale}: the published value is 0.25")
    if hyper.norm_growth_limit is not None and not 1.0 <= hyper.norm_growth_limit <= _LARGEST:
        raise ValueError(
            f"norm_growth_limit must be finite and at least 1, got {hyper.norm_growth_limit}: "
            f"the published value is 1.01, and None turns the limiter off"
        )
    return hyper


def state_dtype_name(state_dtype: torch.dtype | str | None) -> str | None:
    """The option as a checkpoint holds it: a plain name, or None for the default.

    Raises:
        ValueError: moments of this dtype are not offered.
    """
    if state_dtype is None:
        return None
    name = str(state_dtype).removeprefix("torch.")
    if name not in STATE_DTYPES:
        raise ValueError(
            f"state_dtype must be None, torch.float32, torch.bfloat16, torch.int8 or torch.float64, "
            f"got {state_dtype!r}"
        )
    return name


def state_dtype_of(param: Tensor, state_dtype: torch.dtype | str | None) -> torch.dtype:
    """The dtype of a parameter's moments: float32 by default, float64 for float64 parameters."""
    name = state_dtype_name(state_dtype)
    return torch.promote_types(param.dtype, torch.float32) if name is None else STATE_DTYPES[name]


def _learning_rate(lr: Any, capturable: bool) -> float | Tensor:
    """The rate as a number; one on a device, where it may stay there, as the float32 scalar that it is."""
    if not (capturable and isinstance(lr, Tensor)):
        return _number("lr", lr)
    if lr.device.type == "cpu" and not backends.launches_on("cpu"):  # where Triton does, that is its device
        return _number("lr", lr)
    if lr.numel() != 1 or lr.dtype != torch.float32:
        raise TypeError(
            f"lr must be a number or a float32 tensor of one element, got {lr.dtype} of shape {tuple(lr.shape)}"
        )
    return lr


def _number(name: str, value: Any) -> float:
    if type(value) is float:  # which the other checks take a while to say
        return value
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.is_complex():
            raise TypeError(f"{name} must be a number, got a {value.dtype} tensor of shape {tuple(value.shape)}")
        if value.device.type != "cpu":
            raise TypeError(
                f"{name} is a tensor on {value.device}, which step() would have to wait for: pass a float or a "
                f"tensor on the CPU" + (", or capturable=True" if name == "lr" else "")
            )
        return float(value)
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a real number, got {value!r}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} must be finite, got an integer of {len(str(value))} digits") from None
