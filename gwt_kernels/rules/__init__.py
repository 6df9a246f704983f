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
"""By the option ``rule``."""
_BUCKETS = RULES | {rule.last_stage.name: rule.last_stage for rule in RULES.values() if rule.last_stage}
"""What a bucket's rule may be: a stage of one, too."""
MATRIX_STAGES = {stage for rule in RULES.values() if rule.last_stage for stage in (rule.name, rule.last_stage.name)}
"""Rules that are no step by themselves: what comes before matrices are orthogonalised, and after it."""


def rule_of(name: str, level: Level = 1) -> Rule:
    """The rule of that name at a level."""
    rule = _BUCKETS[name]
    return rule if level or rule.plain is None else rule.plain


def check_rule(rule: object, wavelet: str, boundary: str = "zero", level: Level = 1) -> None:
    """Raise a ValueError unless rule and boundary are known, and rule and level know boundary and wavelet."""
    if boundary not in get_args(Boundary):
        raise ValueError(f"unknown boundary {boundary!r}: use one of {', '.join(map(repr, get_args(Boundary)))}")
    if rule not in list(_BUCKETS):
        raise ValueError(f"unknown rule {rule!r}: use one of {', '.join(map(repr, RULES))}")
    if level == ROW and _BUCKETS[str(rule)].is_factored:
        raise ValueError(f"rule={rule!r} keeps rows and columns, and knows no level='row': use a number of levels")
    unknown = literal_alone(wavelet, boundary)
    if unknown and (level == ROW or not _BUCKETS[str(rule)].is_literal):
        option = f"level={level!r}" if level == ROW else f"rule={rule!r}"
        raise ValueError(
            f"{option} folds blocks of neighbours and knows no {unknown}: use wavelet='haar' and boundary='zero'"
        )
