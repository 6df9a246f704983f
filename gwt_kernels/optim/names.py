"""Parameter names without prefixes of wrappers, and matching of two sets of groups by name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import chain, islice
from typing import Any

from gwt_kernels.optim.checks import names_of
from gwt_kernels.optim.param_groups import clean_name

Group = Mapping[str, Any]


def plain_names(names: Sequence[str]) -> list[str]:
    """Return names without the prefixes of wrappers.

    Raises:
        ValueError: several parameters have the same name.
    """
    cleaned = _without_wrappers(names)
    repeated = [name for name, n in Counter(cleaned).items() if n > 1]
    if repeated:
        raise ValueError(f"the name {repeated[0]!r} stands for several parameters: give each a name of its own")
    return cleaned


def check_names(names: object) -> None:
    """Raise a ValueError unless ``names``, from a state, is a list or tuple of strings."""
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise ValueError(
            f"the state has the param_names {names!r}, which are no names: it is damaged; take another"
        )


def in_order_of(groups: Sequence[Group], saved: Sequence[Group]) -> list[dict[str, Any]]:
    """Return the groups of a saved state, and the parameters in each, in the order of an optimizer's groups.

    They are matched by name if both have names; otherwise their order is kept. It is also kept for states whose
    parameters are keyed by name, as in distributed checkpoints, whose loaders have matched them.

    Raises:
        ValueError: names do not match; the message has them.
    """
    in_order = [dict(group) for group in saved]
    are_named = all(names_of(group) for group in groups if group["params"])  # False after one was removed
    if not are_named or any(group.get("param_names") is None for group in saved if group["params"]):
        return in_order
    for i, group in enumerate(saved):
        names = group.get("param_names") or ()
        check_names(names)
        if len(names) != len(group["params"]):
            raise ValueError(
                f"group {i} of the state has {len(names)} names for {len(group['params'])} parameters: it is "
                f"damaged; take another"
            )
    wanted, held = _names_by_group(groups), _names_by_group(saved)
    if wanted == held:
        return in_order
    for names in (wanted, held):
        plain_names(list(chain.from_iterable(names)))
    places = {name: (i, k) for i, names in enumerate(held) for k, name in enumerate(names)}
    if all(isinstance(key, str) for group in saved for key in group["params"]):
        if list(map(sorted, wanted)) == list(map(sorted, held)):
            for group, names in zip(in_order, wanted, strict=True):
                group["param_names"] = [group["param_names"][places[name][1]] for name in names]
        return in_order
    owners = {name: i for i, names in enumerate(wanted) for name in names}
    missing, extra = [n for n in owners if n not in places], [n for n in places if n not in owners]
    lacks = [
        f"the {which} has no parameter named {_listed(names)}"
        for which, names in (("state", missing), ("optimizer", extra))
        if names
    ]
    if lacks:
        raise ValueError(
            f"{' and '.join(lacks)}: build the optimizer from the model that the state was made with, or convert "
            f"the state with gwt_kernels.migrate, whose names=[...] matches them"
        )
    sources = {frozenset(names): i for i, names in enumerate(held)}
    ordered = []
    for names in wanted:
        source = sources.get(frozenset(names))
        if source is None:
            stray = _stray(names, held, places) if names else next(iter(owners), "")
            raise ValueError(
                f"parameter {stray!r} is in group {places[stray][0]} of the state and in group {owners[stray]} of "
                f"the optimizer, beside other parameters than there: give both the same groups, or convert the "
                f"state with gwt_kernels.migrate"
            )
        indices = [places[name][1] for name in names]
        both = {key: [saved[source][key][k] for k in indices] for key in ("params", "param_names") if names}
        ordered.append({**saved[source], **both})
    return ordered


def _stray(names: list[str], held: list[list[str]], places: dict[str, tuple[int, int]]) -> str:
    """Return a parameter that is only in the group of ``names``, or only in the state's group of its first name."""
    home = held[places[names[0]][0]]
    return next(name for name in (*names, *home) if name not in home or name not in names)


def _names_by_group(groups: Sequence[Group]) -> list[list[str]]:
    """Return the names of each group's parameters, without the prefixes of wrappers."""
    names = iter(_without_wrappers([name for group in groups for name in group.get("param_names") or ()]))
    return [list(islice(names, len(group["params"]))) for group in groups]


def _without_wrappers(names: Sequence[str]) -> list[str]:
    cleaned = [clean_name(name) for name in names]
    if cleaned and all(name.startswith("module.") for name in cleaned):  # DistributedDataParallel
        cleaned = [name.removeprefix("module.") for name in cleaned]
    return cleaned


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, names[:3]))
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown
