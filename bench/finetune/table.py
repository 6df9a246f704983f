"""The table that is printed at the end of a comparison."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from bench.finetune.results import CHOSEN_BY, Row, best_setting
from bench.pretrain.compare import WIDTH, with_spread


class Choice(NamedTuple):
    """The best setting of one optimizer and recipe, and its measurements: values by metric, one per seed."""

    optimizer: str
    recipe: str
    tried: int
    best: Row | None
    values: dict[str, list[float]]
    """Values by metric, and percentiles of the optimizer step as `optimizer_p20` and `optimizer_p80`."""


def choices(rows: Sequence[Row]) -> list[Choice]:
    """Return the best setting of each optimizer and recipe, in the order in which these first appear."""
    found = []
    for recipe, optimizer in dict.fromkeys((row["recipe"], row["optimizer"]) for row in rows):
        own = [row for row in rows if (row["recipe"], row["optimizer"]) == (recipe, optimizer)]
        tried = len({(row["lr"], row["scale"]) for row in own if row["metric"] == CHOSEN_BY})
        best = best_setting(own, optimizer, recipe)
        values: dict[str, list[float]] = {}
        for row in own:
            if best and (row["lr"], row["scale"]) == (best["lr"], best["scale"]) and row["median"] is not None:
                values.setdefault(row["metric"], []).append(row["median"])
                if row["metric"] == "optimizer_step" and row["p20"] is not None:
                    values.setdefault("optimizer_p20", []).append(row["p20"])
                    values.setdefault("optimizer_p80", []).append(row["p80"])
        found.append(Choice(optimizer, recipe, tried, best, values))
    return found


def print_table(rows: Sequence[Row], path: Path) -> None:
    """Print what each optimizer reached at its best setting, and write it to a file."""
    first = rows[0]
    seeds = len({row["seed"] for row in rows})
    caption = (
        f"setting chosen by validation loss; ± over {seeds} seeds" if seeds > 1 else "one seed: no spread is known"
    )
    table = Table(title=f"{first['model']}, {first['steps']} steps, {first['device']}", caption=caption)
    headings = ["recipe", "optimizer", "lr", "scale", "tried", "test\nloss", "test\naccuracy, %"]
    headings += ["state\nMB", "peak\nMB", "optimizer\nms", "step\ns"]
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="right" if i > 1 else "left")
    for choice in choices(rows):
        if choice.best is None:
            table.add_row(choice.recipe, choice.optimizer, "-", "-", str(choice.tried), "diverged", *["-"] * 5)
            continue

        def cell(
            metric: str, digits: int, factor: float = 1.0, values: dict[str, list[float]] = choice.values
        ) -> str:
            found = values.get(metric)
            return with_spread([factor * value for value in found], digits) if found else "-"

        table.add_row(
            choice.recipe,
            choice.optimizer,
            f"{choice.best['lr']:g}",
            f"{choice.best['scale']:g}",
            str(choice.tried),
            cell("test_loss", 4),
            cell("test_accuracy", 1, 100),
            cell("state_bytes", 1, 1e-6),
            cell("peak_memory", 0, 1e-6),
            cell("optimizer_step", 1),
            cell("step", 2),
        )
    with path.open("w") as file:
        for console in (Console(file=file, width=WIDTH), Console(width=None if sys.stdout.isatty() else WIDTH)):
            console.print(table)
