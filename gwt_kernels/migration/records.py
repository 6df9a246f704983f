"""Records of one parameter's migration, and what moments and factors have in common in it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gwt_kernels.migration.conversion import Form, form_of
from gwt_kernels.optim.numbers import number
from gwt_kernels.optim.options import ADDED, check_group
from gwt_kernels.optim.state import check_state, state_keys

_OF_DETAILS = ("detail_scale", "res_scale")
"""Names of the factor on details in groups."""


class Migrated(NamedTuple):
    """How one tensor's state was carried over."""

    name: str
    """Name of the parameter, or its index among all if it has none."""
    before: Form
    after: Form
    notes: dict[str, str]
    """For each entry of the state ``exact``, ``approximate``, ``new`` or ``dropped``, and how."""
    bytes_before: int
    bytes_after: int


class Source(NamedTuple):
    """One parameter's old state."""

    name: str | None
    group: Mapping[str, Any]
    state: Mapping[str, Any]
    size: int
    """Bytes of the state as it was passed."""


class Target(NamedTuple):
    """One parameter of the new optimizer."""

    name: str | None
    label: str
    param: Tensor
    group: dict[str, Any]

    @property
    def title(self) -> str:
        """Its name, or its index among all."""
        return self.label.split(" ")[1] if self.name is None else self.name


def number_in(state: Mapping[str, Any], key: str) -> float:
    """Return a number of a state, such as its step count; 0 if it has none.

    Raises:
        ValueError: it is no single real number, not finite, or below 0.
    """
    value = state.get(key, 0.0)
    try:
        found = number(key, value.cpu() if isinstance(value, Tensor) else value)
    except (TypeError, ValueError):
        found = math.nan
    if not 0 <= found < math.inf:
        raise ValueError(f"its {key} is {value}, not a finite number of at least 0: take another state")
    return found


def bytes_of_state(state: Mapping[str, Any]) -> int:
    """Return the bytes of a state's tensors."""
    return sum(x.numel() * x.element_size() for x in state.values() if isinstance(x, Tensor))


def form_of_options(source: Source, defaults: Mapping[str, Any], shape: torch.Size, dtype: torch.dtype) -> Form:
    """Return the form of a state's moments by its group's options, which have a level; ``defaults`` for others.

    The factor on details is left out: moments do not depend on it, and the state's rule may have none.
    """
    unscaled = {key: value for key, value in defaults.items() if key not in _OF_DETAILS}
    options = {**unscaled, **ADDED, **source.group, "backend": None}
    try:
        check_group(options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the options of its state are damaged: {error}") from None
    return form_of(options, shape, dtype)


def finished(
    state: dict[str, Tensor],
    notes: dict[str, str],
    source: Source,
    target: Target,
    p: Tensor,
    forms: tuple[Form, Form],
) -> tuple[dict[str, Tensor], Migrated]:
    """Add the weights' low bits to a state, of moments or of factors, check it, and order its entries."""
    keys, low = state_keys(p, target.group), source.state.get("weight_low")
    if "weight_low" in keys and "weight_low" not in state:
        fresh = torch.zeros((*p.shape, 2), dtype=torch.uint8, device=next(reversed(state.values())).device)
        state["weight_low"] = fresh if low is None else low.detach().clone()
        notes["weight_low"] = "new: zeros, the weights are as they are" if low is None else "exact"
    elif low is not None and "weight_low" not in keys:
        notes["weight_low"] = "dropped: the weights go on from their 16 bits"
    check_state(state, p, target.group, target.label, keys)
    state = {key: state[key] for key in keys}
    return state, Migrated(target.title, *forms, notes, source.size, bytes_of_state(state))
