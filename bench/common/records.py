"""Files of raw results: one format for every benchmark, written atomically, checked when read."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock

RESULTS = Path(__file__).parents[1] / "results"

FORMAT = "gwt_kernels results 1"
"""A JSON object of `format`, `benchmark` and `rows`; a row is one measurement and its full description."""


def read(path: Path) -> tuple[str, list[dict[str, Any]]]:
    """Return the benchmark that a file belongs to, and its rows.

    Raises:
        ValueError: the file is no record, or has a format that this version cannot read.
    """
    try:
        content = json.loads(path.read_text())
    except (RecursionError, ValueError) as error:  # no JSON, nested without end, or no text
        raise ValueError(f"{path} is not JSON ({error}): delete it, or restore it from version control") from error
    found = content.get("format") if isinstance(content, dict) else None
    if found != FORMAT:
        raise ValueError(
            f"{path} has the format {found!r}, and this version reads {FORMAT!r}: measure again, or move it away"
        )
    benchmark, rows = content.get("benchmark"), content.get("rows")
    if not isinstance(benchmark, str) or not isinstance(rows, list) or not all(isinstance(x, dict) for x in rows):
        raise ValueError(f"{path} names no benchmark, or holds no list of rows: restore it from version control")
    return benchmark, rows


def rows_of(path: Path, benchmark: str) -> list[dict[str, Any]]:
    """Return the rows of a record of `benchmark`; an empty list if there is no file.

    Raises:
        ValueError: the file is no record, or one of another benchmark.
    """
    if not path.exists():
        return []
    found, rows = read(path)
    if found != benchmark:
        raise ValueError(f"{path} is a record of {found!r}, not of {benchmark!r}: give another file")
    return rows


def append(
    path: Path,
    benchmark: str,
    rows: Sequence[dict[str, Any]],
    *,
    keep: Callable[[dict[str, Any]], bool] | None = None,
) -> None:
    """Add rows to a record, or create one; an interruption leaves the old file or the new one.

    Several processes may add to one record. Their lock is a hidden file in the record's folder, since jobs of a
    cluster share no temporary folder.

    Args:
        path: The record.
        benchmark: The benchmark's name.
        rows: The new rows.
        keep: Predicate on old rows: keep this one? None keeps them all.

    Raises:
        ValueError: the file is no record of this benchmark, or a row holds a value that JSON cannot represent.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock")):
        old = [row for row in rows_of(path, benchmark) if keep is None or keep(row)]
        lines = ",\n".join(json.dumps(row, allow_nan=False) for row in [*old, *rows])
        head = json.dumps({"format": FORMAT, "benchmark": benchmark})[:-1]
        partial = path.with_name(path.name + ".partial")
        partial.write_text(f'{head}, "rows": [\n{lines}\n]}}\n')  # one row a line, so that a diff shows rows
        partial.replace(path)


def new_path(benchmark: str, about: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Return the path for a run that starts now, named by benchmark, device and date."""
    device = re.sub(r"[^a-z0-9]+", "-", about["device"].lower()).strip("-")
    stamp = re.sub(r"[^0-9T]", "", about["date"].partition("+")[0])
    return folder / f"{benchmark}_{device}_{stamp}.json"
