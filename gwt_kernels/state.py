"""One parameter's optimizer state: what it holds, how it begins, and whether a given one fits."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from gwt_kernels import backends
from gwt_kernels.core.dtensor import is_sharded, local_of
from gwt_kernels.hyper import Span, quantum
from gwt_kernels.options import state_dtype_of
from gwt_kernels.sharding import check_place_of, check_sharding, spans_of, zeros_like_shard
from gwt_kernels.torch_backend.literal import approximation_width

__all__ = [
    "DEEPEST_QUANTIZED",
    "MOMENTS",
    "SCALES",
    "SMALLEST_QUANTIZED",
    "check_memory",
    "check_place",
    "check_shards",
    "check_state",
    "complete",
    "exact_copy",
    "halves_of",
    "is_limited",
    "is_quantized",
    "moment_dtypes",
    "shard_spans",
    "state_keys",
    "state_shape",
    "upgraded",
]

MOMENTS = ("exp_avg", "exp_avg_sq")
SCALES = ("exp_avg_scale", "exp_avg_sq_scale")

SMALLEST_QUANTIZED = 4096
"""Coefficients below which int8 moments stay float32: they cost little, and norms and biases are among them."""
DEEPEST_QUANTIZED = 6
"""Level beyond which they stay float32: a scale would serve so few codes that it costs more than they save."""


def is_limited(group: Mapping[str, Any]) -> bool:
    """Whether the group's tensors have a limiter: level 0 has none."""
    return bool(group["level"]) and group["norm_growth_limit"] is not None


def is_quantized(p: Tensor, group: Mapping[str, Any]) -> bool:
    """Whether a parameter's moments are codes of one byte: small tensors and deep levels stay float32."""
    return (
        group["state_dtype"] == "int8"
        and group["level"] <= DEEPEST_QUANTIZED
        and math.prod(state_shape(p, group)) >= SMALLEST_QUANTIZED
    )


def moment_dtypes(p: Tensor, group: Mapping[str, Any]) -> tuple[torch.dtype, torch.dtype]:
    """dtypes of ``exp_avg`` and ``exp_avg_sq``."""
    if is_quantized(p, group):
        return torch.int8, torch.uint8
    dtype = torch.float32 if group["state_dtype"] == "int8" else state_dtype_of(p, group["state_dtype"])
    return dtype, dtype


def state_keys(p: Tensor, group: Mapping[str, Any]) -> tuple[str, ...]:
    """What a parameter's state under the group's options holds."""
    keys = ["step", *MOMENTS]
    keys += SCALES if is_quantized(p, group) else []
    keys += ["limiter_norm"] if is_limited(group) else []
    keys += ["weight_low"] if group["weight_rounding"] == "split" else []
    return tuple(keys)


def complete(state: dict[str, Any], p: Tensor, group: Mapping[str, Any]) -> None:
    """Make the state of a first step; of a later one, what an option turned on since then needs."""
    state.update(upgraded(state, p))
    if not state:
        shape = state_shape(p, group)
        moments = {
            key: zeros_like_shard(p, shape, dtype)
            for key, dtype in zip(MOMENTS, moment_dtypes(p, group), strict=True)
        }
        state.update(step=torch.tensor(0.0, dtype=torch.float64, device="cpu"), **moments)
        if is_quantized(p, group):
            n = _quanta(p, group)
            state.update({key: zeros_like_shard(p, (n,), torch.float32) for key in SCALES})
    if is_limited(group) and "limiter_norm" not in state:
        state["limiter_norm"] = torch.zeros((), dtype=_norm_dtype(p), device=p.device)
    if group["weight_rounding"] == "split" and "weight_low" not in state:
        state["weight_low"] = zeros_like_shard(p, (*p.shape, 2), torch.uint8)


def halves_of(low: Tensor) -> Tensor:
    """What this process holds of ``weight_low``, int16 of the weights' shape: the same memory."""
    return local_of(low).view(torch.int16).squeeze(-1)


def upgraded(state: Mapping[str, Any], p: Tensor | None = None) -> Mapping[str, Any]:
    """A state as it is kept now, from an older or a foreign checkpoint; the very same where nothing has to change.

    ``step`` is a float64 tensor, ``limiter_norm`` one of its own dtype if it is known whose (``p``), and
    ``weight_low`` bytes: others hold plain numbers, counts of another dtype, and int16, which no process can send
    another.
    """
    changed: dict[str, Any] = {}
    if not isinstance(state, Mapping):
        return state  # something of the user's own
    if _is_number(state.get("step")):
        changed["step"] = torch.as_tensor(state["step"], dtype=torch.float64, device="cpu")
    if p is not None and _is_number(state.get("limiter_norm")):
        changed["limiter_norm"] = torch.as_tensor(state["limiter_norm"], dtype=_norm_dtype(p), device=p.device)
    step: Any = changed.get("step", state.get("step"))
    if _is_scalar(step) and (step.dtype, step.shape) != (torch.float64, ()):
        changed["step"] = step.detach().reshape(()).to(torch.float64)
    low = state.get("weight_low")
    if isinstance(low, Tensor) and low.dtype == torch.int16:
        changed["weight_low"] = zeros_like_shard(low, (*low.shape, 2), torch.uint8)
        halves_of(changed["weight_low"]).copy_(local_of(low))
    return {**state, **changed} if changed else state


def _is_scalar(x: object) -> bool:
    """Whether ``x`` is a tensor of one real number that can be read."""
    dense = isinstance(x, Tensor) and x.layout == torch.strided and x.device.type != "meta"
    return dense and isinstance(x, Tensor) and x.numel() == 1 and not x.is_complex()


def _is_number(value: object) -> bool:
    """Whether ``value`` is a number of Python or NumPy."""
    return (isinstance(value, Real) and not isinstance(value, bool)) or type(value).__module__ == "numpy"


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
    shape = state_shape(p, group)
    for key, dtype in zip(MOMENTS, moment_dtypes(p, group), strict=True):
        if tuple(state[key].shape) != shape:
            raise ValueError(
                f"{key} of {name} has shape {tuple(state[key].shape)}, but level {group['level']} with wavelet "
                f"{group['wavelet']!r} needs {shape}: use the options and the model that the state was made with, "
                f"or gwt_kernels.migrate for other options"
            )
        if state[key].dtype != dtype:
            raise ValueError(
                f"{key} of {name} is {state[key].dtype}, but the optimizer keeps {dtype}: give it "
                f"state_dtype={state[key].dtype}, or convert the state with gwt_kernels.migrate"
            )
    for key in [key for key in SCALES if key in state]:
        if not is_quantized(p, group):
            raise ValueError(
                f"the state of {name} has {key}, but no int8 moments: load the state that it belongs to"
            )
        if tuple(state[key].shape) != (_quanta(p, group),) or state[key].dtype != torch.float32:
            raise ValueError(
                f"{key} of {name} is {state[key].dtype} of shape {tuple(state[key].shape)}, but needs to be "
                f"float32 of shape {(_quanta(p, group),)}, a number per {quantum(group['level'])} codes"
            )
    for key in {*MOMENTS, *SCALES, "weight_low"} & state.keys():
        check_place_of(state[key], key, p, name)
    for key in {"step", "limiter_norm"} & state.keys():
        if state[key].numel() != 1:
            raise ValueError(f"{key} of {name} has shape {tuple(state[key].shape)}: make it a scalar")
        if not _is_scalar(state[key]) and p.device.type != "meta":
            raise ValueError(
                f"{key} of {name} is a {state[key].dtype} tensor, {state[key].layout}, on {state[key].device}: "
                f"make it a dense tensor of one real number"
            )
    if "weight_low" in state:
        if group["weight_rounding"] != "split":
            raise ValueError(
                f"the state of {name} has weight_low, half of each float32 weight, which the optimizer would drop: "
                f"give it weight_rounding='split', or let gwt_kernels.migrate drop it"
            )
        low, expected = state["weight_low"], (*p.shape, 2)
        if tuple(low.shape) != expected or low.dtype != torch.uint8:
            raise ValueError(
                f"weight_low of {name} is {low.dtype} of shape {tuple(low.shape)}, but needs to be uint8 of shape "
                f"{expected}: use the model that the state was made with"
            )
    if "limiter_norm" in state and state["limiter_norm"].dtype != _norm_dtype(p):
        raise ValueError(
            f"limiter_norm of {name} is {state['limiter_norm'].dtype}, but the optimizer keeps {_norm_dtype(p)}: "
            f"convert the state with gwt_kernels.migrate"
        )
    told = state["step"].device.type == "cpu" and not backends.is_symbolic()  # without waiting for a device
    if told and not 0 <= float(state["step"]) < math.inf:
        raise ValueError(f"step of {name} is {float(state['step'])}: it must be the number of steps so far")


def check_place(state: Mapping[str, Any], p: Tensor, name: str) -> None:
    """Raise unless a kernel can take the tensors of ``state`` as they lie in memory."""
    for key in {*MOMENTS, *SCALES, "limiter_norm", "weight_low"} & state.keys():
        if state[key].device != p.device or not local_of(state[key]).is_contiguous():
            raise ValueError(
                f"{key} of {name} is on {state[key].device} with strides {state[key].stride()}: move it to "
                f"{p.device} and make it contiguous"
            )
    for key in {*MOMENTS, *SCALES, "limiter_norm", "weight_low", "step"} & state.keys():
        check_memory(state[key], f"{key} of {name}")


def check_memory(x: Tensor, name: str) -> None:
    """Raise unless the memory of a tensor, whose address goes to C or to a kernel, is there."""
    x = local_of(x)
    if not x.numel() or backends.is_symbolic() or not torch._C._has_storage(x):
        return
    end = x.storage_offset() + 1 + sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
    held = x.untyped_storage().nbytes()
    if held < end * x.element_size():
        raise ValueError(
            f"{name} needs {end * x.element_size()} bytes of memory, of which {held} are there: it was freed, so "
            f"bring it back before the step"
        )


def exact_copy(name: str, value: Any, p: Tensor) -> Any:
    """A copy of one entry of a state, bit for bit, where ``p``'s state keeps it."""
    if not isinstance(value, Tensor):
        return value
    device = torch.device("cpu") if name == "step" else p.device
    if is_sharded(value):
        copy = zeros_like_shard(p, value.shape, value.dtype)
        local_of(copy).copy_(local_of(value))
        return copy
    return value.detach().to(device=device, copy=True, memory_format=torch.contiguous_format)


def check_shards(p: Tensor, group: Mapping[str, Any], name: str) -> None:
    """Raise unless what this process holds of ``p`` is what the group's options can be applied to."""
    quantized = is_quantized(p, group)
    random = quantized or torch.bfloat16 in moment_dtypes(p, group) or group["weight_rounding"] == "stochastic"
    check_sharding(p, group, name, state_shape(p, group), quantized, random)


def shard_spans(p: Tensor, group: Mapping[str, Any]) -> tuple[Span, Span]:
    """Where what this process holds of ``p``, and of its moments, lies in the whole."""
    return spans_of(p, state_shape(p, group))


def state_shape(p: Tensor, group: Mapping[str, Any]) -> tuple[int, ...]:
    """Shape of the moments of a parameter."""
    if group["level"] == 0:
        return tuple(p.shape)
    return (*p.shape[:-1], approximation_width(p.shape[-1], group["level"], group["wavelet"]))


def _quanta(p: Tensor, group: Mapping[str, Any]) -> int:
    return -(-math.prod(state_shape(p, group)) // quantum(group["level"]))


def _norm_dtype(p: Tensor) -> torch.dtype:
    return torch.promote_types(p.dtype, torch.float32)
