"""Labelled examples: every format is read, splits are disjoint, and unusable files are refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.finetune.examples import Columns, Example, labels_of, read_examples
from bench.finetune.models import load_tokenizer
from bench.finetune.tasks import Sizes, load_classification
from tests.support.finetuning import sentences, write_bert, write_json_lines, write_tokenizer, write_tsv

COLUMNS = Columns("sentence", None, "label")


def test_formats_hold_the_same_examples(tmp_path: Path) -> None:
    expected = [Example(text, None, label) for text, label in sentences(30)]
    assert read_examples(write_tsv(tmp_path / "a.tsv", 30), COLUMNS) == expected
    assert read_examples(write_json_lines(tmp_path / "a.jsonl", 30), Columns("text", None, "label")) == expected
    numbered = tmp_path / "numbered.tsv"
    numbered.write_text("".join(f"x\t{label}\t*\t{text}\r\n" for text, label in sentences(30)))
    assert read_examples(numbered, Columns("3", None, "1")) == expected


def test_quotes_and_odd_line_ends_stay_in_texts(tmp_path: Path) -> None:
    path = tmp_path / "quoted.tsv"
    path.write_bytes('\ufeffsentence\tlabel\n"so it begins\tgood\nno\r "\x85end \tbad\n'.encode())
    assert [example.text for example in read_examples(path, COLUMNS)] == ['"so it begins', 'no\r "\x85end']


def test_pairs(tmp_path: Path) -> None:
    path = tmp_path / "pairs.tsv"
    path.write_text("Quality\t#1 String\t#2 String\n1\ta film\ta story\n0\ta film\ta plot\n")
    found = read_examples(path, Columns("#1 String", "#2 String", "Quality"))
    assert found == [Example("a film", "a story", "1"), Example("a film", "a plot", "0")]


def test_rated_sentences_take_the_sign_and_leave_the_neutral_out(tmp_path: Path) -> None:
    path = tmp_path / "some.rated"
    path.write_text(
        "1\t2.3\tfine film\r\n2\t-0.4\tso so\r\n3\t-1.5\tdull\twith a tab\r\n4\t0.5\tneutral\r\n5\t0.51\tjust so"
    )
    found = read_examples(path, COLUMNS)
    assert [(e.text, e.label) for e in found] == [
        ("fine film", "positive"),
        ("dull\twith a tab", "negative"),
        ("just so", "positive"),
    ]


def test_repeated_texts_count_once(tmp_path: Path) -> None:
    path = tmp_path / "twice.tsv"
    path.write_text("sentence\tlabel\nfine film\tgood\ndull plot\tbad\nfine film\tbad\n")
    assert [(e.text, e.label) for e in read_examples(path, COLUMNS)] == [
        ("fine film", "good"),
        ("dull plot", "bad"),
    ]


def test_labels_in_order() -> None:
    def of(*labels: str) -> list[Example]:
        return [Example(str(i), None, label) for i, label in enumerate(labels * 20)]

    assert labels_of(of("10", "9", "1"), "x") == ["1", "9", "10"]
    assert labels_of(of("pos", "neg"), "x") == ["neg", "pos"]


UNUSABLE = {
    "absent.tsv": (None, r"--data .*absent\.tsv: no such file; give a TSV"),
    "empty.tsv": ("sentence\tlabel\n", r"empty\.tsv: holds no examples; give a file"),
    "void.tsv": ("", r"void\.tsv: has no column 'sentence' but none; name"),
    "other.tsv": (
        "text\tlabel\na\tb\n",
        r"other\.tsv: has no column 'sentence' but 'text', 'label'; .*--text-column",
    ),
    "short.tsv": (
        "sentence\tlabel\na film\tgood\na story\n",
        r"short\.tsv: line 3 has 1 columns, .*; mend the line",
    ),
    "bare.tsv": ("sentence\tlabel\na film\t\n", r"bare\.tsv: line 2 has an empty label; mend"),
    "blank.tsv": ("sentence\tlabel\n \tgood\n", r"blank\.tsv: line 2 has an empty text; mend"),
    "other.jsonl": ('{"text": "a", "label": 1}\n', r"other\.jsonl: has no column 'sentence' but 'text', 'label'"),
    "broken.jsonl": (
        '{"sentence": "a", "label": 1}\n{"sen',
        r"broken\.jsonl: line 2 is not JSON .*one object a line",
    ),
    "deep.jsonl": ("[" * 100_000 + "\n", r"deep\.jsonl: line 1 is not JSON .*one object a line"),
    "list.jsonl": ("[1, 2]\n", r"list\.jsonl: line 1 is no JSON object; give one object a line"),
    "words.rated": ("1\tgood\ta film\n", r"words\.rated: line 1 is not number, mean and sentence"),
    "table.csv": ("sentence,label\n", r"table\.csv: unknown ending '\.csv'; give one of \.tsv"),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_unusable_files_are_refused_in_one_sentence(tmp_path: Path, name: str) -> None:
    content, message = UNUSABLE[name]
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        read_examples(tmp_path / name, COLUMNS)
    assert "\n" not in str(caught.value)


def test_bytes_and_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "latin.tsv").write_bytes("sentence\tlabel\nñandú\tgood\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.tsv: is no UTF-8 text .*convert it"):
        read_examples(tmp_path / "latin.tsv", COLUMNS)
    with pytest.raises(ValueError, match=r"is a folder; name the file of examples in it"):
        read_examples(tmp_path, COLUMNS)


def test_one_label_and_labels_that_are_none() -> None:
    with pytest.raises(
        ValueError, match=r"--data x: every example has the label 'good'; give a file of two labels"
    ):
        labels_of([Example(str(i), None, "good") for i in range(9)], "--data x")
    with pytest.raises(ValueError, match=r"--data x: 9 labels for 9 examples; name the column .*--label-column"):
        labels_of([Example(str(i), None, str(i)) for i in range(9)], "--data x")


# Splits


def test_parts_are_apart_and_do_not_depend_on_how_many_train(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_tokenizer(tmp_path / "words"))
    data = write_tsv(tmp_path / "a.tsv")

    def parts(examples: int | None) -> dict[str, list[tuple[list[int], int]]]:
        return load_classification(data, None, COLUMNS, tokenizer, Sizes(examples, 12, 20, 16)).parts

    few, all_of_them = parts(30), parts(None)
    assert (len(few["train"]), len(all_of_them["train"])) == (30, 48)
    assert few["train"] == all_of_them["train"][:30]
    assert few["validation"] == all_of_them["validation"]
    assert few["test"] == all_of_them["test"]
    ids = [str(ids) for part in all_of_them.values() for ids, _ in part]
    assert len(set(ids)) == len(ids) == 80
    assert all({label for _, label in part} == {0, 1} for part in all_of_them.values())


def test_what_is_tested_on_is_not_trained_on(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_tokenizer(tmp_path / "words"))
    lines = write_tsv(tmp_path / "train.tsv").read_text().splitlines()
    (tmp_path / "dev.tsv").write_text("\n".join([lines[0], *lines[41:]]))
    sizes = Sizes(None, 10, 100, 16)
    task = load_classification(tmp_path / "train.tsv", tmp_path / "dev.tsv", COLUMNS, tokenizer, sizes)
    assert {name: len(part) for name, part in task.parts.items()} == {"train": 30, "validation": 10, "test": 40}
    (tmp_path / "dev.tsv").write_text("sentence\tlabel\nfine film\tgood\ndull film\tterrible\n")
    with pytest.raises(ValueError, match=r"--test-data .*dev\.tsv: the label 'terrible' is none of bad, good in"):
        load_classification(tmp_path / "train.tsv", tmp_path / "dev.tsv", COLUMNS, tokenizer, sizes)


def test_too_few_examples(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_bert(tmp_path / "bert"))
    data = write_tsv(tmp_path / "a.tsv")
    with pytest.raises(ValueError, match=r"a\.tsv: 80 examples leave none to train on after 40 .*lower these"):
        load_classification(data, None, COLUMNS, tokenizer, Sizes(None, 40, 60, 16))
