"""Parts of the pages on measured times: runs in order, the machine, ratios, headings of tables."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from bench.report.markdown import cell, details, model_name, spread
from bench.report.rows import Case, Run

DTYPES = {"bfloat16": "bf16", "float32": "fp32", "float16": "fp16", "float64": "fp64"}

BOUND = re.compile(r" \((?:target|aim): .*\)$")
"""The bound that `bench.kernels.targets` writes after a ratio, which the pages leave out."""

ROOFLINE = """\
Times are medians over repeated runs after a warm-up, with the 20th and 80th percentile in brackets. The
[roofline](glossary.md#roofline) of a kernel or a step is the bytes that it must move over the bandwidth of a plain
copy in the same run; the share of the copy bandwidth is the roofline over the time. On a CPU, where a copy also
reads the cache lines that it overwrites, an optimizer's step is compared with a pass in place, `x.mul_(1)`, timed
in turns with the steps. Kernels are compared with a copy there, and those that work in place may exceed it."""

BANDWIDTHS = {"copy_bandwidth": "Copy bandwidth", "in_place_bandwidth": "Bandwidth of a pass in place"}
"""Metrics of bandwidth from which rooflines are computed, and their names on the pages."""


def newest_open(runs: Sequence[Run], write: Callable[[Run], str]) -> list[str]:
    """Return the newest run, the newest with other threads or models collapsed, and the names of all others."""
    newest: dict[object, Run] = {}
    for run in runs:
        newest.setdefault(_settings(run), run)
    first, *others = newest.values()
    parts = [write(first)]
    for run in others:
        what = "Muon, Adafactor and Lion, run" if run.is_of_other_rules else "Run"
        parts.append(details(f"{what} of {run.date[:19].replace('T', ' ')} UTC", write(run)))
    shown = {run.file for run in newest.values()}
    if older := [f"`{run.file}`" for run in runs if run.file not in shown]:
        parts.append(f"Older runs of the same settings, in `bench/results`: {', '.join(older)}.")
    return parts


def _settings(run: Run) -> object:
    models = tuple(sorted({str(row["model"]) for row in run.rows if row.get("model")}))
    return models, None if run.cuda else run.rows[-1].get("threads"), run.is_of_other_rules


def scaled(value: float | None, factor: float) -> float | None:
    """Return the product, or None without a value."""
    return None if value is None else factor * value


def heading(key: str) -> str:
    """Format a benchmark's column as a heading."""
    return key.replace("_", " ")


def head(case: Case, keys: Sequence[str]) -> list[str]:
    """Return the first cells of a case's row."""
    return [DTYPES.get(str(case.what.get(key)), cell(case.what.get(key))) for key in keys]


def ratios(run: Run) -> list[str]:
    """Return the ratios of times that the run recorded, collapsed; nothing if it has none."""
    notes = [row["note"] for row in run.rows if row.get("metric") == "ratio" and row.get("note")]
    stated = []
    for note in notes:
        model, colon, rest = note.partition(": ")
        words = f"{model_name(model)}{colon}{rest}" if colon else note
        stated.append(f"- {re.sub(BOUND, '', words)}")
    return [details("Ratios between times of this run", "\n".join(stated))] if stated else []


def about_machine(run: Run) -> list[str]:
    """Return the measured bandwidth, and the reason if a run measured nothing."""
    of_machine = [row for row in run.rows if not row.get("optimizer") and not row.get("kernel")]
    known = [row for row in of_machine if row.get("metric") in BANDWIDTHS]
    measured = [f"{BANDWIDTHS[row['metric']]}: {spread(row, 1e-9)} GB/s." for row in known]
    notes = [f"Not measured: {cell(row['note'])}." for row in of_machine if row["median"] is None and row["note"]]
    return [*measured, *notes]
