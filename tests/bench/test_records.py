"""Raw results: rows are read back, an interrupted write loses nothing, an unknown file is refused by name."""

from __future__ import annotations

import json
import multiprocessing
import tempfile
from pathlib import Path

import pytest

from bench.common import records

ABOUT = {"device": "NVIDIA H100 80GB HBM3", "date": "2026-01-02T03:04:05+00:00"}


def test_rows_are_read_back_in_order_one_per_line(tmp_path):
    path = tmp_path / "new" / "kernels.json"
    records.append(path, "kernels", [{"a": 1}, {"a": 2}])
    records.append(path, "kernels", [{"a": None}])
    assert records.read(path) == ("kernels", [{"a": 1}, {"a": 2}, {"a": None}])
    assert [line for line in path.read_text().splitlines() if line.startswith('{"a"')] == [
        '{"a": 1},',
        '{"a": 2},',
        '{"a": null}',
    ]


def test_a_missing_file_has_no_rows(tmp_path):
    assert records.rows_of(tmp_path / "none.json", "kernels") == []


def test_a_row_that_json_cannot_represent_changes_nothing(tmp_path):
    path = tmp_path / "r.json"
    records.append(path, "kernels", [{"a": 1}])
    with pytest.raises(ValueError, match="JSON"):
        records.append(path, "kernels", [{"a": float("nan")}])
    assert records.rows_of(path, "kernels") == [{"a": 1}]


KNOWN = f'"format": "{records.FORMAT}"'


@pytest.mark.parametrize(
    "content",
    [
        *("[]", '{"rows": []}', '{"format": "gwt_kernels results 2"}', "{", "3"),
        *(f'{{{KNOWN}, "rows": []}}', f'{{{KNOWN}, "benchmark": "kernels"}}'),
        *(f'{{{KNOWN}, "benchmark": {rest}}}' for rest in ('["kernels"], "rows": []', '"kernels", "rows": [3]')),
        f'{{{KNOWN}, "benchmark": "kernels", "rows": {{"a": 1}}}}',
        pytest.param("[" * 100_000, id="nested without end"),
    ],
)
def test_a_file_of_unknown_format_is_refused_by_name(tmp_path, content):
    path = tmp_path / "strange.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"strange\.json"):
        records.read(path)
    with pytest.raises(ValueError, match=r"strange\.json"):
        records.append(path, "kernels", [])
    assert path.read_text() == content


def test_a_record_of_another_benchmark_is_refused(tmp_path):
    path = tmp_path / "r.json"
    records.append(path, "kernels", [])
    with pytest.raises(ValueError, match="'kernels', not of 'sweep'"):
        records.append(path, "sweep", [])


def _add(path: Path, number: int) -> None:
    """Add rows with a separate temporary folder, as in jobs of a cluster."""
    tempfile.tempdir = str(path.parent / f"tmp{number}")
    Path(tempfile.tempdir).mkdir()
    for k in range(10):
        records.append(path, "sweep", [{"writer": number, "k": k}])


def test_concurrent_writers_lose_nothing(tmp_path):
    path = tmp_path / "shared.json"
    writers = [multiprocessing.get_context("fork").Process(target=_add, args=(path, i)) for i in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    rows = records.rows_of(path, "sweep")
    assert sorted((row["writer"], row["k"]) for row in rows) == [(i, k) for i in range(3) for k in range(10)]


def test_names_of_files(tmp_path):
    path = records.new_path("kernels", ABOUT, tmp_path)
    assert path == tmp_path / "kernels_nvidia-h100-80gb-hbm3_20260102T030405.json"


@pytest.mark.parametrize("path", sorted(records.RESULTS.glob("*.json")), ids=lambda path: path.name)
def test_every_committed_result_is_readable(path):
    benchmark, rows = records.read(path)
    assert benchmark
    assert rows
    assert json.dumps(rows)
