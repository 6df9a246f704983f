"""The page on sweeps over rate, scale and momentum, and the settings to begin with."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean
from typing import Any

from bench.common.names import optimizer_name, order_of
from bench.report.markdown import cell, figure, model_name, origin, slug, table, with_spread
from bench.report.plots import Plot
from bench.report.rows import Row, Run, of

NOTHING = "Nothing is recorded yet: `python -m bench.pretrain --sweep adamw gwt2` records one."

ABOUT = """\
Each optimizer is tried at a grid of learning rate and scale, Muon at one of scale and momentum, under one seed; the
best setting of each is then repeated under further ones. An optimizer with fewer *settings* than AdamW was not
swept to the end: its best may be better still; one with more was tried further out, where its best was at the edge
of the grid. In the plots, losses far above the lowest are cut off, and runs that diverged have no point."""


def page(runs: Sequence[Run]) -> tuple[str, list[Plot]]:
    """Return the page and its plots."""
    found = swept(runs)
    plots: list[Plot] = []
    parts = ["# Sweeps", ABOUT, *([] if found else [NOTHING])]
    for run in found:
        parts += [f"## {_title(run)}", best_table(run)]
        name = slug(run.file.removesuffix(".json"))
        while any(plot.name.removesuffix("-momentum") == name for plot in plots):  # another regime in the same file
            name += "_other"
        for key, said in AXES.items():
            if not (data := sweep_panels(run, key)):
                continue
            if sum(len(line["x"]) for panel in data for line in panel["lines"]) > len(data):
                plots.append(Plot(name if key == "lr" else f"{name}-{key}", "sweeps", {"x": said, "panels": data}))
                parts.append(figure(f"Held-out loss by {said} and scale", plots[-1].name))
            parts.append(scales_table(run, key))
        parts.append(origin(run))
    if any(_axis(rows) == "momentum" for run in found for rows in optimizers(run).values()):
        parts[2:2] = ["## Muon's momentum and the length of a run", MOMENTA, momenta_table(found)]
    return "\n\n".join(parts) + "\n", plots


AXES = {"lr": "learning rate", "momentum": "momentum"}
"""What is swept besides the scale."""

MOMENTA = """\
The lowest loss at each momentum, and the scale that reached it; one seed. *-*: not tried."""


def _axis(rows: Sequence[Row]) -> str:
    return "lr" if any(row.get("momentum") is None for row in rows) else "momentum"


def momenta_table(found: Sequence[Run]) -> str:
    """Return for each sweep of Muon the lowest loss at each momentum, the shortest runs first."""
    swept = [
        (run.rows[0].get("steps") or 0, run, optimizer, _first_seed(rows))
        for run in found
        for optimizer, rows in optimizers(run).items()
        if _axis(rows) == "momentum"
    ]
    momenta = sorted({row["momentum"] for *_, rows in swept for row in rows})
    lines = []
    for steps, run, optimizer, rows in sorted(swept, key=lambda each: (each[0], each[2])):
        cells = [_lowest([row for row in rows if row["momentum"] == momentum], "scale") for momentum in momenta]
        lines.append([f"{model_name(run.rows[0].get('model'))}, {steps} steps", optimizer_name(optimizer), *cells])
    return table(["model", "optimizer", *(f"momentum {momentum:g}" for momentum in momenta)], lines, left=2)


def swept(runs: Sequence[Run]) -> list[Run]:
    """Return the sweeps, each of one model, length, schedule and text, newest first."""
    parted: dict[tuple[Any, ...], Run] = {}
    for run in of(runs, "sweep"):
        for row in run.rows:
            place = (run.file, run.device, *(row.get(key) for key in REGIME))
            parted.setdefault(place, run._replace(rows=[])).rows.append(row)
    return list(parted.values())


REGIME = ("model", "text", "steps", "batch", "warmup", "grad_clip", "precision")


def _loss(row: Row) -> float | None:
    return row.get("heldout_loss", row.get("median"))


def optimizers(run: Run) -> dict[str, list[Row]]:
    """Return a sweep's runs by optimizer, AdamW's and other peers' first."""
    names = sorted({row["optimizer"] for row in run.rows if row.get("optimizer")}, key=order_of)
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
    return ", ".join(words) + precision(row)


def precision(row: Row) -> str:
    """Return what of a run is not in float32, with a comma before it."""
    return {"mixed": ", bfloat16 activations", "bfloat16": ", bfloat16 weights"}.get(str(row.get("precision")), "")


def best(rows: Sequence[Row]) -> tuple[Row, list[float]] | None:
    """Return the best run of the first seed, and the losses of its setting over seeds."""
    tried = [row for row in _first_seed(rows) if _loss(row) is not None]
    if not tried:
        return None
    chosen = min(tried, key=lambda row: _loss(row) or 0.0)
    keys = ("lr", "scale", "momentum")
    own = [row for row in rows if all(row.get(key) == chosen.get(key) for key in keys)]
    return chosen, [loss for row in own if (loss := _loss(row)) is not None]


def best_table(run: Run) -> str:
    """Return a table of a sweep: the best of each optimizer, mean and standard deviation over seeds."""
    lines = []
    for optimizer, rows in optimizers(run).items():
        head = [optimizer_name(optimizer), _settings(rows)]
        if (found := best(rows)) is None:
            lines.append([*head, "-", "-", "-", "all diverged", "-"])
        else:
            chosen, losses = found
            lines.append([*head, *_numbers(chosen), with_spread(losses), str(len(losses))])
    headings = ["optimizer", "settings", "best lr", "best scale", "momentum", "held-out loss", "seeds"]
    return table(headings, lines)


def _settings(rows: Sequence[Row]) -> str:
    return str(len({(row["lr"], row["scale"], row.get("momentum")) for row in _first_seed(rows)}))


def _numbers(row: Row) -> list[str]:
    return ["-" if row.get(key) is None else f"{row[key]:g}" for key in ("lr", "scale", "momentum")]


PUBLISHED = (0.01, 0.25)
"""Learning rate and scale of the published recipe."""


def begin(runs: Sequence[Run], model: str, steps: int | None) -> str:
    """Return the best setting of each optimizer in the newest sweep of a model and length, beside the published."""
    found = (run for run in swept(runs) if run.rows[0].get("model") == model)
    run = next((run for run in found if run.rows[0].get("steps") == steps), None)
    if run is None:
        return NOTHING
    lines = []
    for optimizer, rows in optimizers(run).items():
        if (found := best(rows)) is None:
            continue
        chosen, losses = found
        published = [_loss(row) for row in _first_seed(rows) if (row["lr"], row["scale"]) == PUBLISHED]
        shown = "not tried" if not published else "diverged" if published[0] is None else f"{published[0]:.3f}"
        cells = [optimizer_name(optimizer), *_numbers(chosen), _settings(rows), with_spread(losses), shown]
        lines.append((losses, cells))
    lines.sort(key=lambda line: mean(line[0]))
    headings = ["optimizer", "lr", "scale", "momentum", "settings", "held-out loss"]
    headings.append("loss at lr {:g}, scale {:g}".format(*PUBLISHED))
    return f"{_title(run)}, on {run.device}:\n\n{table(headings, [cells for _, cells in lines])}"


def _lowest(rows: Sequence[Row], key: str) -> str:
    """Format the lowest loss of some runs, and the value of `key` that reached it."""
    reached = [row for row in rows if _loss(row) is not None]
    lowest = min(reached, key=lambda row: _loss(row) or 0.0, default=None)
    if lowest is None:
        return "diverged" if rows else "-"
    return f"{_loss(lowest):.3f} ({key} {lowest[key]:g})"


def scales_table(run: Run, key: str) -> str:
    """Return for each optimizer whose sweep has that axis, and each scale, the lowest loss along the axis."""
    swept = {name: _first_seed(rows) for name, rows in optimizers(run).items() if _axis(rows) == key}
    scales = sorted({row["scale"] for rows in swept.values() for row in rows})
    lines = [
        [optimizer_name(name), *(_lowest([row for row in rows if row["scale"] == scale], key) for scale in scales)]
        for name, rows in swept.items()
    ]
    return table(["optimizer", *(f"scale {cell(scale)}" for scale in scales)], lines)


def sweep_panels(run: Run, key: str) -> list[dict[str, Any]]:
    """Return the data of a sweep's plot along one axis; diverged runs have no point."""
    panels = []
    for optimizer, rows in optimizers(run).items():
        lines = []
        for scale in sorted({row["scale"] for row in rows}) if _axis(rows) == key else ():
            own = [row for row in _first_seed(rows) if row["scale"] == scale]
            points = sorted((row[key], loss) for row in own if (loss := _loss(row)))
            if points:
                lines.append({"scale": scale, "x": [x for x, _ in points], "loss": [loss for _, loss in points]})
        if lines:
            panels.append({"title": optimizer_name(optimizer), "lines": lines})
    return panels
