"""Rows of the benchmark "finetune" in the raw results, and settings read back from them."""

from __future__ import annotations

from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from bench.common import records
from bench.finetune.training import RunConfig
from bench.pretrain.optimizers import level_of

BENCHMARK = "finetune"
CHOSEN_BY = "validation_loss"
"""The metric whose lowest value chooses a setting; metrics of the test are reported for it."""

_SETTINGS = tuple(field.name for field in fields(RunConfig))
_DATA = ("data", "examples", "validation_size", "test_size", "max_length", "labels", "text_digest", "model_digest")
_ABOUT = ("commit", "date", "command", "device", "driver", "threads", "own_backend", "python", "torch", "triton")
Row = dict[str, Any]


def default_path(preset: str) -> Path:
    """Return the committed record of a preset."""
    return records.RESULTS / f"finetune_{preset}.json"


def rows_of(preset: str, result: dict[str, Any]) -> list[Row]:
    """Return rows in long format, one per metric; for a failed run, a single row with the reason.

    Args:
        preset: Name of the preset of the settings.
        result: Result of `train`; or, for a failed run, its settings, facts and `failed`, the reason.
    """
    shared = {
        "preset": preset,
        **{key: result[key] for key in (*_SETTINGS, *_DATA)},
        "level": level_of(result["optimizer"]),
        "parameters": result.get("parameters"),
        "trained_parameters": result.get("trained_parameters"),
        "data_digest": result.get("data_digest"),
    }
    about = {key: result[key] for key in _ABOUT}

    def row(metric: str, unit: str, value: float | None, **more: Any) -> Row:
        numbers = {"median": value, "p20": None, "p80": None, "samples": 1, "note": ""}
        return {**shared, "metric": metric, "unit": unit, **numbers, **more, **about}

    if "failed" in result:
        return [row(CHOSEN_BY, "nats", None, samples=0, note=result["failed"])]
    units = {"loss": "nats", "accuracy": "share"}
    made = [
        row(f"{part}_{metric}", units[metric], value)
        for part in ("validation", "test")
        for metric, value in result[part].items()
    ]
    if result["untrained_loss"] is not None:
        made.append(row("untrained_loss", "nats", result["untrained_loss"]))
    time = result["optimizer_ms"] or {"median": None, "samples": 0, "note": "too few steps to time"}
    return [
        *made,
        row("state_bytes", "B", result["state_bytes"]),
        row("peak_memory", "B", result["peak_bytes"]),
        row("optimizer_step", "ms", None, **time),
        row("step", "s", result["step_seconds"]),
    ]


def identity(preset: str, config: RunConfig, facts: dict[str, Any], device: str) -> Row:
    """Return the columns that identify a run: two runs with the same values are the same run."""
    return {"preset": preset, **asdict(config), **{key: facts[key] for key in _DATA}, "device": device}


def is_of(row: Row, run: Row) -> bool:
    """Return whether a row belongs to this run."""
    return all(row.get(key) == value for key, value in run.items())


def best_setting(rows: list[Row], optimizer: str, recipe: str) -> Row | None:
    """Return the row of the lowest validation loss among those of the first seed, or None."""
    own = [
        row
        for row in rows
        if (row["metric"], row["optimizer"], row["recipe"]) == (CHOSEN_BY, optimizer, recipe)
        and row["median"] is not None
    ]
    first_seed = min((row["seed"] for row in own), default=0)
    return min((row for row in own if row["seed"] == first_seed), key=lambda row: row["median"], default=None)
