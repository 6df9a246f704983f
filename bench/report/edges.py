"""Settings of a comparison that are the best of a sweep, and those of them that are at the edge of its grid."""

from __future__ import annotations

from collections.abc import Sequence

from bench.common.names import ADAMS, variant
from bench.report import sweeps
from bench.report.comparisons import Comparison, Setting, setting_of
from bench.report.rows import Run

__all__ = ["bests", "edges_of"]


def bests(comparison: Comparison, runs: Sequence[Run]) -> dict[Setting, set[str]]:
    """Return the best settings of the sweeps of the comparison's model and length, with those at the edge."""
    alike = {"model": comparison.model, "steps": comparison.length}
    return {
        setting_of(found[0]): sweeps.edges(rows)
        for run in sweeps.swept(runs)
        for rows in sweeps.optimizers(run).values()
        if alike.items() <= rows[0].items() and (found := sweeps.best(rows))
    }


def edges_of(comparison: Comparison, runs: Sequence[Run]) -> dict[Setting, set[str]]:
    """Return for each setting its keys at the edge of the grid; other storage has the setting of its rule."""
    known = bests(comparison, runs)
    return {setting: known.get(setting) or known.get(_swept(setting), set()) for setting in comparison.runs}


def _swept(setting: Setting) -> Setting:
    own = variant(setting.optimizer)
    if own is None:
        return setting
    return setting._replace(optimizer="adamw" if own.rule in ADAMS and not own.level else own.swept_name)
