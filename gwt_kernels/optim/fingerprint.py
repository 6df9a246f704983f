"""What the checks before a step depend on, remembered so that they are repeated only when it changes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from gwt_kernels.core.survey import PYTHON, Survey

__all__ = ["Fingerprint"]


class Fingerprint:
    """Parameters, options, gradients' kinds and states of all groups as they were.

    Args:
        params: The tensors of all groups, in order.
        grads: Their gradients, or the shards of these; not kept alive.
        options: What else the checks depend on; compared by value.
        state: The optimizer's state by parameter, or its part that matters.
        held: What this process holds of the parameters, if these are sharded; None for all of them.
        survey: How to look at all of these.
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
        """Whether these are the very parameters."""
        return self._survey.same(params, self._params)

    def holds(
        self,
        params: list[Tensor],
        grads: list[Tensor | None],
        options: Any,
        state: Mapping[Tensor, dict[str, Any]],
        held: list[Tensor] | None = None,
    ) -> bool:
        """Whether all is as it was, but for gradients: others of the same kind will do."""
        held = params if held is None else held
        return (
            options == self._options
            and self._survey.same(params, self._params)
            # An assignment to p.data changes one of these.
            and self._survey.addresses(held) == self._addresses
            and self._are_params(held)
            and self._is_state(state)
            and self._are_grads(grads)
        )
