"""Rows of the benchmark "quality", recorded from pre-training runs."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from bench.common import records
from bench.pretrain.optimizers import level_of
from bench.pretrain.training import RunConfig

BENCHMARK = "quality"

_SETTINGS = tuple(field.name for field in fields(RunConfig))
_FACTS = ("commit", "date", "command", "device", "driver", "threads", "own_backend", "python", "torch", "triton")


def default_path(preset: str) -> Path:
    """Return the path of a preset's committed record."""
    return records.RESULTS / f"quality_{preset}.json"


def rows_of(preset: str, result: dict[str, Any]) -> list[dict[str, Any]]:
    """Return rows in long format: each evaluation, the final loss, the bytes of state and the time of an optimizer
    step.

    Args:
        preset: Name of the preset of the settings.
        result: The result of `bench.pretrain.training.train`; or, for an unfinished run, its settings, the facts
            about the machine, and the error as `note`.
    """
    name = result["optimizer"]
    shared = {
        "preset": preset,
        **{key: result[key] for key in _SETTINGS},
        "level": level_of(name),
        "parameters": result.get("parameters"),
        "text": result["text"],
        "text_digest": result.get("text_digest"),
        "data_digest": result.get("data_digest"),
    }
    about = {key: result[key] for key in _FACTS}
    tokens_a_step = result["batch"] * result["accumulate"] * result["context"]

    def row(metric: str, unit: str, value: float | None, **more: Any) -> dict[str, Any]:
        where = {"step": result.get("step"), "tokens": None, "seconds": result.get("seconds")}
        if where["step"] is not None:
            where["tokens"] = where["step"] * tokens_a_step
        numbers = {"median": value, "p20": None, "p80": None, "samples": 1, "note": ""}
        return {**shared, **where, "metric": metric, "unit": unit, **numbers, **more, **about}

    if "failed" in result:
        note = f"{result['failed']}: {result['note']}"
        return [row("final_loss", "nats/token", None, samples=0, note=note)]
    time = result["optimizer_ms"] or {"median": None, "samples": 0, "note": "too few steps to time"}
    at = ("step", "tokens", "seconds")
    return [
        *(
            row("heldout_loss", "nats/token", entry["loss"], **{key: entry[key] for key in at})
            for entry in result["evaluations"]
        ),
        row("final_loss", "nats/token", result["heldout_loss"]),
        row("state_bytes", "B", result["state_bytes_measured"]),
        row("optimizer_step", "ms", None, **time),
    ]


def record(path: Path, preset: str, result: dict[str, Any]) -> None:
    """Add a run's rows to a record, replacing those of the same run on the same device."""
    key = ("preset", *_SETTINGS, "device")
    new = rows_of(preset, result)

    def is_of_another_run(row: dict[str, Any]) -> bool:
        return any(row.get(name) != new[0][name] for name in key)

    records.append(path, BENCHMARK, new, keep=is_of_another_run)
