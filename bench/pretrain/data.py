"""Turn text into batches: find real text, hold some out, and deal the same windows to every run."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from bench.finetune import fetch

CORPORA = {"stdlib": "standard library", "kernel_docs": "Linux kernel's documentation"}
"""Named texts: the running Python's own sources, and the text that `bench.finetune.fetch` downloads."""

_SKIPPED_FOLDERS = {"__pycache__", "site-packages", "dist-packages", "node_modules"}
_STDLIB_TESTS = {"test", "tests", "idle_test"}  # some distributions omit them


class Tokenizer(Protocol):
    """Turns text into token ids."""

    separator: int
    dtype: torch.dtype

    def encode(self, text: str) -> Tensor: ...


class ByteTokenizer:
    """One token per UTF-8 byte; byte 0, absent from text files, separates documents."""

    separator = 0
    dtype = torch.uint8

    def encode(self, text: str) -> Tensor:
        raw = text.encode("utf-8")
        return torch.frombuffer(bytearray(raw), dtype=torch.uint8) if raw else torch.empty(0, dtype=torch.uint8)


class PretrainedTokenizer:
    """A tokenizer from the `transformers` library, by name or folder."""

    dtype = torch.int32

    def __init__(self, name: str) -> None:
        from transformers import AutoTokenizer

        try:
            self._tokenizer = AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError) as error:
            said = str(error).partition("\n")[0]
            raise ValueError(f"--tokenizer {name}: cannot be read ({said}); give another name or folder") from error
        separator = self._tokenizer.eos_token_id
        if separator is None:
            raise ValueError(f"tokenizer {name!r} has no end-of-text token: choose one that has")
        self.separator = int(separator)

    def encode(self, text: str) -> Tensor:
        return torch.tensor(self._tokenizer.encode(text, add_special_tokens=False), dtype=self.dtype)


class Source(Protocol):
    """Source of training windows in a fixed order, in which any position can be restored."""

    def take(self, count: int) -> Tensor:
        """Return the next `count` windows, `[count, context + 1]`."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class ShuffledWindows:
    """Windows of a text held in memory, in a new order on every pass; no token is predicted twice in a pass.

    The order depends on the seed alone, so every optimizer of a comparison sees the same batches, and the number of
    windows taken is the whole state.
    """

    def __init__(self, tokens: Tensor, context: int, seed: int) -> None:
        self._tokens, self._context, self._seed = tokens, context, seed
        # One window less than fits, so that a pass may start at any offset below `context`.
        self._per_pass = (len(tokens) - 1) // context - 1
        self._taken = 0
        self._pass, self._starts = -1, torch.empty(0, dtype=torch.long)

    def _start(self, index: int) -> int:
        number, position = divmod(index, self._per_pass)
        if number != self._pass:
            generator = torch.Generator().manual_seed(self._seed * 1_000_003 + number)
            offset = torch.randint(self._context, (1,), generator=generator)
            self._starts = torch.randperm(self._per_pass, generator=generator) * self._context + offset
            self._pass = number
        return int(self._starts[position])

    def take(self, count: int) -> Tensor:
        starts = [self._start(self._taken + i) for i in range(count)]
        self._taken += count
        return torch.stack([self._tokens[s : s + self._context + 1] for s in starts])

    def reordered(self, seed: int) -> ShuffledWindows:
        """Return windows of the same text in the order of another seed."""
        return ShuffledWindows(self._tokens, self._context, seed)

    @property
    def largest_id(self) -> int:
        """The largest token id of the text."""
        return int(self._tokens.max())

    def state_dict(self) -> dict[str, Any]:
        return {"taken": self._taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._taken = int(state["taken"])


class StreamedWindows:
    """Windows of a stream of documents too large to hold in memory; restarts at the end of the stream.

    Args:
        open_documents: Function from a number of documents to skip to the rest of the stream.
        tokenizer: Encodes each document.
        context: Tokens predicted per window.
    """

    def __init__(self, open_documents: Callable[[int], Iterable[str]], tokenizer: Tokenizer, context: int) -> None:
        self._open, self._tokenizer, self._context = open_documents, tokenizer, context
        self._documents = 0
        self._buffer = torch.empty(0, dtype=tokenizer.dtype)
        self._stream: Iterator[str] | None = None

    def _next_document(self) -> str:
        if self._stream is None:
            self._stream = iter(self._open(self._documents))
        document = next(self._stream, None)
        if document is None:
            if self._documents == 0:
                raise ValueError("the streamed data set holds no documents: check its name and split")
            self._documents, self._stream = 0, None
            return self._next_document()
        self._documents += 1
        return document

    def take(self, count: int) -> Tensor:
        needed, parts = count * self._context + 1, [self._buffer]
        have = len(self._buffer)
        while have < needed:
            parts.append(_encode_documents([self._next_document()], self._tokenizer))
            have += len(parts[-1])
        tokens = torch.cat(parts)
        self._buffer = tokens[needed - 1 :].clone()
        return tokens[:needed].unfold(0, self._context + 1, self._context)

    def state_dict(self) -> dict[str, Any]:
        return {"documents": self._documents, "buffer": self._buffer}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._documents, self._buffer, self._stream = int(state["documents"]), state["buffer"], None


@dataclass
class Corpus:
    """Training windows, held-out windows `[n, context + 1]`, and facts about the text for the log."""

    train: Source
    heldout: Tensor
    facts: dict[str, str | int]


def standard_library() -> Path:
    """Return the folder of the running Python's own sources: real text that every machine has."""
    return Path(sysconfig.get_paths()["stdlib"])


def folder_of(corpus: str) -> Path | None:
    """Return the folder of a named text; None for the standard library's sources.

    Raises:
        FileNotFoundError: It has not been fetched yet.
    """
    if corpus == "stdlib":
        return None
    made = fetch.BUILD / corpus
    if not (made / fetch.MARK).exists():
        raise FileNotFoundError(
            f"--corpus {corpus}: {made} is not made yet; python -m bench.finetune.fetch packages {corpus} makes "
            "it, and --text FOLDER takes other text"
        )
    return made / "text"


@lru_cache(maxsize=1)  # the runs of a comparison read the same text
def read_documents(path: Path | None) -> list[str]:
    """Return every distinct UTF-8 text file under `path`, or the standard library's sources for None.

    Documents are ordered by hash: mixed, and the same on every machine with the same files.

    Raises:
        FileNotFoundError: There is no such file or folder.
        ValueError: It holds no text.
    """
    root = standard_library() if path is None else path
    if not root.exists():
        raise FileNotFoundError(f"--text {root}: no such file or folder; give one that holds text, or leave it out")
    skipped = _SKIPPED_FOLDERS | (_STDLIB_TESTS if path is None else set())
    pattern = "*.py" if path is None else "*"
    documents: dict[str, str] = {}
    for file in [root] if root.is_file() else root.rglob(pattern):
        folders = file.relative_to(root).parts
        if not file.is_file() or any(part in skipped or part.startswith(".") for part in folders):
            continue
        raw = file.read_bytes()
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError:
            continue
        if text and "\0" not in text:
            documents[hashlib.sha256(raw).hexdigest()] = text
    if not documents:
        raise ValueError(f"--text {root}: holds no UTF-8 text files; give a file or folder that does")
    return [documents[digest] for digest in sorted(documents)]


def split_documents(documents: list[str], fraction: float) -> tuple[list[str], list[str]]:
    """Hold out the last `fraction` of all characters; a document across the border is split.

    Returns:
        `(training, held_out)`, which share no character.
    """
    remaining = round(sum(map(len, documents)) * (1.0 - fraction))
    training: list[str] = []
    heldout: list[str] = []
    for document in documents:
        cut = min(remaining, len(document))
        remaining -= cut
        training += [document[:cut]] * (cut > 0)
        heldout += [document[cut:]] * (cut < len(document))
    return training, heldout


def _encode_documents(documents: Iterable[str], tokenizer: Tokenizer) -> Tensor:
    separator = torch.tensor([tokenizer.separator], dtype=tokenizer.dtype)
    parts = [part for document in documents for part in (tokenizer.encode(document), separator)]
    return torch.cat(parts) if parts else torch.empty(0, dtype=tokenizer.dtype)


def _heldout_windows(tokens: Tensor, context: int, count: int, where: str, *, spread: bool = False) -> Tensor:
    if len(tokens) < count * context + 1:
        raise ValueError(
            f"{where}: {len(tokens)} held-out tokens are too few for {count} windows of {context}; "
            "give more text, or lower --eval-windows or --context"
        )
    if spread:
        windows = tokens.unfold(0, context + 1, context)
        return windows[torch.linspace(0, len(windows) - 1, count).long()]
    return tokens[: count * context + 1].unfold(0, context + 1, context)


def load_text(
    path: Path | None,
    tokenizer: Tokenizer,
    *,
    context: int,
    eval_windows: int,
    heldout_fraction: float,
    seed: int,
    spread: bool = False,
    called: str | None = None,
) -> Corpus:
    """Read local text into a `Corpus`.

    Args:
        path: A file or folder; None for the Python standard library's sources.
        tokenizer: Encodes the documents.
        context: Tokens predicted per window.
        eval_windows: Windows of held-out text to evaluate on.
        heldout_fraction: Share of the characters set aside, in (0, 1).
        seed: Decides the order of the training windows.
        spread: Take the held-out windows evenly spaced from all held-out text, not from its beginning.
        called: Name of the text in records; None for its path.

    Raises:
        FileNotFoundError: There is no such file or folder.
        ValueError: There is no text, or too little.
    """
    where = "--text " + (called or ("(standard library)" if path is None else str(path)))
    training, heldout = split_documents(read_documents(path), heldout_fraction)
    tokens = _encode_documents(training, tokenizer)
    if len(tokens) < 2 * context + 1:
        raise ValueError(
            f"{where}: {len(tokens)} training tokens are too few for windows of {context}; "
            "give more text, or lower --context"
        )
    held = _encode_documents(heldout, tokenizer)
    digest = hashlib.sha256(tokens.numpy().tobytes() + held.numpy().tobytes()).hexdigest()[:16]
    facts: dict[str, str | int] = {
        "text": where.removeprefix("--text "),
        "train_tokens": len(tokens),
        "heldout_tokens": len(held),
        "text_digest": digest,
    }
    windows = _heldout_windows(held, context, eval_windows, where, spread=spread)
    return Corpus(ShuffledWindows(tokens, context, seed), windows, facts)


def load_stream(
    name: str,
    config: str | None,
    tokenizer: Tokenizer,
    *,
    context: int,
    eval_windows: int,
    heldout_split: str,
    field: str = "text",
) -> Corpus:
    """Stream a Hugging Face data set: its `train` split to train on, `heldout_split` to evaluate on.

    Raises:
        ModuleNotFoundError: The `datasets` package is not installed.
        ValueError: The two splits are the same, or the held-out one is too small.
    """
    if heldout_split == "train":
        raise ValueError("--heldout-split 'train' is what the model trains on: name another split")
    try:
        from datasets import load_dataset
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("--dataset needs the 'datasets' package: pip install datasets") from error

    def documents(split: str, skip: int = 0) -> Iterator[str]:
        stream = load_dataset(name, config, split=split, streaming=True)
        return (row[field] for row in stream.skip(skip))

    needed, parts, have = eval_windows * context + 1, [], 0
    rows = documents(heldout_split)
    while have < needed and (some := list(islice(rows, 64))):
        parts.append(_encode_documents(some, tokenizer))
        have += len(parts[-1])
    held = torch.cat(parts) if parts else torch.empty(0, dtype=tokenizer.dtype)
    windows = _heldout_windows(held, context, eval_windows, f"--dataset {name}, split {heldout_split}")
    facts: dict[str, str | int] = {"text": f"{name}/{config or ''} (streamed)", "heldout_tokens": len(held)}
    return Corpus(StreamedWindows(lambda skip: documents("train", skip), tokenizer, context), windows, facts)
