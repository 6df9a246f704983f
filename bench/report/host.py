"""The page on host time: what `step()` costs in Python and in Triton's launch path."""

from __future__ import annotations

from collections.abc import Sequence

from bench.report.markdown import cell, details, number, origin, percent, setting, spread, table
from bench.report.plots import Plot
from bench.report.rows import Run, by_device, of
from bench.report.sections import newest_open

ABOUT = """\
What `step()` costs in Python and in Triton's launch path over many small tensors. Where no GPU is at hand the
kernels are compiled for one, and everything but the driver's own launch is done. *The least*: the shortest of all
steps, taken when nothing else uses the core's caches and memory."""

NOTHING = "Nothing is recorded yet: `python -m bench.host` measures it."


def page(runs: Sequence[Run]) -> tuple[str, list[Plot]]:
    """Return the page, which has no plots."""
    parts = ["# Host time", ABOUT]
    if not of(runs, "host"):
        parts.append(NOTHING)
    for device, own in by_device(of(runs, "host")).items():
        parts += [f"## Host time on {device}", *newest_open(own, _run)]
    return "\n\n".join(parts) + "\n", []


def _run(run: Run) -> str:
    least = {row["scenario"]: row for row in run.rows if row.get("metric") == "host_time_least"}
    lines = [
        [
            cell(row.get("scenario")),
            cell(row.get("tensors")),
            spread(row, 1e6) if row.get("median") else row["note"],
            number(1e6 * least[row["scenario"]]["median"]) if row["scenario"] in least else "",
        ]
        for row in run.rows
        if row.get("metric") == "host_time"
    ]
    times = table(["scenario", "tensors", "µs per step", "the least"], lines)
    return "\n\n".join([f"{setting(run)}:", times, *_profiles(run), origin(run)])


def _profiles(run: Run) -> list[str]:
    """Return the host profiles, a table per scenario."""
    shares: dict[str, list[Sequence[str]]] = {}
    for row in run.rows:
        if row.get("metric") == "own_time_share":
            line = [f"`{cell(row['function'])}`", number(row["calls"]), percent(row["median"])]
            shares.setdefault(cell(row["scenario"]), []).append(line)
    return [
        details(
            f"Where the time goes: {scenario}",
            table(["function", "calls a step", "own share of the step"], lines)
            + "\n\nUnder cProfile, which makes every call dearer. What C code calls for every tensor is in the "
            "share of the function around it.",
        )
        for scenario, lines in shares.items()
    ]
