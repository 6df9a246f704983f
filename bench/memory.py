"""The README's memory table: bytes of weights and optimizer state of the LLaMA sizes, from shapes alone."""

from __future__ import annotations

import torch
from transformers import LlamaForCausalLM

from bench.contenders import build_optimizer, predicted_state_bytes
from bench.models import load_config

MODELS = {"60M": "llama_60m", "130M": "llama_130m", "350M": "llama_350m", "1B": "llama_1b", "7B": "llama_7b"}
COLUMNS = (
    ("AdamW, bf16 moments", "adamw", torch.bfloat16),
    ("AdamW, fp32 moments", "adamw", torch.float32),
    ("GWT level 1", "gwt1", torch.bfloat16),
    ("GWT level 2", "gwt2", torch.bfloat16),
    ("GWT level 3", "gwt3", torch.bfloat16),
)


def memory_table() -> str:
    """A Markdown table: GiB of bf16 weights, and of the state that each optimizer keeps beside them.

    AdamW keeps its moments in the dtype of the weights that it is given; GWT keeps them in float32.
    """
    headings = ["LLaMA", "parameters", "weights, bf16", *(heading for heading, _, _ in COLUMNS)]
    rows = [headings, ["---"] * len(headings)]
    for label, name in MODELS.items():
        with torch.device("meta"):
            model = LlamaForCausalLM(load_config(name))
        count = sum(p.numel() for p in model.parameters())
        states = [
            predicted_state_bytes(build_optimizer(optimizer, model.to(dtype), lr=0.01, scale=0.25))
            for _, optimizer, dtype in COLUMNS
        ]
        rows.append([label, f"{count / 1e6:,.0f}M", *(f"{size / 2**30:.2f}" for size in (2 * count, *states))])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    print(memory_table())
