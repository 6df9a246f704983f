"""Comparable times of a step, measured separately from the runs whose tables show them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from bench.common import sources
from bench.common.step_times import BENCHMARK
from bench.report.captions import caption
from bench.report.comparisons import STEP, Comparison
from bench.report.rows import Row, Run, of

__all__ = ["about", "times", "with_times"]

ABOUT = """\
*optimizer step* was measured apart from training, by `--step-times`: the optimizers step in turns over copies of
the model, on the same random gradients, AdamW as `fused=True`. Median, 20th and 80th percentile"""


def times(runs: Sequence[Run], of_: str, **alike: Any) -> dict[tuple[str, str | None], Row]:
    """Return the newest time of each optimizer and recipe.

    Args:
        runs: All results.
        of_: `pretrain` or `finetune`.
        alike: Values that the rows have in common with the runs.
    """
    found: dict[tuple[str, str | None], Row] = {}
    for run in of(runs, BENCHMARK):
        for row in run.rows:
            if row["of"] != of_ or any(row.get(key) != value for key, value in alike.items()):
                continue
            known = found.setdefault((row["optimizer"], row["recipe"]), row)
            if row["date"] > known["date"]:
                found[row["optimizer"], row["recipe"]] = row
    return found


def about(rows: Collection[Row]) -> str:
    """Format how, when and where the times of a table were measured; empty if there are none."""
    if not rows:
        return ""
    digests = {(row["own_backend"], row["sources"]) for row in rows}
    changed = any(then != sources.digest(backend) for backend, then in digests)
    notes = sorted({row["note"] for row in rows if row["note"]})
    sized = [row | {"parameters": None} if row["recipe"] == "lora" else row for row in rows]  # without adapters
    words = [f"{ABOUT}: {caption(sized)}", *(f"GaLore's and APOLLO's: {note}" for note in notes)]
    words += ["**the step's sources have changed since**"] if changed else []
    return "; ".join(words) + "."


def with_times(comparison: Comparison, runs: Sequence[Run]) -> Comparison:
    """Return a comparison with the step times that were measured separately for its model and dtype of weights.

    The times taken during the runs, which shared their cores, are left out.
    """
    weights = _weights(comparison.rows[0]) if comparison.rows else ""
    found = times(runs, "pretrain", model=comparison.model, device=comparison.device)
    others = {key: row for key, row in comparison.others.items() if key[1] not in STEP}
    for setting in comparison.runs:
        row = found.get((setting.optimizer, None))
        if row is not None and _weights(row) == weights:
            others[setting, STEP[0]] = row
    return comparison._replace(others=others)


def _weights(row: Row) -> str:
    """Return the dtype of a run's weights; mixed precision keeps them in float32."""
    return "bfloat16" if row.get("precision") == "bfloat16" else "float32"
