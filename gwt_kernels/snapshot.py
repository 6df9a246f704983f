"""What the checks before a step depend on, remembered so that they are repeated only when it changes."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from itertools import chain
from operator import attrgetter, is_
from typing import Any

from torch import Tensor

__all__ = ["Snapshot"]

_grad_kind = attrgetter("dtype", "layout", "shape", "device")


class Snapshot:
    """Parameters, options, gradients' kinds and states of all groups as they were.

    Gradients are known by their ids for as long as none of them is gone: to hold them would keep their memory
    alive until the next step.

    Args:
        params: The tensors of all groups, in order.
        grads: Their gradients, or the shards of these.
        options: What else the checks depend on; compared by value.
        state: The optimizer's state by parameter.
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
        self._params = params
        self._options = options
        self._places = _places(held or params)
        self._entries = _entries(params, state)
        self._grad_kinds = _kinds_of(grads)
        self._grad_ids = list(map(id, grads))
        self._watched: list[Any] = []
        self.same_grads = False
        """Whether the gradients are the very tensors of the last time: what :meth:`holds` found out."""

    def holds(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor | None],
        options: Any,
        state: Mapping[Tensor, dict[str, Any]],
        held: Sequence[Tensor] | None = None,
    ) -> bool:
        """Whether all is as it was, but for gradients: others of the same kind in the same places will do."""
        if (
            options != self._options
            or not _same(params, self._params)
            or _places(held or params) != self._places
            or not _same(_entries(params, state), self._entries)
        ):
            return False
        ids = list(map(id, grads))
        seem_same = ids == self._grad_ids
        self.same_grads = seem_same and bool(self._watched) and not self._gone
        if not self.same_grads:
            if _kinds_of(grads) != self._grad_kinds:
                return False
            self._grad_ids = ids
            self._watched = self._watch(grads) if seem_same else []
        return True

    def _watch(self, grads: Sequence[Tensor | None]) -> list[Any]:
        """Weak references that fill ``_gone`` when one of the gradients ceases to be: its id may be another's."""
        self._gone: list[Any] = []
        return [weakref.ref(g, self._gone.append) for g in grads if g is not None]


def _same(these: Sequence[Any], those: Sequence[Any]) -> bool:
    return len(these) == len(those) and all(map(is_, these, those))


def _places(params: Sequence[Tensor]) -> tuple[list[Any], ...]:
    """Addresses and strides: an assignment to ``p.data`` changes one of them, or the gradients that fit it."""
    return list(map(Tensor.data_ptr, params)), list(map(Tensor.stride, params))


def _kinds_of(grads: Sequence[Tensor | None]) -> list[Any]:
    return [None if g is None else _grad_kind(g) for g in grads]


def _entries(params: Sequence[Tensor], state: Mapping[Tensor, dict[str, Any]]) -> list[Any]:
    """Every tensor of every state: one that was replaced is another object."""
    own: Any = filter(None, map(state.get, params))
    return list(chain.from_iterable(map(dict.values, own)))
