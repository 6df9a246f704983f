"""The settings to begin with: each optimizer's best at every size, side by side, and what differs between sizes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

from bench.common.names import optimizer_name, order_of
from bench.report import sizes, sweeps
from bench.report.captions import caption
from bench.report.comparisons import Comparison
from bench.report.markdown import table
from bench.report.rows import Row, Run

__all__ = ["section"]

PUBLISHED = (0.01, 0.25)
"""Learning rate and scale of the published recipe."""

RATES = "The best rate of the matrices, *lr × scale*, at each size:"

ORDERS = """\
What does not hold at each size and on each text: optimizers whose loss is not everywhere on one side of AdamW's,
and pairs that change their order. *below*, *above*: by more than the larger spread over seeds, which are few;
*within*: by less."""


def section(runs: Sequence[Run], compared: Sequence[Comparison]) -> str:
    """Return the tables, the origin of their numbers, and what does not hold at each size."""
    found = presets(runs)
    if not found:
        return sweeps.NOTHING
    parts = [best_table(found)]
    if rates := rates_table(found):
        parts += [RATES, rates]
    if any(sweeps.EDGE in part for part in parts):
        parts.append(sweeps.EDGE_NOTE)
    parts.append("\n".join(map(_origin, found)))
    if orders := differences_table(compared):
        parts += [ORDERS, orders]
    return "\n\n".join(parts)


def presets(runs: Sequence[Run]) -> list[Run]:
    """Return the newest sweep of each preset, the smallest model and the shortest runs first."""
    newest: dict[str, Run] = {}
    for run in sweeps.swept(runs):
        if (preset := sweeps.preset_of(run)) is not None:
            newest.setdefault(preset, run)
    return sorted(newest.values(), key=lambda run: (run.rows[0].get("parameters") or 0, run.rows[0]["steps"]))


def best_table(found: Sequence[Run]) -> str:
    """Return the best setting of each optimizer in each sweep, and the published one's loss in the first sweep."""
    swept = [sweeps.optimizers(run) for run in found]
    names = sorted(
        {name for own in swept for name in own}, key=lambda name: (_loss(swept[0].get(name)), order_of(name))
    )
    rows = []
    for name in names:
        own = [each.get(name) for each in swept]
        first = own[0]
        best = f"{_loss(first):.3f}" if first and sweeps.best(first) else "-"
        published = "-" if first is None else sweeps.loss_at(first, *PUBLISHED)
        rows.append([optimizer_name(name), *map(_setting, own), best, published])
    where = f"`{sweeps.preset_of(found[0])}`"
    heads = ["optimizer", *(_head(run) for run in found), f"loss at its best, {where}"]
    return table([*heads, f"loss at lr {PUBLISHED[0]:g}, scale {PUBLISHED[1]:g}, {where}"], rows)


def _loss(rows: Sequence[Row] | None) -> float:
    best = sweeps.best(rows) if rows else None
    return float("inf") if best is None else best[1][0]


def _setting(rows: Sequence[Row] | None) -> str:
    if rows is None:
        return "-"
    best = sweeps.best(rows)
    return (
        "diverged"
        if best is None
        else " / ".join(n for n in sweeps.numbers(best[0], sweeps.edges(rows)) if n != "-")
    )


def _head(run: Run) -> str:
    row = run.rows[0]
    size = f"{row['parameters'] / 1e6:.2f}M, " if row.get("parameters") else ""
    return f"`{sweeps.preset_of(run)}`: {size}{row['steps']:,} steps"


def _origin(run: Run) -> str:
    tried = sorted({sweeps.settings(rows) for rows in sweeps.optimizers(run).values()})
    several = str(tried[0]) if len(tried) == 1 else f"{tried[0]} to {tried[-1]}"
    return f"- `{sweeps.preset_of(run)}`: {several} settings each, {run.device}, {caption(run.rows)}"


def rates_table(found: Sequence[Run]) -> str:
    """Return the matrices' best rate for each optimizer that is in several sweeps, with a column per sweep."""
    swept = [sweeps.optimizers(run) for run in found]
    shared = {name for own in swept for name in own if sum(name in each for each in swept) > 1}
    rows = [
        [optimizer_name(name), *(_best_rate(own.get(name)) for own in swept)]
        for name in sorted(shared, key=order_of)
    ]
    return table(["optimizer", *(f"`{sweeps.preset_of(run)}`" for run in found)], rows) if rows else ""


def _best_rate(rows: Sequence[Row] | None) -> str:
    best = sweeps.best(rows) if rows else None
    if rows is None or best is None:
        return "-"
    tried = [_rate(row) for row in rows]
    edge = sweeps.EDGE if _rate(best[0]) in (min(tried), max(tried)) else ""
    return f"{_rate(best[0]):g}{edge}"


def _rate(row: Row) -> float:
    return float(f"{row['lr'] * row['scale']:.6g}")  # 0.1 × 0.03 is 0.03 × 0.1


def differences_table(compared: Sequence[Comparison]) -> str:
    """Return optimizers whose order against AdamW differs between presets, and pairs that change their order."""
    found = sizes.columns([comparison.plain for comparison in compared])
    names = sorted({name for _, own in found for name in own} - {"adamw"}, key=order_of)
    rows = []
    for one, other in [*((name, "adamw") for name in names), *combinations(names, 2)]:
        said = [_order(own[one], own[other]) if {one, other} <= own.keys() else "-" for _, own in found]
        kinds = {*said} - {"-"}
        if len(kinds) > 1 if other == "adamw" else {"below", "above"} <= kinds:
            rows.append([optimizer_name(one), optimizer_name(other), *said])
    presets = [f"`{comparison.preset}`" for comparison, _ in found]
    return table(["optimizer", "against", *presets], rows, left=2) if rows else ""


def _order(one: dict[str, Any], other: dict[str, Any]) -> str:
    over, spread = one["loss"] - other["loss"], sizes.wider(one, other) or 0.0
    return "within" if abs(over) <= spread else "below" if over < 0 else "above"
