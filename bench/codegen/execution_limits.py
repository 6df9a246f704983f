"""Limits of the gate on executed kernels: the most instructions, sectors and dependent loads."""

from __future__ import annotations

from typing import Any, NamedTuple

from bench.codegen.launches import FACTORED, NORM, PANEL, ROW_NORM, ROW_STEP, SHARED_STEP, STEP, STEPS
from bench.codegen.variant import Variant
from gwt_kernels.core.level import ROW, Level


class Limit(NamedTuple):
    """The most that a kernel may execute, request and wait for."""

    weights: str
    moments: str | None
    path: str
    rounding: str
    executed: float
    """PTX instructions per element."""
    requested: float
    """Sectors over bytes that must move."""
    dependent_loads: int
    rule: str = "gwt"
    level: Level = 2
    kernel: str = STEP

    @property
    def variant(self) -> Variant:
        own = self.weights, self.moments, self.level, self.path
        if self.kernel in STEPS:
            return Variant("sm_90", self.kernel, *own, False, self.rule, self.rounding)
        return Variant("sm_90", self.kernel, *own, rule=None if self.rule == "gwt" else self.rule)


LIMITS = (
    Limit("bf16", "fp32", "flat", "nearest", 22.5, 1.0, 2),
    Limit("bf16", "fp32", "flat", "stochastic", 39.0, 1.0, 2),
    Limit("bf16", "fp32", "row", "nearest", 31.4, 1.25, 2),
    Limit("bf16", "fp32", "row", "stochastic", 55.1, 1.25, 2),
    Limit("bf16", "int8", "flat", "stochastic", 59.2, 1.04, 2),
    Limit("fp32", "fp32", "flat", "nearest", 22.0, 1.0, 2),
    Limit("fp32", "fp32", "row", "nearest", 28.3, 1.16, 2),
    # GWT-Muon's first stage; then its last one, whose blocks are elements unless it rounds stochastically.
    Limit("bf16", "fp32", "flat", "nearest", 14.6, 1.0, 2, "muon"),
    Limit("bf16", "bf16", "flat", "nearest", 24.0, 1.0, 2, "muon"),
    Limit("bf16", "int8", "flat", "nearest", 25.9, 1.03, 2, "muon"),
    Limit("fp32", "fp32", "flat", "nearest", 14.9, 1.0, 2, "muon"),
    Limit("bf16", "fp32", "row", "nearest", 22.0, 1.27, 2, "muon"),
    Limit("bf16", None, "flat", "nearest", 13.5, 1.0, 2, "orthogonal", 0),
    Limit("bf16", None, "flat", "split", 20.2, 1.0, 2, "orthogonal", 0),
    Limit("bf16", None, "flat", "stochastic", 30.0, 1.0, 2, "orthogonal"),
    Limit("fp32", None, "flat", "nearest", 12.9, 1.0, 2, "orthogonal", 0),
    # Two instructions more than a sign takes, so that infinity and NaN show in the weights.
    Limit("bf16", "fp32", "flat", "nearest", 26.2, 1.0, 2, "lion"),
    Limit("bf16", "fp32", "row", "nearest", 35.3, 1.31, 2, "lion"),
    # Adafactor: its sums of squares, its clip, and its step.
    Limit("bf16", None, "flat", "nearest", 21.7, 1.0, 3, FACTORED, 2, PANEL),
    Limit("bf16", None, "row", "nearest", 32.4, 1.41, 3, FACTORED, 2, PANEL),
    Limit("bf16", "fp32", "flat", "nearest", 28.4, 1.0, 2, FACTORED, 2, NORM),
    Limit("bf16", "fp32", "row", "nearest", 32.0, 1.41, 2, FACTORED, 2, NORM),
    Limit("bf16", "fp32", "flat", "nearest", 28.9, 1.0, 2, FACTORED),
    Limit("bf16", "fp32", "row", "nearest", 39.3, 1.31, 2, FACTORED),
    # Rows are read twice: once from memory, and once from a cache.
    Limit("bf16", "fp32", "flat", "nearest", 29.9, 1.26, 2, "adam_mini", 2, SHARED_STEP),
    Limit("bf16", "fp32", "row", "nearest", 45.8, 1.7, 2, "adam_mini", 2, SHARED_STEP),
    Limit("bf16", "fp32", "flat", "nearest", 23.6, 1.35, 2, "gwt", ROW, ROW_STEP),
    Limit("bf16", "fp32", "row", "nearest", 38.0, 1.88, 2, "gwt", ROW, ROW_STEP),
    Limit("bf16", "fp32", "flat", "nearest", 10.7, 1.04, 3, "gwt", ROW, ROW_NORM),
    Limit("bf16", "fp32", "flat", "nearest", 32.6, 1.35, 2, "foam", ROW, ROW_STEP),
    Limit("fp32", "fp32", "flat", "nearest", 31.0, 1.34, 2, "foam", ROW, ROW_STEP),
    Limit("bf16", "bf16", "flat", "stochastic", 78.0, 1.35, 2, "foam", ROW, ROW_STEP),
    Limit("bf16", "fp32", "row", "nearest", 48.7, 1.88, 2, "foam", ROW, ROW_STEP),
)


def limit_of(row: dict[str, Any]) -> Limit | None:
    """Return the limit on a row of counts, or None."""
    variant = Variant(*(row[field] for field in Variant._fields))
    return next((limit for limit in LIMITS if limit.variant == variant), None)


def excesses(row: dict[str, Any]) -> list[str]:
    """Return a text for each count of a row that is above its limit."""
    limit = limit_of(row)
    if limit is None:
        return []
    counted = (
        ("instructions an element", row["executed"], limit.executed),
        ("sectors over bytes that must move", row["requested"], limit.requested),
        ("dependent loads", row["dependent_loads"], limit.dependent_loads),
    )
    return [f"{value:.4g} {what} instead of at most {most:g}" for what, value, most in counted if value > most]
