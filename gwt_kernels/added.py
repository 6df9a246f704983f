"""Groups that others add to an optimizer without its options: names, and which of their tensors are transformed."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.nn.parameter import is_lazy

from gwt_kernels.haar import check_level

__all__ = ["name_by_place", "split_by_level"]

_LEFT = re.compile(r"(^|[._])(embed\w*|\w*embeddings?|wte|wpe|shared|\w*head|classifier|score)([._]|$)")
"""Names of embeddings and output heads, which the paper leaves to AdamW."""


def name_by_place(added: dict[str, Any], groups: Sequence[Mapping[str, Any]]) -> None:
    """Give the parameters names if those of the other groups have: ``"added.2.0"`` for the first of group 2."""
    params = added["params"]
    if not groups or "param_names" not in groups[0] or "param_names" in added:
        return
    if not any(isinstance(p, tuple) for p in params):
        added["param_names"] = [f"added.{len(groups)}.{k}" for k in range(len(params))]


def split_by_level(added: dict[str, Any], level: int) -> dict[str, Any] | None:
    """Take out of a group what ``level`` is not for, and return that as a group of level 0; None if that is
    nothing.

    A group in which nothing else is left gets level 0 itself and is returned; one that says its level stays whole.
    """
    params = added["params"]
    if "level" in added or not level:
        return None
    names = added.get("param_names") or [p[0] if isinstance(p, tuple) else "" for p in params]
    tensors = [p[1] if isinstance(p, tuple) else p for p in params]
    fits = [_is_transformed(p, name, level) for p, name in zip(tensors, names, strict=True)]
    if all(fits):
        return None
    if not any(fits):
        added["level"] = 0
        return added
    keys: list[str] = [key for key in ("params", "param_names") if key in added]
    left = {key: [x for x, fit in zip(added[key], fits, strict=True) if not fit] for key in keys}
    rest = {**added, "level": 0}
    rest.update(left)
    added.update({key: [x for x, fit in zip(added[key], fits, strict=True) if fit] for key in keys})
    return rest


def _is_transformed(p: Any, name: str, level: int) -> bool:
    """Whether a tensor takes the optimizer's level; what cannot be stepped at all is refused by other checks."""
    if not isinstance(p, Tensor) or is_lazy(p):
        return True
    if p.dim() < 2 or _LEFT.search(name):
        return False
    try:
        check_level(level, p.shape[-1], name)
    except ValueError:
        return False
    return True
