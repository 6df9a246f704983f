"""Read foreign states: recognise and check them, merge several into one, and rename a parameter's entries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gwt_kernels.core.level import check_level_type
from gwt_kernels.optim.numbers import number
from gwt_kernels.rules import RULES

_OF_MUON = "ns_coefficients"
"""An option of torch.optim.Muon's groups that SGD's, whose momentum buffer is a sum, do not have."""
_NUMBERS: tuple[str, ...] = (
    "lr",
    "adamw_lr",
    "weight_decay",
    "momentum",
    "scale",
    "detail_scale",
    "res_scale",
    "norm_growth_limit",
)
_NUMBERS += ("max_grad_norm", "beta1", "beta2_decay", "decay_rate", "d", "clip_threshold")
_NUMBERS += ("initial_lr", "max_lr", "min_lr")
_OFF_WITH_NONE = ("beta1", "norm_growth_limit", "max_grad_norm")


def own_entries(
    state: Mapping[str, Any], group: Mapping[str, Any], keys: Mapping[str, str | None]
) -> dict[str, Any]:
    """Return a parameter's state under this package's names, without entries that are None or dropped by ``keys``.

    A state of ``torch.optim.Muon`` is recognised: its momentum is an average, and it counts no steps.

    Raises:
        ValueError: two entries would have one name.
    """
    of_muon = "momentum_buffer" in state and is_of_muon(group)
    if of_muon:
        keys = {"momentum_buffer": "exp_avg", **keys}
    held = [key for key, value in state.items() if value is not None]
    named: dict[str, str] = {}
    for name, key in ((keys.get(key, key), key) for key in held):
        if name in named:
            raise ValueError(
                f"the state of a parameter has {named[name]!r} and {key!r}, which would both be {name!r}: leave "
                f"one of them behind with keys={{{key!r}: None}}"
            )
        if name is not None:
            named[name] = key
    own = {name: state[key] for name, key in named.items()}
    return {"step": torch.zeros((), dtype=torch.float64, device="cpu"), **own} if of_muon else own


def is_of_muon(group: Mapping[str, Any]) -> bool:
    """Return whether a group is one of ``torch.optim.Muon`` or of ``GWTMuon``."""
    return _OF_MUON in group


def is_state(value: object) -> bool:
    """Return whether this is what ``state_dict()`` of any optimizer returns."""
    if not (isinstance(value, Mapping) and {"state", "param_groups"} <= value.keys()):
        return False
    states, groups = value["state"], value["param_groups"]
    return (
        isinstance(states, Mapping)
        and all(isinstance(state, Mapping) for state in states.values())
        and isinstance(groups, list)
        and all(isinstance(group, Mapping) and isinstance(group.get("params"), list) for group in groups)
    )


def as_one(states: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Return one state, or those of several optimizers as that of one, with the groups of one after another's.

    Raises:
        ValueError: an item is no state, or its groups are damaged.
    """
    several: list[Any] = list(states) if isinstance(states, list | tuple) else [states]
    for each in several:
        if not is_state(each):
            of = "" if each is states else f"{type(states).__name__} of "
            found = of + (str(sorted(map(str, each))[:5]) if isinstance(each, Mapping) else type(each).__name__)
            raise ValueError(
                f"no optimizer's state, of which 'state' and 'param_groups' hold dicts, but {found}: pass what "
                f"state_dict() of an optimizer returned"
            )
        if not each["param_groups"]:
            raise ValueError("the state has no groups of parameters: it is damaged; take another")
        for i, group in enumerate(each["param_groups"]):
            _check_options(group, i)
    if len(several) == 1:
        (state,) = several
        return {**state, "param_groups": [_named(group) for group in state["param_groups"]]}
    groups: list[dict[str, Any]] = []
    held: dict[Any, Any] = {}
    for i, each in enumerate(several):
        named = map(_named, each["param_groups"])
        groups += [{**group, "params": [(i, key) for key in group["params"]]} for group in named]
        held.update({(i, key): state for key, state in each["state"].items()})
    return {"state": held, "param_groups": groups}


def _named(group: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a group; if it has no names, with the keys of ``torch.distributed.checkpoint`` as its names."""
    keys = group["params"]
    is_named = group.get("param_names") is not None or not all(isinstance(key, str) for key in keys)
    return group if is_named else {**group, "param_names": list(keys)}


def _check_options(group: Mapping[str, Any], index: int) -> None:
    """Raise a ValueError unless a group's params, rule, level and numbers are valid, whatever its optimizer."""
    wrong = next((key for key in group["params"] if not isinstance(key, int | str | tuple)), None)
    if wrong is not None:
        raise ValueError(
            f"group {index} of the state has {wrong!r} among its params, which is no key of a parameter: it is "
            f"damaged; take another"
        )
    if "rule" in group and group["rule"] not in list(RULES):
        raise ValueError(
            f"group {index} of the state has rule={group['rule']!r}, which is none of "
            f"{', '.join(map(repr, RULES))}: it is damaged; take another"
        )
    if "level" in group:
        try:
            check_level_type(group["level"])
        except (TypeError, ValueError) as error:
            raise ValueError(f"group {index} of the state is damaged: {error}; take another state") from None
    for option in _NUMBERS:
        may_be_none = option in _OFF_WITH_NONE or (option == "lr" and group.get("relative_step"))
        if option in group and not (group[option] is None and may_be_none):
            _check_number(option, group[option], index)
    for option in ("betas", "eps"):
        value = group.get(option)
        if isinstance(value, list | tuple) and len(value) == 2:
            for i, each in enumerate(value):
                if not (each is None and option == "eps"):  # as of PyTorch's Adafactor
                    _check_number(f"{option}[{i}]", each, index)
        elif option == "eps" and value is not None and not isinstance(value, list | tuple):
            _check_number(option, value, index)
        elif value is not None:
            raise ValueError(
                f"group {index} of the state has {option}={value!r}, not two numbers: it is damaged; take another"
            )


def _check_number(option: str, value: Any, index: int) -> None:
    if isinstance(value, Tensor) and value.device.type != "cpu" and value.numel() == 1:
        return  # not read, which would wait for the device
    try:
        number(option, value)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"the options of group {index} of the state are damaged: {error}; take another state"
        ) from None
