"""What holds at each size and on each text: one table of held-out losses minus AdamW's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench.report.comparisons import Comparison
from bench.report.markdown import table
from bench.report.tradeoff import points

__all__ = ["section"]

ABOUT = """\
## At each size and on each text

Held-out loss minus AdamW's, both at the best setting that was tried, means over seeds; ± is the larger of the two
spreads over seeds. A difference within it says nothing. [Sweeps](sweeps.md) count the settings of each. Where a
preset has no sweep of its own, settings are those of the first, and the [page of all runs](quality_runs.md) names
those that were not the best there. Other moments than float32's take its settings."""


def section(compared: Sequence[Comparison]) -> list[str]:
    """Return the table, for comparisons in their preset's precision that hold AdamW; nothing for one."""
    columns = [(comparison, {point["optimizer"]: point for point in points(comparison)}) for comparison in compared]
    columns = [(comparison, own) for comparison, own in columns if "adamw" in own and "," not in comparison.preset]
    counts: dict[str, int] = {}
    for _, own in columns:
        for optimizer in own:
            counts[optimizer] = counts.get(optimizer, 0) + 1
    shown = [optimizer for optimizer, n in counts.items() if n > 1 and optimizer != "adamw"]
    if not shown:
        return []
    heads = ["optimizer", *(_head(comparison) for comparison, _ in columns)]
    rows = [["AdamW's loss", *(own["adamw"]["spread"] for _, own in columns)]]
    for optimizer in shown:
        label = next(own[optimizer]["label"] for _, own in columns if optimizer in own)
        rows.append([label, *(_cell(own.get(optimizer), own["adamw"]) for _, own in columns)])
    return [ABOUT, table(heads, rows)]


def _head(comparison: Comparison) -> str:
    size = f"{comparison.parameters / 1e6:.2f}M, " if comparison.parameters else ""
    text = f", {comparison.text.strip('()')}" if comparison.text else ""
    return f"`{comparison.preset}`: {size}{comparison.steps:,} steps{text}{comparison.precision}"


def _cell(point: dict[str, Any] | None, adamw: dict[str, Any]) -> str:
    if point is None:
        return "-"
    spreads = [float(each["spread"].partition("±")[2]) for each in (point, adamw) if "±" in each["spread"]]
    few = min(point["seeds"], adamw["seeds"])
    spread = f" ± {max(spreads):.3f}" if spreads else ""
    return f"{point['loss'] - adamw['loss']:+.3f}{spread}" + (" (1 seed)" if few == 1 else "")
