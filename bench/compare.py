"""Several finished runs side by side: a table, a figure, and the JSON behind both."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.training import read_log, read_result


def check_same_batches(results: list[dict[str, Any]]) -> None:
    """Refuse to compare runs that did not see the same batches.

    Raises:
        ValueError: Two runs differ in the checksum of the windows they trained on, or in their held-out text.
    """
    first = results[0]
    for result in results[1:]:
        for key in ("data_digest", "step", "text", "heldout_tokens"):
            if result[key] != first[key]:
                raise ValueError(
                    f"{result['optimizer']} and {first['optimizer']} cannot be compared: {key} is "
                    f"{result[key]!r} and {first[key]!r}; run both again with the same settings"
                )


def make_table(results: list[dict[str, Any]]) -> Table:
    """Losses, state and time of each run; shares are of the first run."""
    first = results[0]
    size = f"{Path(first['model']).stem}, {first['parameters']:,} parameters"
    caption = "scale: rate of attention and MLP matrices over lr; step: median, 20th to 80th percentile"
    table = Table(title=f"{size}, {first['step']} steps, {first['device']}", caption=caption)
    table.add_column("optimizer")
    for heading in ("lr", "scale", "held-out\nloss", "state bytes\npredicted", "state bytes\nmeasured"):
        table.add_column(heading, justify="right")
    table.add_column(f"of\n{first['optimizer']}", justify="right")
    table.add_column("optimizer step\nms", justify="right")
    for result in results:
        time = result["optimizer_ms"]
        table.add_row(
            result["optimizer"],
            f"{result['lr']:g}",
            f"{result['scale']:g}",
            f"{result['heldout_loss']:.4f}",
            f"{result['state_bytes_predicted']:,}",
            f"{result['state_bytes_measured']:,}",
            f"{result['state_bytes_measured'] / first['state_bytes_measured']:.0%}",
            f"{time['median']:.1f} ({time['p20']:.1f}-{time['p80']:.1f})" if time else "-",
        )
    return table


def plot(runs: list[Path], results: list[dict[str, Any]], path: Path) -> None:
    """Draw held-out loss against steps, one line per run, into a PNG file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for run, result, marker in zip(runs, results, "osD^vPX*<>" * len(runs), strict=False):
        evaluations = read_log(run / "log.jsonl", "eval")
        state = result["state_bytes_measured"] / 1e6
        axes.plot(
            [entry["step"] for entry in evaluations],
            [entry["loss"] for entry in evaluations],
            marker=marker,
            markersize=5,
            label=f"{result['optimizer']}: {result['heldout_loss']:.3f}, {state:.2f} MB of state",
        )
    axes.set_xlabel(
        f"optimizer step ({results[0]['batch'] * results[0]['accumulate']} x {results[0]['context']} tokens each)"
    )
    axes.set_ylabel("held-out loss (nats per token)")
    size = f"{Path(results[0]['model']).stem}, {results[0]['parameters'] / 1e6:.2f} M parameters"
    axes.set_title(f"{size}: same text, same batches")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(title="final loss, optimizer state")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def compare(runs: list[Path], out: Path) -> None:
    """Print the table of `runs` and leave `compare.json`, `table.txt` and `losses.png` in `out`.

    Raises:
        ValueError: The runs did not see the same batches.
    """
    results = [read_result(run) for run in runs]
    check_same_batches(results)
    (out / "compare.json").write_text(json.dumps(results, indent=2) + "\n")
    table = make_table(results)
    with (out / "table.txt").open("w") as file:
        Console(file=file, width=100).print(table)
    Console(width=None if sys.stdout.isatty() else 100).print(table)
    plot(runs, results, out / "losses.png")
    print(f"curves: {out / 'losses.png'}   numbers: {out / 'compare.json'}")
