"""Completion of a state dict when it is saved; checks and bitwise copies before one is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim.optimizer import Optimizer

from gwt_kernels.backends import choice
from gwt_kernels.optim.checks import check_rounding_of, label_of, name_of
from gwt_kernels.optim.matrices import check_matrix, check_matrix_options
from gwt_kernels.optim.names import in_order_of
from gwt_kernels.optim.options import ADDED, STRUCTURAL, check_group
from gwt_kernels.optim.state import (
    check_memory,
    check_state,
    complete,
    exact_copy,
    row_slots_of,
    state_keys,
    upgraded,
)
from gwt_kernels.rules import RULES, rule_of


def check_places(states: Mapping[Any, Any], groups: Sequence[Mapping[str, Any]]) -> None:
    """Raise a ValueError if a state belongs to a parameter in no group, which has no index in a state dict."""
    placed = {p for group in groups for p in group["params"]}
    if gone := [p for p in states if isinstance(p, Tensor) and p not in placed]:
        raise ValueError(
            f"there are states of {len(gone)} parameters that are in no group any more, such as one of shape "
            f"{tuple(gone[0].shape)}: put them back into a group, or delete their entries from optimizer.state"
        )


def complete_saved(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    """Add the entries that a parameter's next step would add, since an option was turned on after its last one.

    A frozen parameter, for instance, takes no step that would add them. The optimizer's own states do not change.
    """
    states = state_dict["state"]
    for saved, group in zip(state_dict["param_groups"], optimizer.param_groups, strict=True):
        for key, p in zip(saved["params"], group["params"], strict=True):
            held = states.get(key)
            if held and isinstance(held, Mapping):
                whole = dict(held)
                complete(whole, p, group)
                if whole.keys() != held.keys():
                    states[key] = whole


def check_and_set_aside(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Check a state before it is loaded, and hide its tensors from the base class, which would cast them."""
    if not {"state", "param_groups"} <= state_dict.keys():
        raise ValueError(
            f"the state has the keys {sorted(map(str, state_dict))[:5]}, but needs 'state' and 'param_groups': "
            f"pass what the optimizer's state_dict() returned"
        )
    _check_containers(state_dict)
    added, groups = ADDED.items(), optimizer.param_groups
    saved_groups = [
        {**g, **{k: v for k, v in added if k not in g}} for g in in_order_of(groups, state_dict["param_groups"])
    ]
    if [len(g["params"]) for g in saved_groups] != [len(g["params"]) for g in groups]:
        raise ValueError(
            f"the state has groups of {[len(g['params']) for g in saved_groups]} parameters, the optimizer of "
            f"{[len(g['params']) for g in groups]}: build the optimizer from the same model and groups, or "
            f"convert the state with gwt_kernels.migrate"
        )
    set_aside: dict[Any, Any] = {}
    for i, (saved, group) in enumerate(zip(saved_groups, groups, strict=True)):
        for option in (*STRUCTURAL, "head_rows"):
            if option == "head_rows" and not row_slots_of(group):
                continue
            if option not in saved:
                raise ValueError(
                    f"group {i} of the state has no {option!r}: it was not saved by this package; "
                    f"gwt_kernels.migrate takes over an AdamW's, and a Muon's"
                )
            if option == "rule" and _name_at_level(saved) == _name_at_level(group):
                continue  # older checkpoints have another name at level 0
            if option == "state_dtype" and _spelled(saved[option]) == _spelled(group[option]):
                continue  # a user may have set a torch.dtype in a group
            if saved[option] != group[option]:
                raise ValueError(
                    f"group {i} of the state has {option}={saved[option]!r}, the optimizer "
                    f"{option}={group[option]!r}: build the optimizer with the state's value, or convert the state "
                    f"with gwt_kernels.migrate"
                )
        if (saved.get("weight_rounding") == "split") != (group["weight_rounding"] == "split"):
            raise ValueError(
                f"group {i} of the state has weight_rounding={saved.get('weight_rounding')!r}, the optimizer "
                f"weight_rounding={group['weight_rounding']!r}: with 'split' half of each weight is in the state, "
                f"so build the optimizer with the state's value, or convert the state with gwt_kernels.migrate"
            )
        options = {**optimizer.defaults, **saved, "rule": group["rule"], "backend": group["backend"]}
        check_group(options, capturable=getattr(optimizer, "capturable", False))
        check_matrix_options(options)
        for k, (key, p) in enumerate(zip(saved["params"], group["params"], strict=True)):
            check_rounding_of(p, options, name_of(group, k, i))
            check_matrix(p, options, label_of(group, k, i))
            held = state_dict["state"].get(key, {})
            if not isinstance(held, Mapping):
                raise ValueError(
                    f"the state of {name_of(group, k, i)} is a {type(held).__name__}, not a dict: it is damaged; "
                    f"take another"
                )
            for entry, value in held.items():  # all tensors are copied
                if isinstance(value, Tensor):
                    check_memory(value, f"{entry} of {name_of(group, k, i)}")
            if state := upgraded(held, p):
                check_state(state, p, options, name_of(group, k, i), state_keys(p, options))
                _check_norm(state, name_of(group, k, i))
                set_aside[p] = {name: exact_copy(name, value, p, options) for name, value in state.items()}
    unknown = state_dict["state"].keys() - {key for g in saved_groups for key in g["params"]}
    set_aside.update({key: state_dict["state"][key] for key in unknown})
    optimizer.__dict__["_set_aside"] = set_aside
    new_groups = [
        {**saved, "rule": group["rule"], "backend": group["backend"]}
        for saved, group in zip(saved_groups, groups, strict=True)
    ]
    return {**state_dict, "state": {}, "param_groups": new_groups}


def _check_containers(state_dict: Mapping[str, Any]) -> None:
    """Raise a ValueError unless states and groups are in containers as those of ``state_dict()``."""
    states, groups = state_dict["state"], state_dict["param_groups"]
    if not isinstance(states, Mapping):
        raise ValueError(
            f"'state' is a {type(states).__name__}, not a dict by parameter: it is damaged; take another"
        )
    if not isinstance(groups, list | tuple):
        raise ValueError(f"'param_groups' is a {type(groups).__name__}, not a list: it is damaged; take another")
    for i, group in enumerate(groups):
        if not isinstance(group, Mapping) or not isinstance(group.get("params"), list | tuple):
            raise ValueError(f"group {i} of the state is no dict with a list 'params': it is damaged; take another")
        names = group.get("param_names")
        if not isinstance(names, list | tuple | None):
            raise ValueError(
                f"'param_names' of group {i} of the state is of type {type(names).__name__}, not a list: it is "
                f"damaged; take another"
            )


def _check_norm(state: Mapping[str, Any], name: str) -> None:
    """Raise a ValueError if the limiter's norm is negative or NaN; on a device it is not read."""
    norm = state.get("limiter_norm")
    if isinstance(norm, Tensor) and norm.device.type == "cpu" and not choice.is_symbolic() and not float(norm) >= 0:
        raise ValueError(
            f"limiter_norm of {name} is {float(norm)}, not a norm: load the state of an earlier step, or set it to "
            f"0, which limits nothing in the next step"
        )


def _name_at_level(group: dict[str, Any]) -> Any:
    """Return the name of the group's rule at its level."""
    rule = group["rule"]
    return rule_of(rule, group["level"]).name if isinstance(rule, str) and rule in RULES else rule


def _spelled(state_dtype: object) -> str:
    """Return the text of a dtype, or of its name, without ``torch.``."""
    return str(state_dtype).removeprefix("torch.")
