"""What the checks before a step depend on, remembered so that they are repeated only when it changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import is_, itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

try:  # private to PyTorch, and gone in some version to come: then Python compares, several times as slowly
    from torch._C._dynamo.guards import TensorGuards
except ImportError:  # pragma: no cover
    TensorGuards = None  # type: ignore[assignment, misc]

__all__ = ["Snapshot"]


class Snapshot:
    """Parameters, options, gradients' kinds and states of all groups as they were.

    Args:
        params: The tensors of all groups, in order.
        grads: Their gradients, or the shards of these; not kept alive.
        options: What else the checks depend on; compared by value.
        state: The optimizer's state by parameter, or its part that matters.
        held: What this process holds of the parameters, if these are sharded; None for all of them.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor | None],
        options: Any,
        state: Mapping[Tensor, dict[str, Any]],
        held: Sequence[Tensor] | None = None,
    ) -> None:
        held = params if held is None else held
        self._params = params
        self._options = options
        self._addresses = list(map(Tensor.data_ptr, held))
        self._are_params = _like(held)
        self._owners, self._states = list(state), list(state.values())
        self._lengths = list(map(len, self._states))
        self._entries = _entries(self._states)
        self._absent = [i for i, g in enumerate(grads) if g is None]
        self._are_grads = _like([g for g in grads if g is not None])

    def holds(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor | None],
        options: Any,
        state: Mapping[Tensor, dict[str, Any]],
        held: Sequence[Tensor] | None = None,
    ) -> bool:
        """Whether all is as it was, but for gradients: others of the same kind will do."""
        held = params if held is None else held
        return (
            options == self._options
            and _same(params, self._params)
            # An assignment to p.data changes one of these.
            and list(map(Tensor.data_ptr, held)) == self._addresses
            and self._are_params(held)
            # A state that was replaced, or a tensor in it, is another object, and one that moved another's.
            and _same(list(state), self._owners)
            and _same(list(state.values()), self._states)
            and list(map(len, self._states)) == self._lengths
            and all(map(_still, self._entries))
            and self._are_those(grads)
        )

    def _are_those(self, grads: Sequence[Tensor | None]) -> bool:
        if self._absent:
            if [i for i, g in enumerate(grads) if g is None] != self._absent:
                return False
            grads = [g for g in grads if g is not None]
        return self._are_grads(grads)


def _same(these: Sequence[Any], those: Sequence[Any]) -> bool:
    """Whether the sequences hold the very same objects in the same order."""
    return len(these) == len(those) and all(map(is_, these, those))


def _like(tensors: Sequence[Any]) -> Callable[[Sequence[Any]], bool]:
    """What tells whether others, in their places, are of the same dtypes, layouts, shapes and devices.

    And whether both are contiguous, or both not, and mean what they hold.
    """
    kinds, n = _kinds(tensors), len(tensors)
    if TensorGuards is None or len(set(map(id, tensors))) < n:  # it takes no tensor twice
        return lambda others: _kinds(others) == kinds
    guards = TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)
    # It is stricter: strides of a single element count, and what modes such as autocast are on.
    return lambda others: len(others) == n and (guards.check(*others) or _kinds(others) == kinds)


def _kinds(tensors: Sequence[Any]) -> list[Any]:
    return [None if x is None else _kind(x) for x in tensors]


def _kind(x: Tensor) -> tuple[Any, ...]:
    plain = x.layout == torch.strided and x.is_contiguous() and not x.is_neg()
    return x.dtype, x.layout, x.shape, x.device, plain


class _Entries(NamedTuple):
    """What some states hold under a key that they share."""

    key: str
    states: list[dict[str, Any]]
    values: list[Any]


def _entries(states: Sequence[dict[str, Any]]) -> list[_Entries]:
    holders: dict[str, list[dict[str, Any]]] = {}
    for own in states:
        for key in own:
            holders.setdefault(key, []).append(own)
    return [_Entries(key, having, [own[key] for own in having]) for key, having in holders.items()]


def _still(entries: _Entries) -> bool:
    key, states, values = entries
    try:
        return all(map(is_, map(itemgetter(key), states), values))
    except KeyError:
        return False
