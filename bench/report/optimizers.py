"""The page on optimizer steps: the time of `step()`, compared with other optimizers."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from bench.report import brief
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
from bench.report.sections import DTYPES, ROOFLINE, about_machine, head, heading, newest_open, scaled

ABOUT = f"""\
`step()` alone, over the real parameter lists of LLaMA models, beside what one would use instead.

{ROOFLINE}

*limiter*: the published rule with its norm-growth limiter, which is the default; *foam*: the folded rule
(`rule="foam"`); neither: the published rule without limiter. *with clipping*: PyTorch's `clip_grad_norm_` and the
step. Other words name [options](interface.md#gwtadamw).

{brief.ROUNDING}

Before it is timed, a step of this package is compared with a float64 oracle, and a step of another package with
AdamW's update; what differs by more than its rounding and its method explain is not timed."""

ENOUGH = 5  # optimizers in the short comparison; if there are fewer, all optimizers are shown

NOTHING = "Nothing is recorded yet: `python -m bench.optimizers` measures it."

OTHER_RULES = """\
Muon, Adafactor and Lion (`--peers rules`). Muon's time is that of its products of matrices, which its roofline
does not count; the update of each is compared with that of its own rule in float64."""

ON_CPU = """\
On a CPU a step of float32 weights and moments waits for memory. Level 0 moves the 28 bytes a parameter that the
fused AdamW moves, and takes about as long; other levels move fewer. With narrower weights and moments steps move
fewer still, but rounding at random and int8 moments take time to compute."""


def page(runs: Sequence[Run]) -> tuple[str, list[Plot]]:
    """Return the page and its plots."""
    plots: list[Plot] = []
    parts = ["# Optimizer step", ABOUT]
    if not of(runs, "optimizers"):
        parts.append(NOTHING)
    for device, own in by_device(of(runs, "optimizers")).items():
        parts.append(f"## {device}")
        if not all(run.cuda for run in own):
            parts.append(ON_CPU)
        if panels := step_panels(own):
            plots.append(Plot(f"steps_{slug(device)}", "steps", panels))
            parts.append(figure(f"Time of a step by optimizer and model on {device}", plots[-1].name))
        if states := state_models(own):
            what = "bytes of optimizer state per parameter, measured"
            plots.append(Plot(f"state_{slug(device)}", "states", {"what": what, "models": states}))
            parts.append(figure(f"Bytes of optimizer state per parameter, measured on {device}", plots[-1].name))
        parts += newest_open(sorted(own, key=lambda run: run.is_of_other_rules), _run)
    return "\n\n".join(parts) + "\n", plots


def _run(run: Run) -> str:
    """Return the short comparison, and a collapsed table of every case."""
    parts = [OTHER_RULES] if run.is_of_other_rules else []
    for model, found in steps_by_model(run).items():
        short, whole = brief.speed(run, model, plain(found)), steps_table(found)
        if short.count("\n| ") < ENOUGH + 2:
            parts += [f"**{model_name(model)}**, {setting(run)}:", whole]
        else:
            parts += [short, details(f"{model_name(model)}, every optimizer of this run", whole)]
    return "\n\n".join([*parts, *about_machine(run), origin(run)])


Write = Callable[[Case], str]


def _metric(name: str, factor: float) -> Write:
    return lambda case: spread(case.metrics.get(name), factor)


COLUMNS: dict[str, Write] = {
    "step, ms": _metric("step_time", 1e3),
    "wall, ms": _metric("wall_time", 1e3),
    "roofline, ms": lambda case: number(scaled(case.median("roofline_time"), 1e3)),
    "of copy bandwidth": lambda case: percent(case.median("copy_bandwidth_fraction")),
    "of bandwidth in place": lambda case: percent(case.median("in_place_bandwidth_fraction")),
    "host, ms": _metric("host_time", 1e3),
    "launches": lambda case: "-" if (n := case.median("kernel_launches")) is None else f"{n:g}",
    "state, bytes a parameter": lambda case: number(state_per_parameter(case)),
    "state, MiB": lambda case: number(scaled(case.median("state_bytes"), 2**-20)),
    "extra, MiB": lambda case: number(scaled(case.median("peak_extra_bytes"), 2**-20)),
}


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

    fused = {case.what.get("weights"): case.median("step_time") for case in timed if _is_fused(case)}

    def over_fused(case: Case) -> str:
        base, own = fused.get(case.what.get("weights")), case.median("step_time")
        return "-" if base is None or own is None else f"{own / base:.2f}"

    known = {"step, ms": COLUMNS["step, ms"], "with clipping, ms": with_clipping} | COLUMNS
    known["times fused AdamW"] = over_fused
    columns = {head: write for head, write in known.items() if any(write(case) != "-" for case in timed)}
    for name, metric in (("wall, ms", "wall_time"), ("host, ms", "host_time")):
        if timed and not any(_differs(case, metric) for case in timed):  # on a CPU all are the time of the call
            columns.pop(name, None)
    if "state, bytes a parameter" in columns:
        columns.pop("state, MiB", None)
    lines = [[*head(case, keys), *(write(case) for write in columns.values())] for case in timed]
    notes = [f"- {', '.join(head(case, keys))}: {cell(_reason(case.note))}" for case in found if not case.metrics]
    parts = [table([*map(heading, keys), *columns], lines, left=len(keys))] if timed else []
    return "\n\n".join(parts + (["Not timed:\n\n" + "\n".join(notes)] if notes else []))


def _is_fused(case: Case) -> bool:
    return bool(case.what["optimizer"] == "AdamW(fused=True)")


def _reason(note: str) -> str:
    """Return in words why an optimizer was not timed, from the exception that its package raised."""
    if found := re.search(r"No module named '([\w.]+)'", note):
        return f"{found[1]} is not installed"
    if note.startswith("cannot run here") and re.search(r"CUDA|0 active drivers", note):
        return "needs a GPU"
    return re.sub(r"^cannot run here: \w+(?:Error|Exception): ", "cannot run here: ", note)


def _unclipped(case: Case) -> str:
    return repr({key: value for key, value in case.what.items() if key != "clipped"})


def _differs(case: Case, metric: str) -> bool:
    return case.median(metric) not in (None, case.median("step_time"))


def steps_by_model(run: Run) -> dict[str, list[Case]]:
    """Return the cases of a run by model, including the notes of candidates that could not be timed."""
    found = cases(row for row in run.rows if row.get("optimizer"))
    models = dict.fromkeys(case.what["model"] for case in found)
    return {model: [case for case in found if case.what["model"] == model] for model in models}


def timed(runs: Sequence[Run]) -> Iterator[tuple[Run, str, list[Case]]]:
    """Yield each run that timed a step, GPUs first and newest first, with the largest model that it timed."""
    for own in by_device(of(runs, "optimizers")).values():
        for run in own:
            models = {} if run.is_of_other_rules else steps_by_model(run)
            shown = [model for model, found in models.items() if any(case.metrics for case in found)]
            if shown:
                model = max(shown, key=size)
                yield run, model, models[model]


def _label(case: Case, found: Sequence[Case]) -> str:
    several = len({other.what.get("weights") for other in found}) > 1
    keys = telling_columns(found, ["optimizer"], ("model", "weights", "level", "limiter", "parameters"))[1:]
    words = [case.what["optimizer"], *([DTYPES.get(case.what["weights"], case.what["weights"])] if several else [])]
    words += [f"{heading(key)} {cell(case.what.get(key))}" for key in keys]
    return ", ".join(words)


def plain(found: Sequence[Case]) -> list[Case]:
    """Return the cases that were timed without clipping."""
    return [case for case in found if not case.what.get("clipped")]


def _newest_of_each_model(runs: Sequence[Run]) -> dict[str, list[Case]]:
    """Return for each model the cases that plots show, from its newest run; the smallest model is first."""
    newest: dict[str, list[Case]] = {}
    for run in runs:
        for model, found in ({} if run.is_of_other_rules else steps_by_model(run)).items():
            if any("step_time" in case.metrics for case in found):
                short = [case for case in plain(found) if case.what["optimizer"] in brief.SHOWN]
                newest.setdefault(model, short if len(short) >= ENOUGH else plain(found))
    return dict(sorted(newest.items(), key=lambda item: size(item[0])))


def size(model: str) -> float:
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
