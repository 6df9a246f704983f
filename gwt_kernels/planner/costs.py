"""Bytes of weights, gradients and optimizer state, and bytes that a step reads and writes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from gwt_kernels.core.factored import FACTORS
from gwt_kernels.formats.moments import MOMENTS, SCALES
from gwt_kernels.optim.matrices import matrix_options
from gwt_kernels.optim.options import state_dtype_name
from gwt_kernels.optim.state import complete, head_rows_of, row_slots_of, slots_of


def stand_in(p: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return a meta tensor with the shape of `p`, and its dtype unless another is named."""
    dtype = dtype if dtype is not None and p.is_floating_point() else p.dtype
    return torch.empty(p.shape, dtype=dtype, device="meta")


def first_state(p: Tensor, group: Mapping[str, Any], state_dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Return the state of `p` after one step with a group's options; `state_dtype` replaces the moments' dtype."""
    if "level" not in group:
        extra = {"max_exp_avg_sq": stand_in(p)} if group["amsgrad"] else {}
        return adamw_state(p, p.dtype) | extra
    state: dict[str, Tensor] = {}
    offered = is_offered(state_dtype)
    name = group["state_dtype"] if state_dtype is None or not offered else state_dtype_name(state_dtype)
    complete(state, stand_in(p), {**group, "state_dtype": name})
    if not offered:
        of_rows = row_slots_of(group)  # which stay float32 or wider
        state |= {key: state[key].to(state_dtype) for key in slots_of(group) if key not in of_rows}
    return state


def adamw_state(p: Tensor, moments: torch.dtype) -> dict[str, Tensor]:
    """Return the state that ``torch.optim.AdamW`` keeps for `p`, with moments of this dtype."""
    return {
        "step": torch.zeros((), dtype=torch.float32, device="cpu"),
        **{key: stand_in(p, moments) for key in MOMENTS},
    }


def is_offered(state_dtype: torch.dtype | None) -> bool:
    """Return whether the optimizers support moments of this dtype."""
    try:
        state_dtype_name(state_dtype)
    except ValueError:
        return False
    return True


def pass_bytes(p: Tensor, state: Mapping[str, Tensor], group: Mapping[str, Any] | None = None) -> int:
    """Return the bytes that a step reads and writes for a parameter, without the limiter's second read.

    For a matrix stage these are the bytes of the element-wise passes: one writes the matrix, another reads it. A
    gradient whose rows share second moments is read once more, before the pass.
    """
    options = None if group is None else matrix_options(group)
    matrices = 0 if options is None else 2 * p.numel() * options.newton_schulz.dtype.itemsize
    sums = 0 if group is None or head_rows_of(group) == 1 else bytes_of(p)
    low = bytes_of(*(state[key] for key in ("weight_low",) if key in state))
    # 3: p is read and written, its gradient (of p's dtype) is read.
    return 3 * bytes_of(p) + 2 * (_moment_bytes(state) + low) + matrices + sums


def limiter_bytes(p: Tensor, state: Mapping[str, Tensor]) -> int:
    """Return the bytes of the limiter's second read, or of two more reads of gradients for factors; else 0."""
    if FACTORS[0] in state:
        return 2 * bytes_of(p)
    return bytes_of(p) + _moment_bytes(state) if "limiter_norm" in state else 0


def _moment_bytes(state: Mapping[str, Tensor]) -> int:
    return bytes_of(*(state[key] for key in (*MOMENTS, *FACTORS, *SCALES) if key in state))


def bytes_of(*tensors: Tensor) -> int:
    """Return the bytes of all elements of the tensors."""
    return sum(x.numel() * x.element_size() for x in tensors)


def name_of_dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def names_of(dtypes: Iterable[torch.dtype]) -> str:
    return ", ".join(sorted(map(name_of_dtype, dtypes)))
