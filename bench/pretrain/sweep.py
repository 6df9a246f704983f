"""Sweeps of learning rate and scale, recorded run by run, and the best recorded settings."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench.common import grids, records
from bench.common.grids import Grid
from bench.common.measure import facts
from bench.pretrain.training import RunConfig


def read_runs(path: Path) -> list[dict[str, Any]]:
    """Return every recorded run; an empty list if there is no record."""
    return records.rows_of(path, "sweep")


def best_settings(runs: list[dict[str, Any]], optimizer: str) -> dict[str, Any] | None:
    """Return the run of `optimizer` with the lowest held-out loss for the sweep's first seed, or None."""
    own = [run for run in runs if run["optimizer"] == optimizer and run["heldout_loss"] is not None]
    if not own:
        return None
    first_seed = min(run["seed"] for run in own)
    return min((run for run in own if run["seed"] == first_seed), key=lambda run: run["heldout_loss"])


def settings_tried(runs: list[dict[str, Any]]) -> dict[str, int]:
    """Count the settings tried for each optimizer on the first seed, diverged ones included."""
    first_seed = min((run["seed"] for run in runs), default=0)
    tried = {
        (run["optimizer"], run["lr"], run["scale"], run.get("momentum"))
        for run in runs
        if run["seed"] == first_seed
    }
    return dict(Counter(optimizer for optimizer, *_ in tried))


def settings_of(grid: Grid | Sequence[Grid]) -> list[dict[str, float | None]]:
    """Return the settings of a grid: `lr`, `scale` and, for Muon, `momentum`."""
    names = ("lr", "scale", "momentum")
    return [dict(zip(names, setting, strict=True)) for setting in grids.settings_of(grid, names)]


def sweep(
    settings: Mapping[str, Sequence[Mapping[str, Any]]],
    bases: Mapping[str, RunConfig],
    path: Path,
    run: Callable[[RunConfig], dict[str, Any]],
    *,
    seeds: int,
    device: torch.device,
    on: Mapping[str, Any] | None = None,
) -> None:
    """Run the settings of each optimizer's grid, then the best of each under further seeds.

    A run already recorded in `path` is not repeated, so a sweep can be stopped, continued and extended.

    Args:
        settings: Settings to run for each optimizer: `lr`, `scale` and `momentum`.
        bases: All other settings, by optimizer.
        path: The record, to which runs are added one by one.
        run: Trains under one configuration and returns its result; `FloatingPointError` means it diverged.
        seeds: Number of seeds for each best setting, including the sweep's own.
        device: Device of the runs, for the record.
        on: Further columns of the results that tell runs with the same settings apart, such as their text.
    """

    def once(config: RunConfig) -> None:
        key = {name: value for name, value in asdict(config).items() if name != "evals"} | dict(on or {})
        if any(all(done.get(name) == value for name, value in key.items()) for done in read_runs(path)):
            return
        try:
            result = run(config)
        except FloatingPointError as error:
            about = facts(device, "bench.pretrain", sys.argv[1:])
            result = {**key, "heldout_loss": None, "diverged": str(error), **about}
        result.pop("evaluations", None)
        records.append(path, "sweep", [result])
        loss = result["heldout_loss"]
        print(
            f"{config.optimizer} lr={config.lr:g} scale={config.scale:g} momentum={config.momentum} "
            f"seed={config.seed}: {loss}",
            flush=True,
        )

    for optimizer, tried in settings.items():
        base = bases[optimizer]
        for setting in tried:
            once(replace(base, **setting))
        best = best_settings(read_runs(path), optimizer)
        for seed in range(base.seed + 1, base.seed + seeds):
            if best is not None:
                own = {name: best.get(name) for name in ("lr", "scale", "momentum")}
                once(replace(base, seed=seed, **own))
    report(path)


def report(path: Path) -> None:
    """Print, for each optimizer recorded in `path`, its best setting and the loss over seeds."""
    runs = read_runs(path)
    tried = settings_tried(runs)
    table = Table(
        "optimizer", "settings tried", "best lr", "best scale", "held-out loss over seeds", title=str(path)
    )
    for optimizer in dict.fromkeys(run["optimizer"] for run in runs):
        best = best_settings(runs, optimizer)
        if best is None:
            table.add_row(optimizer, "all diverged")
            continue
        losses = [
            run["heldout_loss"]
            for run in runs
            if all(run.get(name) == best.get(name) for name in ("optimizer", "lr", "scale", "momentum"))
            and run["heldout_loss"] is not None
        ]
        spread = (
            f"{mean(losses):.4f} ± {stdev(losses):.4f} ({len(losses)} seeds)" if losses[1:] else f"{losses[0]:.4f}"
        )
        table.add_row(optimizer, str(tried[optimizer]), f"{best['lr']:g}", f"{best['scale']:g}", spread)
    Console(width=100).print(table)
