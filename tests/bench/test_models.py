"""LLaMA models from configuration files: the published sizes, and weights determined by the seed."""

from __future__ import annotations

import pytest
import torch

from bench.common.models import build_model, load_config


@pytest.mark.parametrize(
    ("name", "hidden", "intermediate", "layers", "parameters"),
    [  # counts worked out by hand: 2*32000*h + layers*(4*h*h + 3*h*i + 2*h) + h
        ("llama_60m", 512, 1376, 8, 58_073_600),
        ("llama_130m", 768, 2048, 12, 134_105_856),
        ("llama_350m", 1024, 2736, 24, 367_969_280),
        ("llama_1b", 2048, 5461, 24, 1_339_082_752),
        ("llama_7b", 4096, 11008, 32, 6_738_415_616),
    ],
)
def test_published_sizes(name: str, hidden: int, intermediate: int, layers: int, parameters: int) -> None:
    model = build_model(load_config(name), seed=0, device=torch.device("meta"), dtype=torch.bfloat16)
    shapes = {key: tuple(p.shape) for key, p in model.named_parameters()}
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert shapes["lm_head.weight"] == shapes["model.embed_tokens.weight"] == (32000, hidden)
    last = f"model.layers.{layers - 1}."
    assert shapes[last + "self_attn.q_proj.weight"] == (hidden, hidden)
    assert shapes[last + "mlp.down_proj.weight"] == (hidden, intermediate)
    assert f"model.layers.{layers}.self_attn.q_proj.weight" not in shapes
    heads = {"llama_60m": 8, "llama_130m": 12, "llama_350m": 16, "llama_1b": 32, "llama_7b": 32}
    assert load_config(name).num_attention_heads == heads[name]


def test_seed_decides_initial_weights() -> None:
    config, cpu = load_config("llama_cpu"), torch.device("cpu")
    one, same, other = (
        build_model(config, seed=seed, device=cpu, dtype=torch.float32).state_dict() for seed in (1, 1, 2)
    )
    assert one.keys() == same.keys()
    assert all(torch.equal(one[name].view(torch.int32), same[name].view(torch.int32)) for name in one)
    assert not torch.equal(one["lm_head.weight"], other["lm_head.weight"])
