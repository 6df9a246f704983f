"""Bad input of ``bench.finetune``: refused in one sentence, before any training."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench.common import places
from bench.finetune import __main__ as finetune
from bench.finetune import results
from tests.support.finetuning import write_bert, write_text, write_tokenizer

Row = results.Row


@pytest.fixture
def refused(options: list[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a check that a command line is refused in one sentence, and that nothing was trained."""

    def trained(*_: Any) -> None:
        raise AssertionError("a run was begun")

    monkeypatch.setattr(finetune, "train_apart", trained)

    def check(match: str, *more: str) -> None:
        with pytest.raises((ValueError, OSError, ModuleNotFoundError), match=match) as caught:
            finetune.main([*options, *more])
        assert "\n" not in str(caught.value)

    return check


def test_bad_input_is_refused_before_training(tmp_path: Path, refused: Callable[..., None]) -> None:
    refused(r"--model .*void: no such folder; give", "--model", str(tmp_path / "void"))
    (tmp_path / "hollow").mkdir()
    refused(r"--model .*hollow: has no config\.json", "--model", str(tmp_path / "hollow"))
    bare = write_bert(tmp_path / "bare")
    (bare / "model.safetensors").unlink()
    refused(r"--model .*bare: has no weights .*; download them", "--model", str(bare))
    refused(r"has no column 'text' but 'sentence', 'label'; name its columns", "--text-column", "text")
    one = tmp_path / "one.tsv"
    one.write_text("sentence\tlabel\n" + "".join(f"film {'cast ' * i}\tgood\n" for i in range(60)))
    refused(r"one\.tsv: every example has the label 'good'; give a file of two", "--data", str(one))
    large = write_tokenizer(tmp_path / "large", more=9)
    words = tmp_path / "words.tsv"
    words.write_text("sentence\tlabel\n" + "".join(f"more8 {'cast ' * i}\t{i % 2}\n" for i in range(60)))
    refused(
        r"--tokenizer .*large: token id 23 is outside the vocabulary of --model .*bert, 15",
        "--tokenizer",
        str(large),
        "--data",
        str(words),
    )
    refused(r"--max-length 25: --model .* takes 24 tokens at most", "--max-length", "25")
    refused(r"^--optimizers: unknown optimizer 'sgd': choose adamw", "--optimizers", "adamw", "sgd")
    refused(r"^--recipes: unknown recipe 'all': choose from head", "--recipes", "all")
    refused(r"examples leave none to train on after 70", "--validation", "70")
    refused(r"--sweep: preset 'glue' has no grid for recipe 'matrices'; give", *_glue_sweep())
    refused(r"--device cuda:7: PyTorch sees no such device", "--device", "cuda:7")
    (tmp_path / "file").write_text("")
    refused(r"--out .*file/out: cannot be written .*; give another folder", "--out", str(tmp_path / "file" / "out"))
    (tmp_path / "out").mkdir(exist_ok=True)
    (tmp_path / "out" / "results.json").write_text('{"format": "another"}')
    refused(r"has the format 'another', and this version reads")


def test_parts_that_are_missing_or_of_another_model_are_refused_before_training(
    tmp_path: Path, refused: Callable[..., None]
) -> None:
    few = write_bert(tmp_path / "few", vocab_size=3000)
    few_refused = r"--tokenizer .*few: has 15 token ids, and the embedding of --model .*few 3,000 rows; give the"
    refused(few_refused, "--model", str(few))
    many = str(write_tokenizer(tmp_path / "many", more=500))
    refused(r"--tokenizer .*many: has 515 token ids, and the embedding .*bert 15 rows; give", "--tokenizer", many)
    model = tmp_path / "bert"
    (model / "model.safetensors").unlink()
    named = {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}
    (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": named}))
    (model / "model-1-of-2.safetensors").write_text("")
    refused(r"--model .*bert: lacks model-2-of-2\.safetensors, one of 1 missing of the 2 files .*; download them")


def _glue_sweep() -> list[str]:
    return ["--preset", "glue", "--task", "sst2", "--sweep", "--recipes", "matrices", "--test", "20"]


def test_bad_data_and_sizes_are_refused_before_training(tmp_path: Path, refused: Callable[..., None]) -> None:
    def lines(
        name: str, label: Callable[[int], Any], text: Callable[[int], Any] = lambda i: f"film {'cast ' * i}"
    ) -> str:
        rows = [json.dumps({"sentence": text(i), "label": label(i)}) for i in range(60)]
        (tmp_path / name).write_text("\n".join(rows))
        return str(tmp_path / name)

    null = lines("null.jsonl", lambda i: i % 2 if i else None)
    refused(r"null\.jsonl: line 1 has None in column 'label'; give a text or a number", "--data", null)
    nan = lines("nan.jsonl", lambda i: i % 2 if i != 7 else float("nan"))
    refused(r"nan\.jsonl: line 8 has nan in column 'label'", "--data", nan)
    nested = lines("nested.jsonl", lambda i: i % 2, lambda i: {"text": i})
    refused(r"nested\.jsonl: line 1 has {'text': 0} in column 'sentence'", "--data", nested)
    one, two = lines("one.jsonl", lambda i: 0), lines("two.jsonl", lambda i: i % 2)
    refused(r"--test-data .*one\.jsonl: every example has the label '0'; give", "--data", two, "--test-data", one)
    strange = lines("strange.jsonl", lambda i: i % 2, lambda i: f"Satz {i} in fremder Sprache")
    refused(r"--tokenizer .*bert: does not know [5-9]\d % of the tokens of --data; give", "--data", strange)
    refused(r"--max-length 2: the tokenizer's 2 special tokens leave no room .* at least 3", "--max-length", "2")
    text = str(write_text(tmp_path / "text.txt"))
    refused(r"--max-length 1: leaves no token to predict; give at least 2",
            "--kind", "text", "--data", text, "--max-length", "1")  # fmt: skip
    refused(r"--threads 100000: this machine has \d+ cores; give at most", "--threads", "100000")
    refused(r"--record .*: is a folder; name a file in it", "--record", str(tmp_path))
    (tmp_path / "file").write_text("")
    refused(
        r"--record .*file/r\.json: cannot be written .*; give another", "--record", str(tmp_path / "file/r.json")
    )
    config = tmp_path / "bert" / "config.json"
    config.write_text(json.dumps({"model_type": "vit"}))
    refused(r"--model .*bert: is no model of text, vit; give one that has a vocabulary")


def test_no_room_on_the_disk(refused: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    full = type("Usage", (), {"free": 1_000_000})()
    monkeypatch.setattr(places.shutil, "disk_usage", lambda path: full)
    refused(r"--out .*out: 1\.0 MB are free and results take up to 10 MB; make room")


def test_a_preset_without_its_data_says_how_to_get_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        FileNotFoundError, match=r"--model build/.*: is not there yet; run python -m .*fetch reviews"
    ):
        finetune.main(["--recipes", "full", "--out", str(tmp_path / "out")])
    with pytest.raises(ValueError, match=r"--model: preset 'glue' names none; give a folder"):
        finetune.main(["--preset", "glue", "--task", "rte", "--out", str(tmp_path / "out")])


@pytest.mark.parametrize(
    "line",
    [["--lr", "0"], ["--lr", "nan"], ["--lr", "inf"], ["--batch", "0"], ["--warmup", "2"], ["--grad-clip", "-1"]],
    ids=" ".join,
)
def test_numbers_out_of_range(line: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        finetune.parse(line)
    assert f"argument {line[0]}: {line[1]!r}: give a " in capsys.readouterr().err
