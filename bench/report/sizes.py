"""Results at each size and on each text: a table per text of held-out losses minus AdamW's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from bench.report.captions import caption
from bench.report.comparisons import Comparison, Setting, by_text_and_size
from bench.report.edges import edges_of
from bench.report.markdown import table
from bench.report.rows import Run
from bench.report.sweeps import EDGE, EDGE_NOTE
from bench.report.tradeoff import points

__all__ = ["columns", "section", "wider"]

ABOUT = """\
## At each size and on each text

Held-out loss minus AdamW's, both at the best setting that was tried, means over seeds; ± is the larger of the two
spreads over seeds. A difference within it says nothing. [Sweeps](sweeps.md) count the settings of each. Where a
preset has no sweep of its own, each optimizer has one or two settings from the first text, and the
[page of all runs](quality_runs.md) names those that were not the best there. Other moments than float32's take its
settings. What does not hold at each size is on the [choosing page](choosing.md#learning-rate-and-scale)."""


def columns(compared: Sequence[Comparison]) -> list[tuple[Comparison, dict[str, dict[str, Any]]]]:
    """Return the comparisons in their preset's precision that include AdamW, with their points by optimizer."""
    found = [(each, {point["optimizer"]: point for point in points(each)}) for each in by_text_and_size(compared)]
    return [(each, own) for each, own in found if "adamw" in own and "," not in each.preset]


def section(compared: Sequence[Comparison], runs: Sequence[Run]) -> list[str]:
    """Return a table for each text and the origins of their columns; nothing for a single comparison."""
    found = columns(compared)
    counts = Counter(optimizer for _, own in found for optimizer in own)
    shown = [optimizer for optimizer, n in counts.items() if n > 1 and optimizer != "adamw"]
    if not shown:
        return []
    parts = [ABOUT]
    for text in dict.fromkeys(comparison.text for comparison, _ in found):
        over = [one for one in found if one[0].text == text]
        parts += [f"Over the {text.strip('()')}:"] if text else []
        parts.append(_table(over, [each for each in shown if any(each in own for _, own in over)], runs))
    origins = "\n".join(f"- `{comparison.preset}`: {caption(comparison.rows)}" for comparison, _ in found)
    note = [EDGE_NOTE] if any(EDGE in part for part in parts) else []
    return [*parts, *note, origins]


def _table(
    found: Sequence[tuple[Comparison, dict[str, dict[str, Any]]]], shown: Sequence[str], runs: Sequence[Run]
) -> str:
    """Return the losses of the optimizers minus AdamW's, with a column per comparison."""
    edges = [edges_of(comparison, runs) for comparison, _ in found]
    adamw = (own["adamw"]["spread"] + _mark(own["adamw"], at) for (_, own), at in zip(found, edges, strict=True))
    rows = [["AdamW's loss", *adamw]]
    for optimizer in shown:
        label = next(own[optimizer]["label"] for _, own in found if optimizer in own)
        cells = [_cell(own.get(optimizer), own["adamw"], at) for (_, own), at in zip(found, edges, strict=True)]
        rows.append([label, *cells])
    return table(["optimizer", *(_head(comparison) for comparison, _ in found)], rows)


def _head(comparison: Comparison) -> str:
    size = f"{comparison.parameters / 1e6:.2f}M, " if comparison.parameters else ""
    return f"`{comparison.preset}`: {size}{comparison.steps:,} steps{comparison.precision}"


def _mark(point: dict[str, Any], edges: Mapping[Setting, Collection[str]]) -> str:
    return EDGE if edges.get(point["setting"]) else ""


def _cell(point: dict[str, Any] | None, adamw: dict[str, Any], edges: Mapping[Setting, Collection[str]]) -> str:
    if point is None:
        return "-"
    found = wider(point, adamw)
    spread = f" ± {found:.3f}" if found is not None else ""
    few = " (1 seed)" if min(point["seeds"], adamw["seeds"]) == 1 else ""
    return f"{point['loss'] - adamw['loss']:+.3f}{spread}{few}{_mark(point, edges)}"


def wider(*found: dict[str, Any]) -> float | None:
    """Return the largest standard deviation over seeds of some points; None if none has several seeds."""
    return max((point["deviation"] for point in found if point["deviation"] is not None), default=None)
