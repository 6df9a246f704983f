"""The page on quality: loss curves over seeds, and the sweeps that chose the settings."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from statistics import mean
from typing import Any, NamedTuple

from bench.common.names import RULES, optimizer_name, variant
from bench.report import sweeps
from bench.report.markdown import (
    cell,
    details,
    figure,
    model_name,
    origin,
    slug,
    spread,
    table,
    with_spread,
)
from bench.report.plots import Plot
from bench.report.rows import Row, Run, of

INTRODUCTION = """\
Does the model come out as good? Each preset of `python -m bench.pretrain` pre-trains one LLaMA model on the same
batches with every optimizer, each at the best of its own sweep unless it says otherwise. *scale* is the rate of
attention and MLP matrices over the learning rate; AdamW has that knob too, so that no optimizer has one more.
Losses are on held-out text, in nats per token. The runs on a CPU below shared its cores with other work, some more
than others: their wall and step times tell little, which the losses do not suffer from."""

NOTHING = (
    "Nothing is recorded yet: `python -m bench.pretrain --preset cpu --compare adamw gwt1 gwt2 gwt3` measures it."
)


MANY = 8  # lines of a plot at most


class Setting(NamedTuple):
    """An optimizer with its settings."""

    optimizer: str
    lr: float | None
    scale: float | None


class Comparison(NamedTuple):
    """All recorded runs of one preset, model, length and device, by setting and seed."""

    preset: str
    model: str
    device: str
    runs: dict[Setting, dict[int, list[Row]]]
    """Evaluations in the order of steps; a run's other rows are in `others`."""
    others: dict[tuple[Setting, str], Row]
    last: Run

    @property
    def name(self) -> str:
        """Return a name for the plot's file."""
        return f"losses_{slug(self.preset)}"

    @property
    def plain(self) -> Comparison:
        """Return the settings with default storage, or all if none has it."""
        kept = {setting: seeds for setting, seeds in self.runs.items() if "-" not in setting.optimizer}
        return self._replace(runs=kept or self.runs)


def comparisons(runs: Sequence[Run]) -> list[Comparison]:
    """Collect the measurements of each preset, newest first; a repeated run replaces the older one."""
    found: dict[tuple[Any, ...], Comparison] = {}
    for run in reversed(of(runs, "quality")):
        fresh: set[tuple[Any, ...]] = set()
        for row in run.rows:
            preset = str(row.get("preset") or row.get("model"))
            if row.get("precision") not in (None, "float32"):
                preset += f", {row['precision']}"
            place = (preset, row.get("model"), row.get("device"), row.get("steps"))
            model, device = str(row.get("model")), str(row.get("device"))
            old = found.pop(place, None) or Comparison(preset, model, device, {}, {}, run)
            comparison = found[place] = old._replace(last=run)
            setting = Setting(str(row.get("optimizer")), row.get("lr"), row.get("scale"))
            seeds = comparison.runs.setdefault(setting, {})
            if row.get("metric") != "heldout_loss":
                comparison.others[setting, str(row.get("metric"))] = row
                continue
            key = (*place, setting, row.get("seed"))
            if key not in fresh:
                fresh.add(key)
                seeds[row.get("seed") or 0] = []
            seeds[row.get("seed") or 0].append(row)
    for comparison in found.values():
        for seeds in comparison.runs.values():
            for rows in seeds.values():
                rows.sort(key=lambda row: row.get("step") or 0)
    return [each._replace(runs=dict(sorted(each.runs.items(), key=_order))) for each in reversed(found.values())]


def _order(item: tuple[Setting, Any]) -> tuple[Any, ...]:
    """Sort key: peers before this package's optimizers, these by rule, level and storage."""
    setting = item[0]
    own = variant(setting.optimizer)
    if own is None:
        return (0, setting.optimizer)
    return (1, RULES.index(own.rule), own.level, STORAGE.index(own.moments), STORAGE.index(own.rounding))


def page(runs: Sequence[Run]) -> tuple[str, list[Plot]]:
    """Return the page and its plots."""
    plots: list[Plot] = []
    parts = ["# Quality", INTRODUCTION]
    compared = comparisons(runs)
    if not compared:
        parts.append(NOTHING)
    taken: set[str] = set()
    for comparison in compared:
        title = f"{model_name(comparison.model)}, preset `{comparison.preset}`, on {comparison.device}"
        parts.append(f"## {title}")
        name = comparison.name
        while name in taken:  # the same preset on another device, or of another length
            name += "_older"
        taken.add(name)
        if data := curves(comparison.plain):
            plots.append(Plot(name, "losses", data))
            parts.append(figure("Held-out loss against tokens", name))
            words = "Lines are means over seeds; bands reach from the lowest to the highest seed."
            if len(data) < len(comparison.plain.runs):
                words += " AdamW and the lowest losses are drawn; the table has all."
            parts.append(words)
        parts.append(final_table(comparison.plain))
        if len(comparison.plain.runs) < len(comparison.runs):
            parts += [STORED_OTHERWISE, storage_table(comparison)]
            parts.append(
                details(
                    "These, with state and time",
                    final_table(comparison, comparison.runs.keys() - comparison.plain.runs),
                )
            )
        if names := [_name(setting, comparison.runs) for setting in unswept(comparison.plain, runs)]:
            parts.append(f"Not the best of a sweep below, so the comparison is not even: {', '.join(names)}.")
        parts.append(origin(comparison.last))
    chosen = next((c for c in compared if c.preset == "cpu"), None)
    if chosen is not None and (drawn := chart(chosen.plain)):
        plots += drawn
        parts[2:2] = [
            "## Memory or a better model?",
            TRADEOFF,
            figure("Held-out loss over bytes of state", CHART),
        ]
    swept, drawn = sweeps.section(runs)
    parts += swept
    plots += drawn
    return "\n\n".join(parts) + "\n", plots


STORED_OTHERWISE = """\
The same by how moments and weights are stored, at the rule's and level's own settings, which were not tuned again:
held-out loss, ± over three seeds, one seed where no ± stands."""

CHART = "loss_over_state"

TRADEOFF = """\
Held-out loss over bytes of optimizer state per parameter, preset `cpu`: lower and further left is better. A point
is the mean over seeds, its line reaches from the lowest to the highest; the larger the mark, the longer a step
took."""

# Comparisons.


def curves(comparison: Comparison) -> list[dict[str, Any]]:
    """Return the data of the loss plot: mean and range at each step that all seeds reached.

    Of many optimizers, AdamW and those of the lowest losses are in it.
    """
    series = []
    for setting, seeds in comparison.runs.items():
        whole = [rows for rows in seeds.values() if rows and all(row["median"] is not None for row in rows)]
        points = list(zip(*whole, strict=False)) if whole else []
        if points:
            losses = [[row["median"] for row in point] for point in points]
            series.append(
                {
                    "label": _name(setting, comparison.runs),
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


def _name(setting: Setting, settings: Iterable[Setting]) -> str:
    several = sum(other.optimizer == setting.optimizer for other in settings) > 1
    return optimizer_name(setting.optimizer) + (f", lr {setting.lr:g}, scale {setting.scale:g}" if several else "")


def unswept(comparison: Comparison, runs: Sequence[Run]) -> list[Setting]:
    """Return the settings that are not the best of a recorded sweep on the comparison's model."""
    swept = {
        Setting(optimizer, found[0]["lr"], found[0]["scale"])
        for run in of(runs, "sweep")
        for optimizer, rows in sweeps.optimizers(run).items()
        if (found := sweeps.best([row for row in rows if row.get("model") == comparison.model]))
    }
    return [setting for setting in comparison.runs if setting not in swept]


def final_losses(comparison: Comparison) -> dict[Setting, list[float]]:
    """Return the loss after the last step by seed, for the seeds that reached it."""
    last = max((rows[-1].get("step") or 0 for s in comparison.runs.values() for rows in s.values()), default=0)
    return {
        setting: [
            rows[-1]["median"]
            for rows in seeds.values()
            if (rows[-1].get("step") or 0) == last and rows[-1]["median"] is not None
        ]
        for setting, seeds in comparison.runs.items()
    }


def final_table(comparison: Comparison, shown: Collection[Setting] | None = None) -> str:
    """Return a table of losses with spread, state and time by optimizer; differences are from AdamW's mean.

    Args:
        comparison: The runs.
        shown: Settings to show; None for all.
    """
    final = final_losses(comparison)
    adamw = [losses for setting, losses in final.items() if setting.optimizer == "adamw" and losses]
    reference = min(map(mean, adamw), default=None)
    reference_state = next(
        (
            row["median"]
            for (s, metric), row in comparison.others.items()
            if metric in STATE and s.optimizer == "adamw"
        ),
        None,
    )
    lines = []
    for setting, losses in final.items():
        if shown is not None and setting not in shown:
            continue
        rows = {metric: row for (s, metric), row in comparison.others.items() if s == setting}
        state = next((rows[metric]["median"] for metric in STATE if metric in rows), None)
        step = next(
            (rows[metric] for metric in STEP if metric in rows and rows[metric]["median"] is not None), None
        )
        unfinished = len(comparison.runs[setting]) - len(losses)
        lines.append(
            [
                optimizer_name(setting.optimizer),
                *("-" if value is None else f"{value:g}" for value in (setting.lr, setting.scale)),
                f"{len(losses)}" + (f", {unfinished} not finished" if unfinished else ""),
                with_spread(losses),
                "-" if reference is None or not losses else f"{mean(losses) - reference:+.3f}",
                "-" if state is None else f"{state:,.0f}",
                "-" if not (state and reference_state) else f"{100 * state / reference_state:.0f} %",
                spread(step, 1e3 if step and step.get("unit") == "s" else 1.0),
            ]
        )
    headings = ["optimizer", "lr", "scale", "seeds", "held-out loss", "minus AdamW's", "state bytes", "of AdamW's"]
    notes = {
        f"- {optimizer_name(setting.optimizer)}: {cell(row['note'])}": None
        for (setting, metric), row in comparison.others.items()
        if row["median"] is None
        and metric == "final_loss"
        and row.get("note")
        and (shown is None or setting in shown)
    }
    made = table([*headings, "optimizer step, ms"], lines)
    return made + ("\n\nNot finished:\n\n" + "\n".join(notes) if notes else "")


def _points(comparison: Comparison) -> list[dict[str, Any]]:
    """Return loss, state and time of a step by optimizer, the lowest loss first."""
    points = []
    for chosen, losses in final_losses(comparison).items():
        rows = {metric: row for (s, metric), row in comparison.others.items() if s == chosen}
        state = next((rows[metric]["median"] for metric in STATE if metric in rows), None)
        size = next(
            (r["parameters"] for s in comparison.runs[chosen].values() for r in s if r.get("parameters")), None
        )
        if not losses or state is None or size is None:
            continue
        points.append(
            {
                "label": optimizer_name(chosen.optimizer),
                "own": variant(chosen.optimizer) is not None,
                "loss": mean(losses),
                "low": min(losses),
                "high": max(losses),
                "bytes": state / size,
                "ms": next((rows[m]["median"] for m in STEP if m in rows and rows[m]["median"]), None),
                "spread": with_spread(losses),
            }
        )
    return sorted(points, key=lambda point: point["loss"])


def chart(comparison: Comparison) -> list[Plot]:
    """Return the chart of held-out loss over state, one point an optimizer; none without results."""
    points = _points(comparison)
    return [Plot(CHART, "tradeoff", points)] if len(points) > 1 else []


def tradeoff(comparison: Comparison, root: str) -> str:
    """Return the optimizers of a preset up to level 2, the lowest loss first, and the chart of all."""
    points = _points(comparison)
    rows = [
        [point["label"], point["spread"], f"{point['bytes']:.2f}"]
        for point in points
        if not point["label"].endswith(("level 3", "level 4"))
    ]
    sizes = {
        r["parameters"] for s in comparison.runs.values() for x in s.values() for r in x if r.get("parameters")
    }
    steps = max(rows_[-1].get("step") or 0 for s in comparison.runs.values() for rows_ in s.values())
    size = f"{max(sizes) / 1e6:.2f}M parameters, " if sizes else ""
    words = f"{size}{steps} steps, preset `{comparison.preset}`, {comparison.device}, {comparison.last.date[:10]}"
    made = table(["optimizer", "held-out loss", "state, bytes a parameter"], rows)
    parts = [f"{words}, mean ± standard deviation over seeds:", made]
    if len(points) > 1:
        parts.append(figure("Held-out loss over bytes of optimizer state per parameter", CHART, root))
    return "\n\n".join(parts)


def storage_table(comparison: Comparison) -> str:
    """Return a table of losses by rule and level, with a column per storage of moments and weights."""
    cells: dict[str, dict[tuple[str, str], list[float]]] = {}
    for setting, losses in final_losses(comparison).items():
        if losses and (own := variant(setting.optimizer)):
            found = cells.setdefault(optimizer_name(f"{own.rule}{own.level}"), {})
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


RULES = ("gwt", "foam", "lion", "muon")
STORAGE = ("", "bf16", "int8", "nearest", "stochastic", "split")
STATE = ("state_bytes", "state_bytes_measured")
STEP = ("optimizer_step", "step_time", "optimizer_time")
