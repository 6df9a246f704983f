"""The report finds pages and pictures that are stale, and refuses what it cannot read by name."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from bench.common import sources
from bench.report import markdown, optimizers, plots, rows
from bench.report.__main__ import main, make
from bench.report.rows import Run
from tests.support.made_up_rows import CPU, GPU, MAKERS, optimizer_rows
from tests.support.reports import checkout, record, report


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a checkout with results and their pages, to be copied before it is changed."""
    folder = checkout(tmp_path_factory.mktemp("reported"))
    record(folder, "quality", CPU)
    record(folder, "optimizers", CPU)
    assert report(folder, "--check") == 1  # nothing is written yet
    assert report(folder) == 0
    return folder


def tamper_row(place: Path) -> None:
    path = place / "results" / "optimizers_abacus-3000.json"
    content = json.loads(path.read_text())
    row = next(r for r in content["rows"] if r["metric"] == "step_time" and not r["clipped"])
    row["median"] *= 3
    path.write_text(json.dumps(content))


def tamper_page(place: Path) -> None:
    path = place / "docs" / "quality_runs.md"
    path.write_text(path.read_text().replace("1.570 ± 0.010", "1.470 ± 0.010"))


def tamper_block(place: Path) -> None:
    path = place / "README.md"
    path.write_text(path.read_text().replace("1.570 ± 0.010", "1.470 ± 0.010"))


def tamper_picture(place: Path) -> None:
    path = place / "docs" / "images" / "losses_cpu.svg"
    path.write_text(re.sub("drawn from .{8}", "drawn from 00000000", path.read_text()))


TAMPERED = {
    "steps_abacus-3000.svg: drawn from other rows": tamper_row,
    r"quality_runs.md:\d+: not what the results say": tamper_page,
    r"README.md:\d+: not what the results say": tamper_block,
    "losses_cpu.svg: drawn from other rows": tamper_picture,
    "losses_cpu.svg: missing": lambda place: (place / "docs" / "images" / "losses_cpu.svg").unlink(),
    "performance.md: missing": lambda place: (place / "docs" / "performance.md").unlink(),
    "losses_cpu.svg: shown nowhere": lambda place: (place / "results" / "quality_abacus-3000.json").unlink(),
    r"performance_optimizers.md:\d+: not what": lambda place: record(place, "optimizers", GPU),
}


def test_a_fresh_report_is_not_written_again(reported: Path) -> None:
    assert report(reported, "--check") == 0
    before = {path: path.read_bytes() for path in reported.rglob("*.*") if path.is_file()}
    assert report(reported) == 0
    assert {path: path.read_bytes() for path in reported.rglob("*.*") if path.is_file()} == before


@pytest.mark.parametrize("message", TAMPERED)
def test_check_finds_stale_pages(
    reported: Path, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = shutil.copytree(reported, tmp_path / "place")
    assert report(place, "--check") == 0
    capsys.readouterr()
    TAMPERED[message](place)
    assert report(place, "--check") == 1
    errors = capsys.readouterr().err
    assert re.search(message, errors)
    assert "run `python -m bench.report`" in errors
    assert report(place) == 0
    assert report(place, "--check") == 0


def test_equal_rows_give_equal_pictures(tmp_path: Path) -> None:
    plot = plots.Plot("a", "steps", optimizers.step_panels([rows.Run("f", "optimizers", "d", optimizer_rows(CPU))]))
    for name in ("one.svg", "two.svg"):
        plots.draw(plot, tmp_path / name)
    one, two = ((tmp_path / name).read_bytes() for name in ("one.svg", "two.svg"))
    assert one == two
    assert plots.digest_in(tmp_path / "one.svg") == plot.digest
    assert plot._replace(data=plot.data[:1]).digest != plot.digest


def test_unknown_pictures_are_left_alone(place: Path) -> None:
    other = place / "docs" / "images" / "logo.svg"
    other.parent.mkdir()
    other.write_text("<svg/>")
    report(place)
    assert other.exists()
    assert report(place, "--check") == 0


@pytest.mark.parametrize("arguments", [(), ("--check",)])
def test_unknown_format_is_refused_by_name(
    place: Path, arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "results" / "odd.json").write_text(
        '{"format": "gwt_kernels results 99", "benchmark": "x", "rows": []}'
    )
    assert report(place, *arguments) == 1
    errors = capsys.readouterr().err
    assert "odd.json" in errors
    assert "gwt_kernels results 99" in errors
    assert not (place / "docs" / "performance.md").exists()


@pytest.mark.parametrize("benchmark", MAKERS)
def test_a_row_without_a_column_is_refused_by_name(benchmark: str, tmp_path: Path) -> None:
    """Check that the report raises or works without the column."""
    place = checkout(tmp_path)
    path = record(place, benchmark, CPU)
    content = json.loads(path.read_text())
    said = {}
    for column in dict.fromkeys(column for row in content["rows"] for column in row):
        short = [{key: value for key, value in row.items() if key != column} for row in content["rows"]]
        path.write_text(json.dumps(content | {"rows": short}))
        try:
            make(place / "results", place)
        except ValueError as error:
            said[column] = str(error)
    assert said or benchmark == "gpu"
    assert all(words.startswith(f"{path.name}: a row lacks {column!r}") for column, words in said.items())


def test_missing_folders_are_refused_by_name(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Check that pages are not rewritten as if nothing had been measured."""
    before = (place / "README.md").read_text()
    assert main(["--results", str(place / "typo"), "--root", str(place)]) == 1
    assert "there is no folder" in (said := capsys.readouterr().err)
    assert "typo" in said
    assert (place / "README.md").read_text() == before
    assert main(["--results", str(place / "results"), "--root", str(place / "nowhere")]) == 1
    assert "nowhere" in capsys.readouterr().err


def test_unknown_block_is_refused_by_name(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "docs" / "traps.md").write_text("<!-- mistyped -->\n<!-- /mistyped -->\n")
    assert report(place) == 1
    assert "mistyped" in capsys.readouterr().err


def test_a_run_with_changed_sources_is_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check marks of changed sources, and of steps in C without a digest; other benchmarks have none."""
    now = sources.digest("compiled")
    assert now == sources.digest("compiled") != sources.digest("torch")

    def said(benchmark: str = "optimizers", **row: str | None) -> str:
        own = {"own_backend": "compiled", "date": "2026", "commit": "abc"} | row
        return markdown.setting(Run("file", benchmark, "device", [own]))

    assert "changed since" not in said(sources=now)
    assert "changed since" in said(sources="another")
    assert "changed since" in said()
    assert "changed since" not in said(own_backend="triton")
    assert "changed since" in said(own_backend="triton", sources=now)
    assert "changed since" not in said(benchmark="host", sources="another")
    monkeypatch.setattr(sources, "PACKAGE", sources.PACKAGE / "absent")
    with pytest.raises(FileNotFoundError, match=r"no backends/cpu/\*\.c or .*\*\.h.* in .*absent"):
        said(sources=now)


def test_digest_covers_all_compiled_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "backends" / "cpu"
    folder.mkdir(parents=True)
    monkeypatch.setattr(sources, "PACKAGE", tmp_path)
    seen = set()
    for name in ("step.c", "step.h", "level.inc"):
        for text in ("one", "two"):
            (folder / name).write_text(text)
            seen.add(sources.digest("compiled"))
    assert len(seen) == 6
