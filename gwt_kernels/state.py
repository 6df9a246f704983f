"""One parameter's optimizer state: what it holds, how it begins, and whether a given one fits."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from gwt_kernels.options import state_dtype_of
from gwt_kernels.torch_backend.literal import approximation_width

__all__ = ["MOMENTS", "check_place", "check_state", "complete", "exact_copy", "is_limited", "state_keys"]

MOMENTS = ("exp_avg", "exp_avg_sq")


def is_limited(group: Mapping[str, Any]) -> bool:
    """Whether the group's tensors have a limiter: level 0 has none."""
    return bool(group["level"]) and group["norm_growth_limit"] is not None


def state_keys(group: Mapping[str, Any]) -> tuple[str, ...]:
    """What a state under the group's options holds."""
    keys = ["step", *MOMENTS]
    keys += ["limiter_norm"] if is_limited(group) else []
    keys += ["weight_low"] if group["weight_rounding"] == "split" else []
    return tuple(keys)


def complete(state: dict[str, Any], p: Tensor, group: Mapping[str, Any]) -> None:
    """Make the state of a first step; of a later one, what an option turned on since then needs."""
    if not state:
        dtype = state_dtype_of(p, group["state_dtype"])
        shape = _state_shape(p, group)
        moments = {key: torch.zeros(shape, dtype=dtype, device=p.device) for key in MOMENTS}
        state.update(step=torch.zeros((), dtype=torch.float32), **moments)
    if is_limited(group) and "limiter_norm" not in state:
        state["limiter_norm"] = torch.zeros((), dtype=_norm_dtype(p), device=p.device)
    if group["weight_rounding"] == "split" and "weight_low" not in state:
        state["weight_low"] = torch.zeros(p.shape, dtype=torch.int16, device=p.device)


def check_state(
    state: Mapping[str, Any], p: Tensor, group: Mapping[str, Any], name: str, keys: Iterable[str]
) -> None:
    """Raise unless ``state`` has the ``keys`` and is what a step of ``p`` under the group's options takes."""
    missing = [key for key in keys if not isinstance(state.get(key), Tensor)]
    if missing:
        raise ValueError(
            f"the state of {name} lacks {', '.join(missing)}: it was not made by GWTAdamW with these options "
            f"(level={group['level']}, norm_growth_limit={group['norm_growth_limit']}); load one that was, or "
            f"clear it to begin anew"
        )
    shape, dtype = _state_shape(p, group), state_dtype_of(p, group["state_dtype"])
    for key in MOMENTS:
        if tuple(state[key].shape) != shape:
            raise ValueError(
                f"{key} of {name} has shape {tuple(state[key].shape)}, but level {group['level']} with wavelet "
                f"{group['wavelet']!r} needs {shape}: use the options and the model that the state was made with"
            )
        if state[key].dtype != dtype:
            raise ValueError(
                f"{key} of {name} is {state[key].dtype}, but the optimizer keeps {dtype}: "
                f"give it state_dtype={state[key].dtype}, or convert the state"
            )
    for key in {"step", "limiter_norm"} & state.keys():
        if state[key].numel() != 1:
            raise ValueError(f"{key} of {name} has shape {tuple(state[key].shape)}: make it a scalar")
    if "weight_low" in state:
        if group["weight_rounding"] != "split":
            raise ValueError(
                f"the state of {name} has weight_low, half of each float32 weight, which the optimizer would drop: "
                f"give it weight_rounding='split', or remove weight_low from the state"
            )
        if state["weight_low"].shape != p.shape or state["weight_low"].dtype != torch.int16:
            raise ValueError(
                f"weight_low of {name} is {state['weight_low'].dtype} of shape {tuple(state['weight_low'].shape)}, "
                f"but needs to be int16 of shape {tuple(p.shape)}: use the model that the state was made with"
            )
    if "limiter_norm" in state and state["limiter_norm"].dtype != _norm_dtype(p):
        raise ValueError(
            f"limiter_norm of {name} is {state['limiter_norm'].dtype}, but the optimizer keeps {_norm_dtype(p)}: "
            f"convert it"
        )
    if not 0 <= float(state["step"]) < math.inf:
        raise ValueError(f"step of {name} is {float(state['step'])}: it must be the number of steps so far")


def check_place(state: Mapping[str, Any], p: Tensor, name: str) -> None:
    """Raise unless a kernel can take the tensors of ``state`` as they lie in memory."""
    for key in {*MOMENTS, "limiter_norm", "weight_low"} & state.keys():
        if state[key].device != p.device or not state[key].is_contiguous():
            raise ValueError(
                f"{key} of {name} is on {state[key].device} with strides {state[key].stride()}: move it to "
                f"{p.device} and make it contiguous"
            )


def exact_copy(name: str, value: Any, p: Tensor) -> Any:
    """A copy of one entry of a state, bit for bit, where ``p``'s state keeps it."""
    if not isinstance(value, Tensor):
        return value
    device = torch.device("cpu") if name == "step" else p.device
    return value.detach().to(device=device, copy=True, memory_format=torch.contiguous_format)


def _state_shape(p: Tensor, group: Mapping[str, Any]) -> tuple[int, ...]:
    if group["level"] == 0:
        return tuple(p.shape)
    return (*p.shape[:-1], approximation_width(p.shape[-1], group["level"], group["wavelet"]))


def _norm_dtype(p: Tensor) -> torch.dtype:
    return torch.promote_types(p.dtype, torch.float32)
