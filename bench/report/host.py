"""The page on host time: what `step()` costs in Python and in Triton's launch path."""

from __future__ import annotations

from collections.abc import Sequence

from bench.report.markdown import cell, details, number, origin, percent, setting, spread, table
from bench.report.plots import Plot
from bench.report.rows import Run, by_device, of
from bench.report.sections import newest_open

ABOUT = """\
What `step()` costs in Python and in Triton's launch path over many small tensors. Where no GPU is at hand the
kernels are compiled for one, and everything but the driver's own launch and Muon's products of matrices is done.
*The least*: the shortest of all steps. *limiter*: the published rule's norm-growth limiter; *re-allocated*:
gradients lie at new addresses in every step; *sharded*: parameters are `DTensor`s; *matrices alone*: all of one
shape, none left to AdamW."""

LEAST_SHARE = 0.035
"""Share of a step's time below which functions are left out."""

PROFILED = """\
Under cProfile, which makes every call dearer; functions of less than 4 % are left out. What C code calls for every
tensor is in the share of the function around it."""

NOTHING = "Nothing is recorded yet: `python -m bench.host` measures it."


def page(runs: Sequence[Run]) -> tuple[str, list[Plot]]:
    """Return the page, which has no plots."""
    parts = ["# Host time", ABOUT]
    if not of(runs, "host"):
        parts.append(NOTHING)
    for device, own in by_device(of(runs, "host")).items():
        parts.append(f"## Host time on {device}")
        alike: dict[frozenset[str], list[Run]] = {}
        for run in own:  # matrices alone are timed in a separate run
            alike.setdefault(frozenset(row["scenario"] for row in run.rows), []).append(run)
        for each in alike.values():
            parts += newest_open(each, _run)
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
    """Return the host profiles of all scenarios."""
    lines = [
        [cell(row["scenario"]), f"`{cell(row['function'])}`", number(row["calls"]), percent(row["median"])]
        for row in run.rows
        if row.get("metric") == "own_time_share" and row["median"] >= LEAST_SHARE
    ]
    if not lines:
        return []
    made = table(["scenario", "function", "calls a step", "own share of the step"], lines, left=2)
    return [details("Where the time goes", f"{PROFILED}\n\n{made}")]
