"""Bytes of weights, gradients and state, and the bytes that a step moves of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from gwt_kernels.core.factored import FACTORS
from gwt_kernels.formats.moments import MOMENTS, SCALES
from gwt_kernels.optim.matrices import matrix_options
from gwt_kernels.optim.options import state_dtype_name
from gwt_kernels.optim.state import complete, slots_of

__all__ = [
    "adamw_state",
    "bytes_of",
    "first_state",
    "is_offered",
    "limiter_bytes",
    "name_of_dtype",
    "names_of",
    "pass_bytes",
    "stand_in",
]


def stand_in(p: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor like `p` that takes no memory."""
    dtype = dtype if dtype is not None and p.is_floating_point() else p.dtype
    return torch.empty(p.shape, dtype=dtype, device="meta")


def first_state(p: Tensor, group: Mapping[str, Any], state_dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The state that a first step makes for `p` under a group's options, but with moments of `state_dtype`."""
    if "level" not in group:
        extra = {"max_exp_avg_sq": stand_in(p)} if group["amsgrad"] else {}
        return adamw_state(p, p.dtype) | extra
    state: dict[str, Tensor] = {}
    offered = is_offered(state_dtype)
    own = group["state_dtype"] if state_dtype is None or not offered else state_dtype_name(state_dtype)
    complete(state, stand_in(p), {**group, "state_dtype": own})
    if not offered:
        state |= {key: state[key].to(state_dtype) for key in slots_of(group)}
    return state


def adamw_state(p: Tensor, moments: torch.dtype) -> dict[str, Tensor]:
    """What ``torch.optim.AdamW`` holds for `p`: moments in the weights' dtype if nobody says otherwise."""
    return {
        "step": torch.zeros((), dtype=torch.float32, device="cpu"),
        **{key: stand_in(p, moments) for key in MOMENTS},
    }


def is_offered(state_dtype: torch.dtype | None) -> bool:
    """Whether `GWTAdamW` takes moments of this dtype."""
    try:
        state_dtype_name(state_dtype)
    except ValueError:
        return False
    return True


def pass_bytes(p: Tensor, state: Mapping[str, Tensor], group: Mapping[str, Any] | None = None) -> int:
    """Bytes that a step moves of a parameter with this state: all but the limiter's second read.

    A matrix stage's are those of the element-wise passes: its matrices are written by one and read by the other.
    """
    options = None if group is None else matrix_options(group)
    matrices = 0 if options is None else 2 * p.numel() * options.newton_schulz.dtype.itemsize
    return (
        3 * bytes_of(p) + 2 * _moment_bytes(state) + matrices
    )  # a gradient, of p's dtype, is read and not written


def limiter_bytes(p: Tensor, state: Mapping[str, Tensor]) -> int:
    """Bytes of the limiter's second read, or of the two that factors need; 0 where there is neither."""
    if FACTORS[0] in state:
        return 2 * bytes_of(p)
    return bytes_of(p) + _moment_bytes(state) if "limiter_norm" in state else 0


def _moment_bytes(state: Mapping[str, Tensor]) -> int:
    return bytes_of(*(state[key] for key in (*MOMENTS, *FACTORS, *SCALES) if key in state))


def bytes_of(*tensors: Tensor) -> int:
    """Bytes of all elements of the tensors."""
    return sum(x.numel() * x.element_size() for x in tensors)


def name_of_dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def names_of(dtypes: Iterable[torch.dtype]) -> str:
    return ", ".join(sorted(map(name_of_dtype, dtypes)))
