"""LLaMA models from configuration files: the package's presets, the small ones beside this module, or a path."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import gwt_kernels

CONFIGS = Path(__file__).parent / "configs"
FOLDERS = (Path(gwt_kernels.__file__).parent / "configs", CONFIGS)


def load_config(model: str) -> LlamaConfig:
    """The model configuration named `model` (`llama_60m`), or in the JSON file of that path.

    Raises:
        FileNotFoundError: There is no such configuration; the message lists those there are.
    """
    named = {file.stem: file for folder in FOLDERS for file in folder.glob("llama_*.json")}
    path = named.get(model, Path(model))
    if not path.is_file():
        known = ", ".join(sorted(named))
        raise FileNotFoundError(f"--model {model}: no such configuration; choose from {known}, or give a JSON file")
    fields = json.loads(path.read_text())
    for label in ("about", "model_type"):
        fields.pop(label, None)
    return LlamaConfig(**fields)


def build_model(config: LlamaConfig, *, seed: int, device: torch.device, dtype: torch.dtype) -> LlamaForCausalLM:
    """A freshly initialised model; the same seed gives the same weights on one kind of device."""
    torch.manual_seed(seed)
    with device:
        model = LlamaForCausalLM(config)
    return model.to(dtype=dtype)
