"""Labelled examples from files: TSV, JSON lines or rated sentences, checked before anything is trained."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

NEUTRAL = 0.5
"""Rated sentences whose mean rating, from -4 to 4, is at most this far from 0 have no label and are left out."""


class Columns(NamedTuple):
    """The columns of a file's texts and labels: names, or numbers from 0 if a TSV file has no header."""

    text: str
    pair: str | None
    label: str

    @property
    def wanted(self) -> list[str]:
        """The columns in the order of an example's parts."""
        return [self.text, *([self.pair] if self.pair else []), self.label]

    @property
    def numbered(self) -> bool:
        """Whether the columns are numbers, as for a file without a header."""
        return all(name.isdigit() for name in self.wanted)


class Example(NamedTuple):
    """One text, or two that belong together, and its label."""

    text: str
    pair: str | None
    label: str


def read_examples(path: Path, columns: Columns, option: str = "--data") -> list[Example]:
    """Return the distinct examples of a file in its order; of a repeated text, the first example is kept.

    Args:
        path: TSV (`.tsv`, `.txt`), JSON lines (`.jsonl`, `.json`), or rated sentences (`.rated`).
        columns: The columns of texts and labels; rated sentences ignore them.
        option: The option that named the file, for messages.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It has no examples, other columns, or a line that cannot be read.
    """
    readers = {".tsv": _tsv, ".txt": _tsv, ".jsonl": _json_lines, ".json": _json_lines, ".rated": _rated}
    where = f"{option} {path}"
    if path.is_dir():
        raise ValueError(f"{where}: is a folder; name the file of examples in it")
    if not path.is_file():
        raise FileNotFoundError(f"{where}: no such file; give a TSV file or JSON lines")
    if path.suffix not in readers:
        raise ValueError(f"{where}: unknown ending {path.suffix!r}; give one of {', '.join(readers)}")
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")  # texts may hold other line ends
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: is no UTF-8 text ({error.reason}); convert it") from error
    found: dict[tuple[str, str | None], Example] = {}
    for example in readers[path.suffix](lines, columns, where):
        found.setdefault((example.text, example.pair), example)
    if not found:
        raise ValueError(f"{where}: holds no examples; give a file that does")
    return list(found.values())


def labels_of(examples: list[Example], where: str) -> list[str]:
    """Return the labels in order, numbers by their value.

    Raises:
        ValueError: There is only one label, or more than one label per four examples.
    """
    labels = sorted({example.label for example in examples}, key=lambda label: (len(label), label))
    if len(labels) < 2:
        raise ValueError(f"{where}: every example has the label {labels[0]!r}; give a file of two labels or more")
    if len(labels) > max(2, len(examples) // 4):
        raise ValueError(
            f"{where}: {len(labels)} labels for {len(examples)} examples; "
            "name the column of them with --label-column"
        )
    return labels


def shuffled(examples: list[Example]) -> list[Example]:
    """Return the examples in the order of their hashes: mixed, and the same on every machine."""
    return sorted(examples, key=lambda example: hashlib.sha256("\t".join(map(str, example)).encode()).digest())


def digest_of(examples: list[Example]) -> str:
    """Return a digest of the examples in their order."""
    return hashlib.sha256(json.dumps(examples).encode()).hexdigest()[:16]


def _tsv(lines: list[str], columns: Columns, where: str) -> Iterator[Example]:
    rows = (line.rstrip("\r").split("\t") for line in lines if line.strip())
    names = None if columns.numbered else next(rows, [])
    places = [int(name) if names is None else _place(name, names, where) for name in columns.wanted]
    for number, row in enumerate(rows, 1 if names is None else 2):
        if max(places) >= len(row):
            raise ValueError(
                f"{where}: line {number} has {len(row)} columns, and column {max(places)} (from 0) is needed; "
                "mend the line, or name other columns with --text-column, --pair-column and --label-column"
            )
        yield _example([row[place] for place in places], number, where)


def _place(name: str, names: list[str], where: str) -> int:
    if name not in names:
        raise ValueError(_other_columns(name, names, where))
    return names.index(name)


def _other_columns(name: str, names: list[str], where: str) -> str:
    return (
        f"{where}: has no column {name!r} but {', '.join(map(repr, names[:12])) or 'none'}; "
        "name its columns with --text-column, --pair-column and --label-column"
    )


def _json_lines(lines: list[str], columns: Columns, where: str) -> Iterator[Example]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except (RecursionError, ValueError) as error:  # no JSON, or nested without end
            raise ValueError(f"{where}: line {number} is not JSON ({error}); give one object a line") from error
        if not isinstance(fields, dict):
            raise ValueError(f"{where}: line {number} is no JSON object; give one object a line")
        for name in columns.wanted:
            if name not in fields:
                raise ValueError(f"{_other_columns(name, list(fields), where)} (line {number})")
        for name in columns.wanted:
            if not isinstance(fields[name], str | int | float) or fields[name] != fields[name]:
                raise ValueError(
                    f"{where}: line {number} has {fields[name]!r:.40} in column {name!r}; give a text or a number"
                )
        yield _example([str(fields[name]) for name in columns.wanted], number, where)


def _rated(lines: list[str], columns: Columns, where: str) -> Iterator[Example]:
    """Yield examples from lines of number, mean rating and sentence; the sign of the mean is the label."""
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            _, mean, text = line.rstrip("\r").split("\t", 2)
            rating = float(mean)
        except ValueError as error:
            raise ValueError(
                f"{where}: line {number} is not number, mean and sentence with tabs between them; give such a file"
            ) from error
        if abs(rating) > NEUTRAL:
            yield Example(text, None, "positive" if rating > 0 else "negative")


def _example(parts: list[str], number: int, where: str) -> Example:
    text, *pair, label = (part.strip() for part in parts)
    if not text or not label:
        raise ValueError(
            f"{where}: line {number} has an empty {'label' if text else 'text'}; mend or delete the line"
        )
    return Example(text, pair[0] if pair else None, label)
