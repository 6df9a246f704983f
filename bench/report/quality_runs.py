"""The page on the runs of each preset: loss curves over seeds, losses, state and time of each optimizer."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from statistics import mean
from typing import Any

from bench.common.names import STORAGE, optimizer_name, variant
from bench.report import step_times, sweeps
from bench.report.captions import caption
from bench.report.comparisons import (
    STATE,
    STEP,
    Comparison,
    Setting,
    best_settings,
    final_losses,
    name_of,
)
from bench.report.edges import bests, edges_of
from bench.report.markdown import (
    cell,
    details,
    figure,
    model_name,
    origin,
    spread,
    table,
    with_spread,
)
from bench.report.plots import Plot
from bench.report.quality import NOTHING, in_order
from bench.report.rows import Run

INTRODUCTION = """\
The runs behind the [quality page](quality.md), preset by preset: the loss of each optimizer at its settings, the
state that it kept and, where it was measured, the time of its step."""


MANY = 8  # lines of a plot at most


def page(runs: Sequence[Run]) -> tuple[str, list[Plot]]:
    """Return the page and its plots."""
    plots: list[Plot] = []
    parts = ["# Runs of each preset", INTRODUCTION]
    if not (compared := in_order(runs)):
        parts.append(NOTHING)
    taken: set[str] = set()
    for comparison in (step_times.with_times(each, runs) for each in compared):
        parts.append(f"## {_title(comparison)}")
        name = comparison.name
        while name in taken:  # the same preset on another device, of another length or over another text
            name += "_older"
        taken.add(name)
        parts.append(f"Plot and tables: {caption(comparison.rows)}.")
        if data := curves(comparison.plain):
            plots.append(Plot(name, "losses", data))
            parts.append(figure("Held-out loss against tokens", name))
            words = "Lines are means over seeds; bands reach from the lowest to the highest seed."
            if len(data) < len(comparison.plain.runs):
                words += (
                    " AdamW and the lowest losses are drawn, of the optimizers whose best setting was evaluated on "
                    "the way."
                )
            parts.append(words)
        edges = edges_of(comparison, runs)
        if any(edges.values()):
            parts.append(sweeps.EDGE_NOTE)
        parts.append(final_table(comparison.plain, edges=edges))
        if len(comparison.plain.runs) < len(comparison.runs):
            parts += [STORED_OTHERWISE, storage_table(comparison)]
            parts.append(
                details(
                    "These, with state and time",
                    final_table(comparison, comparison.runs.keys() - comparison.plain.runs, edges),
                )
            )
        if names := [name_of(setting, comparison.runs) for setting in unswept(comparison.plain, runs)]:
            parts.append(
                f"Not the best of a [sweep](sweeps.md), so the comparison is not even: {', '.join(names)}."
            )
        if names := [name_of(setting, comparison.runs) for setting in from_sweeps(comparison)]:
            parts.append(f"These are a sweep's own runs: {', '.join(names)}.")
        if timed := [row for (_, metric), row in comparison.others.items() if metric == STEP[0]]:
            parts.append(step_times.about(timed))
        parts.append(origin(comparison.last))
    return "\n\n".join(parts) + "\n", plots


STORED_OTHERWISE = """\
The same by how moments and weights are stored, at the rule's and level's own settings, which were not tuned again:
held-out loss, ± over seeds, one seed where no ± stands."""

# Comparisons.


def curves(comparison: Comparison) -> list[dict[str, Any]]:
    """Return the data of the loss plot: mean and range at each step that all seeds reached.

    Each optimizer has its best setting, if this was evaluated during training. Of many optimizers, only AdamW and
    those with the lowest losses are included.
    """
    series = []
    for setting in best_settings(comparison):
        seeds = comparison.runs[setting]
        whole = [rows for rows in seeds.values() if rows and all(row["median"] is not None for row in rows)]
        points = list(zip(*whole, strict=False)) if whole else []
        if len(points) > 1:
            losses = [[row["median"] for row in point] for point in points]
            series.append(
                {
                    "label": optimizer_name(setting.optimizer),
                    "tokens": [
                        mean(row.get("tokens") or row.get("step") or 0 for row in point) for point in points
                    ],
                    "mean": [mean(point) for point in losses],
                    "low": [min(point) for point in losses],
                    "high": [max(point) for point in losses],
                }
            )
    ranked = sorted(series, key=lambda line: (not line["label"].startswith("AdamW"), line["mean"][-1]))
    return [line for line in series if line in ranked[:MANY]]


def unswept(comparison: Comparison, runs: Sequence[Run]) -> list[Setting]:
    """Return the settings that are not the best of a recorded sweep of the comparison's model and length."""
    swept = bests(comparison, runs)
    return [setting for setting in comparison.runs if setting not in swept]


def from_sweeps(comparison: Comparison) -> list[Setting]:
    """Return the settings whose runs are those of a sweep."""
    found = comparison.plain.runs.items()
    return [each for each, seeds in found if any(row.get("swept") for rows in seeds.values() for row in rows)]


def _title(comparison: Comparison) -> str:
    title = f"{model_name(comparison.model)}, preset `{comparison.preset.partition(',')[0]}`{comparison.precision}"
    title += f", {comparison.length} steps" if comparison.length else ""
    title += f", {comparison.text.strip('()')}" if comparison.text else ""
    return f"{title}, on {comparison.device}"


def final_table(
    comparison: Comparison,
    shown: Collection[Setting] | None = None,
    edges: Mapping[Setting, Collection[str]] | None = None,
) -> str:
    """Return a table of losses with spread, state and time by optimizer; differences are from AdamW's mean.

    Args:
        comparison: The runs.
        shown: Settings to show; None for all.
        edges: Keys of a setting to mark, as at the edge of its sweep.
    """
    final = final_losses(comparison)
    adamw = {mean(losses): setting for setting, losses in final.items() if setting.optimizer == "adamw" and losses}
    reference = min(adamw, default=None)
    whole = None if reference is None else comparison.metric(adamw[reference], STATE)
    timed = any(comparison.metric(setting, STEP) for setting in final if shown is None or setting in shown)
    lines = []
    for setting, losses in final.items():
        if shown is not None and setting not in shown:
            continue
        state, step = comparison.metric(setting, STATE), comparison.metric(setting, STEP)
        unfinished = len(comparison.runs[setting]) - len(losses)
        lines.append(
            [
                optimizer_name(setting.optimizer),
                *sweeps.numbers(setting._asdict(), (edges or {}).get(setting, ())),
                f"{len(losses)}" + (f", {unfinished} not finished" if unfinished else ""),
                with_spread(losses),
                "-" if reference is None or not losses else f"{mean(losses) - reference:+.3f}",
                "-" if state is None else f"{state['median']:,.0f}",
                "-" if state is None or whole is None else f"{100 * state['median'] / whole['median']:.0f} %",
                *([spread(step)] if timed else []),
            ]
        )
    headings = ["optimizer", "lr", "scale", "momentum", "seeds", "held-out loss", "minus AdamW's", "state bytes"]
    notes = {
        f"- {optimizer_name(setting.optimizer)}: {cell(row['note'])}": None
        for (setting, metric), row in comparison.others.items()
        if row["median"] is None
        and metric == "final_loss"
        and row.get("note")
        and (shown is None or setting in shown)
    }
    made = table([*headings, "of AdamW's", *(["optimizer step, ms"] if timed else [])], lines)
    return made + ("\n\nNot finished:\n\n" + "\n".join(notes) if notes else "")


def storage_table(comparison: Comparison) -> str:
    """Return a table of losses by rule and level, with a column per storage of moments and weights.

    AdamW of `torch.optim` is this package's level 0 in float32.
    """
    cells: dict[str, dict[tuple[str, str], list[float]]] = {}
    for setting, losses in final_losses(comparison).items():
        own = variant("gwt0" if setting.optimizer == "adamw" else setting.optimizer)
        if losses and own:
            found = cells.setdefault(optimizer_name(own.swept_name), {})
            known = found.get((own.moments, own.rounding))
            if known is None or mean(losses) < mean(known):  # the best of several settings
                found[own.moments, own.rounding] = losses
    ways = sorted(
        {way for found in cells.values() for way in found}, key=lambda way: tuple(map(STORAGE.index, way))
    )
    headings = ["moments", *(moments or "float32" for moments, _ in ways)]
    rows = [["weights", *(rounding or "nearest" for _, rounding in ways)]]
    rows += [[name, *(with_spread(found.get(way, [])) for way in ways)] for name, found in cells.items()]
    return table(headings, rows)
