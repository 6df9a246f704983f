"""Survey many tensors at once: addresses, gradients and unchanged states, which every step checks first."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from operator import is_, itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gwt_kernels.core.dtensor import is_sharded, local_of

try:  # private to PyTorch; without it Python compares, several times more slowly
    from torch._C._dynamo.guards import TensorGuards
except ImportError:  # pragma: no cover
    TensorGuards = None  # type: ignore[assignment, misc]

States = Mapping[Tensor, dict[str, Any]]
Tensors = list[Tensor] | list[Tensor | None]


class Survey(NamedTuple):
    """Functions that survey tensors, in Python or in C (backends/triton/native.py), with the same results."""

    addresses: Callable[[Sequence[Tensor]], bytes]
    """Return the tensors' addresses, 8 bytes each."""
    grads: Callable[[list[Tensor]], list[Tensor | None]]
    """Return the parameters' gradients, DTensors included, without unwrapping them."""
    same: Callable[[list[Any], list[Any]], bool]
    """Return whether two lists hold the same objects in the same order."""
    like: Callable[[Tensors], Callable[[Tensors], bool]]
    """Return a predicate of other tensors: same dtype, layout, shape and device, pairwise?

    It also compares contiguity and the negative bit. It keeps no tensor alive, and may be False for tensor
    subclasses.
    """
    still: Callable[[States], Callable[[States], bool]]
    """Return a predicate: is an optimizer's state unchanged? It keeps the state's objects alive.

    Unchanged are the same objects under the same keys, with tensors (or shards of DTensors) at the same addresses:
    offloading by ``.data`` moves memory and leaves the objects.
    """


def _addresses(tensors: Sequence[Tensor]) -> bytes:
    return struct.pack(f"{len(tensors)}Q", *map(Tensor.data_ptr, tensors))


def _grads(params: Sequence[Tensor]) -> list[Tensor | None]:
    # For a DTensor, the search for __torch_function__ takes longer than the attribute itself.
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
    if TensorGuards is None or len(set(map(id, tensors))) < n:  # TensorGuards takes no tensor twice
        return lambda others: _kinds(others) == kinds
    guards = TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)
    # TensorGuards is stricter: it compares strides of dimensions of size 1, and modes such as autocast.
    return lambda others: len(others) == n and (guards.check(*others) or _kinds(others) == kinds)


def _kinds(tensors: Sequence[Any]) -> list[Any]:
    return [None if x is None else _kind(x) for x in tensors]


def _kind(x: Tensor) -> tuple[Any, ...]:
    plain = x.layout == torch.strided and x.is_contiguous() and not x.is_neg()
    return x.dtype, x.layout, x.shape, x.device, plain


def _still(state: States) -> Callable[[States], bool]:
    owners, states = list(state), list(state.values())
    dicts = [x for x in states if isinstance(x, dict)]  # anything else is the user's own
    lengths = list(map(len, dicts))
    entries = _entries(dicts)
    values = [x for each in entries for x in each.values if has_memory(x)]
    plain, shards = [x for x in values if not is_sharded(x)], [x for x in values if is_sharded(x)]
    plain_addresses, shard_addresses = _addresses(plain), _addresses(list(map(local_of, shards)))
    # A replaced state or tensor is another object; a moved tensor has another address.
    return lambda now: (
        _same(list(now), owners)
        and _same(list(now.values()), states)
        and list(map(len, dicts)) == lengths
        and all(map(_are_still, entries))
        and _addresses(plain) == plain_addresses
        and (not shards or _addresses(list(map(local_of, shards))) == shard_addresses)
    )


def has_memory(x: object) -> bool:
    """Return whether ``x`` is a dense tensor, which has an address."""
    return isinstance(x, Tensor) and x.layout == torch.strided


class _Entries(NamedTuple):
    """Values of all states that have a key."""

    key: str
    states: list[dict[str, Any]]
    values: list[Any]


def _entries(states: Sequence[dict[str, Any]]) -> list[_Entries]:
    holders: dict[str, list[dict[str, Any]]] = {}
    for state in states:
        for key in state:
            holders.setdefault(key, []).append(state)
    return [_Entries(key, having, [state[key] for state in having]) for key, having in holders.items()]


def _are_still(entries: _Entries) -> bool:
    key, states, values = entries
    try:
        return all(map(is_, map(itemgetter(key), states), values))
    except KeyError:
        return False


PYTHON = Survey(_addresses, _grads, _same, _like, _still)
