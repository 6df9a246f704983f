"""The short table of step times in README, like beside like."""

from __future__ import annotations

from collections.abc import Sequence

from bench.report import performance
from bench.report.markdown import model_name, setting, spread, table
from bench.report.rows import Case, Run

__all__ = ["speed"]

NO_GPU = "No time on a GPU is known yet: `make bench-gpu` measures it on a CUDA machine."
_SHOWN = (
    "AdamW(fused=True)", "AdamW(foreach=True)", "GWTAdamW level 2, limiter", "GWTAdamW level 2",
    "GWTAdamW level 2, foam", "GWTAdamW level 2, bfloat16 moments",
    "GWTAdamW level 2, bfloat16 moments, stochastic rounding", "GWTAdamW level 2, int8 moments",
    "GWTAdamW level 2, int8 moments, stochastic rounding", "optimi AdamW(triton=False, foreach=False)",
    "bitsandbytes AdamW8bit", "torchao AdamW8bit",
)  # fmt: skip
_NAMES = {"GWTAdamW level 2, limiter": "GWTAdamW level 2, the defaults", "GWTAdamW level 2": "without the limiter"}


def speed(run: Run, model: str, found: Sequence[Case]) -> str:
    """Return the steps of one run that README compares, each over fused AdamW's with the same weights.

    Args:
        run: The run.
        model: The model that it timed.
        found: Its cases.
    """
    timed = {(_label(case), _weights(case)): case for case in found if "step_time" in case.metrics}
    dtypes = [each for each in ("fp32", "bf16") if any(weights == each for _, weights in timed)]
    rows = []
    for weights in dtypes:
        fused = timed.get(("AdamW(fused=True)", weights))
        for label in _SHOWN:
            if (case := timed.get((label, weights))) is None:
                continue
            time, size = case.metrics["step_time"], case.metrics.get("state_bytes_per_parameter")
            over = "-" if fused is None else f"{time['median'] / fused.metrics['step_time']['median']:.2f}"
            state = "-" if size is None else f"{size['median']:.3g}"
            rows.append([_NAMES.get(label, label), weights, spread(time, 1e3), over, state])
    headings = ["optimizer", "weights", "step, ms", "times fused AdamW", "state, bytes a parameter"]
    layers = run.rows[-1].get("layers")
    part = (
        f", {layers} layer{'s' if layers != 1 else ''} of {model_name(model)}"
        if layers
        else f", {model_name(model)}"
    )
    parts = [f"{run.device}{part}, {setting(run)}:", table(headings, rows, left=2)]
    return "\n\n".join(parts if run.cuda else [*parts, NO_GPU])


def _label(case: Case) -> str:
    return str(case.what.get("optimizer"))


def _weights(case: Case) -> str:
    return performance.DTYPES.get(str(case.what.get("weights")), str(case.what.get("weights")))
