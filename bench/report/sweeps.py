"""The page on sweeps over rate, scale and momentum."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from bench.common.models import CONFIGS
from bench.common.names import optimizer_name, order_of
from bench.report.captions import caption
from bench.report.markdown import cell, figure, model_name, origin, slug, table, with_spread
from bench.report.plots import Plot
from bench.report.rows import Row, Run, of

NOTHING = "Nothing is recorded yet: `python -m bench.pretrain --sweep adamw gwt2` records one."

ABOUT = """\
Each optimizer is tried at a grid of learning rate and scale, Muon at one of scale and momentum, under one seed; the
best setting of each is then repeated under further ones. For the presets of `bench.pretrain` the losses over seeds
are on the [page of all runs](quality_runs.md), and the best settings side by side on the
[choosing page](choosing.md#learning-rate-and-scale).

Some grids were extended after their first results, beyond the edge at which the best was or around it: at
preset `cpu_long` those of all optimizers, by two settings each. Where an optimizer has more *settings* than AdamW,
its grid alone was extended. One with fewer was not swept to the end: its best may be better still. In the tables by
scale the best of each optimizer is bold. In the plots, losses far above the lowest are cut off, and runs that
diverged have no point."""

EDGE = "†"
EDGE_NOTE = f"{EDGE} At the edge of the settings tried: a value beyond may be better."
"""The footnote of every table of best settings. A key with only one tried value is not marked."""

KEYS = ("lr", "scale", "momentum")


def page(runs: Sequence[Run]) -> tuple[str, list[Plot]]:
    """Return the page and its plots."""
    found = swept(runs)
    plots: list[Plot] = []
    parts = ["# Sweeps", ABOUT, *([f"{EDGE_NOTE} {ONE_VALUE}"] if found else [NOTHING])]
    for run in found:
        parts += [f"## {_title(run)}", f"On {run.device}, {caption(run.rows)}:"]
        if preset_of(run) is None:
            parts.append(best_table(run))
        name = slug(run.file.removesuffix(".json"))
        while any(plot.name.removesuffix("-momentum") == name for plot in plots):  # another regime in the same file
            name += "_other"
        for key, said in AXES.items():
            data = sweep_data(run, key)
            if not data["panels"]:
                continue
            if sum(len(line["x"]) for panel in data["panels"] for line in panel["lines"]) > len(data["panels"]):
                plots.append(Plot(name if key == "lr" else f"{name}-{key}", "sweeps", data))
                parts.append(figure(f"Held-out loss by {said} and scale", plots[-1].name))
            parts.append(scales_table(run, key))
        parts.append(origin(run))
    if of_muon := [run for run in found if any(_axis(rows) == "momentum" for rows in optimizers(run).values())]:
        rows = [row for run in of_muon for row in run.rows if row.get("momentum") is not None]
        words = f"{MOMENTA} {caption(rows)}:"
        parts[3:3] = ["## Muon's momentum and the length of a run", words, momenta_table(found)]
    return "\n\n".join(parts) + "\n", plots


AXES = {"lr": "learning rate", "momentum": "momentum"}
"""The keys that are swept in addition to the scale, and their names."""

MOMENTA = """\
The lowest loss at each momentum, and the scale that reached it; one seed. *-*: not tried. From the sweeps below,"""

ONE_VALUE = "A learning rate or momentum of which a sweep tried one value only is not marked."


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
    """Return what is not in float32 in a run, after a comma."""
    return {"mixed": ", bfloat16 activations", "bfloat16": ", bfloat16 weights"}.get(str(row.get("precision")), "")


def best(rows: Sequence[Row]) -> tuple[Row, list[float]] | None:
    """Return the best run of the first seed, and the losses of its setting over seeds."""
    tried = [row for row in _first_seed(rows) if _loss(row) is not None]
    if not tried:
        return None
    chosen = min(tried, key=lambda row: _loss(row) or 0.0)
    own = [row for row in rows if all(row.get(key) == chosen.get(key) for key in KEYS)]
    return chosen, [loss for row in own if (loss := _loss(row)) is not None]


def edges(rows: Sequence[Row]) -> set[str]:
    """Return the keys whose value in a sweep's best run is the lowest or highest tried, the other keys being equal.

    A key with only one value in the sweep is not among them.
    """
    found = best(rows)
    if found is None:
        return set()
    chosen, first = found[0], _first_seed(rows)
    several = [key for key in KEYS if len({row.get(key) for row in first}) > 1]
    return {key for key in several if _is_outermost(chosen, first, key)}


def _is_outermost(chosen: Row, rows: Sequence[Row], key: str) -> bool:
    others = [other for other in KEYS if other != key]
    beside = [row[key] for row in rows if all(row.get(other) == chosen.get(other) for other in others)]
    return chosen[key] in (min(beside), max(beside))


def preset_of(run: Run) -> str | None:
    """Return the preset whose sweep this is; None if there is none."""
    preset = run.file.removeprefix("sweep_").removesuffix(".json")
    return preset if (CONFIGS / f"preset_{preset}.json").exists() else None


def best_table(run: Run) -> str:
    """Return a table of a sweep: the best of each optimizer, mean and standard deviation over seeds."""
    lines = []
    for optimizer, rows in optimizers(run).items():
        head = [optimizer_name(optimizer), str(settings(rows))]
        if (found := best(rows)) is None:
            lines.append([*head, "-", "-", "-", "all diverged", "-"])
        else:
            chosen, losses = found
            lines.append([*head, *numbers(chosen, edges(rows)), with_spread(losses), str(len(losses))])
    headings = ["optimizer", "settings", "best lr", "best scale", "momentum", "held-out loss", "seeds"]
    return table(headings, lines)


def settings(rows: Sequence[Row]) -> int:
    """Return the number of settings that were tried for an optimizer."""
    return len({tuple(row.get(key) for key in KEYS) for row in _first_seed(rows)})


def numbers(row: Row, at: Collection[str]) -> list[str]:
    """Format learning rate, scale and momentum, and mark those whose keys are in `at`."""
    return ["-" if row.get(key) is None else f"{row[key]:g}{EDGE if key in at else ''}" for key in KEYS]


def loss_at(rows: Sequence[Row], lr: float, scale: float) -> str:
    """Format the loss of the first seed at a setting."""
    found = [_loss(row) for row in _first_seed(rows) if (row["lr"], row["scale"]) == (lr, scale)]
    return "not tried" if not found else "diverged" if found[0] is None else f"{found[0]:.3f}"


def lowest(rows: Sequence[Row]) -> Row | None:
    """Return the run with the lowest loss; None if none has a loss."""
    reached = [row for row in rows if _loss(row) is not None]
    return min(reached, key=lambda row: _loss(row) or 0.0, default=None)


def _lowest(rows: Sequence[Row], key: str, marked: Row | None = None, mark: str = "") -> str:
    """Format the lowest loss of some runs and the value of `key` that reached it; `marked` in bold with a mark."""
    found = lowest(rows)
    if found is None:
        return "diverged" if rows else "-"
    loss = f"**{_loss(found):.3f}**{mark}" if found is marked else f"{_loss(found):.3f}"
    return f"{loss} ({key} {found[key]:g})"


def scales_table(run: Run, key: str) -> str:
    """Return for each optimizer whose sweep has that axis, and each scale, the lowest loss along the axis."""
    swept = {name: rows for name, rows in optimizers(run).items() if _axis(rows) == key}
    scales = sorted({row["scale"] for rows in swept.values() for row in rows})
    lines = []
    for name, rows in swept.items():
        found, mark, first = best(rows), EDGE if edges(rows) else "", _first_seed(rows)
        marked = found[0] if found else None
        cells = [_lowest([row for row in first if row["scale"] == scale], key, marked, mark) for scale in scales]
        lines.append([optimizer_name(name), str(settings(rows)), *cells])
    return table(["optimizer", "settings", *(f"scale {cell(scale)}" for scale in scales)], lines)


def sweep_data(run: Run, key: str) -> dict[str, Any]:
    """Return the data of a sweep's plot: a line per scale along an axis, or along the scale if that has one value.

    Diverged runs have no point.
    """
    swept = {name: _first_seed(rows) for name, rows in optimizers(run).items() if _axis(rows) == key}
    along, per = (
        (key, "scale") if len({row[key] for rows in swept.values() for row in rows}) > 1 else ("scale", key)
    )
    panels = []
    for optimizer, rows in swept.items():
        lines = []
        for value in sorted({row[per] for row in rows}):
            points = sorted((row[along], loss) for row in rows if row[per] == value and (loss := _loss(row)))
            if points:
                lines.append({"value": value, "x": [x for x, _ in points], "loss": [loss for _, loss in points]})
        if lines:
            panels.append({"title": optimizer_name(optimizer), "lines": lines})
    said = {"scale": "scale", **AXES}
    return {"x": said[along], "per": said[per], "panels": panels}
