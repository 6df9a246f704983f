"""Surveys many tensors at once: what a step has to know of all of them, each time, before it launches anything."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from operator import is_, itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gwt_kernels.core.dtensor import is_sharded, local_of

try:  # private to PyTorch, and gone in some version to come: then Python compares, several times as slowly
    from torch._C._dynamo.guards import TensorGuards
except ImportError:  # pragma: no cover
    TensorGuards = None  # type: ignore[assignment, misc]

__all__ = ["PYTHON", "States", "Survey", "Tensors", "has_memory"]

States = Mapping[Tensor, dict[str, Any]]
Tensors = list[Tensor] | list[Tensor | None]


class Survey(NamedTuple):
    """How to look at tensors: through Python, or through C (backends/triton/native.py), with the same results."""

    addresses: Callable[[Sequence[Tensor]], bytes]
    """Eight bytes for each tensor's."""
    grads: Callable[[list[Tensor]], list[Tensor | None]]
    """The gradients as they are."""
    same: Callable[[list[Any], list[Any]], bool]
    """Whether the lists hold the very same objects in the same order."""
    like: Callable[[Tensors], Callable[[Tensors], bool]]
    """What tells whether others, in their places, are of the same dtypes, layouts, shapes and devices.

    And whether both are contiguous, or both not, and mean what they hold. Keeps none of the tensors alive. May
    say no of objects of a class of the user's own.
    """
    still: Callable[[States], Callable[[States], bool]]
    """What tells whether an optimizer's state is as it was, and keeps its objects.

    The very same objects under the same keys, and the memory of tensors at the same addresses: a move by ``.data``,
    as of states that are offloaded, leaves the objects. Of a DTensor, the memory of its shard.
    """


def _addresses(tensors: Sequence[Tensor]) -> bytes:
    return struct.pack(f"{len(tensors)}Q", *map(Tensor.data_ptr, tensors))


def _grads(params: Sequence[Tensor]) -> list[Tensor | None]:
    # To look for an override of the attribute takes a DTensor longer than the attribute itself.
    with torch._C.DisableTorchFunctionSubclass():
        return [p.grad for p in params]


def _same(these: Sequence[Any], those: Sequence[Any]) -> bool:
    return len(these) == len(those) and all(map(is_, these, those))


def _like(tensors: Tensors) -> Callable[[Tensors], bool]:
    absent = [i for i, x in enumerate(tensors) if x is None]
    present = _present_like([x for x in tensors if x is not None])

    def are_like(others: Tensors) -> bool:
        if absent:
            if [i for i, x in enumerate(others) if x is None] != absent:
                return False
            others = [x for x in others if x is not None]
        return present(others)

    return are_like


def _present_like(tensors: Sequence[Any]) -> Callable[[Sequence[Any]], bool]:
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


def _still(state: States) -> Callable[[States], bool]:
    owners, states = list(state), list(state.values())
    dicts = [own for own in states if isinstance(own, dict)]  # what else lies there is the user's own
    lengths = list(map(len, dicts))
    entries = _entries(dicts)
    values = [x for each in entries for x in each.values if has_memory(x)]
    plain, shards = [x for x in values if not is_sharded(x)], [x for x in values if is_sharded(x)]
    places = _addresses(plain), _addresses(list(map(local_of, shards)))
    # A state that was replaced, or a tensor in it, is another object, and one that moved another's.
    return lambda now: (
        _same(list(now), owners)
        and _same(list(now.values()), states)
        and list(map(len, dicts)) == lengths
        and all(map(_are_still, entries))
        and _addresses(plain) == places[0]
        and (not shards or _addresses(list(map(local_of, shards))) == places[1])
    )


def has_memory(x: object) -> bool:
    """Whether ``x`` is a dense tensor, which has an address."""
    return isinstance(x, Tensor) and x.layout == torch.strided


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


def _are_still(entries: _Entries) -> bool:
    key, states, values = entries
    try:
        return all(map(is_, map(itemgetter(key), states), values))
    except KeyError:
        return False


PYTHON = Survey(_addresses, _grads, _same, _like, _still)
