"""The page on speed and memory: optimizer steps, kernels, host time."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from bench.report.executed import section as executed_section
from bench.report.machine_code import section as machine_code_section
from bench.report.markdown import (
    cell,
    details,
    figure,
    model_name,
    number,
    origin,
    percent,
    setting,
    slug,
    spread,
    table,
)
from bench.report.plots import Plot
from bench.report.rows import Case, Run, by_device, cases, of, telling_columns

DTYPES = {"bfloat16": "bf16", "float32": "fp32", "float16": "fp16", "float64": "fp64"}

INTRODUCTION = """\
Every time is a median over repeated runs after a warm-up, with the 20th and 80th percentile in brackets, and stands
beside its *roofline*: the bytes that must move over the copy bandwidth measured in the same run. Before anything is
timed its result is compared with a float64 oracle; what differs by more than rounding is not timed. Optimizers of
other packages have rules and roundings of their own: their update must resemble AdamW's, within what their method
explains, and the rows say `sanity` where the others say `oracle`. The raw rows are in `bench/results/`, one file a
run, with commit, device, versions and the exact command; newest runs come first."""

NO_GPU = """\
**No GPU was at hand, so no time on a GPU is known yet.** On a CUDA machine `make bench-gpu` checks and measures
everything here, and the next report shows it by device. Until then the [machine code](#machine-code) of the kernels
stands in its place, what each would load, store and occupy, and [what they execute](#executed-instructions):
counts, and the bound that follows from them."""


ON_CPU = """\
On a CPU, level 0 moves the 28 bytes a parameter that the fused AdamW moves, and both wait for memory, not for
arithmetic. Level 0 executes 3.0 instructions an element in vectors of 32 bytes, as `callgrind` counts (level 2:
3.6, its folded rule 4.5), and `gcc -fopt-info-vec` reports vectors for every loop of it. On one thread of an AMD
EPYC, by medians of 30 turns of CPU time, a loop of three additions over the same four arrays takes 0.98 of level
0's time, one that only reads them 0.80, and plain SGD 0.43, as its 12 of 28 bytes would have it. So an aim of 0.90
for level 0 is out of reach: but for what Python adds to either, about a tenth, it takes as long as the fused AdamW.
Other levels have fewer bytes to move."""


def page(runs: Sequence[Run]) -> tuple[str, list[Plot]]:
    """Return the page and its plots."""
    plots: list[Plot] = []
    timed = [run for run in runs if run.benchmark in ("optimizers", "kernels")]
    parts = ["# Performance", INTRODUCTION]
    if not any(run.cuda for run in timed):
        parts.append(NO_GPU)
    for benchmark, write in (("optimizers", _optimizers), ("kernels", _kernels), ("host", _host)):
        title, about, command = ABOUT[benchmark]
        parts += [f"## {title}", about]
        if not of(runs, benchmark):
            parts.append(f"Nothing is recorded yet: `{command}` measures it.")
        for device, own in by_device(of(runs, benchmark)).items():
            parts.append(f"### {device}" if benchmark == "optimizers" else f"### {title} on {device}")
            write(device, own, parts, plots)
    parts += _checks(of(runs, "gpu"))
    parts += machine_code_section(of(runs, "codegen"))
    parts += executed_section(of(runs, "executed"))
    return "\n\n".join(parts) + "\n", plots


ABOUT = {
    "optimizers": (
        "Optimizer step",
        "`step()` alone, over the real parameter lists of LLaMA models, beside what one would use instead.",
        "python -m bench.optimizers",
    ),
    "kernels": (
        "Kernels",
        "One kernel on one tensor: the fused step with and without the limiter, the Haar transform and its\n"
        "inverse. Several sets of buffers take turns, so that no call finds its data in a cache.",
        "python -m bench.kernels",
    ),
    "host": (
        "Host time",
        "What `step()` costs in Python and in Triton's launch path over many small tensors. Where no GPU is at\n"
        "hand the kernels are compiled for one, and everything but the driver's own launch is done. The least of\n"
        "all steps is what one takes when nothing else uses the core's caches and its neighbours' memory.",
        "python -m bench.host",
    ),
}


# Optimizers.

Write = Callable[[Case], str]


def _metric(name: str, factor: float) -> Write:
    return lambda case: spread(case.metrics.get(name), factor)


COLUMNS: dict[str, Write] = {
    "step, ms": _metric("step_time", 1e3),
    "wall, ms": _metric("wall_time", 1e3),
    "roofline, ms": lambda case: number(_scaled(case.median("roofline_time"), 1e3)),
    "of copy bandwidth": lambda case: percent(case.median("copy_bandwidth_fraction")),
    "host, ms": _metric("host_time", 1e3),
    "launches": lambda case: "-" if (n := case.median("kernel_launches")) is None else f"{n:g}",
    "state, bytes a parameter": lambda case: number(state_per_parameter(case)),
    "state, MiB": lambda case: number(_scaled(case.median("state_bytes"), 2**-20)),
    "extra, MiB": lambda case: number(_scaled(case.median("peak_extra_bytes"), 2**-20)),
}


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else factor * value


def state_per_parameter(case: Case) -> float | None:
    """Return bytes of state over parameters, if the benchmark records their number."""
    if (stated := case.median("state_bytes_per_parameter")) is not None:
        return stated
    state, parameters = case.median("state_bytes"), case.what.get("parameters")
    return state / parameters if state is not None and parameters else None


def steps_table(found: Sequence[Case]) -> str:
    """Return a table of optimizers with the metrics that any of them has, and the notes of those not timed."""
    clipped = {_unclipped(case): case for case in found if case.what.get("clipped")}
    found = [case for case in found if not case.what.get("clipped")]
    never = ("model", "level", "limiter", "parameters", "layers", "embeddings")
    keys = telling_columns(found, ["optimizer", "weights"], never)
    timed = [case for case in found if case.metrics]

    def with_clipping(case: Case) -> str:
        other = clipped.get(_unclipped(case))
        return "-" if other is None else spread(other.metrics.get("step_time"), 1e3)

    known = {"step, ms": COLUMNS["step, ms"], "with clipping, ms": with_clipping} | COLUMNS
    columns = {head: write for head, write in known.items() if any(write(case) != "-" for case in timed)}
    if timed and not any(_host_differs(case) for case in timed):  # on a CPU both are the time of the call
        columns.pop("host, ms", None)
    if "state, bytes a parameter" in columns:
        columns.pop("state, MiB", None)
    lines = [[*_head(case, keys), *(write(case) for write in columns.values())] for case in timed]
    notes = [f"- {', '.join(_head(case, keys))}: {cell(case.note)}" for case in found if not case.metrics]
    parts = [table([*map(_heading, keys), *columns], lines, left=len(keys))] if timed else []
    if any((case.median("copy_bandwidth_fraction") or 0) > 1 for case in timed):
        parts.append("Above 100 %: faster than the copy that was measured, as caches allow.")
    return "\n\n".join(parts + (["Not timed:\n\n" + "\n".join(notes)] if notes else []))


def _unclipped(case: Case) -> str:
    return repr({key: value for key, value in case.what.items() if key != "clipped"})


def _host_differs(case: Case) -> bool:
    return case.median("host_time") not in (None, case.median("step_time"))


def _heading(key: str) -> str:
    return key.replace("_", " ")


def _head(case: Case, keys: Sequence[str]) -> list[str]:
    return [DTYPES.get(str(case.what.get(key)), cell(case.what.get(key))) for key in keys]


def steps_by_model(run: Run) -> dict[str, list[Case]]:
    """Return the cases of a run by model, including the notes of candidates that could not be timed."""
    found = cases(row for row in run.rows if row.get("optimizer"))
    models = dict.fromkeys(case.what["model"] for case in found)
    return {model: [case for case in found if case.what["model"] == model] for model in models}


def targets(run: Run) -> list[str]:
    """Return a paragraph on the project's targets as the run recorded them; empty if it has none."""
    notes = [row["note"] for row in run.rows if row.get("metric") == "ratio" and row.get("note")]
    stated = [f"- {note.replace('(aim: ', '(target: ')}" for note in notes]  # older runs say "aim"
    return ["Targets, within this run:\n\n" + "\n".join(stated)] if stated else []


def _optimizers(device: str, runs: Sequence[Run], parts: list[str], plots: list[Plot]) -> None:
    name = f"steps_{slug(device)}"
    if not all(run.cuda for run in runs):
        parts.append(ON_CPU)
    if panels := step_panels(runs):
        plots.append(Plot(name, "steps", panels))
        parts += [figure(f"Time of a step by optimizer and model on {device}", name)]
    if states := state_models(runs):
        what = "bytes of optimizer state per parameter, measured"
        plots.append(Plot(f"state_{slug(device)}", "states", {"what": what, "models": states}))
        parts += [figure(f"Bytes of optimizer state per parameter, measured on {device}", f"state_{slug(device)}")]
    _newest_open(runs, _optimizer_run, parts)


def _newest_open(runs: Sequence[Run], write: Callable[[Run], str], parts: list[str]) -> None:
    parts.append(write(runs[0]))
    parts += [details(f"Run of {run.date[:19].replace('T', ' ')} UTC", write(run)) for run in runs[1:]]


def _optimizer_run(run: Run) -> str:
    parts = []
    for model, found in steps_by_model(run).items():
        parts += [f"**{model_name(model)}**, {setting(run)}:", steps_table(found)]
    parts += _about_machine(run)
    return "\n\n".join([*parts, *targets(run), origin(run)])


def _about_machine(run: Run) -> list[str]:
    """Return the copy bandwidth, and the reason if a run measured nothing."""
    of_machine = [row for row in run.rows if not row.get("optimizer") and not row.get("kernel")]
    copied = [f"{spread(row, 1e-9)} GB/s" for row in of_machine if row.get("metric") == "copy_bandwidth"]
    notes = [f"Not measured: {cell(row['note'])}." for row in of_machine if row["median"] is None and row["note"]]
    return [*(f"Copy bandwidth: {found}." for found in copied), *notes]


def _label(case: Case, found: Sequence[Case]) -> str:
    several = len({other.what.get("weights") for other in found}) > 1
    keys = telling_columns(found, ["optimizer"], ("model", "weights", "level", "limiter", "parameters"))[1:]
    words = [case.what["optimizer"], *([DTYPES.get(case.what["weights"], case.what["weights"])] if several else [])]
    words += [f"{_heading(key)} {cell(case.what.get(key))}" for key in keys]
    return ", ".join(words)


def _plain(found: Sequence[Case]) -> list[Case]:
    """Leave out the cases timed together with clipping."""
    return [case for case in found if not case.what.get("clipped")]


def _newest_of_each_model(runs: Sequence[Run]) -> dict[str, list[Case]]:
    """Return for each model the cases of the newest run that timed it, the smallest model first."""
    newest: dict[str, list[Case]] = {}
    for run in runs:
        for model, found in steps_by_model(run).items():
            if any("step_time" in case.metrics for case in found):
                newest.setdefault(model, _plain(found))
    return dict(sorted(newest.items(), key=lambda item: _size(item[0])))


def _size(model: str) -> float:
    found = re.search(r"(\d+)([mb])", model)
    return int(found[1]) * {"m": 1e6, "b": 1e9}[found[2]] if found else 0.0


def step_panels(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return the data of the plot of step times, one run per panel, so that its entries are comparable."""
    panels = []
    for model, found in _newest_of_each_model(runs).items():
        entries = [
            {key: case.metrics["step_time"][key] for key in ("median", "p20", "p80")}
            | {
                "label": _label(case, found),
                "own": case.what["optimizer"].startswith("GWT"),
                "roofline": case.median("roofline_time"),
            }
            for case in found
            if "step_time" in case.metrics
        ]
        panels.append({"title": model_name(model), "entries": entries})
    return panels


def state_models(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return the data of the plot of state bytes."""
    models = []
    for model, found in _newest_of_each_model(runs).items():
        entries = {_label(case, found): state_per_parameter(case) for case in found}
        if entries := {label: state for label, state in entries.items() if state is not None}:
            models.append({"title": model_name(model), "entries": entries})
    return models


# Kernels.


def _kernels(device: str, runs: Sequence[Run], parts: list[str], plots: list[Plot]) -> None:
    name = f"roofline_{slug(device)}"
    panels, dtypes = kernel_panels(cases(runs[0].rows))
    if panels:
        plots.append(Plot(name, "roofline", panels))
        parts += [figure(f"Share of the copy bandwidth by kernel, level and size on {device}, {dtypes}", name)]
        parts.append(f"The plot shows {dtypes}; the tables have everything.")
    _newest_open(runs, _kernel_run, parts)


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
    return str(case.what.get("path") or case.what.get("width") or case.what.get("width_class") or "")


def kernel_panels(found: Sequence[Case]) -> tuple[list[dict[str, Any]], str]:
    """Return the data of the roofline plot, of one combination of dtypes, and its name."""
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


def _kernel_run(run: Run) -> str:
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
            text = number(_scaled(case.median("time"), 1e6))
            if (share := case.median("copy_bandwidth_fraction")) is not None:
                text = f"{percent(share)}, {text}"
            lines.setdefault(tuple(_head(case, keys)), {}).setdefault(case.what.get("level") or 0, text)
        headings = [*map(_heading, keys), *(f"level {level}" for level in levels)]
        rows = [[*head, *(texts.get(level, "-") for level in levels)] for head, texts in lines.items()]
        parts.append(details(f"{kernel} ({len(rows)} rows)", table(headings, rows, left=len(keys))))
    if parts:
        parts.insert(0, f"Share of the copy bandwidth, and microseconds, {setting(run)}:")
    if untimed:
        reasons: dict[str, int] = {}
        for case in untimed:
            reasons[case.note] = reasons.get(case.note, 0) + 1
        parts.append("Not timed:\n\n" + "\n".join(f"- {n} cases: {cell(note)}" for note, n in reasons.items()))
    return "\n\n".join([*parts, *_about_machine(run), *targets(run), origin(run)])


# Host time.


def _host(device: str, runs: Sequence[Run], parts: list[str], plots: list[Plot]) -> None:
    _newest_open(runs, _host_run, parts)


def _host_run(run: Run) -> str:
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
    return "\n\n".join([f"{setting(run)}:", times, *_host_profiles(run), origin(run)])


def _host_profiles(run: Run) -> list[str]:
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


# The parts of `make bench-gpu`.


def _checks(runs: Sequence[Run]) -> list[str]:
    if not runs:
        return []
    parts = ["## Runs of `make bench-gpu`", "Correctness comes first: where a test fails, nothing is timed."]
    for run in runs:
        lines = [
            [cell(row["part"]), "finished" if row["finished"] else cell(row["note"]), number(row["median"])]
            for row in run.rows
        ]
        parts += [f"**{run.device}**", table(["part", "outcome", "seconds"], lines, left=2), origin(run)]
    return parts
