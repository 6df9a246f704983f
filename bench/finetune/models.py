"""Pre-trained models from folders, recipes for their trained parts, and the optimizer of a run."""

from __future__ import annotations

import hashlib
import importlib
import json
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from torch.optim import Optimizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from bench.pretrain.optimizers import build_optimizer, check_name
from gwt_kernels import gwt_param_groups

RECIPES = {
    "head": "the output head alone, with AdamW",
    "lora": "low-rank adapters of peft beside all Linears, and a new head, with AdamW",
    "matrices": "attention and MLP matrices, and a new head",
    "full": "everything",
}
WHOLE = ("matrices", "full")
"""Recipes that train matrices, for which other optimizers differ from AdamW."""

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
PADDED = 128
"""Number of rows by which an embedding may differ from its tokenizer's vocabulary."""
PADDED_SHARE = 0.05
"""The same as a share of the rows, for large vocabularies."""
_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "tokenizer.model")


def check_folder(model: Path) -> None:
    """Check that a folder has a model.

    Raises:
        FileNotFoundError: There is no folder, no configuration, or weights are missing in it.
        ValueError: The configuration or the list of weights cannot be read.
    """
    if not model.is_dir():
        raise FileNotFoundError(f"--model {model}: no such folder; give one that `save_pretrained` wrote")
    if not (model / "config.json").is_file():
        raise FileNotFoundError(f"--model {model}: has no config.json; give a folder that `save_pretrained` wrote")
    weights = next((name for name in WEIGHTS if (model / name).is_file()), None)  # in transformers' order
    if weights is None:
        raise FileNotFoundError(
            f"--model {model}: has no weights ({' or '.join(WEIGHTS[::2])}); download them into the folder, "
            "or give one that `save_pretrained` wrote"
        )
    if weights.endswith(".index.json"):
        _check_shards(model, weights)
    try:
        AutoConfig.from_pretrained(model)
    except (ValueError, OSError, KeyError) as error:
        line = str(error).strip().split("\n")[0]
        raise ValueError(
            f"--model {model}: transformers cannot read its config.json ({line}); "
            "give the folder of a model that it knows"
        ) from error


def _check_shards(model: Path, index: str) -> None:
    try:
        shards = sorted(set(json.loads((model / index).read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"--model {model}: cannot read which files hold its weights from {index} "
            f"({type(error).__name__}: {error}); download it again"
        ) from error
    if missing := [name for name in shards if not (model / name).is_file()]:
        raise FileNotFoundError(
            f"--model {model}: lacks {missing[0]}, one of {len(missing)} missing of the {len(shards)} files of "
            f"weights that {index} names; download them into the folder"
        )


def load_tokenizer(folder: Path) -> Any:
    """Return the tokenizer of a folder, with a padding token.

    Raises:
        FileNotFoundError: The folder has no tokenizer.
        ValueError: It cannot be read, or has no token for padding or for the end of a text.
    """
    if not any((folder / name).is_file() for name in _TOKENIZERS):
        raise FileNotFoundError(
            f"--tokenizer {folder}: has no tokenizer.json; name the folder that has, with --tokenizer"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (ValueError, OSError, KeyError, TypeError) as error:
        line = str(error).strip().split("\n")[0]
        raise ValueError(f"--tokenizer {folder}: cannot be read ({line}); give another folder") from error
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ValueError(f"--tokenizer {folder}: has no token to pad or to end a text with; give one that has")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def check_tokenizer(model: Path, folder: Path, ids: int) -> None:
    """Check that a tokenizer's vocabulary is about as large as the model's.

    Some tokens may have been added, and rows of the embedding padded to a round number.

    Args:
        model: The model's folder.
        folder: The tokenizer's folder.
        ids: Number of token ids of the tokenizer.

    Raises:
        ValueError: The sizes differ by more.
    """
    rows = _vocabulary(model)
    if abs(rows - ids) > max(PADDED, PADDED_SHARE * rows):
        raise ValueError(
            f"--tokenizer {folder}: has {ids:,} token ids, and the embedding of --model {model} {rows:,} rows; "
            "give the tokenizer that the model was trained with"
        )


def check_fit(model: Path, folder: Path, largest_id: int, length: int) -> None:
    """Check that token ids and lengths of texts are within a model's limits.

    Args:
        model: The model's folder.
        folder: The tokenizer's folder.
        largest_id: The largest token id of the texts.
        length: Number of tokens of the longest text.

    Raises:
        ValueError: A token id is outside the vocabulary, or the texts are longer than the model takes.
    """
    size = _vocabulary(model)
    if largest_id >= size:
        raise ValueError(
            f"--tokenizer {folder}: token id {largest_id} is outside the vocabulary of --model {model}, "
            f"{size} ids; give the tokenizer that the model was trained with"
        )
    most = getattr(AutoConfig.from_pretrained(model).get_text_config(), "max_position_embeddings", None)
    if most is not None and length > most:
        raise ValueError(f"--max-length {length}: --model {model} takes {most} tokens at most; give at most {most}")


def _vocabulary(model: Path) -> int:
    """Return the rows of a model's embedding."""
    config = AutoConfig.from_pretrained(model).get_text_config()
    size = getattr(config, "vocab_size", None)
    if size is None:
        raise ValueError(
            f"--model {model}: is no model of text, {config.model_type}; give one that has a vocabulary"
        )
    return int(size)


def digest_of(model: Path) -> str:
    """Return a digest of a folder's configuration and weights."""
    found = hashlib.sha256()
    for path in sorted(path for path in model.iterdir() if path.suffix in (".safetensors", ".bin")):
        with path.open("rb") as file:
            found.update(hashlib.file_digest(file, "sha256").digest())
    config = json.loads((model / "config.json").read_text())
    found.update(json.dumps(config, sort_keys=True).encode())
    return found.hexdigest()[:16]


def check_pair(optimizer: str, recipe: str) -> None:
    """Check that an optimizer can be used with a recipe.

    Raises:
        ValueError: There is no such optimizer or recipe, or they do not go together.
        ModuleNotFoundError: peft is needed and not installed.
    """
    check_name(optimizer, "--optimizers")
    if recipe not in RECIPES:
        raise ValueError(f"--recipes: unknown recipe {recipe!r}: choose from {', '.join(RECIPES)}")
    if recipe not in WHOLE and optimizer != "adamw":
        raise ValueError(
            f"recipe {recipe!r} trains no matrix that {optimizer} would treat otherwise: use adamw with it"
        )
    if recipe == "lora":
        _peft()


def _peft() -> Any:
    try:
        return importlib.import_module("peft")
    except ImportError as error:
        raise ModuleNotFoundError(
            f"recipe 'lora' needs peft ({error}): pip install peft, or run python -m bench.finetune.fetch packages "
            "and put build/finetune/packages into PYTHONPATH"
        ) from error


def build_model(
    folder: str, classes: int, recipe: str, *, rank: int, dtype: torch.dtype, pad: int | None = None
) -> nn.Module:
    """Return a pre-trained model in which the part of the recipe is trainable.

    Args:
        folder: Folder of the configuration and the weights.
        classes: Outputs of a new head; 0 for a language model with its own.
        recipe: One of `RECIPES`.
        rank: Rank of the adapters of `lora`.
        dtype: dtype of the weights.
        pad: Padding token of the batches, for models whose configuration has none.

    Raises:
        ValueError: The weights cannot be read, or are not those of the model that the configuration describes.
    """
    if classes:
        model = _load(folder, classes, AutoModelForSequenceClassification, num_labels=classes, dtype=dtype)
        if model.config.pad_token_id is None:
            model.config.pad_token_id = pad
    else:
        model = _load(folder, classes, AutoModelForCausalLM, dtype=dtype)
        model.config.use_cache = False
    if recipe == "lora":
        return _with_adapters(model, rank, "SEQ_CLS" if classes else "CAUSAL_LM")
    if recipe == "full":
        return model
    trained = {id(p) for p in head_of(model, classes)} if classes or recipe == "head" else set()
    if recipe == "matrices":
        groups = gwt_param_groups(model, level=1)
        trained |= {id(p) for group in groups if group["level"] for p in group["params"]}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in trained)
    return model


def _load(folder: str, classes: int, kind: Any, **options: Any) -> Any:
    """Load a model with transformers; only a new head may lack weights."""
    previous = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # a warning that the head is new is not needed
    transformers.logging.disable_progress_bar()
    try:
        model, said = kind.from_pretrained(folder, output_loading_info=True, **options)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except (
        Exception
    ) as error:  # from safetensors, pickle, torch or transformers, depending on how a file is damaged
        line = str(error).strip().split("\n")[0]
        if "ignore_mismatched_sizes" in line:
            line = "its weights have other shapes than its config.json says"
        raise ValueError(
            f"--model {folder}: cannot be loaded ({type(error).__name__}: {line}); "
            "give a whole folder that `save_pretrained` wrote, of a model that the task can use"
        ) from error
    finally:
        transformers.logging.set_verbosity(previous)
    new = {id(parameter) for parameter in head_of(model, classes)} if classes else set()
    named = dict(model.named_parameters())
    missing = sorted(name for name in said["missing_keys"] if name in named and id(named[name]) not in new)
    if missing:
        raise ValueError(
            f"--model {folder}: its weights lack {len(missing)} of the tensors of its config.json, "
            f"such as {missing[0]}; give the folder of a trained model"
        )
    return model


def _with_adapters(model: nn.Module, rank: int, kind: str) -> nn.Module:
    peft = _peft()
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type=kind)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # about old names in transformers that peft still uses
        adapted: nn.Module = peft.get_peft_model(model, config)
    return adapted


def head_of(model: nn.Module, classes: int) -> Iterable[nn.Parameter]:
    """Return the head's parameters: a classifier's pooler and all outside its body, or the output matrix."""
    if not classes:
        return [model.get_output_embeddings().weight]
    body = getattr(model, model.base_model_prefix)
    inside = {id(p) for name, p in body.named_parameters() if not name.startswith("pooler.")}
    return [parameter for parameter in model.parameters() if id(parameter) not in inside]


def optimizer_of(
    model: nn.Module, name: str, recipe: str, *, lr: float, scale: float, weight_decay: float
) -> Optimizer:
    """Return the optimizer of a run: that of `bench.pretrain` if matrices are trained, else AdamW.

    `scale` is the rate of matrices, or of adapters, over `lr`.
    """
    if recipe in WHOLE:
        return build_optimizer(name, model, lr=lr, scale=scale, weight_decay=weight_decay)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="gwt_param_groups found nothing to transform")
        found = gwt_param_groups(model, level=1, weight_decay=weight_decay)
    groups = []
    for group in found:
        for rate, adapters in ((lr * scale, True), (lr, False)):
            named = zip(group["param_names"], group["params"], strict=True)
            own = [parameter for parameter_name, parameter in named if ("lora_" in parameter_name) == adapters]
            if own:
                groups.append({"params": own, "lr": rate, "weight_decay": group["weight_decay"]})
    fused = all(parameter.is_cuda for parameter in model.parameters())
    return torch.optim.AdamW(groups, lr=lr, fused=fused or None)
