"""The optimizer class of each rule."""

from __future__ import annotations

from gwt_kernels.optim.adafactor import GWTAdafactor
from gwt_kernels.optim.adam_mini import GWTAdamMini
from gwt_kernels.optim.adamw import GWTAdamW
from gwt_kernels.optim.base import PlannedOptimizer
from gwt_kernels.optim.lion import GWTLion
from gwt_kernels.optim.muon import GWTMuon
from gwt_kernels.rules import ADAMW

OPTIMIZERS: tuple[type[PlannedOptimizer], ...] = (GWTAdamW, GWTLion, GWTMuon, GWTAdamMini, GWTAdafactor)
_BY_RULE = {rule: each for each in reversed(OPTIMIZERS) for rule in each.rules if rule != ADAMW.name}


def optimizer_of(rule: str) -> type[PlannedOptimizer]:
    """Return the optimizer class of a rule; ``GWTAdamW`` for ``"adamw"``, and for unknown rules, to refuse them."""
    return _BY_RULE[rule] if rule in list(_BY_RULE) else GWTAdamW
