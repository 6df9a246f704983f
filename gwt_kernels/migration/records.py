"""What a migration takes and makes of one parameter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from gwt_kernels.migration.conversion import Form

__all__ = ["Migrated", "Source", "Target", "bytes_of_state"]


class Migrated(NamedTuple):
    """How one tensor's state was carried over."""

    name: str
    """Of the parameter, or its place among all where nobody named it."""
    before: Form
    after: Form
    notes: dict[str, str]
    """By entry of the state: ``exact``, ``approximate``, ``new`` or ``dropped``, and how."""
    bytes_before: int
    bytes_after: int


class Source(NamedTuple):
    """What a state holds of one parameter."""

    name: str | None
    group: Mapping[str, Any]
    state: Mapping[str, Any]
    size: int
    """Bytes of it as it came."""


class Target(NamedTuple):
    """One parameter of the optimizer."""

    name: str | None
    label: str
    param: Tensor
    group: dict[str, Any]

    @property
    def title(self) -> str:
        """Its name, or its place among all."""
        return self.label.split(" ")[1] if self.name is None else self.name


def bytes_of_state(state: Mapping[str, Any]) -> int:
    """Bytes of a state's tensors."""
    return sum(x.numel() * x.element_size() for x in state.values() if isinstance(x, Tensor))
