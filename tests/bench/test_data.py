"""Text into windows: held-out text, windows without repetition, and streams that resume."""

from __future__ import annotations

import argparse
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.pretrain.data import (
    ByteTokenizer,
    ShuffledWindows,
    StreamedWindows,
    load_stream,
    load_text,
    read_documents,
    split_documents,
)

TEXT = Path(argparse.__file__)  # real text of 100 kB that is always present


@pytest.mark.parametrize("files", [1, 7])
def test_heldout_text_is_not_trained_on(tmp_path: Path, files: int) -> None:
    for file in range(files):
        lines = [f"file {file} line {line:05d}\n" for line in range(400)]
        (tmp_path / f"{file}.txt").write_text("".join(lines))
        (tmp_path / f"copy of {file}.txt").write_text("".join(lines))  # a copy must not leak across the border
    (tmp_path / "binary").write_bytes(b"\xff\xfe\0\0")
    documents = read_documents(tmp_path)
    assert len(documents) == files
    training, heldout = split_documents(documents, 0.2)
    assert "".join(training + heldout) == "".join(documents)
    seen, held = "".join(training).splitlines(), "".join(heldout).splitlines()
    assert len(held) == pytest.approx(0.2 * 400 * files, abs=2)
    assert not set(seen) & set(held[1:])  # the border may cut one line

    corpus = load_text(tmp_path, ByteTokenizer(), context=64, eval_windows=5, heldout_fraction=0.2, seed=0)
    window_text = bytes(corpus.heldout[:, :-1].flatten().tolist()).decode()
    assert window_text in "\0".join(heldout)
    training_text = bytes(corpus.train.take(64 * files).unique(dim=0).flatten().tolist()).decode()
    assert not set(window_text.splitlines()[1:-1]) & set(training_text.splitlines())


def test_default_text_is_the_standard_library() -> None:
    documents = read_documents(None)
    assert TEXT.read_text() in documents
    assert sum(map(len, documents)) > 5_000_000
    assert not any("site-packages" in document[:200] for document in documents[:50])


def test_shuffled_windows_repeat_no_token_in_a_pass() -> None:
    tokens = torch.arange(1000, dtype=torch.int32)
    windows = ShuffledWindows(tokens, context=10, seed=3)
    first, second = windows.take(98), windows.take(98)
    for one_pass in (first, second):
        predicted = one_pass[:, 1:].flatten()
        assert len(predicted.unique()) == 980
    assert not torch.equal(first, second)
    assert torch.equal(first[:, :1] + torch.arange(11), first)
    assert torch.equal(ShuffledWindows(tokens, context=10, seed=3).take(98), first)
    assert not torch.equal(ShuffledWindows(tokens, context=10, seed=4).take(98), first)


class FakeStream(list[dict[str, str]]):
    """The parts of the object returned by `datasets` with `streaming=True` that are used."""

    def skip(self, count: int) -> FakeStream:
        return FakeStream(self[count:])


def test_streamed_windows_resume_at_their_position(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {
        "train": FakeStream({"text": f"document {i}, " * (i + 1)} for i in range(12)),
        "validation": FakeStream({"text": f"held out {i}. "} for i in range(40)),
    }
    fake = types.ModuleType("datasets")
    calls = []

    def load_dataset(name: str, config: str | None, *, split: str, streaming: bool) -> FakeStream:
        calls.append((name, config, streaming))
        return rows[split]

    fake.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", fake)

    def fresh() -> Any:
        settings = {"context": 16, "eval_windows": 8, "heldout_split": "validation"}
        return load_stream("some/text", "en", ByteTokenizer(), **settings)

    corpus = fresh()
    expected = "".join(row["text"] + "\0" for row in rows["train"])
    passes = (expected * 3).encode()
    dealt = torch.cat([corpus.train.take(n) for n in (3, 1, 7, 100)])  # 1,776 tokens: more than one pass
    assert len(dealt) * 16 > len(expected)
    assert bytes(dealt[:, :-1].flatten().tolist()) == passes[: len(dealt) * 16]
    assert bytes(dealt[:, 1:].flatten().tolist()) == passes[1 : len(dealt) * 16 + 1]
    assert bytes(corpus.heldout[0].tolist()) == b"held out 0. \0held out 1"[:17]
    assert ("some/text", "en", True) in calls

    for taken in (1, 40, 90):
        before, after = fresh().train, fresh().train
        before.take(taken)
        after.load_state_dict(before.state_dict())
        assert torch.equal(after.take(30), before.take(30))

    with pytest.raises(ValueError, match="no documents"):
        StreamedWindows(lambda skip: [], ByteTokenizer(), 16).take(1)
