"""LLaMA models from the configuration files beside this module."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

CONFIGS = Path(__file__).parent / "configs"


def load_config(model: str) -> LlamaConfig:
    """The model configuration named `model` (`llama_60m`), or in the JSON file of that path.

    Raises:
        FileNotFoundError: There is no such configuration; the message lists those there are.
    """
    named = CONFIGS / f"{model}.json"
    path = named if named.exists() else Path(model)
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in CONFIGS.glob("llama_*.json")))
        raise FileNotFoundError(f"--model {model}: no such configuration; choose from {known}, or give a JSON file")
    fields = json.loads(path.read_text())
    fields.pop("about", None)
    return LlamaConfig(**fields)


def build_model(config: LlamaConfig, *, seed: int, device: torch.device, dtype: torch.dtype) -> LlamaForCausalLM:
    """A freshly initialised model; the same seed gives the same weights on one kind of device."""
    torch.manual_seed(seed)
    with device:
        model = LlamaForCausalLM(config)
    return model.to(dtype=dtype)
