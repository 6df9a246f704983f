"""Sweeps over learning rate and scale: the section of the quality page, and the settings to begin with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench.common.names import optimizer_name
from bench.report.markdown import cell, figure, model_name, origin, slug, table, with_spread
from bench.report.plots import Plot
from bench.report.rows import Row, Run, of

NOTHING = "Nothing is recorded yet: `python -m bench.pretrain --sweep adamw gwt2` records one."

ABOUT = """\
Each optimizer is tried at a grid of learning rate and scale, under one seed; the best setting of each is then
repeated under further ones. Where the column *settings* differs, a sweep was not finished, and the comparison is
not even. In the plots, losses far above the lowest are cut off, and runs that diverged have no point."""


def section(runs: Sequence[Run]) -> tuple[list[str], list[Plot]]:
    """Return the section on sweeps and its plots."""
    found = of(runs, "sweep")
    plots: list[Plot] = []
    parts = ["## Sweeps", ABOUT, regimes(runs) if found else NOTHING]
    for run in found:
        parts.append(f"### {_title(run)}")
        if data := sweep_panels(run):
            plots.append(Plot(slug(run.file.removesuffix(".json")), "sweeps", data))
            parts.append(figure("Held-out loss by learning rate and scale", plots[-1].name))
        parts += [scales_table(run), origin(run)]
    return parts, plots


def _loss(row: Row) -> float | None:
    return row.get("heldout_loss", row.get("median"))


def optimizers(run: Run) -> dict[str, list[Row]]:
    names = dict.fromkeys(row["optimizer"] for row in run.rows if row.get("optimizer"))
    return {name: [row for row in run.rows if row.get("optimizer") == name] for name in names}


def _first_seed(rows: Sequence[Row]) -> list[Row]:
    first = min((row["seed"] for row in rows), default=None)
    return [row for row in rows if row["seed"] == first]


def _title(run: Run) -> str:
    row = run.rows[0]
    words = [model_name(row.get("model")), f"{row.get('steps')} steps"]
    if row.get("warmup") is not None:
        words.append(f"warm-up {round(row['warmup'] * (row.get('steps') or 0))} steps")
    if row.get("grad_clip") is not None:
        words.append(f"gradients clipped to norm {row['grad_clip']:g}" if row["grad_clip"] else "no clipping")
    return ", ".join(words)


def best(rows: Sequence[Row]) -> tuple[Row, list[float]] | None:
    """Return the best run of the first seed, and the losses of its setting over seeds."""
    tried = [row for row in _first_seed(rows) if _loss(row) is not None]
    if not tried:
        return None
    chosen = min(tried, key=lambda row: _loss(row) or 0.0)
    keys = ("lr", "scale", "momentum")
    own = [row for row in rows if all(row.get(key) == chosen.get(key) for key in keys)]
    return chosen, [loss for row in own if (loss := _loss(row)) is not None]


def regimes(runs: Sequence[Run]) -> str:
    """Return a table of all sweeps: the best of each optimizer, mean and standard deviation over seeds."""
    lines = []
    for run in of(runs, "sweep"):
        for optimizer, rows in optimizers(run).items():
            settings = str(len({(row["lr"], row["scale"]) for row in _first_seed(rows)}))
            head = [_title(run), optimizer_name(optimizer), settings]
            if (found := best(rows)) is None:
                lines.append([*head, "-", "-", "all diverged", "-"])
            else:
                chosen, losses = found
                lines.append(
                    [*head, f"{chosen['lr']:g}", f"{chosen['scale']:g}", with_spread(losses), str(len(losses))]
                )
    return table(
        ["sweep", "optimizer", "settings", "best lr", "best scale", "held-out loss", "seeds"], lines, left=2
    )


PUBLISHED = (0.01, 0.25)
"""Learning rate and scale of the published recipe."""


def begin(runs: Sequence[Run], model: str) -> str:
    """Return the best rate and scale of each optimizer in a model's newest sweep, beside the published ones."""
    run = next((run for run in of(runs, "sweep") if run.rows[0].get("model") == model), None)
    if run is None:
        return NOTHING
    lines = []
    for optimizer, rows in optimizers(run).items():
        if (found := best(rows)) is None:
            continue
        chosen, losses = found
        published = [_loss(row) for row in _first_seed(rows) if (row["lr"], row["scale"]) == PUBLISHED]
        shown = "not tried" if not published else "diverged" if published[0] is None else f"{published[0]:.3f}"
        numbers = [f"{chosen['lr']:g}", f"{chosen['scale']:g}", with_spread(losses), shown]
        lines.append([optimizer_name(optimizer), *numbers])
    headings = ["optimizer", "lr", "scale", "held-out loss", "loss at lr {:g}, scale {:g}".format(*PUBLISHED)]
    return f"{_title(run)}, on {run.device}:\n\n{table(headings, lines)}"


def scales_table(run: Run) -> str:
    """Return for each optimizer and scale the lowest loss over learning rates, and the rate that reached it."""
    scales = sorted({row["scale"] for row in run.rows})
    lines = []
    for optimizer, rows in optimizers(run).items():
        cells = []
        for scale in scales:
            tried = [row for row in _first_seed(rows) if row["scale"] == scale]
            reached = [row for row in tried if _loss(row) is not None]
            lowest = min(reached, key=lambda row: _loss(row) or 0.0, default=None)
            diverged = "diverged" if tried else "-"
            cells.append(f"{_loss(lowest):.3f} (lr {lowest['lr']:g})" if lowest else diverged)
        lines.append([optimizer_name(optimizer), *cells])
    return table(["optimizer", *(f"scale {cell(scale)}" for scale in scales)], lines)


def sweep_panels(run: Run) -> list[dict[str, Any]]:
    """Return the data of a sweep's plot; diverged runs have no point."""
    panels = []
    for optimizer, rows in optimizers(run).items():
        lines = []
        for scale in sorted({row["scale"] for row in rows}):
            points = sorted(
                (row["lr"], loss) for row in _first_seed(rows) if row["scale"] == scale and (loss := _loss(row))
            )
            if points:
                lines.append({"scale": scale, "lr": [lr for lr, _ in points], "loss": [loss for _, loss in points]})
        if lines:
            panels.append({"title": optimizer_name(optimizer), "lines": lines})
    return panels
