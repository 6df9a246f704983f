"""Tasks that a model is fine-tuned on: classification of texts, or language modelling of plain text."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.finetune.examples import Columns, Example, digest_of, labels_of, read_examples, shuffled
from bench.pretrain.data import ByteTokenizer, PretrainedTokenizer, ShuffledWindows, load_text
from bench.pretrain.training import loss_of

POOL = 8  # batches that are sorted by length together, so that little of a batch is padding
EVALUATED_AT_ONCE = 64
MOST_UNKNOWN = 0.5
"""Share of unknown tokens above which a tokenizer does not fit the texts."""
_Encoded = tuple[list[int], int]


class Task(Protocol):
    """Data prepared for training, which is sent to the process of each run."""

    kind: str
    """`classify` or `text`: which head the model has."""
    classes: int
    """Number of outputs of a new head; 0 to keep the model's own head."""
    facts: dict[str, Any]
    """Columns of the records that determine the batches."""
    largest_id: int
    pad: int | None

    def steps_of(self, epochs: float, batch: int) -> int:
        """Return the number of steps of this many passes over the data."""
        ...

    def deal(self, batch: int, seed: int) -> Iterator[dict[str, Tensor]]:
        """Yield training batches without end; their order depends on the seed alone."""
        ...

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Return the mean loss of a batch."""
        ...

    def evaluate(self, model: nn.Module, part: str, device: torch.device) -> dict[str, float]:
        """Return loss, and accuracy where there are labels, on the part `validation` or `test`."""
        ...


def checksum(batch: dict[str, Tensor], before: int) -> int:
    """Extend a checksum of all batches so far, by which runs on other batches are detected."""
    for name in sorted(batch):
        before = zlib.crc32(batch[name].contiguous().numpy().data, before)
    return before


@dataclass
class Classification:
    """Encoded texts, each with one of several labels."""

    parts: dict[str, list[_Encoded]]
    """`train`, `validation` and `test`."""
    classes: int
    pad: int
    facts: dict[str, Any]
    kind: str = "classify"

    @property
    def largest_id(self) -> int:
        """The largest token id in use."""
        return max(max(ids) for part in self.parts.values() for ids, _ in part)

    def steps_of(self, epochs: float, batch: int) -> int:
        return max(1, round(epochs * math.ceil(len(self.parts["train"]) / batch)))

    def deal(self, batch: int, seed: int) -> Iterator[dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        train = self.parts["train"]
        while True:
            order = torch.randperm(len(train), generator=generator).tolist()
            for start in range(0, len(order), POOL * batch):
                pool = sorted(order[start : start + POOL * batch], key=lambda index: len(train[index][0]))
                batches = [pool[at : at + batch] for at in range(0, len(pool), batch)]
                for place in torch.randperm(len(batches), generator=generator).tolist():
                    yield self._padded([train[index] for index in batches[place]])

    def _padded(self, examples: Sequence[_Encoded]) -> dict[str, Tensor]:
        width = max(len(ids) for ids, _ in examples)
        ids = torch.tensor([[*ids, *[self.pad] * (width - len(ids))] for ids, _ in examples])
        mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in examples])
        return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([label for _, label in examples])}

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return F.cross_entropy(logits.float(), batch["labels"])

    def evaluate(self, model: nn.Module, part: str, device: torch.device) -> dict[str, float]:
        examples = sorted(self.parts[part], key=lambda example: len(example[0]))
        loss = torch.zeros((), dtype=torch.float64, device=device)
        right = torch.zeros((), dtype=torch.long, device=device)
        for start in range(0, len(examples), EVALUATED_AT_ONCE):
            batch = self._padded(examples[start : start + EVALUATED_AT_ONCE])
            labels = batch.pop("labels").to(device)
            logits = model(**{name: tensor.to(device) for name, tensor in batch.items()}).logits.float()
            loss += F.cross_entropy(logits, labels, reduction="sum").double()
            right += (logits.argmax(-1) == labels).sum()
        return {"loss": float(loss) / len(examples), "accuracy": float(right) / len(examples)}


@dataclass
class PlainText:
    """Windows of text, each token to be predicted from those before it."""

    windows: ShuffledWindows
    held: dict[str, Tensor]
    facts: dict[str, Any]
    largest_id: int
    tokens: int
    kind: str = "text"
    classes: int = 0
    pad: int | None = None

    def steps_of(self, epochs: float, batch: int) -> int:
        return max(1, round(epochs * self.tokens / (batch * self.facts["max_length"])))

    def deal(self, batch: int, seed: int) -> Iterator[dict[str, Tensor]]:
        windows = self.windows.reordered(seed)
        while True:
            yield {"windows": windows.take(batch)}

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return loss_of(model, batch["windows"])

    def evaluate(self, model: nn.Module, part: str, device: torch.device) -> dict[str, float]:
        windows = self.held[part]
        total = sum(float(loss_of(model, window.to(device))) * len(window) for window in windows.split(4))
        return {"loss": total / len(windows)}


class Sizes(NamedTuple):
    """Amounts of data to use."""

    examples: int | None
    """Training examples at most; None for all."""
    validation: int
    """Examples, or windows of text, by whose loss a setting is chosen."""
    test: int
    """Examples, or windows of text, on which the chosen setting is reported."""
    max_length: int
    """Tokens of an example at most, or of a window."""


def load_classification(
    data: Path, test_data: Path | None, columns: Columns, tokenizer: Any, sizes: Sizes
) -> Classification:
    """Read labelled examples, and split them into training, validation and test examples without overlap.

    Args:
        data: The file of training examples, of which some are set aside.
        test_data: A file to test on; None to set examples of `data` aside for it.
        columns: The columns of texts and labels in both files.
        tokenizer: The model's tokenizer, from transformers.
        sizes: Numbers of examples, and their length.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file cannot be read, has one label, or too few examples; or the tests have other labels.
    """
    examples = shuffled(read_examples(data, columns))
    labels = labels_of(examples, f"--data {data}")
    if test_data is None:
        test, rest = examples[: sizes.test], examples[sizes.test :]
    else:
        test, rest = _tests(test_data, columns, labels, sizes.test), examples
        tested = {example[:2] for example in test}
        rest = [example for example in rest if example[:2] not in tested]
    validation, train = rest[: sizes.validation], rest[sizes.validation :][: sizes.examples]
    if not train:
        raise ValueError(
            f"--data {data}: {len(examples)} examples leave none to train on after {sizes.validation} for "
            f"--validation and {len(test)} for --test; lower these, or give more examples"
        )
    labels_of(train, f"--data {data}, the {len(train)} to train on")
    special = tokenizer.num_special_tokens_to_add(pair=columns.pair is not None)
    if sizes.max_length <= special:
        raise ValueError(
            f"--max-length {sizes.max_length}: the tokenizer's {special} special tokens leave no room for text; "
            f"give at least {special + 1}"
        )
    places = {label: place for place, label in enumerate(labels)}
    parts = {
        name: _encoded(part, places, tokenizer, sizes.max_length)
        for name, part in (("train", train), ("validation", validation), ("test", test))
    }
    _check_known(parts["train"], tokenizer)
    facts = {
        "data": str(data),
        "examples": len(train),
        "validation_size": len(validation),
        "test_size": len(test),
        "max_length": sizes.max_length,
        "labels": labels,
        "text_digest": digest_of([*train, *validation, *test]),
    }
    return Classification(parts, len(labels), tokenizer.pad_token_id, facts)


def _check_known(examples: list[_Encoded], tokenizer: Any) -> None:
    ids = [token for row, _ in examples for token in row]
    share = ids.count(tokenizer.unk_token_id) / len(ids)
    if share > MOST_UNKNOWN:
        raise ValueError(
            f"--tokenizer {tokenizer.name_or_path}: does not know {100 * share:.0f} % of the tokens of --data; "
            "give the tokenizer that the model was trained with, or texts of its language"
        )


def _tests(path: Path, columns: Columns, labels: list[str], count: int) -> list[Example]:
    test = shuffled(read_examples(path, columns, "--test-data"))
    labels_of(test, f"--test-data {path}")
    if new := sorted({example.label for example in test} - set(labels)):
        raise ValueError(
            f"--test-data {path}: the label {new[0]!r} is none of {', '.join(labels)} in --data; "
            "give files of the same labels"
        )
    return test[:count]


def _encoded(examples: list[Example], places: dict[str, int], tokenizer: Any, length: int) -> list[_Encoded]:
    if not examples:
        return []
    texts, pairs = [e.text for e in examples], [e.pair or "" for e in examples]
    pair = {"text_pair": pairs} if any(pairs) else {}
    ids = tokenizer(texts, **pair, truncation=True, max_length=length)["input_ids"]
    return [(row, places[example.label]) for row, example in zip(ids, examples, strict=True)]


def load_plain_text(data: Path | None, tokenizer: str | None, sizes: Sizes, heldout_fraction: float) -> PlainText:
    """Read a file or folder of text; its last part is held out for validation and test.

    Args:
        data: A file or folder; None for the Python standard library's sources.
        tokenizer: A folder of the model's tokenizer; None for one token per byte.
        sizes: Numbers of windows, and their length.
        heldout_fraction: Share of the text that is held out.

    Raises:
        FileNotFoundError: There is no such file or folder.
        ValueError: There is no text, or too little.
    """
    if sizes.max_length < 2:
        raise ValueError(f"--max-length {sizes.max_length}: leaves no token to predict; give at least 2")
    words = PretrainedTokenizer(tokenizer) if tokenizer else ByteTokenizer()
    how = {"context": sizes.max_length, "eval_windows": sizes.validation + sizes.test}
    try:
        corpus = load_text(data, words, **how, heldout_fraction=heldout_fraction, seed=0, spread=True)
    except (ValueError, FileNotFoundError) as error:
        raise type(error)(_in_these_options(str(error))) from error
    assert isinstance(corpus.train, ShuffledWindows)
    mixed = corpus.heldout[torch.randperm(len(corpus.heldout), generator=torch.Generator().manual_seed(0))]
    held = {"validation": mixed[: sizes.validation], "test": mixed[sizes.validation :]}
    facts = {
        "data": str(corpus.facts["text"]),
        "examples": None,
        "validation_size": sizes.validation,
        "test_size": sizes.test,
        "max_length": sizes.max_length,
        "labels": None,
        "text_digest": corpus.facts["text_digest"],
    }
    largest = max(int(mixed.max()), corpus.train.largest_id)
    return PlainText(corpus.train, held, facts, largest, int(corpus.facts["train_tokens"]))


def _in_these_options(message: str) -> str:
    """Replace names of options of bench.pretrain, whose function reads the text, by the names used here."""
    names = {"--text ": "--data ", "--eval-windows": "--validation, --test", "--context": "--max-length"}
    for theirs, ours in names.items():
        message = message.replace(theirs, ours)
    return message
