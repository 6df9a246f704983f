"""Groups made by other code: names and levels of added groups, and warnings of options without effect."""

from __future__ import annotations

import inspect
import itertools
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.nn.parameter import is_lazy

from gwt_kernels.core.level import ROW, Level
from gwt_kernels.haar.transform import check_level
from gwt_kernels.rules import ADAMW, MATRIX_STAGES

_LEFT = re.compile(r"(^|[._])(embed\w*|\w*embeddings?|wte|wpe|shared|\w*head|classifier|score)([._]|$)")
"""Names of embeddings and output heads, for which the paper uses AdamW."""


def divided(
    added: dict[str, Any], groups: Sequence[Mapping[str, Any]], defaults: Mapping[str, Any]
) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """Return a copy of an added group, with names if the other groups have them, and its rest, at level 0.

    Either is None if it would be empty.

    Args:
        added: The group; only its ``params`` change, to a list.
        groups: The optimizer's groups.
        defaults: The optimizer's options.
    """
    params = added.get("params")
    if not isinstance(params, Tensor) and (not isinstance(params, Iterable) or isinstance(params, set | str)):
        return added, None  # the base class raises
    added["params"] = [params] if isinstance(params, Tensor) else list(params)
    group = dict(added)
    _name_by_place(group, groups)
    return _split_by_level(group, defaults)


def warn_of_level_0(rest: Mapping[str, Any] | None, level: Level) -> bool:
    """Warn of added tensors that are at level 0 by default; return whether there are any."""
    if rest is None:
        return False
    warnings.warn(
        f"level 0 (AdamW) for {len(rest['params'])} of the parameters added without a level, which have one "
        f"dimension, are embeddings or are too narrow for its level {level}: say 'level' in the group, or use "
        f"gwt_param_groups",
        stacklevel=3,
    )
    return True


def warn_of_unused(optimizer: type, given: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> None:
    """Warn of options of a constructor that have no effect, since all transformed groups have other values.

    Groups of :func:`gwt_kernels.gwt_param_groups` have their own values, which override the optimizer's.

    Args:
        optimizer: The optimizer's class.
        given: Its options.
        groups: Its groups.
    """
    defaults = inspect.signature(optimizer).parameters
    transformed = [group for group in groups if group["rule"] != ADAMW.name]
    for option in ("level", "scale", "weight_decay"):
        value, said = given[option], [group[option] for group in transformed]
        is_chosen = option in defaults and value != defaults[option].default
        if is_chosen and said and not any(value == each for each in said):
            values = ", ".join(dict.fromkeys(map(str, said)))
            warnings.warn(
                f"{optimizer.__name__}(..., {option}={value}) has no effect: its groups say {option}={values}. "
                f"Pass it to gwt_param_groups instead",
                stacklevel=4,
            )


def _name_by_place(added: dict[str, Any], groups: Sequence[Mapping[str, Any]]) -> None:
    """Name the parameters if those of other groups are named: ``"added.2.0"`` for the first of group 2.

    A later number is used if another group already has that name, as after groups were removed.
    """
    params = added["params"]
    if not groups or "param_names" not in groups[0] or "param_names" in added:
        return
    if not any(isinstance(p, tuple) for p in params):
        taken = {str(name).rpartition(".")[0] for group in groups for name in group.get("param_names") or ()}
        number = next(i for i in itertools.count(len(groups)) if f"added.{i}" not in taken)
        added["param_names"] = [f"added.{number}.{k}" for k in range(len(params))]


def _split_by_level(
    group: dict[str, Any], defaults: Mapping[str, Any]
) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """Split a group into tensors for the optimizer's level and rule, and a group of the others for AdamW.

    A group with its own level is not split, nor any group of an optimizer that takes every tensor.
    """
    params, level = group["params"], defaults["level"]
    if "level" in group or not (level or defaults["rule"] in MATRIX_STAGES):
        return group, None
    names = group.get("param_names") or [p[0] if isinstance(p, tuple) else "" for p in params]
    tensors = [p[1] if isinstance(p, tuple) else p for p in params]
    fits = [_is_transformed(p, name, level) for p, name in zip(tensors, names, strict=True)]
    keys: list[str] = [key for key in ("params", "param_names") if key in group]

    def those(fit: bool) -> dict[str, Any]:
        part = {key: [x for x, is_one in zip(group[key], fits, strict=True) if is_one == fit] for key in keys}
        return {**group, **part}

    if all(fits):
        return group, None
    return those(True) if any(fits) else None, {**those(False), "level": 0, "rule": "adamw"}


def _is_transformed(p: Any, name: str, level: Level) -> bool:
    """Return whether a tensor gets the optimizer's level; other checks refuse invalid parameters."""
    if not isinstance(p, Tensor) or is_lazy(p):
        return True
    if p.dim() < 2 or _LEFT.search(name):
        return False
    if level == ROW:
        return True
    try:
        check_level(level, p.shape[-1], name)
    except ValueError:
        return False
    return True
