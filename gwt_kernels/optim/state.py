"""One parameter's optimizer state: its entries, their initial values, and checks of a given state."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from gwt_kernels.backends import choice
from gwt_kernels.backends.torch.literal import approximation_width
from gwt_kernels.core.dtensor import is_sharded, local_of
from gwt_kernels.core.factored import FACTORS, factor_dims
from gwt_kernels.core.hyper import Span
from gwt_kernels.core.level import ROW
from gwt_kernels.distributed.heads import torn_dims
from gwt_kernels.distributed.sharding import (
    check_place_of,
    check_sharding,
    divides_rows,
    spans_of,
    zeros_like_shard,
)
from gwt_kernels.formats.moments import FORMATS, MOMENTS, SCALES, MomentFormat, wide
from gwt_kernels.optim.options import state_dtype_name
from gwt_kernels.rules import rule_of

_TENSORS = ("step", *MOMENTS, *FACTORS, *SCALES, "limiter_norm", "weight_low")
"""Entries of a state that optimizers of this package make; all are tensors."""


def is_limited(group: Mapping[str, Any]) -> bool:
    """Return whether the group's tensors have a limiter; level 0 has none."""
    return bool(group["level"]) and group["norm_growth_limit"] is not None


def slots_of(group: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the state entries of moments of the group's tensors; there is no first one with ``beta1=None``."""
    rule = rule_of(group["rule"], group["level"])
    return rule.slots[1:] if rule.is_factored and group.get("beta1", 0.0) is None else rule.slots


def factors_of(p: Tensor, group: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the state entries of factors of a parameter's second moment, and the dimensions that each keeps."""
    return factor_dims(p.dim()) if rule_of(group["rule"], group["level"]).is_factored else {}


def moment_format(p: Tensor, group: Mapping[str, Any]) -> MomentFormat:
    """Return the storage format of a parameter's moments: the group's, or float32 if they do not fit that."""
    asked = state_dtype_name(group["state_dtype"])
    if asked is None or not slots_of(group):
        return wide(p.dtype)
    known = FORMATS[asked]
    fits = known.fits(state_shape(p, group), group["level"]) and not (known.scales and row_slots_of(group))
    return known if fits else wide(torch.float32)


def row_slots_of(group: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the state entries of moments that have one number per row, or per head (rows that share one)."""
    return rule_of(group["rule"], group["level"]).row_slots


def head_rows_of(group: Mapping[str, Any]) -> int | None:
    """Return how many rows share a second moment: None for all of a tensor, 1 if the rule has no such moments."""
    head_rows: int | None = group.get("head_rows", 1) if row_slots_of(group) else 1
    return head_rows


def moments_of(p: Tensor, group: Mapping[str, Any]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Return shape and dtype of each moment of a parameter."""
    shape, row_keys = state_shape(p, group), row_slots_of(group)
    stored = zip(slots_of(group), moment_format(p, group).dtypes, strict=False)
    return {
        key: (row_shape(p, head_rows_of(group)), wide(dtype).dtypes[0]) if key in row_keys else (shape, dtype)
        for key, dtype in stored
    }


def kept_dims(
    key: str, p: Tensor, group: Mapping[str, Any], torn: tuple[int, ...] | None = None
) -> tuple[int | None, ...] | None:
    """Return the dimensions of a parameter that a state entry keeps, along which both are sharded alike.

    None means all dimensions. An entry with one number per row is whole on every process that holds a part of the
    row. An entry with one number per head is also whole along the ``torn`` dimensions, along which processes share
    heads; by default :func:`shared_dims`.
    """
    of_heads = key in row_slots_of(group)
    if p.dim() and (of_heads or (group["level"] == ROW and key in slots_of(group))):
        if torn is None:
            torn = shared_dims(p, group)
        return (*(None if of_heads and d in torn else d for d in range(p.dim() - 1)), None)
    return factors_of(p, group).get(key)


def takes_rows(group: Mapping[str, Any]) -> bool:
    """Return whether the update of an element depends on its whole row."""
    return group["level"] == ROW or bool(row_slots_of(group))


def shared_dims(p: Tensor, group: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the dimensions along which processes share heads: rows with a common second moment."""
    return torn_dims(p, head_rows_of(group))


def needs_row_sums(p: Tensor, group: Mapping[str, Any]) -> bool:
    """Return whether a step first needs sums over rows, or heads, of which processes hold parts."""
    return takes_rows(group) and (divides_rows(p) or bool(shared_dims(p, group)))


def row_shape(p: Tensor, head_rows: int | None) -> tuple[int, ...]:
    """Return the shape of moments with one number per ``head_rows`` rows; None: one for all rows."""
    if head_rows is None:
        return (1,) * p.dim()
    return (*p.shape[:-2], p.shape[-2] // head_rows, 1) if p.dim() > 1 else (1,) * p.dim()


def state_keys(p: Tensor, group: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the keys of a parameter's state under the group's options."""
    slots = slots_of(group)
    keys = ["step", *slots, *factors_of(p, group), *moment_format(p, group).scales_of(slots)]
    keys += ["limiter_norm"] if is_limited(group) else []
    keys += ["weight_low"] if group["weight_rounding"] == "split" else []
    return tuple(keys)


def complete(state: dict[str, Any], p: Tensor, group: Mapping[str, Any]) -> None:
    """Initialize an empty state, or add to an existing one what options that were turned on since then need."""
    state.update(upgraded(state, p))
    if not state:
        shape, stored, slots = state_shape(p, group), moment_format(p, group), slots_of(group)
        moments = {
            key: zeros_like_shard(p, own, dtype, kept_dims(key, p, group))
            for key, (own, dtype) in moments_of(p, group).items()
        }
        state.update(step=torch.tensor(0.0, dtype=torch.float64, device="cpu"), **moments)
        for key, dims in factors_of(p, group).items():
            state[key] = zeros_like_shard(p, [shape[d] for d in dims], _norm_dtype(p), dims)
        n = stored.n_scales(shape, group["level"])
        state.update({key: zeros_like_shard(p, (n,), torch.float32) for key in stored.scales_of(slots)})
    if is_limited(group) and "limiter_norm" not in state:
        state["limiter_norm"] = torch.zeros((), dtype=_norm_dtype(p), device=p.device)
    if group["weight_rounding"] == "split" and "weight_low" not in state:
        state["weight_low"] = zeros_like_shard(p, (*p.shape, 2), torch.uint8)


def low_bits_of(low: Tensor) -> Tensor:
    """Return this process's part of ``weight_low`` as int16 of the weights' shape, in the same memory."""
    return local_of(low).view(torch.int16).squeeze(-1)


def upgraded(state: Mapping[str, Any], p: Tensor | None = None) -> Mapping[str, Any]:
    """Convert a state of an older or a foreign checkpoint; return the same object if nothing has to change.

    ``step`` becomes a float64 tensor, ``limiter_norm`` a tensor of its own dtype if its parameter ``p`` is given,
    and ``weight_low`` bytes. Such checkpoints hold plain numbers, counts of another dtype, and int16, which
    collectives cannot transfer.
    """
    changed: dict[str, Any] = {}
    if not isinstance(state, Mapping):
        return state  # something of the user's own
    if _is_number(state.get("step")):
        changed["step"] = torch.as_tensor(_in_range(state["step"]), dtype=torch.float64, device="cpu")
    if p is not None and _is_number(state.get("limiter_norm")):
        norm = _in_range(state["limiter_norm"])
        changed["limiter_norm"] = torch.as_tensor(norm, dtype=_norm_dtype(p), device=p.device)
    step: Any = changed.get("step", state.get("step"))
    if _is_scalar(step) and (step.dtype, step.shape) != (torch.float64, ()):
        changed["step"] = step.detach().reshape(()).to(torch.float64)
    low = state.get("weight_low")
    if isinstance(low, Tensor) and low.dtype == torch.int16:
        changed["weight_low"] = zeros_like_shard(low, (*low.shape, 2), torch.uint8)
        low_bits_of(changed["weight_low"]).copy_(local_of(low))
    return {**state, **changed} if changed else state


def _is_scalar(x: object) -> bool:
    """Return whether ``x`` is a tensor of one real number that can be read."""
    dense = isinstance(x, Tensor) and x.layout == torch.strided and x.device.type != "meta"
    return dense and isinstance(x, Tensor) and x.numel() == 1 and not x.is_complex()


def _in_range(value: Any) -> Any:
    """Return the number, or infinity of its sign if it is too large for a float; checks refuse that later."""
    try:
        float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf
    except (TypeError, ValueError):  # an array
        pass
    return value


def _is_number(value: object) -> bool:
    """Return whether ``value`` is a number of Python or NumPy."""
    return (isinstance(value, Real) and not isinstance(value, bool)) or type(value).__module__ == "numpy"


def check_state(
    state: Mapping[str, Any], p: Tensor, group: Mapping[str, Any], name: str, keys: Iterable[str]
) -> None:
    """Raise unless ``state`` has the ``keys`` and fits a step of ``p`` under the group's options."""
    own = [key for key in _TENSORS if key in state]
    missing = [key for key in dict.fromkeys((*keys, *own)) if not isinstance(state.get(key), Tensor)]
    if missing:
        raise ValueError(
            f"the state of {name} lacks {', '.join(missing)}: it was not made by an optimizer with these options "
            f"(level={group['level']}, norm_growth_limit={group['norm_growth_limit']}); load one that was, or "
            f"clear it to begin anew"
        )
    for key in own:
        check_memory(state[key], f"{key} of {name}")
    shape, stored, slots = state_shape(p, group), moment_format(p, group), slots_of(group)
    factors = factors_of(p, group)
    if stray := [key for key in (*MOMENTS, *FACTORS) if key in state and key not in (*slots, *factors)]:
        raise ValueError(
            f"the state of {name} has {stray[0]}, which rule={group['rule']!r} does not keep: load the state that "
            f"belongs to it, or convert it with gwt_kernels.migrate"
        )
    kept = moments_of(p, group)
    kept |= {key: (tuple(shape[d] for d in dims), _norm_dtype(p)) for key, dims in factors.items()}
    for key, (own_shape, dtype) in kept.items():
        if tuple(state[key].shape) != own_shape:
            asked = f"level {group['level']} with wavelet {group['wavelet']!r}"
            if key in row_slots_of(group):
                asked = f"head_rows={head_rows_of(group)}"
            raise ValueError(
                f"{key} of {name} has shape {tuple(state[key].shape)}, but {asked} needs {own_shape}: use the "
                f"options and the model that the state was made with, or gwt_kernels.migrate for other options"
            )
        if state[key].dtype != dtype:
            wider = {"limiter_norm", *factors} & state.keys()  # their dtypes follow the parameter's alone
            follows = key not in {*factors, *row_slots_of(group)} and all(
                state[each].dtype == _norm_dtype(p) for each in wider
            )
            other = f"give it state_dtype={state[key].dtype}, or " if follows else ""
            raise ValueError(
                f"{key} of {name} is {state[key].dtype}, but the optimizer keeps {dtype}: {other}convert the state "
                f"with gwt_kernels.migrate"
            )
    n = stored.n_scales(shape, group["level"])
    for key in [key for key in SCALES if key in state]:
        if key not in stored.scales_of(slots):
            raise ValueError(
                f"the state of {name} has {key}, but no moments with such scales: load the state that it belongs to"
            )
        if tuple(state[key].shape) != (n,) or state[key].dtype != torch.float32:
            raise ValueError(
                f"{key} of {name} is {state[key].dtype} of shape {tuple(state[key].shape)}, but needs to be "
                f"float32 of shape {(n,)}, a number per {stored.block_size(group['level'])} values"
            )
    for key in {*MOMENTS, *FACTORS, *SCALES, "weight_low"} & state.keys():
        check_place_of(state[key], key, p, name, kept_dims(key, p, group))
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
    told = state["step"].device.type == "cpu" and not choice.is_symbolic()  # without waiting for a device
    if told and not 0 <= float(state["step"]) < math.inf:
        raise ValueError(f"step of {name} is {float(state['step'])}: it must be the number of steps so far")


def check_place(state: Mapping[str, Any], p: Tensor, name: str) -> None:
    """Raise unless the tensors of ``state`` are on ``p``'s device, contiguous and allocated, as kernels need."""
    for key in {*MOMENTS, *FACTORS, *SCALES, "limiter_norm", "weight_low"} & state.keys():
        if state[key].device != p.device or not local_of(state[key]).is_contiguous():
            raise ValueError(
                f"{key} of {name} is on {state[key].device} with strides {state[key].stride()}: move it to "
                f"{p.device} and make it contiguous"
            )


def check_memory(x: Tensor, name: str) -> None:
    """Raise unless the memory of a tensor, whose address is passed to C or to a kernel, is allocated."""
    x = local_of(x)
    if not x.numel() or choice.is_symbolic() or not torch._C._has_storage(x):
        return
    end = x.storage_offset() + 1 + sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
    held = x.untyped_storage().nbytes()
    if held < end * x.element_size():
        raise ValueError(
            f"{name} needs {end * x.element_size()} bytes of memory, of which {held} are there: it was freed, so "
            f"bring it back first"
        )


def exact_copy(name: str, value: Any, p: Tensor, group: Mapping[str, Any]) -> Any:
    """Return a copy, bit for bit, of one state entry on the device where ``p``'s state keeps it."""
    if not isinstance(value, Tensor):
        return value
    device = torch.device("cpu") if name == "step" else p.device
    if is_sharded(value):
        copy = zeros_like_shard(p, value.shape, value.dtype, kept_dims(name, p, group))
        local_of(copy).copy_(local_of(value))
        return copy
    return value.detach().to(device=device, copy=True, memory_format=torch.contiguous_format)


def check_shards(p: Tensor, group: Mapping[str, Any], name: str) -> None:
    """Raise unless the group's options can be applied to this process's shard of ``p``."""
    stored = moment_format(p, group)
    random = stored.is_random or group["weight_rounding"] == "stochastic"
    check_sharding(p, group, name, state_shape(p, group), stored.block_size(group["level"]), random)


def shard_spans(p: Tensor, group: Mapping[str, Any]) -> tuple[Span, Span]:
    """Return the positions of this process's shard of ``p``, and of its moments, in the whole."""
    return spans_of(p, state_shape(p, group), group["level"])


def state_shape(p: Tensor, group: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the shape of a parameter's moments."""
    if group["level"] == 0 or not p.dim():
        return tuple(p.shape)
    return (*p.shape[:-1], approximation_width(p.shape[-1], group["level"], group["wavelet"]))


def _norm_dtype(p: Tensor) -> torch.dtype:
    return torch.promote_types(p.dtype, torch.float32)
