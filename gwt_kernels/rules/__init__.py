"""Update rules, one file each, and their registry, to which a new rule adds a line."""

from __future__ import annotations

from typing import get_args

from gwt_kernels.core.hyper import Boundary, literal_alone
from gwt_kernels.rules.adafactor import ADAFACTOR
from gwt_kernels.rules.adamw import ADAMW
from gwt_kernels.rules.foam import FOAM
from gwt_kernels.rules.gwt import GWT
from gwt_kernels.rules.lion import LION
from gwt_kernels.rules.rule import Rule

__all__ = ["ADAFACTOR", "ADAMW", "RULES", "Rule", "check_rule", "rule_of"]

RULES = {rule.name: rule for rule in (GWT, FOAM, ADAMW, LION, ADAFACTOR)}
"""By the option ``rule``."""


def rule_of(name: str, level: int = 1) -> Rule:
    """The rule of that name at a level."""
    rule = RULES[name]
    return rule if level or rule.plain is None else rule.plain


def check_rule(rule: object, wavelet: str, boundary: str = "zero") -> None:
    """Raise a ValueError unless rule and boundary are known, and the rule knows boundary and wavelet."""
    if boundary not in get_args(Boundary):
        raise ValueError(f"unknown boundary {boundary!r}: use one of {', '.join(map(repr, get_args(Boundary)))}")
    if rule not in list(RULES):
        raise ValueError(f"unknown rule {rule!r}: use one of {', '.join(map(repr, RULES))}")
    unknown = literal_alone(wavelet, boundary)
    if unknown and not RULES[str(rule)].is_literal:
        raise ValueError(
            f"rule={rule!r} folds blocks of neighbours and knows no {unknown}: use wavelet='haar' and "
            f"boundary='zero'"
        )
