"""The page on kernels: share of the copy bandwidth by kernel, level and size."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from bench.report.markdown import cell, details, figure, number, origin, percent, setting, slug, table
from bench.report.plots import Plot
from bench.report.rows import Case, Run, by_device, cases, of, telling_columns
from bench.report.sections import DTYPES, ROOFLINE, about_machine, head, heading, newest_open, ratios, scaled

ABOUT = f"""\
One kernel on one tensor: the fused step with and without the limiter, the Haar transform and its inverse. Several
sets of buffers take turns, so that no call finds its data in a cache. Where a time hardly grows with the size of
the tensor, it is that of the call, and says nothing about bandwidth.

{ROOFLINE}"""

NOTHING = "Nothing is recorded yet: `python -m bench.kernels` measures it."


def page(runs: Sequence[Run]) -> tuple[str, list[Plot]]:
    """Return the page and its plots."""
    plots: list[Plot] = []
    parts = ["# Kernels", ABOUT]
    if not of(runs, "kernels"):
        parts.append(NOTHING)
    for device, own in by_device(of(runs, "kernels")).items():
        parts.append(f"## Kernels on {device}")
        panels, dtypes = kernel_panels(cases(own[0].rows))
        if panels:
            plots.append(Plot(f"roofline_{slug(device)}", "roofline", panels))
            text = f"Share of the copy bandwidth by kernel, level and size on {device}, {dtypes}"
            parts += [figure(text, plots[-1].name), f"The plot shows {dtypes}; the tables have everything."]
        parts += newest_open(own, _run)
    return "\n\n".join(parts) + "\n", plots


def _dtypes(case: Case) -> str:
    weights, moments = (case.what.get(key) for key in ("weights", "moments"))
    return f"{DTYPES.get(str(weights), weights)} weights" + (
        f" and {DTYPES.get(str(moments), moments)} moments" if moments else ""
    )


def _elements(case: Case) -> int:
    shape = case.what.get("shape")
    numbers = re.findall(r"\d+", shape) if isinstance(shape, str) else shape or ()
    return math.prod(map(int, numbers))


def _path(case: Case) -> str:
    path = str(case.what.get("path") or case.what.get("width") or case.what.get("width_class") or "")
    return {"flat": "flat path", "odd": "row path"}.get(path, path)


def kernel_panels(found: Sequence[Case]) -> tuple[list[dict[str, Any]], str]:
    """Return the data of the roofline plot for the most frequent dtypes, and the names of these."""
    found = [case for case in found if "copy_bandwidth_fraction" in case.metrics]
    with_moments = [case for case in found if case.what.get("moments")] or found
    counts: dict[tuple[Any, Any], int] = {}
    for case in with_moments:
        key = (case.what.get("weights"), case.what.get("moments"))
        counts[key] = counts.get(key, 0) + 1
    if not counts:
        return [], ""
    weights, moments = max(counts, key=lambda key: counts[key])
    chosen = [c for c in found if c.what.get("weights") == weights and c.what.get("moments") in (moments, None)]
    panels = []
    for kernel in dict.fromkeys(case.what["kernel"] for case in chosen):
        series: dict[tuple[int, str], dict[int, float]] = {}
        for case in chosen:
            if case.what["kernel"] == kernel:
                key = (case.what.get("level") or 0, _path(case))
                share = case.median("copy_bandwidth_fraction")
                series.setdefault(key, {}).setdefault(_elements(case), share or 0.0)
        lines = [{"level": k[0], "path": k[1], "points": sorted(p.items())} for k, p in sorted(series.items())]
        panels.append({"title": kernel.replace("_", " "), "series": lines})
    return panels, _dtypes(next(c for c in with_moments if c.what.get("weights") == weights))


def _run(run: Run) -> str:
    """Return shares and times, a row per shape and a column per level."""
    found = cases(row for row in run.rows if row.get("kernel"))
    timed, untimed = ([c for c in found if bool(c.metrics) is has] for has in (True, False))
    parts = []
    for kernel in dict.fromkeys(case.what["kernel"] for case in timed):
        own = [case for case in timed if case.what["kernel"] == kernel]
        levels = sorted({case.what.get("level") or 0 for case in own})
        never = (
            "kernel",
            "level",
            "path",
            "width",
            "width_class",
            "elements",
            "sets",
            "source",
            "model",
            "backend",
        )
        keys = telling_columns(
            own, ["shape", "weights", *(["moments"] if own[0].what.get("moments") else [])], never
        )
        lines: dict[tuple[str, ...], dict[int, str]] = {}
        for case in own:
            text = number(scaled(case.median("time"), 1e6))
            if (share := case.median("copy_bandwidth_fraction")) is not None:
                text = f"{percent(share)}, {text}"
            lines.setdefault(tuple(head(case, keys)), {}).setdefault(case.what.get("level") or 0, text)
        headings = [*map(heading, keys), *(f"level {level}" for level in levels)]
        rows = [[*head, *(texts.get(level, "-") for level in levels)] for head, texts in lines.items()]
        parts.append(details(f"{kernel} ({len(rows)} rows)", table(headings, rows, left=len(keys))))
    if parts:
        parts.insert(0, f"Share of the copy bandwidth, and microseconds, {setting(run)}:")
    if untimed:
        reasons: dict[str, int] = {}
        for case in untimed:
            reasons[case.note] = reasons.get(case.note, 0) + 1
        parts.append("Not timed:\n\n" + "\n".join(f"- {n} cases: {cell(note)}" for note, n in reasons.items()))
    return "\n\n".join([*parts, *about_machine(run), *ratios(run), origin(run)])
