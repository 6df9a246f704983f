"""Plans of steps of one parameter each, for gradients that never exist at the same time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from gwt_kernels.core.dtensor import is_sharded
from gwt_kernels.distributed.sharding import local_parts
from gwt_kernels.optim.checks import names_of
from gwt_kernels.optim.fingerprint import Sources
from gwt_kernels.optim.step_plan import StepPlan, options_of


class ParameterSteps:
    """Plans of steps of one parameter each, and the positions of parameters in an optimizer's groups."""

    def __init__(self) -> None:
        self._plans: dict[Tensor, StepPlan] = {}
        self._places: dict[Tensor, tuple[int, int, int]] = {}

    def place_of(self, p: Tensor, groups: Sequence[dict[str, Any]]) -> tuple[int, int, int]:
        """Return a parameter's index among all, the index of its group, and its index in the group.

        Raises:
            ValueError: no group has the parameter.
        """
        _, i, k = self._places.get(p, (0, len(groups), 0))
        if not (i < len(groups) and k < len(groups[i]["params"]) and groups[i]["params"][k] is p):
            listed = [(i, k, q) for i, group in enumerate(groups) for k, q in enumerate(group["params"])]
            self._places = {q: (place, i, k) for place, (i, k, q) in reversed(list(enumerate(listed)))}
        if p not in self._places:
            raise ValueError(
                f"the parameter of shape {tuple(p.shape)} is not the optimizer's: add it by add_param_group"
            )
        return self._places[p]

    def sources_of(
        self, p: Tensor, groups: Sequence[dict[str, Any]], state: Mapping[Tensor, Any], capturable: bool
    ) -> Sources:
        """Return the sources of a plan of one parameter's steps, with its state if it has one and a gradient."""
        place, i, k = self.place_of(p, groups)
        group = groups[i]
        held, grads = local_parts([p], [p.grad]) if is_sharded(p) else ([p], [p.grad])
        names = names_of(group)
        alone = {**group, "params": [p], "param_names": names and names[k : k + 1]}
        states = {} if p.grad is None or p not in state else {p: state[p]}
        return Sources([alone], states, [p], held, grads, options_of([group], capturable, False), place)

    def plan_of(self, p: Tensor, sources: Sources, make: Callable[[], StepPlan]) -> StepPlan:
        """Return the plan of a parameter's steps; ``make`` a new one if ``sources`` have changed."""
        plan = self._plans.get(p)
        if plan is None or not plan.holds(sources):
            plan = self._plans[p] = make()
        return plan
