"""States as they come: whether something is one, several as one, and what others call a parameter's entries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

_OF_MUON = "ns_coefficients"
"""An option that torch.optim.Muon's groups have, and SGD's, whose buffer is a sum, do not."""


def own_entries(
    state: Mapping[str, Any], group: Mapping[str, Any], keys: Mapping[str, str | None]
) -> dict[str, Any]:
    """A parameter's state by the names that are used here, without what is to be left behind or is not there.

    That of ``torch.optim.Muon`` is recognised: its momentum is an average, and it counts no steps.
    """
    if "momentum_buffer" in state and is_of_muon(group):
        keys = {"momentum_buffer": "exp_avg", **keys}
        state = {"step": torch.zeros((), dtype=torch.float64, device="cpu"), **state}
    named = ((keys.get(key, key), value) for key, value in state.items())
    return {key: value for key, value in named if key is not None and value is not None}


def is_of_muon(group: Mapping[str, Any]) -> bool:
    """Whether a group is one of ``torch.optim.Muon`` or of ``GWTMuon``."""
    return _OF_MUON in group


def is_state(value: object) -> bool:
    """Whether this is what an optimizer's ``state_dict()`` returns, whatever the optimizer."""
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
    """A state as it is, or several optimizers' as that of one, the groups of each after those of the one before.

    Raises:
        ValueError: One of them is no state.
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
    if len(several) == 1:
        (state,) = several
        return dict(state)
    groups: list[dict[str, Any]] = []
    held: dict[Any, Any] = {}
    for i, each in enumerate(several):
        groups += [{**group, "params": [(i, key) for key in group["params"]]} for group in each["param_groups"]]
        held.update({(i, key): state for key, state in each["state"].items()})
    return {"state": held, "param_groups": groups}
