"""Fingerprint of what the checks before a step depend on, so that they run only after a change."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from gwt_kernels.core.survey import PYTHON, Survey


class Fingerprint:
    """Parameters, options, kinds of gradients, and states of all groups at one time.

    Args:
        params: The tensors of all groups, in order.
        grads: Their gradients or shards of these; not kept alive.
        options: Other values that the checks depend on, compared by ``==``.
        state: The optimizer's state by parameter, or its relevant part.
        held: This process's shards of the parameters; None if none is sharded.
        survey: Functions that compare tensors and states.
    """

    def __init__(
        self,
        params: list[Tensor],
        grads: list[Tensor | None],
        options: Any,
        state: Mapping[Tensor, dict[str, Any]],
        held: list[Tensor] | None = None,
        survey: Survey = PYTHON,
    ) -> None:
        held = params if held is None else held
        self._survey = survey
        self._params = params
        self._options = options
        self._addresses = survey.addresses(held)
        self._are_params = survey.like(held)
        self._is_state = survey.still(state)
        self._are_grads = survey.like(grads)

    def is_of(self, params: list[Tensor]) -> bool:
        """Return whether these are the same parameter objects."""
        return self._survey.same(params, self._params)

    def holds(
        self,
        params: list[Tensor],
        grads: list[Tensor | None],
        options: Any,
        state: Mapping[Tensor, dict[str, Any]],
        held: list[Tensor] | None = None,
    ) -> bool:
        """Return whether nothing has changed, except for new gradients of the same kind."""
        held = params if held is None else held
        return (
            options == self._options
            and self._survey.same(params, self._params)
            # Assignment to p.data changes an address or a kind.
            and self._survey.addresses(held) == self._addresses
            and self._are_params(held)
            and self._is_state(state)
            and self._are_grads(grads)
        )
