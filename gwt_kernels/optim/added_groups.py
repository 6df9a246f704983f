"""Groups that others add to an optimizer without its options: names, and which of their tensors are transformed."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.nn.parameter import is_lazy

from gwt_kernels.core.level import ROW, Level
from gwt_kernels.haar.transform import check_level
from gwt_kernels.rules import MATRIX_STAGES

__all__ = ["divided", "warn_of_level_0"]

_LEFT = re.compile(r"(^|[._])(embed\w*|\w*embeddings?|wte|wpe|shared|\w*head|classifier|score)([._]|$)")
"""Names of embeddings and output heads, which the paper leaves to AdamW."""


def divided(
    added: dict[str, Any], groups: Sequence[Mapping[str, Any]], defaults: Mapping[str, Any]
) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """A copy of a group that is added to others, with names if they have names, and its part of level 0.

    Either is None where it would be empty.

    Args:
        added: The group; its ``params`` become a list, and nothing else of it changes.
        groups: That the optimizer has.
        defaults: The optimizer's options.
    """
    params = added.get("params")
    if not isinstance(params, Tensor) and (not isinstance(params, Iterable) or isinstance(params, set | str)):
        return added, None  # which the base class refuses
    added["params"] = [params] if isinstance(params, Tensor) else list(params)
    group = dict(added)
    _name_by_place(group, groups)
    return _split_by_level(group, defaults)


def warn_of_level_0(rest: Mapping[str, Any] | None, level: Level) -> bool:
    """Warn of tensors that were added and have got level 0 unasked; whether there are any."""
    if rest is None:
        return False
    warnings.warn(
        f"{len(rest['params'])} of the parameters added without a level are one-dimensional, "
        f"embeddings, or too narrow for its level {level}, and get level 0 (AdamW): say 'level' in the group, or "
        f"use gwt_param_groups",
        stacklevel=3,
    )
    return True


def _name_by_place(added: dict[str, Any], groups: Sequence[Mapping[str, Any]]) -> None:
    """Give the parameters names if those of the other groups have: ``"added.2.0"`` for the first of group 2."""
    params = added["params"]
    if not groups or "param_names" not in groups[0] or "param_names" in added:
        return
    if not any(isinstance(p, tuple) for p in params):
        added["param_names"] = [f"added.{len(groups)}.{k}" for k in range(len(params))]


def _split_by_level(
    group: dict[str, Any], defaults: Mapping[str, Any]
) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """The group without what is not for the optimizer's level and rule, and that as AdamW's.

    All of it where it says a level, or where the optimizer's takes every tensor.
    """
    params, level = group["params"], defaults["level"]
    if "level" in group or not (level or defaults["rule"] in MATRIX_STAGES):
        return group, None
    names = group.get("param_names") or [p[0] if isinstance(p, tuple) else "" for p in params]
    tensors = [p[1] if isinstance(p, tuple) else p for p in params]
    fits = [_is_transformed(p, name, level) for p, name in zip(tensors, names, strict=True)]
    keys: list[str] = [key for key in ("params", "param_names") if key in group]

    def those(fit: bool) -> dict[str, Any]:
        own = {key: [x for x, is_one in zip(group[key], fits, strict=True) if is_one == fit] for key in keys}
        return {**group, **own}

    if all(fits):
        return group, None
    return those(True) if any(fits) else None, {**those(False), "level": 0, "rule": "adamw"}


def _is_transformed(p: Any, name: str, level: Level) -> bool:
    """Whether a tensor takes the optimizer's level; what cannot be stepped at all is refused by other checks."""
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
