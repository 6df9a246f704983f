"""Results of pre-training runs of one kind, by setting and seed, from comparisons and from sweeps."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from statistics import mean
from typing import Any, NamedTuple

from bench.common.models import CONFIGS
from bench.common.names import optimizer_name, order_of, variant
from bench.report import sweeps
from bench.report.markdown import slug
from bench.report.rows import Row, Run, of

STATE = ("state_bytes", "state_bytes_measured")
STEP = ("optimizer_step", "step_time", "optimizer_time")


class Setting(NamedTuple):
    """An optimizer with its settings."""

    optimizer: str
    lr: float | None
    scale: float | None
    momentum: float | None = None


class Comparison(NamedTuple):
    """All recorded runs of one preset, model, length, text and device, by setting and seed."""

    preset: str
    model: str
    device: str
    length: int | None
    """Planned number of steps of its runs."""
    text: str | None
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
        kept = {setting: seeds for setting, seeds in self.runs.items() if _is_plain(setting.optimizer)}
        return self._replace(runs=kept or self.runs)

    def metric(self, setting: Setting, names: Sequence[str]) -> Row | None:
        """Return the row of the first of these metrics that was measured."""
        rows = (self.others.get((setting, name)) for name in names)
        return next((row for row in rows if row and row["median"] is not None), None)

    @property
    def rows(self) -> list[Row]:
        """Return every evaluation."""
        return [row for seeds in self.runs.values() for own in seeds.values() for row in own]

    @property
    def precision(self) -> str:
        """Return what is not in float32, after a comma; empty if all is in float32."""
        return sweeps.precision(self.rows[0]) if self.rows else ""

    @property
    def parameters(self) -> int | None:
        """Return the number of the model's parameters."""
        return next((row["parameters"] for row in self.rows if row.get("parameters")), None)

    @property
    def steps(self) -> int:
        """Return the last step of its longest run."""
        return max((own[-1].get("step") or 0 for s in self.runs.values() for own in s.values()), default=0)


def _is_plain(optimizer: str) -> bool:
    own = variant(optimizer)
    return own is None or own.is_stored_plainly


def comparisons(runs: Sequence[Run]) -> list[Comparison]:
    """Collect the measurements of each preset, newest first; a repeated run replaces the older one.

    If a sweep's best setting of an optimizer was not compared, the sweep's own runs of it are used.
    """
    found: dict[tuple[Any, ...], Comparison] = {}
    for run in reversed(of(runs, "quality")):
        _add(found, run, run.rows)
    for run in reversed(sweeps.swept(runs)):
        if (preset := sweeps.preset_of(run)) is not None:
            _add(found, run, list(_best_of_sweep(run, preset, found)))
    for comparison in found.values():
        for seeds in comparison.runs.values():
            for rows in seeds.values():
                rows.sort(key=lambda row: row.get("step") or 0)
    return [
        each._replace(runs=dict(sorted(each.runs.items(), key=lambda item: order_of(item[0].optimizer))))
        for each in reversed(found.values())
    ]


def by_text_and_size(compared: Iterable[Comparison]) -> list[Comparison]:
    """Sort comparisons by text in order of appearance, then by their models' sizes, then by length."""
    found = list(compared)
    texts = list(dict.fromkeys(each.text for each in found))
    return sorted(found, key=lambda each: (texts.index(each.text), each.parameters or 0, each.length or 0))


def _place(row: Row) -> tuple[Any, ...]:
    """Return the values that the runs of one comparison have in common."""
    preset, precision = str(row.get("preset") or row.get("model")), row.get("precision")
    if precision not in (None, _precision_of(preset)):
        preset += f", {precision}"
    return (preset, row.get("model"), row.get("device"), row.get("steps"), row.get("text"))


@cache
def _precision_of(preset: str) -> str:
    """Return the precision that a preset trains in, on a CPU."""
    path = CONFIGS / f"preset_{preset}.json"
    fields = json.loads(path.read_text()) if path.exists() else {}
    return str(fields.get("precision", "float32"))


def setting_of(row: Row) -> Setting:
    """Return the setting of a run."""
    return Setting(str(row.get("optimizer")), row.get("lr"), row.get("scale"), row.get("momentum"))


def _add(found: dict[tuple[Any, ...], Comparison], run: Run, rows: Sequence[Row]) -> None:
    """Add rows of one run to their comparisons, which become the newest."""
    fresh: set[tuple[Any, ...]] = set()
    for row in rows:
        place = _place(row)
        old = found.pop(place, None) or Comparison(*map(str, place[:3]), *place[3:], {}, {}, run)
        last = run if run.benchmark == "quality" or not old.runs else old.last
        comparison = found[place] = old._replace(last=last)
        setting = setting_of(row)
        seeds = comparison.runs.setdefault(setting, {})
        if row.get("metric") != "heldout_loss":
            comparison.others[setting, str(row.get("metric"))] = row
            continue
        key = (*place, setting, row.get("seed"))
        if key not in fresh:
            fresh.add(key)
            seeds[row.get("seed") or 0] = []
        seeds[row.get("seed") or 0].append(row)


def _best_of_sweep(run: Run, preset: str, found: dict[tuple[Any, ...], Comparison]) -> Iterator[Row]:
    """Yield rows of the best setting of each optimizer of a sweep, if its preset's comparison lacks it."""
    for rows in sweeps.optimizers(run).values():
        best = sweeps.best(rows)
        if best is None:
            continue
        chosen = {**best[0], "preset": preset}
        known = found.get(_place(chosen))
        if known is not None and setting_of(chosen) in known.runs:
            continue
        for row in rows:
            if setting_of(row) != setting_of(chosen) or row.get("heldout_loss") is None:
                continue
            shared = {**row, "preset": preset, "swept": True, "p20": None, "p80": None, "samples": 1}
            tokens = row["steps"] * row["batch"] * row["accumulate"] * row["context"]
            yield {**shared, "metric": "heldout_loss", "median": row["heldout_loss"], "tokens": tokens}
            yield {**shared, "metric": "state_bytes", "unit": "B", "median": row["state_bytes_measured"]}
            yield {
                **shared,
                "metric": "optimizer_step",
                "unit": "ms",
                "median": None,
                **(row["optimizer_ms"] or {}),
            }


def final_losses(comparison: Comparison) -> dict[Setting, list[float]]:
    """Return the loss after the last step by seed, for the seeds that reached it."""
    last = comparison.steps
    return {
        setting: [
            rows[-1]["median"]
            for rows in seeds.values()
            if (rows[-1].get("step") or 0) == last and rows[-1]["median"] is not None
        ]
        for setting, seeds in comparison.runs.items()
    }


def best_settings(comparison: Comparison) -> list[Setting]:
    """Return for each optimizer the setting of the lowest mean loss; an unfinished one if there is no other."""
    final = final_losses(comparison)
    found: dict[str, Setting] = {}
    for setting in sorted(comparison.runs, key=lambda each: mean(final[each] or [math.inf])):
        found.setdefault(setting.optimizer, setting)
    return sorted(found.values(), key=lambda each: order_of(each.optimizer))


def name_of(setting: Setting, settings: Iterable[Setting]) -> str:
    """Return the name of an optimizer, with its setting if there are several."""
    if sum(other.optimizer == setting.optimizer for other in settings) == 1:
        return optimizer_name(setting.optimizer)
    numbers = f", lr {setting.lr:g}, scale {setting.scale:g}"
    return (
        optimizer_name(setting.optimizer)
        + numbers
        + (f", momentum {setting.momentum:g}" if setting.momentum else "")
    )
