"""Small models of odd widths whose memory tests plan: a module, and configurations of several families."""

from __future__ import annotations

import json
from pathlib import Path

from torch import nn

TINY = {"vocab_size": 61, "hidden_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
FAMILIES = {  # 45 and 27 columns, no multiple of a block
    "llama": {**TINY, "intermediate_size": 45},
    "qwen2": {**TINY, "intermediate_size": 45, "num_key_value_heads": 2},  # attention biases
    "mixtral": {**TINY, "intermediate_size": 45, "num_key_value_heads": 2, "num_local_experts": 3},  # 3-D experts
    "gpt2": {"vocab_size": 61, "n_embd": 36, "n_layer": 2, "n_head": 4, "n_inner": 45, "n_positions": 16},  # tied
    "t5": {
        "vocab_size": 61,
        "d_model": 27,
        "d_kv": 9,
        "d_ff": 45,
        "num_layers": 1,
        "num_heads": 3,
    },  # not a causal model
}


class Small(nn.Module):
    """An MLP of odd widths whose last layer is too narrow for level 3, with tied weights and a frozen one."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 27)
        self.mlp = nn.ModuleList([nn.Linear(27, 19), nn.Linear(3, 7)])
        self.norm = nn.LayerNorm(27)
        self.lm_head = nn.Linear(27, 11, bias=False)
        self.lm_head.weight = self.embed.weight
        self.frozen = nn.Linear(8, 4, bias=False).requires_grad_(False)


def config_file(folder: Path, kind: str, **fields: object) -> Path:
    """Write a configuration as Hugging Face saves it."""
    path = folder / "config.json"
    path.write_text(json.dumps({"model_type": kind, **FAMILIES.get(kind, {}), **fields}))
    return path
