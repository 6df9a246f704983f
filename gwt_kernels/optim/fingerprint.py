"""Fingerprint of what the checks before a step depend on, so that they run only after a change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from gwt_kernels.core.survey import Survey


class Sources(NamedTuple):
    """Groups, states and tensors that a plan is made from and depends on.

    Attributes:
        groups: Parameter groups, whose options are checked.
        states: States of the parameters, complete for those that have a gradient.
        params: Parameters of all groups, in order.
        held: This process's shards of them, or plain tensors themselves.
        grads: Their gradients, or the shards of these.
        options: Other values that the checks depend on; compared by ``==``.
        first_place: Index of the first parameter among all of the optimizer.
    """

    groups: Sequence[Mapping[str, Any]]
    states: Mapping[Tensor, dict[str, Any]]
    params: list[Tensor]
    held: list[Tensor]
    grads: list[Tensor | None]
    options: Any
    first_place: int = 0


def _are_equal(these: Any, those: Any) -> bool:
    try:
        return bool(these == those)
    except (ValueError, RuntimeError):  # there is an array or a tensor, which the checks refuse by name
        return False


class Fingerprint:
    """Parameters, options, kinds of gradients, and states of all groups at one time; keeps no gradient alive.

    Args:
        sources: The sources at that time.
        survey: Functions that compare tensors and states.
    """

    def __init__(self, sources: Sources, survey: Survey) -> None:
        self._survey = survey
        self._params = sources.params
        self._options = sources.options
        self._first_place = sources.first_place
        self._addresses = survey.addresses(sources.held)
        self._are_params = survey.like(sources.held)
        self._is_state = survey.still(sources.states)
        self._are_grads = survey.like(sources.grads)

    def is_of(self, params: list[Tensor]) -> bool:
        """Return whether these are the same parameter objects."""
        return self._survey.same(params, self._params)

    def holds(self, sources: Sources) -> bool:
        """Return whether nothing has changed, except for new gradients of the same kind."""
        return (
            _are_equal(sources.options, self._options)
            and sources.first_place == self._first_place
            and self._survey.same(sources.params, self._params)
            # Assignment to p.data changes an address or a kind.
            and self._survey.addresses(sources.held) == self._addresses
            and self._are_params(sources.held)
            and self._is_state(sources.states)
            and self._are_grads(sources.grads)
        )
