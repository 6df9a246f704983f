"""LLaMA models and their shapes, from the package's configuration files, those of `bench/configs`, or a path."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import gwt_kernels
from gwt_kernels import gwt_param_groups

CONFIGS = Path(__file__).parents[1] / "configs"
FOLDERS = (Path(gwt_kernels.__file__).parent / "models" / "configs", CONFIGS)


class Shape(NamedTuple):
    """One tensor of a model, as `gwt_param_groups` sorts it."""

    name: str
    size: tuple[int, ...]
    transformed: bool
    decayed: bool


def load_config(model: str) -> LlamaConfig:
    """Return the model configuration of that name, such as `llama_60m`, or in the JSON file of that path.

    Raises:
        FileNotFoundError: There is no such configuration; the message lists the existing ones.
        ValueError: The file holds no configuration of a LLaMA.
    """
    named = {file.stem: file for folder in FOLDERS for file in folder.glob("llama_*.json")}
    path = named.get(model, Path(model))
    if not path.is_file():
        known = ", ".join(sorted(named))
        raise FileNotFoundError(f"--model {model}: no such configuration; choose from {known}, or give a JSON file")
    try:
        fields = json.loads(path.read_text())
    except (RecursionError, ValueError) as error:  # no JSON, nested without end, or no text
        raise ValueError(f"--model {path}: is not JSON ({error}); give a file of LlamaConfig fields") from error
    # LlamaConfig accepts any fields, and its default sizes are those of LLaMA-7B.
    if not isinstance(fields, dict) or "hidden_size" not in fields or fields.get("model_type", "llama") != "llama":
        raise ValueError(
            f"--model {path}: is no configuration of a LLaMA; give a file with its hidden_size and so on"
        )
    for label in ("about", "model_type"):
        fields.pop(label, None)
    return LlamaConfig(**fields)


def build_model(config: LlamaConfig, *, seed: int, device: torch.device, dtype: torch.dtype) -> LlamaForCausalLM:
    """Build a freshly initialised model; the same seed gives the same weights on one kind of device."""
    torch.manual_seed(seed)
    with device:
        model = LlamaForCausalLM(config)
    return model.to(dtype=dtype)


def shapes_of(model: str, *, layers: int | None = None, embeddings: bool = True) -> list[Shape]:
    """Return the shapes of a model's tensors; nothing is allocated.

    Args:
        model: Name or path, as for `load_config`.
        layers: Number of layers to include; None for all.
        embeddings: Whether to include embedding, output head and last norm.
    """
    config = load_config(model)
    config.num_hidden_layers = layers or config.num_hidden_layers
    with torch.device("meta"):
        on_meta = LlamaForCausalLM(config)
    return [
        Shape(name, tuple(parameter.shape), group["level"] > 0, group["weight_decay"] > 0)
        for group in gwt_param_groups(on_meta, level=1, weight_decay=1.0)
        for name, parameter in zip(group["param_names"], group["params"], strict=True)
        if embeddings or ".layers." in name
    ]
