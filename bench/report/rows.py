"""Reader of a folder of raw results, in the order in which the pages show them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench.common import records

Row = dict[str, Any]

MEASURED = ("metric", "unit", "median", "p20", "p80", "samples", "note")
ORIGIN = (
    *("commit", "date", "command", "device", "driver", "threads", "own_backend", "sources"),
    *("python", "torch", "triton"),
)


class _FromFile(dict[str, Any]):
    """A row whose error for a missing column names its file."""

    def __init__(self, row: Row, file: str) -> None:
        super().__init__(row)
        self.file = file

    def __missing__(self, column: str) -> Any:
        raise ValueError(
            f"{self.file}: a row lacks {column!r}, which the pages show: measure again, or move the file away"
        )


class Run(NamedTuple):
    """The rows of one file that come from one device."""

    file: str
    benchmark: str
    device: str
    rows: list[Row]

    @property
    def date(self) -> str:
        """Return the time of its last row; empty if no row has one."""
        return max(row.get("date") or "" for row in self.rows)

    @property
    def is_of_other_rules(self) -> bool:
        """Return whether it is a separate run of Muon, Adafactor and Lion (`bench.optimizers.rules`)."""
        return {row.get("peer") for row in self.rows if row.get("optimizer")} == {"rules"}

    @property
    def cuda(self) -> bool:
        """Return whether the device is a GPU: `bench.common.measure.facts` records a driver for each."""
        return any(row.get("driver") not in (None, "none") for row in self.rows)


class Case(NamedTuple):
    """One timed case, described by the benchmark's own columns, and its rows by metric."""

    what: dict[str, Any]
    metrics: dict[str, Row]
    note: str

    def median(self, metric: str) -> float | None:
        """Return the median of a metric, or None if it was not measured."""
        row = self.metrics.get(metric)
        return None if row is None else row["median"]


def load(folder: Path) -> list[Run]:
    """Return every run in a folder, newest first.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: a file is no record, or has a format that this version cannot read; the message names it.
            A row that lacks a column raises it when the column is read.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}: --results names one of raw results")
    runs = []
    for path in sorted(folder.glob("*.json")):
        benchmark, rows = records.read(path)
        split: dict[str, list[Row]] = {}
        for row in rows:
            split.setdefault(str(row.get("device")), []).append(_FromFile(row, path.name))
        runs += [Run(path.name, benchmark, device, own) for device, own in split.items()]
    return sorted(runs, key=lambda run: (run.date, run.file), reverse=True)


def of(runs: Iterable[Run], benchmark: str) -> list[Run]:
    """Return the runs of one benchmark."""
    return [run for run in runs if run.benchmark == benchmark]


def by_device(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Sort runs by device, GPUs first; within a device the order is kept."""
    devices = dict.fromkeys(run.device for run in sorted(runs, key=lambda run: not run.cuda))
    return {device: [run for run in runs if run.device == device] for device in devices}


def cases(rows: Iterable[Row]) -> list[Case]:
    """Group rows by case; of two rows for one metric the later one counts."""
    found: dict[str, Case] = {}
    for row in rows:
        what = {k: v for k, v in row.items() if k not in MEASURED and k not in ORIGIN and not isinstance(v, float)}
        if isinstance(row, _FromFile):
            what = _FromFile(what, row.file)
        case = found.setdefault(repr(what), Case(what, {}, row.get("note") or ""))
        if row.get("median") is not None:
            case.metrics[row["metric"]] = row
    return list(found.values())


def telling_columns(found: Sequence[Case], always: Sequence[str], never: Sequence[str] = ()) -> list[str]:
    """Return the columns to show: those in `always`, and the others needed to tell the cases apart.

    A new column of a benchmark thus never merges two of its cases.
    """
    shown = list(always)
    others = dict.fromkeys(key for case in found for key in case.what if key not in (*always, *never))
    for key in others:
        if _distinct(found, [*shown, key]) > _distinct(found, shown):
            shown.append(key)
    return shown


def _distinct(found: Sequence[Case], columns: Sequence[str]) -> int:
    return len({repr([case.what.get(column) for column in columns]) for case in found})
