"""Comparison of several runs: a table, a figure, and the JSON behind both."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

from rich.console import Console
from rich.table import Table

WIDTH = 120


def check_same_batches(results: list[dict[str, Any]]) -> None:
    """Refuse to compare runs that trained on different batches.

    Raises:
        ValueError: Two runs of one seed differ in the checksum of their training windows, or in their
            held-out text.
    """
    first_of_seed: dict[int, dict[str, Any]] = {}
    for result in results:
        first = first_of_seed.setdefault(result["seed"], result)
        for key in ("data_digest", "step", "text", "heldout_tokens"):
            if result[key] != first[key]:
                raise ValueError(
                    f"{result['optimizer']} and {first['optimizer']} cannot be compared: {key} is "
                    f"{result[key]!r} and {first[key]!r}; run both again with the same settings"
                )


def by_optimizer(results: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Return the results of each optimizer, one per seed, in the order of the optimizers' first appearance."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        groups.setdefault(result["optimizer"], []).append(result)
    return groups


def with_spread(values: Sequence[float], digits: int) -> str:
    """Format the mean and, for several values, their standard deviation."""
    spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{spread}"


def make_table(results: list[dict[str, Any]]) -> Table:
    """Return a table of losses, state and time by optimizer; percentages are over the first that finished."""
    finished = [result for result in results if "failed" not in result]
    seeds = len({result["seed"] for result in results})
    caption = "scale: rate of attention and MLP matrices over lr; step: median, 20th to 80th percentile"
    if seeds > 1:
        caption += f"; loss: mean ± standard deviation over {seeds} seeds"
    table = Table(title=_title(results, finished), caption=caption)
    table.add_column("optimizer")
    headings = ["lr", "scale", "held-out\nloss", "state bytes\npredicted", "state bytes\nmeasured"]
    headings += [f"of\n{finished[0]['optimizer']}" if finished else "", "optimizer step\nms", "training\ns"]
    for heading in headings:
        table.add_column(heading, justify="right")
    for name, group in by_optimizer(results).items():
        done = [result for result in group if "failed" not in result]
        rates = (f"{group[0]['lr']:g}", f"{group[0]['scale']:g}")
        failures = sorted({result["failed"] for result in group if "failed" in result})
        if not done:
            table.add_row(name, *rates, ", ".join(failures), *["-"] * 5)
            continue
        losses = [result["heldout_loss"] for result in done if result["heldout_loss"] is not None]
        loss = with_spread(losses, 4) if losses else "-"  # of a run that stopped before its first evaluation
        if failures:
            loss += f"\n{len(done)} of {len(group)} seeds: {', '.join(failures)}"
        held = done[0]["state_bytes_measured"]
        table.add_row(
            name,
            *rates,
            loss,
            f"{done[0]['state_bytes_predicted']:,}",
            f"{held:,}",
            f"{held / finished[0]['state_bytes_measured']:.0%}",
            _step_time(done),
            with_spread([result["seconds"] for result in done], 1),
        )
    return table


def _title(results: list[dict[str, Any]], finished: list[dict[str, Any]]) -> str:
    title = Path(results[0]["model"]).stem
    if finished:
        title += f", {finished[0]['parameters']:,} parameters, {finished[0]['step']} steps"
    return f"{title}, {results[0]['device']}"


def _step_time(done: list[dict[str, Any]]) -> str:
    times = [result["optimizer_ms"] for result in done if result["optimizer_ms"]]
    if not times:
        return "-"
    middle, low, high = (median(time[key] for time in times) for key in ("median", "p20", "p80"))
    return f"{middle:.1f} ({low:.1f}-{high:.1f})"


def curve(evaluations: list[list[dict[str, Any]]], x: str) -> tuple[list[float], list[float], list[float]]:
    """Return the mean over runs of `x` and of the loss at each evaluation, and the loss's standard deviation."""
    points = list(zip(*evaluations, strict=True))
    losses = [[entry["loss"] for entry in point] for point in points]
    spreads = [stdev(values) if len(values) > 1 else 0.0 for values in losses]
    return [mean(entry[x] for entry in point) for point in points], [mean(values) for values in losses], spreads


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Draw held-out loss against tokens and against time: a line for the mean over seeds, a band for the spread."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(13, 5), sharey=True, layout="constrained")
    first = results[0]
    for (name, group), marker in zip(by_optimizer(results).items(), "osD^vPX*<>" * len(results), strict=False):
        loss = with_spread([result["heldout_loss"] for result in group], 3)
        label = f"{name}: {loss}, {group[0]['state_bytes_measured'] / 1e6:.2f} MB of state"
        for axes, x in zip(panels, ("tokens", "seconds"), strict=True):
            at, middle, spread = curve([result["evaluations"] for result in group], x)
            (line,) = axes.plot(at, middle, marker=marker, markersize=4, label=label)
            low, high = ([m + sign * s for m, s in zip(middle, spread, strict=True)] for sign in (-1, 1))
            axes.fill_between(at, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    panels[0].set_xlabel(f"training tokens ({first['batch'] * first['accumulate']} x {first['context']} a step)")
    panels[1].set_xlabel(f"seconds of training (evaluation left out; {first['device']})")
    panels[0].set_ylabel("held-out loss (nats per token)")
    panels[0].legend(title="final loss, optimizer state")
    for axes in panels:
        axes.grid(alpha=0.3)
    size = f"{Path(first['model']).stem}, {first['parameters'] / 1e6:.2f} M parameters"
    seeds = len({result["seed"] for result in results})
    figure.suptitle(f"{size}: same text, same batches" + (f", {seeds} seeds" if seeds > 1 else ""))
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def compare(results: list[dict[str, Any]], out: Path) -> None:
    """Print the table of `results` and write `compare.json`, `table.txt` and `losses.png` to `out`.

    Args:
        results: Results of `train` for each optimizer and seed; for a run that could not finish, its settings,
            `failed` (a word or two) and `note` (the reason).
        out: Output folder; created if missing.

    Raises:
        ValueError: Runs of one seed did not see the same batches.
    """
    finished = [result for result in results if "failed" not in result]
    check_same_batches(finished)
    out.mkdir(parents=True, exist_ok=True)
    (out / "compare.json").write_text(json.dumps(results, indent=2) + "\n")
    table = make_table(results)
    notes = dict.fromkeys(f"{result['failed']}: {result['note']}" for result in results if "failed" in result)
    with (out / "table.txt").open("w") as file:
        for console in (Console(file=file, width=WIDTH), Console(width=None if sys.stdout.isatty() else WIDTH)):
            console.print(table)
            for note in notes:
                console.print(note, markup=False, highlight=False)
    if any(result["evaluations"] for result in finished):
        plot(finished, out / "losses.png")
        print(f"curves: {out / 'losses.png'}   numbers: {out / 'compare.json'}")
