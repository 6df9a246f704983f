"""Loss against state: the chart, tables of the best at equal state and at equal loss, and README's short table."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean, stdev
from typing import Any

from bench.common.names import optimizer_name, variant
from bench.report import step_times
from bench.report.captions import caption
from bench.report.comparisons import STATE, Comparison, final_losses
from bench.report.markdown import figure, table, with_spread
from bench.report.plots import Plot
from bench.report.rows import Row, Run
from gwt_kernels.core.level import ROW

_Points = Sequence[dict[str, Any]]

CHART = "loss_over_state"
PRESET = "cpu"
"""The preset with the most optimizers."""

ABOUT = """\
Held-out loss over bytes of optimizer state per parameter, preset `cpu`: lower and further left is better. A point
is the mean over seeds, its upright line reaches from the lowest to the highest; where it has none, one seed ran.
The number beside a point is its level, and a line joins the levels of one rule. Moments are in float32. The bytes
are of the whole model, whose embeddings and head keep AdamW's 8 bytes a parameter; in a larger model they are a
smaller share."""

UNTIMED = """\
What a step costs is on [another page](performance_optimizers.md): these runs shared their cores with other work."""
SERIES = ("adamw", "gwt", "foam", "muon", "adafactor", "galore", "apollo", "adam_mini")
"""Rules and other packages' optimizers in the chart; others follow by lowest loss, while there is room."""
MOST = 8

BUDGETS = (8.0, 4.5, 2.5, 1.6, 1.2, 0.9, 0.7, 0.5)
"""Bytes of state per parameter."""

EQUAL_STATE = """\
### At equal state

The lowest loss with so much state at most, with moments in float32, and with moments of any kind that ran under
several seeds; of all optimizers, and without Muon, whose step multiplies matrices:"""

EQUAL_LOSS = """\
### At equal loss

The least state of an optimizer whose mean loss is no higher than that of the one named first, in the same
columns:"""

CHOICES = ["float32 moments", "without Muon", "any moments", "any moments, without Muon"]
REFERENCES = ("muon0", "muon2", "foam2", "gwt2", "adamw", "adafactor0", "apollo", "galore")

SHOWN = ("muon0", "muon0-int8", "muon2", "muon2-int8", "adafactor2", "foam2", "gwt2", "adamw")
"""The optimizers in README's table."""


def of_preset(compared: Sequence[Comparison]) -> Comparison | None:
    """Return the comparison that the chart is drawn from."""
    return next((comparison for comparison in compared if comparison.preset == PRESET), None)


def points(comparison: Comparison) -> list[dict[str, Any]]:
    """Return loss and state by optimizer, the lowest loss first; from several settings, the best."""
    found: dict[str, dict[str, Any]] = {}
    for chosen, losses in final_losses(comparison).items():
        state = comparison.metric(chosen, STATE)
        if not losses or state is None or comparison.parameters is None:
            continue
        own = variant(chosen.optimizer)
        point = {
            "optimizer": chosen.optimizer,
            "label": optimizer_name(chosen.optimizer),
            "rule": own.rule + own.details if own else None,
            "level": str(own.level) if own else "0",
            "own": own is not None,
            "loss": mean(losses),
            "low": min(losses),
            "high": max(losses),
            "bytes": state["median"] / comparison.parameters,
            "spread": with_spread(losses),
            "deviation": stdev(losses) if len(losses) > 1 else None,
            "seeds": len(losses),
            "setting": chosen,
        }
        old = found.get(chosen.optimizer)
        if old is None or old["loss"] > point["loss"]:
            found[chosen.optimizer] = point
    return sorted(found.values(), key=lambda point: point["loss"])


def section(comparison: Comparison, runs: Sequence[Run]) -> tuple[list[str], list[Plot]]:
    """Return the part of the page that compares loss and state, and its chart; nothing without results."""
    found = points(comparison.plain)
    if len(found) < 2:
        return [], []
    everything = [point for point in points(comparison) if point["seeds"] > 1]
    shown, left = charted(found)
    alike = {"preset": PRESET, "device": comparison.device}
    times = {name: row for (name, _), row in step_times.times(runs, "pretrain", **alike).items()}
    data = [
        {key: point[key] for key in DRAWN}
        | {"ms": times[name]["median"] if (name := point["optimizer"]) in times else None}
        for point in shown
    ]
    words = [ABOUT, _about_time(list(times.values())) if times else UNTIMED]
    if left:
        names = ", ".join(point["label"] for point in left)
        words.append(f"Left out, so that the chart can be read: {names}; [all runs](quality_runs.md) has them.")
    parts = ["## Memory or a better model?", " ".join(words), figure("Held-out loss over bytes of state", CHART)]
    parts += [f"Chart and tables of this section: {caption(comparison.rows)}."]
    parts += [EQUAL_STATE, _equal_state(found, everything), EQUAL_LOSS, _equal_loss(found, everything)]
    if costs := _rows(found):
        parts += ["### What a row costs", costs]
    return parts, [Plot(CHART, "tradeoff", data)]


DRAWN = ("label", "rule", "level", "own", "loss", "low", "high", "bytes")


def charted(found: _Points) -> tuple[_Points, _Points]:
    """Return the points of at most `MOST` rules and other optimizers, and those left out."""
    names = list(dict.fromkeys(_series(point) for point in found))  # the lowest loss first
    names.sort(key=lambda name: SERIES.index(name) if name in SERIES else len(SERIES))
    drawn = set(names[:MOST])
    parted: tuple[list[dict[str, Any]], list[dict[str, Any]]] = ([], [])
    for point in found:
        parted[_series(point) not in drawn].append(point)
    return parted


def _series(point: dict[str, Any]) -> str:
    return str(point["rule"] or point["optimizer"])


def _about_time(rows: Sequence[Row]) -> str:
    return (
        "The area of a marker is the median time of one step of the optimizer, timed apart from training on this "
        f"preset's model: {rows[0]['device']}, {caption(rows)}."
    )


def _said(point: dict[str, Any]) -> str:
    return f"{point['label']}, {point['spread']}"


def _equal_state(found: _Points, everything: _Points) -> str:
    def best(budget: float, among: _Points) -> str:
        within = (point for point in among if point["bytes"] <= budget)
        return next((f"{_said(point)} ({point['bytes']:.2f})" for point in within), "-")

    lines = [[f"{budget:g}", *(best(budget, among) for among in _choices(found, everything))] for budget in BUDGETS]
    return table(
        ["bytes a parameter, at most", *CHOICES], [line for line in lines if any(cell != "-" for cell in line[1:])]
    )


def _equal_loss(found: _Points, everything: _Points) -> str:
    def least(loss: float, among: _Points) -> str:
        reaching = [point for point in among if point["loss"] <= loss]
        point = min(reaching, key=lambda point: point["bytes"], default=None)
        return "-" if point is None else f"{point['bytes']:.2f}: {_said(point)}"

    lines = [
        [
            _said(point),
            f"{point['bytes']:.2f}",
            *(least(point["loss"], among) for among in _choices(found, everything)),
        ]
        for point in found
        if point["optimizer"] in REFERENCES
    ]
    return table(["no higher than", "its bytes", *CHOICES], lines)


def _choices(found: _Points, everything: _Points) -> tuple[_Points, ...]:
    """Return the points that each column of both tables chooses from."""
    others = [[point for point in among if point["rule"] != "muon"] for among in (found, everything)]
    return found, others[0], everything, others[1]


def _rows(found: Sequence[dict[str, Any]]) -> str:
    """Return losses of optimizers with one block per row, and their differences from AdamW and level 2."""
    known = {point["optimizer"]: point for point in found}
    lines = []
    for point in found:
        if point["level"] != ROW:
            continue
        beside = [known.get(name) for name in ("adamw", f"{point['rule']}2")]
        over = ["-" if each is None else f"{point['loss'] - each['loss']:+.3f}" for each in beside]
        lines.append([point["label"], point["spread"], *over, f"{point['bytes']:.2f}"])
    headings = ["optimizer", "held-out loss", "minus AdamW's", "minus level 2's", "bytes a parameter"]
    return table(headings, lines) if lines else ""


def block(comparison: Comparison, root: str) -> str:
    """Return README's table, the lowest loss first, and the chart of all."""
    found = points(comparison.plain)
    shown = [point for point in points(comparison) if point["optimizer"] in SHOWN]
    rows = [[point["label"], point["spread"], f"{point['bytes']:.2f}"] for point in shown]
    seeds = " or ".join(map(str, sorted({point["seeds"] for point in shown})))
    words = f"{comparison.steps} steps, preset `{PRESET}`, {comparison.device}, {caption(comparison.rows)}"
    made = table(["optimizer", "held-out loss, nats a byte", "state, bytes a parameter"], rows)
    parts = [f"{words}, mean ± standard deviation over {seeds} seeds:", made]
    if len(found) > 1:
        parts.append(figure("Held-out loss over bytes of optimizer state per parameter", CHART, root))
    return "\n\n".join(parts)
