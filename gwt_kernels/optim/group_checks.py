"""Checks of an optimizer's groups and their parameters, when they are added and before a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gwt_kernels.optim.checks import (
    check_before_step,
    check_capturable,
    check_observable,
    check_param,
    check_replaced,
    label_of,
    name_of,
)
from gwt_kernels.optim.matrices import check_matrix, check_matrix_options, has_matrices, ns_dtype_name
from gwt_kernels.optim.numbers import SLACK
from gwt_kernels.optim.options import check_group, state_dtype_name
from gwt_kernels.optim.state import head_rows_of
from gwt_kernels.rules import check_rule, rule_of

_OF_THE_OPTIMIZER = ("max_grad_norm", "skip_nonfinite", "capturable", "telemetry")
"""Options of the whole optimizer, which a group must not turn on; groups of other optimizers turn some off."""
_OF_STATES = ("level", "rule", "wavelet", "state_dtype", "head_rows")


Form = tuple[Any, ...]
"""Values of the group options that the states of its parameters depend on."""


def kept_forms(
    groups: Sequence[Mapping[str, Any]],
    states: Mapping[Tensor, Mapping[str, Any]],
    before: Mapping[Tensor, Form],
) -> dict[Tensor, Form]:
    """Return the forms of the parameters' states: see :func:`kept_form`.

    Args:
        groups: The optimizer's groups, which may have been replaced or reordered.
        states: State by parameter.
        before: The forms at the last check; parameters added since then have none.
    """
    return {
        p: kept_form(group, k, i, states.get(p), before.get(p))
        for i, group in enumerate(groups)
        for k, p in enumerate(group["params"])
    }


def kept_form(
    group: Mapping[str, Any], k: int, index: int, state: Mapping[str, Any] | None, before: Form | None
) -> Form:
    """Return the form of the state of parameter ``k`` of a group.

    Raises:
        ValueError: the parameter has a state, which had another form ``before``.
    """
    form = _form_of(group)
    if before is not None and form != before and state:
        changes = zip(_OF_STATES, before, form, strict=True)
        option, was, now = next(each for each in changes if each[1] != each[2])
        raise ValueError(
            f"{option} of group {index} was changed from {was!r} to {now!r}, but the state of "
            f"{label_of(group, k, index)} is of {was!r}: set it back, or convert the states with "
            f"gwt_kernels.migrate"
        )
    return form


def _form_of(group: Mapping[str, Any]) -> Form:
    said = {"rule": rule_of(group["rule"], group["level"]).name, "head_rows": head_rows_of(group)}
    named = {**group, **said, "state_dtype": state_dtype_name(group["state_dtype"])}
    return tuple(named.get(option) for option in _OF_STATES)


class GroupChecks(NamedTuple):
    """The checks of one optimizer's groups. Each raises a TypeError, a ValueError or a RuntimeError.

    Attributes:
        optimizer: Name of the optimizer's class.
        rules: Allowed values of a group's ``rule``.
        capturable: Whether CUDA graphs may capture the steps.
        telemetry: Whether the steps record telemetry.
    """

    optimizer: str
    rules: tuple[str, ...]
    capturable: bool
    telemetry: bool

    def check_options(self, group: Mapping[str, Any], slack: float = SLACK) -> None:
        """Check the options of a group, which need not have parameters yet."""
        check_rule(group["rule"], "haar")
        if group["rule"] not in self.rules:
            raise ValueError(
                f"rule={group['rule']!r} is no rule of {self.optimizer}: use one of "
                f"{', '.join(map(repr, self.rules))}"
            )
        check_group(group, capturable=self.capturable, slack=slack)
        check_matrix_options(group)
        if self.telemetry and "params" in group:
            check_observable(group)

    def check_new(self, group: dict[str, Any], index: int) -> None:
        """Check an added group, and replace its dtypes by their names."""
        for option in _OF_THE_OPTIMIZER:
            if group.get(option):
                raise ValueError(
                    f"{option}={group[option]!r} in parameter group {index} would be ignored: it is the whole "
                    f"optimizer's, so pass it to {self.optimizer}"
                )
        group["state_dtype"] = state_dtype_name(group["state_dtype"])
        self.check_options(group, slack=0.0)
        if has_matrices(group):
            group["ns_dtype"] = ns_dtype_name(group["ns_dtype"])
        for k, p in enumerate(group["params"]):
            check_param(p, group, name_of(group, k, index))
            self._check_uses(group, k, index)

    def check_all(
        self,
        groups: Sequence[Mapping[str, Any]],
        states: Mapping[Tensor, Mapping[str, Any]],
        shapes: Sequence[Mapping[Tensor, torch.Size]],
    ) -> None:
        """Check all groups before a step, and their parameters that have gradients.

        Args:
            groups: The optimizer's groups.
            states: State by parameter; one without state has not been stepped.
            shapes: Shape by parameter of each group, at the last check.
        """
        for i, group in enumerate(groups):
            self.check_options(group)
            check_replaced(group, shapes, i)
            for k, p in enumerate(group["params"]):
                if p.grad is not None:
                    self.check_one(group, k, i, states.get(p))

    def check_one(self, group: Mapping[str, Any], k: int, index: int, state: Mapping[str, Any] | None) -> None:
        """Check parameter ``k`` of a group, which has a gradient, before a step."""
        check_before_step(group["params"][k], state, group, name_of(group, k, index))
        self._check_uses(group, k, index)

    def _check_uses(self, group: Mapping[str, Any], k: int, index: int) -> None:
        """Check that a parameter fits its group's matrix stage and, with ``capturable``, a CUDA graph."""
        p = group["params"][k]
        check_matrix(p, group, label_of(group, k, index))
        if self.capturable:
            check_capturable(p, group, name_of(group, k, index))
