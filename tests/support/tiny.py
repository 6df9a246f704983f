"""A language model that trains in milliseconds, its data and comparisons, for tests of integrations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from gwt_kernels import GWTAdamW, gwt_param_groups
from tests.support.runs import assert_same_bits

GROUPS = {"level": 1, "scale": 0.5, "weight_decay": 0.1, "exclude": ["o_proj"]}
NUMBERS: dict[str, Any] = {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-7}


def llama(seed: int = 0) -> LlamaForCausalLM:
    """Build two layers with every kind of tensor: embedding, attention, MLP, norms and a head."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=32)
    )


def sentences(count: int = 24, length: int = 8) -> list[dict[str, Tensor]]:
    """Return random tokens, each sequence its own label, the same at every call."""
    tokens = torch.randint(32, (count, length), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in tokens]


def optimizer_of(model: nn.Module, **options: Any) -> GWTAdamW:
    """Build the optimizer that every integration is configured to build."""
    return GWTAdamW(gwt_param_groups(model, **GROUPS), **NUMBERS, **options)


def assert_same_run(model: nn.Module, optimizer: Any, other: nn.Module, other_optimizer: Any) -> None:
    """Raise AssertionError unless weights and optimizer states are equal bit for bit."""
    assert_same_bits(list(model.parameters()), list(other.parameters()))
    bare = [getattr(o, "optimizer", o) for o in (optimizer, other_optimizer)]
    assert_same_bits(*[o.state_dict() for o in bare])


def assert_close_runs(model: nn.Module, same: nn.Module, other: nn.Module) -> None:
    """Raise AssertionError unless ``same``'s weights differ from ``model``'s by rounding, ``other``'s by more."""

    def distance(against: nn.Module) -> float:
        pairs = zip(model.parameters(), against.parameters(), strict=True)
        return max(float((p - q).detach().abs().max()) for p, q in pairs)

    assert distance(other) > 1e-3
    assert distance(same) < 1e-4 * distance(other)  # first steps are large, and so are their rounding errors
