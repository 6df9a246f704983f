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

__all__ = ["differences", "section"]

PUBLISHED = (0.01, 0.25)
"""Learning rate and scale of the published recipe."""

SHIFTS = """\
What does not hold at each size and on each text; *below* and *above*: by more than the larger spread over seeds,
which are few:"""


def section(runs: Sequence[Run], compared: Sequence[Comparison]) -> str:
    """Return the table, where its numbers are from, and what does not hold at each size."""
    found = presets(runs)
    if not found:
        return sweeps.NOTHING
    made = best_table(found)
    parts = [made, *([sweeps.EDGE_NOTE] if sweeps.EDGE in made else []), "\n".join(map(_origin, found))]
    if listed := [*rates(found), *differences(compared)]:
        parts += [SHIFTS, "\n".join(f"- {line}" for line in listed)]
    return "\n\n".join(parts)


def presets(runs: Sequence[Run]) -> list[Run]:
    """Return the newest sweep of each preset, the smallest model and the shortest runs first."""
    newest: dict[str, Run] = {}
    for run in sweeps.swept(runs):
        if (preset := sweeps.preset_of(run)) is not None:
            newest.setdefault(preset, run)
    return sorted(newest.values(), key=lambda run: (run.rows[0].get("parameters") or 0, run.rows[0]["steps"]))


def best_table(found: Sequence[Run]) -> str:
    """Return the best setting of each optimizer in each sweep, and what the published one reaches in the first."""
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


def rates(found: Sequence[Run]) -> list[str]:
    """Return for each sweep but the first which optimizers' best rate of matrices is lower or higher than there."""
    lines = []
    first = {name: sweeps.best(rows) for name, rows in sweeps.optimizers(found[0]).items()}
    for run in found[1:]:
        ways: dict[str, list[str]] = {"lower": [], "higher": [], "the same": [], "not known": []}
        for name, rows in sweeps.optimizers(run).items():
            best, there = sweeps.best(rows), first.get(name)
            if best and there:
                here, old = _rate(best[0]), _rate(there[0])
                way = _way(here, old, [_rate(row) for row in rows])
                moved = f" ({old:g} to {here:g})" if way in ("lower", "higher") else ""
                ways[way].append(optimizer_name(name) + moved)
        if ways["lower"] or ways["higher"]:
            said = "; ".join(f"{way} for {', '.join(names)}" for way, names in ways.items() if names)
            presets = f"`{sweeps.preset_of(run)}` against `{sweeps.preset_of(found[0])}`"
            lines.append(f"The best rate of the matrices, lr × scale, at {presets}: {said}.")
    return lines


def _rate(row: Row) -> float:
    return float(f"{row['lr'] * row['scale']:.6g}")  # 0.1 × 0.03 is 0.03 × 0.1


def _way(here: float, old: float, tried: Sequence[float]) -> str:
    """Return how the best rate moved; not known if none was tried beyond it, towards the old one."""
    if here == old:
        return "the same"
    if here < old:
        return "lower" if max(tried) > here else "not known"
    return "higher" if min(tried) < here else "not known"


def differences(compared: Sequence[Comparison]) -> list[str]:
    """Return which optimizers do not stand alike to AdamW at every preset, and which two change their order."""
    found = sizes.columns([comparison.plain for comparison in compared])
    lines = []
    for name in sorted({name for _, own in found for name in own} - {"adamw"}, key=order_of):
        said = {comparison.preset: _order(own[name], own["adamw"]) for comparison, own in found if name in own}
        if len(set(said.values())) > 1:
            label = optimizer_name(name)
            lines.append(f"{label} against AdamW: {_places(said)}.")
    for one, other in combinations(sorted({name for _, own in found for name in own} - {"adamw"}, key=order_of), 2):
        said = {
            comparison.preset: _order(own[one], own[other])
            for comparison, own in found
            if {one, other} <= own.keys()
        }
        if {"below", "above"} <= set(said.values()):
            lines.append(f"{optimizer_name(one)} against {optimizer_name(other)}: {_places(said)}.")
    return lines


def _order(one: dict[str, Any], other: dict[str, Any]) -> str:
    over, spread = one["loss"] - other["loss"], sizes.wider(one, other) or 0.0
    return "within the spread" if abs(over) <= spread else "below" if over < 0 else "above"


def _places(said: dict[str, str]) -> str:
    return ", ".join(
        f"{order} at {' and '.join(f'`{p}`' for p, own in said.items() if own == order)}"
        for order in dict.fromkeys(said.values())
    )
