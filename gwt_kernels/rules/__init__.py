"""Update rules, one file each, and their registry, to which a new rule adds a line."""

from __future__ import annotations

from typing import get_args

from gwt_kernels.core.hyper import Boundary, literal_alone
from gwt_kernels.core.level import ROW, Level
from gwt_kernels.rules.adafactor import ADAFACTOR
from gwt_kernels.rules.adam_mini import ADAM_MINI
from gwt_kernels.rules.adamw import ADAMW
from gwt_kernels.rules.foam import FOAM
from gwt_kernels.rules.gwt import GWT
from gwt_kernels.rules.lion import LION
from gwt_kernels.rules.muon import MUON
from gwt_kernels.rules.rule import Rule

__all__ = [
    "ADAFACTOR",
    "ADAMW",
    "ADAM_MINI",
    "GWT",
    "MATRIX_STAGES",
    "MUON",
    "RULES",
    "Rule",
    "check_rule",
    "rule_of",
]

RULES = {rule.name: rule for rule in (GWT, FOAM, ADAMW, LION, MUON, ADAM_MINI, ADAFACTOR)}
"""Rules by the option ``rule``."""
_BUCKETS = RULES | {rule.last_stage.name: rule.last_stage for rule in RULES.values() if rule.last_stage}
"""Rules that a bucket may have: all rules, and last stages of rules."""
MATRIX_STAGES = {stage for rule in RULES.values() if rule.last_stage for stage in (rule.name, rule.last_stage.name)}
"""Names of rules that are only a stage of a step, before or after matrices are orthogonalised."""


def rule_of(name: str, level: Level = 1) -> Rule:
    """Return the named rule; at level 0 the rule to which it reduces."""
    rule = _BUCKETS[name]
    return rule if level or rule.plain is None else rule.plain


def check_rule(rule: object, wavelet: str, boundary: str = "zero", level: Level = 1) -> None:
    """Raise a ValueError if rule or boundary is unknown, or if the rule supports no such level or transform."""
    if not isinstance(boundary, str) or boundary not in get_args(Boundary):
        raise ValueError(f"unknown boundary {boundary!r}: use one of {', '.join(map(repr, get_args(Boundary)))}")
    if not isinstance(rule, str) or rule not in _BUCKETS:
        raise ValueError(f"unknown rule {rule!r}: use one of {', '.join(map(repr, RULES))}")
    if level == ROW and _BUCKETS[str(rule)].is_factored:
        raise ValueError(f"rule={rule!r} keeps rows and columns, and knows no level='row': use a number of levels")
    unknown = literal_alone(wavelet, boundary)
    if unknown and (level == ROW or not _BUCKETS[str(rule)].is_literal):
        option = f"level={level!r}" if level == ROW else f"rule={rule!r}"
        raise ValueError(
            f"{option} folds blocks of neighbours and knows no {unknown}: use wavelet='haar' and boundary='zero'"
        )
