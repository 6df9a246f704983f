"""Models, tokenizers and data small enough for tests of fine-tuning: made on the spot, nothing is downloaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from bench.finetune.examples import Columns
from bench.finetune.models import load_tokenizer
from bench.finetune.tasks import Classification, Sizes, load_classification
from bench.finetune.training import RunConfig

GOOD, BAD, OTHER = (
    ("fine", "great", "moving"),
    ("dull", "poor", "empty"),
    ("film", "story", "cast", "scene", "plot"),
)
WORDS = (*GOOD, *BAD, *OTHER)
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")


def write_tokenizer(folder: Path, *, more: int = 0) -> Path:
    """Write a tokenizer of whole words, with `more` words than the embeddings of the models below have rows."""
    words = {word: i for i, word in enumerate((*SPECIAL, *WORDS, *(f"more{i}" for i in range(more))))}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "eos_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return folder


def write_bert(folder: Path, **changed: Any) -> Path:
    """Write a BERT of two layers, without a head for labels, and its tokenizer."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    sizes |= {"vocab_size": len(SPECIAL) + len(WORDS), "max_position_embeddings": 24, "initializer_range": 0.1}
    BertForMaskedLM(BertConfig(**sizes | changed)).save_pretrained(folder)
    return write_tokenizer(folder)


def write_llama(folder: Path) -> Path:
    """Write a language model of one layer, whose output matrix is its embedding, and its tokenizer."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    sizes |= {"vocab_size": len(SPECIAL) + len(WORDS), "max_position_embeddings": 64, "initializer_range": 0.3}
    LlamaForCausalLM(LlamaConfig(**sizes, pad_token_id=0, tie_word_embeddings=True)).save_pretrained(folder)
    return write_tokenizer(folder)


def sentences(count: int) -> list[tuple[str, str]]:
    """Return distinct sentences of three to eight words, labelled by their one word from `GOOD` or `BAD`."""
    generator = torch.Generator().manual_seed(5)
    found: dict[str, str] = {}
    while len(found) < count:
        label = ("bad", "good")[len(found) % 2]
        judges = GOOD if label == "good" else BAD
        length = 2 + int(torch.randint(6, (), generator=generator))
        words = [OTHER[int(i)] for i in torch.randint(len(OTHER), (length,), generator=generator)]
        words.insert(int(torch.randint(length, (), generator=generator)), judges[len(found) // 2 % 3])
        found.setdefault(" ".join(words), label)
    return list(found.items())


def write_tsv(path: Path, count: int = 80) -> Path:
    path.write_text("sentence\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in sentences(count)))
    return path


def write_json_lines(path: Path, count: int = 80) -> Path:
    path.write_text("".join(json.dumps({"label": label, "text": text}) + "\n" for text, label in sentences(count)))
    return path


def write_text(path: Path) -> Path:
    path.write_text("\n".join(text for text, _ in sentences(600)))
    return path


def tiny_task(folder: Path, *, examples: int = 48) -> Classification:
    """Return a task of labelled sentences for the model that `write_bert` writes into `folder / "bert"`."""
    data = write_tsv(folder / "reviews.tsv")
    tokenizer = load_tokenizer(folder / "bert")
    task = load_classification(
        data, None, Columns("sentence", None, "label"), tokenizer, Sizes(examples, 12, 20, 16)
    )
    task.facts["model_digest"] = "made up"
    return task


def tiny_config(model: Path, **changed: Any) -> RunConfig:
    known: dict[str, Any] = {"model": str(model), "optimizer": "adamw", "recipe": "full", "lr": 1e-2, "scale": 1.0}
    known |= {"steps": 6, "batch": 8, "warmup": 0.2, "weight_decay": 0.0, "grad_clip": 0.0, "seed": 0}
    return RunConfig(**known | {"precision": "float32", "rank": 0} | changed)


def tiny_options(folder: Path) -> list[str]:
    """Return a command line of six small steps, and write its files to `folder`."""
    model, data = write_bert(folder / "bert"), write_tsv(folder / "reviews.tsv")
    line = f"--model {model} --data {data} --out {folder / 'out'} --device cpu --threads 1 --steps 6 --batch 8"
    sizes = "--examples 48 --validation 12 --test 20 --max-length 16 --precision float32"
    return [*line.split(), *sizes.split(), "--optimizers", "adamw", "gwt2", "--recipes", "full"]
