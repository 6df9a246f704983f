"""The plot of optimizer state per parameter, computed from the models' configurations."""

from __future__ import annotations

import functools

import torch

from bench.report.markdown import model_name
from bench.report.plots import Plot
from gwt_kernels.plan import Cost, plan

MODELS = ("llama_60m", "llama_350m", "llama_1b", "llama_7b", "llama_70b")
SHORT = {"bfloat16": "bf16", "float32": "fp32", "int8": "int8"}


@functools.cache
def plot() -> Plot:
    """Return the plot: AdamW, and every level and dtype of moments, for bf16 weights."""
    models = []
    for model in MODELS:
        planned = plan(model, dtype=torch.bfloat16)
        options = [cost for cost in planned.options if cost.level and cost.offered]
        parameters = planned.weight_bytes / torch.bfloat16.itemsize
        entries = {_label(cost): cost.state_bytes / parameters for cost in (*planned.adamw, *options)}
        models.append({"title": model_name(model), "entries": entries})
    return Plot("state", "states", {"what": "bytes of optimizer state per parameter", "models": models})


def _label(cost: Cost) -> str:
    name = cost.optimizer if cost.level is None else f"GWT level {cost.level}"
    return f"{name}, {SHORT[cost.moments]} moments"
