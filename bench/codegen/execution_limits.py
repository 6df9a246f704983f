"""What the project promises of executed kernels: at most so many instructions, sectors and dependent loads."""

from __future__ import annotations

from typing import Any, NamedTuple

from bench.codegen.launches import STEP
from bench.codegen.variant import Variant


class Limit(NamedTuple):
    """The most that a step of level 2 may execute, request and wait for."""

    weights: str
    moments: str
    path: str
    rounding: str
    executed: float
    """PTX instructions an element."""
    requested: float
    """Sectors over bytes that must move."""
    dependent_loads: int

    @property
    def variant(self) -> Variant:
        return Variant("sm_90", STEP, self.weights, self.moments, 2, self.path, False, "gwt", self.rounding)


LIMITS = (
    Limit("bf16", "fp32", "flat", "nearest", 22.5, 1.0, 2),
    Limit("bf16", "fp32", "flat", "stochastic", 39.0, 1.0, 2),
    Limit("bf16", "fp32", "row", "nearest", 31.4, 1.25, 2),
    Limit("bf16", "fp32", "row", "stochastic", 55.1, 1.25, 2),
    Limit("bf16", "int8", "flat", "stochastic", 71.0, 1.04, 2),
    Limit("fp32", "fp32", "flat", "nearest", 22.0, 1.0, 2),
    Limit("fp32", "fp32", "row", "nearest", 28.3, 1.16, 2),
)


def limit_of(row: dict[str, Any]) -> Limit | None:
    """Return what is promised of a row of counts; None where nothing is."""
    variant = Variant(*(row[field] for field in Variant._fields))
    return next((limit for limit in LIMITS if limit.variant == variant), None)


def excesses(row: dict[str, Any]) -> list[str]:
    """Return what of a row is above what is promised of it."""
    limit = limit_of(row)
    if limit is None:
        return []
    counted = (
        ("instructions an element", row["executed"], limit.executed),
        ("sectors over bytes that must move", row["requested"], limit.requested),
        ("dependent loads", row["dependent_loads"], limit.dependent_loads),
    )
    return [f"{value:.4g} {what} instead of at most {most:g}" for what, value, most in counted if value > most]
