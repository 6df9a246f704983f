"""Build a model from a configuration file or a preset, on the meta device: shapes without weights."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

CONFIGS = Path(__file__).parent / "configs"

# Entries about remote code and weight storage: irrelevant for shapes, and they might run code or need a package.
_IGNORED = ("auto_map", "quantization_config")
_FETCHED = "use_pretrained_backbone"  # would fetch weights of a part of the model, which shapes do not need


def presets() -> dict[str, Path]:
    """Return the package's configuration files by name, smallest model first."""

    def size(name: str) -> float:
        number = name.rpartition("_")[2]
        return float(number[:-1]) * {"m": 1e6, "b": 1e9}[number[-1]]

    return {name: CONFIGS / f"{name}.json" for name in sorted((p.stem for p in CONFIGS.glob("*.json")), key=size)}


def build_on_meta(model: str | Path, dtype: torch.dtype | None = None) -> nn.Module:
    """Build the model of a Hugging Face configuration on the meta device: no memory, no network, no remote code.

    The class is named by the configuration's ``architectures``; otherwise it is the causal language model of its
    ``model_type``, or the bare model.

    Args:
        model: A preset's name, the path of a ``config.json``, or a folder that holds one.
        dtype: dtype of the weights; None for the configuration's, or bfloat16 if it has none.

    Raises:
        FileNotFoundError: there is no such preset, file or folder.
        ValueError: the file is not a model configuration, or transformers cannot build its model.
        ModuleNotFoundError: transformers is not installed.
    """
    path = _find(model)
    fields = _without_weights({key: value for key, value in _read(path).items() if key not in _IGNORED})
    try:
        transformers: Any = importlib.import_module("transformers")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "a model is built from its configuration by transformers, which is not installed: "
            "pip install transformers (a live module needs none)"
        ) from error
    kind = fields.pop("model_type")
    if kind not in transformers.CONFIG_MAPPING:
        raise ValueError(
            f"{path}: model_type {kind!r} is unknown to transformers {transformers.__version__}: "
            f"use a newer one, or pass the live module to gwt_kernels.plan.plan"
        )
    try:
        with torch.device("meta"), _quiet(transformers), _offline():
            config = transformers.AutoConfig.for_model(kind, **fields)
            built: nn.Module = _model_class(transformers, config)._from_config(
                config, dtype=dtype or config.dtype or torch.bfloat16, attn_implementation="eager"
            )
    except Exception as error:  # any type: the model's code may raise anything
        said = f"{path}: transformers cannot build a {kind!r} model: {' '.join(str(error).split())}"
        if named := _named_backbone(fields):
            said = (
                f"{path}: the {kind!r} model has the backbone {named!r}, whose configuration is elsewhere, and "
                f"nothing is fetched: give it as backbone_config, or pass the live module to gwt_kernels.plan.plan"
            )
        raise ValueError(said) from error
    return built


def _find(model: str | Path) -> Path:
    known = presets()
    if str(model) in known:
        return known[str(model)]
    path = Path(model)
    if path.is_dir():
        path /= "config.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no file or preset {str(model)!r}: give the path of a Hugging Face config.json, or one of "
            f"{', '.join(known)}"
        )
    return path


def _read(path: Path) -> dict[str, Any]:
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (RecursionError, ValueError) as error:  # not JSON, nested without end, or not text
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(fields, dict) or not isinstance(fields.get("model_type"), str):
        raise ValueError(f"{path} is no model configuration: a Hugging Face config.json has a 'model_type'")
    return fields


def _without_weights(fields: Any) -> Any:
    """Return a configuration in which no part asks for pretrained weights."""
    if isinstance(fields, list):
        return [_without_weights(each) for each in fields]
    if not isinstance(fields, dict):
        return fields
    return {key: False if key == _FETCHED else _without_weights(value) for key, value in fields.items()}


def _named_backbone(fields: Any) -> str | None:
    """Return the backbone that a configuration, or a part of it, names without describing it; None for none."""
    if not isinstance(fields, dict):
        return None
    if isinstance(fields.get("backbone"), str) and not fields.get("backbone_config"):
        return str(fields["backbone"])
    return next((named for value in fields.values() if (named := _named_backbone(value))), None)


def _model_class(transformers: Any, config: Any) -> Any:
    for name in config.architectures or ():
        named = getattr(transformers, name, None)
        if isinstance(named, type) and issubclass(named, transformers.PreTrainedModel):
            return named
    for mapping in (transformers.MODEL_FOR_CAUSAL_LM_MAPPING, transformers.MODEL_MAPPING):
        if type(config) in mapping:
            found = mapping[type(config)]
            return found[0] if isinstance(found, tuple) else found
    raise ValueError("it has neither a causal language model nor a bare one of this type")


@contextmanager
def _offline() -> Iterator[None]:
    """Keep transformers from downloading what a configuration names; cached files are still read."""
    constants: Any = importlib.import_module("huggingface_hub.constants")
    hub: Any = importlib.import_module("transformers.utils.hub")
    flags = [(constants, "HF_HUB_OFFLINE"), (hub, "_is_offline_mode")]  # the second is that of transformers 4
    before = [(module, name, getattr(module, name)) for module, name in flags if hasattr(module, name)]
    for module, name, _ in before:
        setattr(module, name, True)
    try:
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Silence transformers' warnings about using the model, which is never run here."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)
