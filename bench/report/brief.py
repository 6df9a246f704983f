"""The short table of step times, which compares optimizers with the same weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bench.report.markdown import count, model_name, setting, spread, table
from bench.report.rows import Case, Run
from bench.report.sections import DTYPES

__all__ = ["IN_README", "ROUNDING", "SHOWN", "speed"]

SHOWN = {
    "AdamW(fused=True)": "AdamW(fused=True)",
    "AdamW(foreach=True)": "AdamW(foreach=True)",
    "GWTAdamW level 2, limiter": "GWTAdamW level 2, the defaults",
    "GWTAdamW level 2, foam": "GWTAdamW level 2, foam",
    "GWTAdamW level 2, foam, bfloat16 moments": "GWTAdamW level 2, foam, bfloat16 moments",
} | {
    f"GWTAdamW level 2, {options}": f"GWTAdamW level 2, no limiter, {options}"
    for options in (
        "bfloat16 moments",
        "bfloat16 moments, stochastic rounding",
        "int8 moments, stochastic rounding",
    )
}
"""The optimizers shown, by their names in the records, with their names on the pages."""

ROUNDING = """\
AdamW rounds bf16 weights to the nearest, and so does every row that names no rounding. *Stochastic rounding* keeps
updates that are too small for bf16; drawing its random numbers is part of the time."""


IN_README = {label: name for label, name in SHOWN.items() if "foreach" not in label and "int8" not in label}
"""The optimizers in README's table."""


def speed(run: Run, model: str, found: Sequence[Case], names: Mapping[str, str] = SHOWN) -> str:
    """Return a table of comparable steps of one run, with each time over fused AdamW's for the same weights.

    Args:
        run: The run.
        model: The model that it timed.
        found: Its cases.
        names: The optimizers to show, by their names in the records, with their names on the page.
    """
    timed = {(_label(case), _weights(case)): case for case in found if "step_time" in case.metrics}
    dtypes = [each for each in ("fp32", "bf16") if any(weights == each for _, weights in timed)]
    rows = []
    for weights in dtypes:
        fused = timed.get(("AdamW(fused=True)", weights))
        for label, name in names.items():
            if (case := timed.get((label, weights))) is None:
                continue
            time, size = case.metrics["step_time"], case.metrics.get("state_bytes_per_parameter")
            over = "-" if fused is None else f"{time['median'] / fused.metrics['step_time']['median']:.2f}"
            state = "-" if size is None else f"{size['median']:.3g}"
            rows.append([name, weights, spread(time, 1e3), over, state])
    headings = ["optimizer", "weights", "step, ms", "times fused AdamW", "state, bytes a parameter"]
    return f"{run.device}, {_part(run, model, found)}, {setting(run)}:\n\n{table(headings, rows, left=2)}"


def _part(run: Run, model: str, found: Sequence[Case]) -> str:
    """Format the model, or the part of it that was timed and the part's size."""
    if not (layers := run.rows[-1].get("layers")):
        return model_name(model)
    parameters = next((case.what["parameters"] for case in found if case.what.get("parameters")), None)
    size = f" ({parameters / 1e6:.1f}M parameters)" if parameters else ""
    return f"{count(layers, 'layer')} of {model_name(model)}{size}"


def _label(case: Case) -> str:
    return str(case.what.get("optimizer"))


def _weights(case: Case) -> str:
    return DTYPES.get(str(case.what.get("weights")), str(case.what.get("weights")))
