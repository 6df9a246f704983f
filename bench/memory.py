"""Tables of README and docs: bytes of weights and optimizer state of the LLaMA sizes."""

from __future__ import annotations

import functools

import torch

from gwt_kernels.models.files import presets
from gwt_kernels.plan import Plan, plan

MODELS = {name.removeprefix("llama_").upper(): name for name in presets()}
IN_README = ("60M", "350M", "1B", "7B")
LEVELS = (1, 2, 3, 4)
IN_SHORT = 2
"""The level in README's table."""
DTYPES = {"float32": "fp32", "bfloat16": "bf16"}


def memory_table() -> str:
    """Return the README's Markdown table: GiB of bf16 weights, and of AdamW's and GWT's state by dtype."""
    headings = [
        f"{name}, {DTYPES[dtype]}" for dtype in reversed(DTYPES) for name in ("AdamW", f"GWT level {IN_SHORT}")
    ]
    rows = []
    for label in IN_README:
        planned = _planned(label)
        adamw = {cost.moments: cost.state_bytes for cost in planned.adamw}
        pairs = [(adamw[dtype], _state(planned, IN_SHORT, dtype)) for dtype in reversed(DTYPES)]
        rows.append((label, planned, [each for pair in pairs for each in pair]))
    return _table(headings, rows, parameters=False)


def level_table() -> str:
    """Return the Markdown table of docs/memory.md: every size of the package, by level and dtype of the moments."""
    headings = ["AdamW, bf16", "AdamW, fp32"]
    headings += [f"level {level}, {short}" for level in LEVELS for short in DTYPES.values()]
    rows = []
    for label in MODELS:
        planned = _planned(label)
        states = [_state(planned, level, dtype) for level in LEVELS for dtype in DTYPES]
        rows.append((label, planned, [*(cost.state_bytes for cost in planned.adamw), *states]))
    return _table(headings, rows)


@functools.cache
def _planned(label: str) -> Plan:
    return plan(MODELS[label], dtype=torch.bfloat16)


def _state(planned: Plan, level: int, moments: str) -> int:
    return next(c.state_bytes for c in planned.options if (c.level, c.moments) == (level, moments))


def _table(headings: list[str], rows: list[tuple[str, Plan, list[int]]], *, parameters: bool = True) -> str:
    first = ["LLaMA", *(["parameters"] if parameters else []), "weights, bf16", *headings]
    table = [first, ["---"] * len(first)]
    for label, planned, states in rows:
        count = planned.weight_bytes / torch.bfloat16.itemsize
        sizes = (f"{size / 2**30:.2f}" for size in (planned.weight_bytes, *states))
        table.append([label, *([f"{count / 1e6:,.0f}M"] if parameters else []), *sizes])
    return "\n".join(f"| {' | '.join(row)} |" for row in table)


if __name__ == "__main__":
    print(memory_table(), level_table(), sep="\n\n")
