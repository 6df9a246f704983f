"""Update rules, one file each, and their registry, to which a new rule adds a line."""

from __future__ import annotations

from gwt_kernels.rules.adamw import ADAMW
from gwt_kernels.rules.foam import FOAM
from gwt_kernels.rules.gwt import GWT
from gwt_kernels.rules.rule import Rule

__all__ = ["ADAMW", "RULES", "Rule", "rule_of"]

RULES = {rule.name: rule for rule in (GWT, FOAM)}
"""By the option ``rule``. At level 0 each of them is :data:`ADAMW`."""


def rule_of(name: str, level: int = 1) -> Rule:
    """The rule of that name at a level."""
    return ADAMW if level == 0 or name == ADAMW.name else RULES[name]
