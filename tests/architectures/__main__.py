"""Build a small model of every architecture in transformers on the meta device, and list how matrices are grouped.

``python -m tests.architectures [MODEL_TYPE ...]`` prints the listing, by default of everything that can be built,
and fails if a rule is broken; ``--write`` rewrites the expected table of the architectures in use.
"""

from __future__ import annotations

import argparse
import copy
import logging
import re
import sys
import warnings
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto import modeling_auto

from gwt_kernels.optim.param_groups import Decision, decide

TABLE = Path(__file__).parents[1] / "data" / "architectures.txt"

USED = (
    "BertForMaskedLM", "RobertaForMaskedLM", "XLMRobertaForMaskedLM", "CamembertForMaskedLM",
    "ElectraForPreTraining", "DebertaV2ForMaskedLM", "MPNetForMaskedLM", "AlbertForMaskedLM",
    "DistilBertForMaskedLM", "ModernBertForMaskedLM", "EsmForMaskedLM", "XLNetLMHeadModel",
    "ViTForImageClassification", "Dinov2ForImageClassification", "CLIPModel", "SiglipModel",
    "SwinForImageClassification", "ConvNextForImageClassification", "WhisperForConditionalGeneration",
    "Wav2Vec2ForCTC", "T5ForConditionalGeneration", "BartForConditionalGeneration", "GPT2LMHeadModel",
    "GPTNeoXForCausalLM", "LlamaForCausalLM", "Qwen3ForCausalLM", "MistralForCausalLM", "Gemma3ForCausalLM",
    "Phi3ForCausalLM", "MambaForCausalLM", "Mamba2ForCausalLM", "FalconMambaForCausalLM", "RwkvForCausalLM",
    "JambaForCausalLM", "NemotronHForCausalLM", "RecurrentGemmaForCausalLM", "Qwen3NextForCausalLM",
    "MixtralForCausalLM", "Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM", "DeepseekV3ForCausalLM",
    "GptOssForCausalLM", "GraniteMoeForCausalLM", "LlavaForConditionalGeneration",
    "Qwen2_5_VLForConditionalGeneration", "Qwen3VLForConditionalGeneration", "PaliGemmaForConditionalGeneration",
)  # fmt: skip
"""Model classes in use, with their heads."""

_LAYERS = re.compile(r"^(n_?layers?|num_blocks|depth)$|layers$|^num_hidden_groups$")
_NO_LAYERS = re.compile(r"feature|conv|embed|first|dense|shared|kv|skip|drop|up|out|select|cross|every|interval")
_MISSING = {"vocab_size": 64, "prediction_length": 8, "pad_token_id": 0, "num_key_value_heads": 4, "head_dim": 64}
_WITH_HEADS = (
    "CAUSAL_LM",
    "IMAGE_TEXT_TO_TEXT",
    "MASKED_LM",
    "SPEECH_SEQ_2_SEQ",
    "SEQ_TO_SEQ",
    "CTC",
    "CLASSIFICATION",
)


def model_types() -> list[str]:
    """Return every model type known to one of transformers' automatic classes."""
    return sorted({kind for mapping in _mappings() for kind in mapping})


def build(model_type: str) -> nn.Module:
    """Build a type's model with an output head if there is one, two layers, and otherwise default widths.

    Raises:
        ValueError: the configuration alone does not suffice, or a package is missing.
    """
    found = [(name, entry[model_type]) for name, entry in _named_mappings() if model_type in entry]
    found.sort(
        key=lambda item: next((i for i, kind in enumerate(_WITH_HEADS) if kind in item[0]), len(_WITH_HEADS))
    )
    names = [each for _, value in found for each in ([value] if isinstance(value, str) else value)]
    error: Exception | None = None
    for missing in ({}, _MISSING):
        try:
            config = _configuration(transformers.CONFIG_MAPPING[model_type], 2, missing)
        except Exception as raised:  # any exception of the family's code
            error = raised
            continue
        for name in dict.fromkeys(names):
            try:
                return _of_config(name, copy.deepcopy(config))
            except Exception as raised:
                error = raised
    raise ValueError(f"{model_type}: {' '.join(str(error).split())[:160]}") from error


def build_class(name: str) -> nn.Module:
    """Build the model of a class with enough layers for a hybrid to have one of each kind."""
    kind = getattr(transformers, name).config_class
    try:
        return _of_config(name, _configuration(kind, 8, {}))
    except Exception:  # any exception of the family's code
        return _of_config(name, _configuration(kind, 8, _MISSING))


def listing(model: nn.Module) -> Iterator[str]:
    """Return lines that list the transformed tensors of two or more dimensions, and the others by reason."""
    decisions = [decision for _, decision in decide(model) if len(decision.shape) > 1]
    for title, transformed in (("transformed", True), ("left", False)):
        by_reason: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
        for decision in decisions:
            if (decision.level > 0) == transformed:
                path, _, leaf = re.sub(r"(?<=\.)\d+(?=\.)", "*", decision.name.removesuffix(".weight")).rpartition(
                    "."
                )
                leaves = by_reason[decision.reason][path or "-"]
                leaves.extend({leaf} - set(leaves))
        yield f"  {title}"
        for reason, paths in by_reason.items():
            yield f"    {reason}"
            yield from (f"      {path}: {' '.join(leaves)}" for path, leaves in paths.items())


def version() -> str:
    """Return the release of transformers, without the patch number."""
    return ".".join(transformers.__version__.split(".")[:2])


def table() -> str:
    """Return the table as it would be written now."""
    text = "".join("\n".join((name, *listing(build_class(name)))) + "\n" for name in USED)
    return f"transformers {version()}\n{text}"


def expected() -> tuple[str, dict[str, list[str]]]:
    """Return the expected table: its release of transformers, and the listing of each class."""
    first, *lines = TABLE.read_text(encoding="utf-8").splitlines()
    listings: dict[str, list[str]] = {}
    for line in lines:
        if not line.startswith(" "):
            listings[line] = []
        else:
            listings[next(reversed(listings))].append(line)
    return first.removeprefix("transformers "), listings


REASONS = frozenset(
    {
        "bias",
        "norm or other 1-D tensor",
        "norm",
        "embedding",
        "convolution",
        "low-rank adapter",
        "MoE router",
        "output head",
        "part of a pooler or an embedding",
        "one output: a score or a gate",
        "Linear outside of the repeated blocks",
    }
)
"""Reasons to leave a tensor at level 0, in addition to too narrow a width and a class other than Linear."""

BETWEEN = re.compile(
    r"\.downsample\.reduction\.|^tdnn\.\d+\.kernel|keypoint_encoder\.encoder\.\d+\.linear|\.patch_embedder\.proj\."
    r"|\.readout_projects\."
)
"""Linears under a number in no repeated block: between stages, from stages to a neck, or used as convolutions."""


def broken(model: nn.Module) -> list[str]:
    """Return the wrong decisions about a model, judged independently of the code under test."""
    owners = {
        f"{path}.{leaf}" if path else leaf: module
        for path, module in model.named_modules(remove_duplicate=False)
        for leaf, _ in module.named_parameters(recurse=False, remove_duplicate=False)
    }
    ends = {id(module.weight) for module in _ends(model)}
    return [
        f"{decision.name} {decision.shape} level {decision.level}, {decision.reason}: {fault}"
        for parameter, decision in decide(model)
        for fault in _faults(decision, owners[decision.name], id(parameter) in ends)
    ]


def _faults(decision: Decision, owner: nn.Module, is_end: bool) -> Iterator[str]:
    reason = decision.reason.partition(", tied to ")[0]
    kinds = {kind.__name__ for kind in type(owner).__mro__}
    numbered = any(part.isdigit() for part in decision.name.split(".")[:-2])
    if decision.level:
        if len(decision.shape) < 2 or decision.name.endswith("bias"):
            yield "no matrix is transformed"
        if isinstance(owner, nn.Embedding) or is_end:
            yield "an embedding or a head is transformed"
        if kinds & {"LayerNorm", "_ConvNd", "RNNBase"} or type(owner).__name__.endswith("Norm"):
            yield "a norm, a convolution or a recurrence is transformed"
        return
    narrow = re.search(r"but a width of \d+ holds at most level \d$", reason)
    if not (narrow or reason in REASONS or reason == f"{type(owner).__name__}, not the weight of a Linear"):
        yield "no known reason"
    if numbered and reason.startswith("Linear outside") and not BETWEEN.search(decision.name):
        yield "a Linear of a repeated block is left"
    if kinds & {"Linear", "Conv1D"} and reason.endswith("not the weight of a Linear"):
        yield "it is the weight of a Linear"


def _ends(model: nn.Module) -> list[nn.Module]:
    """Return the modules that a model itself calls its input and output embeddings."""
    found = []
    for get in ("get_input_embeddings", "get_output_embeddings"):
        try:
            found.append(getattr(model, get)())
        except Exception:  # models without text have none, and fail in several ways
            continue
    return [end for end in found if isinstance(getattr(end, "weight", None), nn.Parameter)]


def _mappings() -> list[dict[str, Any]]:
    return [mapping for _, mapping in _named_mappings()]


def _named_mappings() -> list[tuple[str, dict[str, Any]]]:
    names = [name for name in dir(modeling_auto) if re.fullmatch(r"MODEL_(FOR_\w+_)?MAPPING_NAMES", name)]
    return [(name, getattr(modeling_auto, name)) for name in names]


def _configuration(kind: Any, count: int, missing: dict[str, int]) -> Any:
    """Return a configuration with ``count`` layers at every depth, completed by ``missing`` fields."""
    usual = kind()
    layers = {
        key: count
        for key, value in vars(usual).items()
        if type(value) is int
        and count is not None
        and value > count
        and _LAYERS.search(key)
        and not _NO_LAYERS.search(key)
    }
    filled = {key: value for key, value in missing.items() if key in vars(usual) and getattr(usual, key) is None}
    parts: dict[str, Any] = {}
    for name in getattr(kind, "sub_configs", {}):
        part = getattr(usual, name, None)
        if isinstance(part, transformers.PreTrainedConfig):
            parts[name] = _configuration(type(part), count, missing)
    for options in ({**layers, **parts, **filled}, {**parts, **filled}, {**layers, **filled}):
        try:
            return kind(**options)
        except Exception:  # counts that have to agree with one another
            continue
    return kind(**filled)


def _of_config(name: str, config: Any) -> nn.Module:
    kind = getattr(transformers, name)
    with torch.device("meta"), _quiet():
        try:
            model: nn.Module = kind._from_config(config, attn_implementation="eager")
        except (AttributeError, TypeError, ValueError):
            model = kind(config)
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the families' warnings."""
    verbosity, disabled = transformers.logging.get_verbosity(), logging.root.manager.disable
    transformers.logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        transformers.logging.set_verbosity(verbosity)


def main() -> int:
    """Print the listing; return 1 if a rule is broken."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("types", nargs="*", metavar="MODEL_TYPE")
    parser.add_argument("--write", action="store_true", help=f"write {TABLE.name} and stop")
    asked = parser.parse_args()
    if asked.write:
        TABLE.write_text(table(), encoding="utf-8")
        return 0
    built, faults = 0, 0
    for kind in asked.types or model_types():
        try:
            model = build(kind)
        except ValueError as error:
            print(f"{kind}\n  cannot be built: {error}")
            continue
        wrong = broken(model)
        built, faults = built + 1, faults + len(wrong)
        print(
            "\n".join((f"{kind} ({type(model).__name__})", *listing(model), *(f"  WRONG {each}" for each in wrong)))
        )
    print(f"{built} architectures, {faults} faults")
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main())
