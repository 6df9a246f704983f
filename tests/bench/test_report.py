"""The report: pages show the rows, stale pages are found, and unreadable results are refused by name."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from bench.common import records, sources
from bench.report import blocks, comparisons, markdown, optimizers, plots, quality, rows
from bench.report.__main__ import GENERATED, main
from bench.report.rows import Run
from tests.support.made_up_rows import CPU, ENDS, GPU, MAKERS, Row, measured, optimizer_rows, quality_rows

README = """# Made up

<!-- speed -->
<!-- /speed -->

Words between the blocks.

<!-- tradeoff -->
old
<!-- /tradeoff -->
"""


def checkout(folder: Path) -> Path:
    """Create a checkout without results."""
    (folder / "docs").mkdir()
    (folder / "results").mkdir()
    (folder / "README.md").write_text(README)
    (folder / "docs" / "traps.md").write_text(
        "<!-- begin -->\n<!-- /begin -->\n\n<!-- tradeoff -->\n<!-- /tradeoff -->"
    )
    return folder


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A checkout without results."""
    return checkout(tmp_path)


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout with results and their pages, to be copied before it is changed."""
    folder = checkout(tmp_path_factory.mktemp("reported"))
    record(folder, "quality", CPU)
    record(folder, "optimizers", CPU)
    assert report(folder, "--check") == 1  # nothing is written yet
    assert report(folder) == 0
    return folder


def record(place: Path, benchmark: str, about: Row, name: str = "") -> Path:
    path = place / "results" / f"{benchmark}_{name or markdown.slug(about['device'])}.json"
    records.append(path, benchmark, MAKERS[benchmark](about))
    return path


def report(place: Path, *arguments: str) -> int:
    return main([*arguments, "--results", str(place / "results"), "--root", str(place)])


def page(place: Path, name: str) -> str:
    return (place / "docs" / name).read_text()


def pages_on_speed(place: Path) -> str:
    return "\n".join(page(place, name) for name in GENERATED if name.startswith("performance"))


def images(place: Path) -> set[str]:
    return {path.stem for path in (place / "docs" / "images").glob("*.svg")}


def test_every_benchmark_is_shown(place: Path) -> None:
    for benchmark in MAKERS:
        record(place, benchmark, CPU)
        if benchmark in ("optimizers", "kernels"):
            record(place, benchmark, GPU)
    assert report(place) == 0
    speed, models = pages_on_speed(place), page(place, "quality.md")
    assert "No GPU was at hand" not in speed
    assert speed.index("## NVIDIA H100") < speed.index("## Abacus 3000")
    assert "| optimizer | weights | step, ms | with clipping, ms | wall, ms |" in speed
    assert (
        "| AdamW(fused=True) | fp32 | 14.0 (12.6–15.4) | 16.8 (15.1–18.5) | 15.4 (13.9–16.9) | 11.2 | 80 % |"
        in speed
    )
    assert "- APOLLO, bf16: apollo_torch is not installed" in speed
    assert "1.75 (target: at least 1.7, met)" in speed
    assert "Copy bandwidth: 3,000 (2,700–3,300) GB/s." in speed
    assert "| 2048x5461 | bf16 | fp32 |" in speed
    assert "- 1 cases: does not fit: needs 20 GiB" in speed
    assert "| GWTAdamW, limiter, re-allocated | 300 | 250 (225–275) |" in speed
    assert "| step | flat | 1 | p 2×128 | p 1×64 2×128 | 77 | 0 | 24 of 64 |" in speed
    assert "| step, foam, split | flat | 2 | p 2×128 |" in speed
    assert (
        "| step | bf16/fp32 | flat | 2 | 28.0 | 10.0 | 1.00 | 1.00 | 7 | 30 % | 100 % | 35 % | bandwidth |" in speed
    )
    row = "| step, foam, stochastic | bf16/fp32 | row,"
    assert f"{row} 5,461 | 2 | 28.0 | 10.0 | 1.24 | 1.00 | 7 | 80 % | 100 % | 125 % | either |" in speed
    assert f"{row} 1,000 | 2 | 28.0 | 10.0 | 1.24 | 1.00 | 7 | 100 % | 58 % | 198 % | issue slots |" in speed
    assert f"{row} 1,000 | 2 | {7 * '4.0 | '}28.0 | 28.5 | 1.25 |" in speed
    assert "132 × 4 × 32 lanes' instructions a cycle" in speed
    assert "| kernels | stopped after 120 s | 90.0 |" in speed
    assert "24 of 32" in speed  # a compute unit's own limit
    assert (
        "| GWT level 2 | 0.03 | 0.1 | - | 3 | 1.570 ± 0.010 | -0.040 | 1,500,000 | 30 % | 3.30 (2.97–3.63) |"
        in models
    )
    assert "- APOLLO: package missing: apollo_torch" in models
    assert re.search(r"\| AdamW \| 9 \| 0\.03 \| 0\.1 \| - \| 1\.510 ± 0\.010 \| 3 \|", models)
    drawn = {"steps_abacus-3000", "steps_nvidia-h100-80gb-hbm3", "state_abacus-3000", "state_nvidia-h100-80gb-hbm3"}
    drawn |= {"state", "roofline_abacus-3000", "roofline_nvidia-h100-80gb-hbm3", "losses_cpu", "sweep-abacus-3000"}
    drawn.add("loss_over_state")
    assert images(place) == drawn
    for name in re.findall(r"\]\(images/(.*?)\.svg\)", speed + models):
        assert name in drawn


def test_blocks_are_filled_and_the_rest_stays(place: Path) -> None:
    record(place, "quality", CPU)
    record(place, "optimizers", GPU)
    assert report(place) == 0
    readme = (place / "README.md").read_text()
    run = "NVIDIA H100 80GB HBM3, LLaMA-7B, GWTAdamW on the `triton` backend, 2026-02-03, commit 0123456789ab"
    assert readme.startswith(f"# Made up\n\n<!-- speed -->\n{run}:\n")
    assert "\n\nWords between the blocks.\n\n" in readme
    assert "old" not in readme
    assert "](docs/images/loss_over_state.svg)" in readme
    assert "](images/loss_over_state.svg)" in page(place, "traps.md")
    assert "| GWT level 2 | 1.570 ± 0.010 |" in readme
    assert "0.86M parameters" in readme
    assert "with clipping" not in readme  # for the page


def test_a_run_without_times_is_shown_and_hides_no_other(place: Path) -> None:
    note = measured("step_time", "s", None, 0, "no device: PyTorch finds no cuda:0 here")
    newer = CPU | {"date": "2026-05-05T05:05:05+00:00", "command": "python -m bench.optimizers --device cuda:0"}
    records.append(place / "results" / "optimizers_none.json", "optimizers", [{"optimizer": None} | note | newer])
    assert report(place) == 0
    assert "Nothing is timed yet" in (place / "README.md").read_text()
    assert "\n\nNot measured: no device: PyTorch finds no cuda:0 here.\n\n" in page(
        place, "performance_optimizers.md"
    )
    record(place, "optimizers", CPU)
    assert report(place) == 0
    assert (
        "LLaMA-7B, 2 threads, 2026-01-02, commit 0123456789ab:\n\n| optimizer |"
        in (place / "README.md").read_text()
    )


def test_a_newer_run_of_other_rules_stands_apart(place: Path) -> None:
    record(place, "optimizers", CPU)
    report(place)
    before, pictures = (place / "README.md").read_text(), images(place)
    newer = CPU | {"date": "2026-05-05T05:05:05+00:00"}
    own = [
        {"peer": "rules", "model": "llama_7b", "optimizer": name, "weights": "float32", "clipped": False}
        | measured("step_time", "s", 1.5)
        | newer
        for name in ("Muon and AdamW(fused=True)", "GWTMuon level 2")
    ]
    records.append(place / "results" / "optimizers_rules.json", "optimizers", own)
    assert report(place) == 0
    assert (place / "README.md").read_text() == before
    assert images(place) == pictures
    text = page(place, "performance_optimizers.md")
    assert "<summary>Muon, Adafactor and Lion, run of 2026-05-05 05:05:05 UTC</summary>" in text
    assert "| GWTMuon level 2 | fp32 | 1,500 |" in text
    assert text.index("AdamW(fused=True) | bf16") < text.index("GWTMuon level 2")


def test_settings_not_from_a_sweep_are_named(place: Path) -> None:
    record(place, "quality", CPU)
    said = "Not the best of a sweep below, so the comparison is not even: "
    report(place)
    assert f"{said}AdamW, APOLLO, GaLore, GWT level 1, GWT level 2, GWT level 3.\n" in page(place, "quality.md")
    record(place, "sweep", CPU)
    report(place)
    assert f"{said}APOLLO.\n" in page(place, "quality.md")


def test_many_storage_options_get_their_own_table(place: Path) -> None:
    ways = ("", "-split", "-bf16", "-bf16-stochastic", "-int8")
    ends = ENDS | {f"{rule}2{way}": 1.3 + 0.01 * i for i, way in enumerate(ways) for rule in ("foam", "gwt")}
    records.append(place / "results" / "quality.json", "quality", quality_rows(CPU, ends))
    report(place)
    text = page(place, "quality.md")
    first, folded = text.split("<details")[:2]
    assert "| moments | float32 | float32 | bf16 | bf16 | int8 |" in first
    assert "| weights | nearest | split | nearest | stochastic | nearest |" in first
    losses = " | ".join(f"{1.41 + 0.01 * i:.3f} ± 0.010" for i in range(5))
    assert re.findall(r"\| (\w+ level 2) \| " + re.escape(losses), first) == ["GWT level 2", "FOAM level 2"]
    assert "| GWT level 1 | 1.590 ± 0.010 | - | - | - | - |" in first
    assert "split weights" not in first
    assert "| FOAM level 2, split weights | 0.03 | 0.1 | - | 3 |" in folded


def test_pages_without_results_say_so(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report(place) == 0
    speed, models = pages_on_speed(place), page(place, "quality.md")
    assert "No GPU was at hand" in speed
    assert "make bench-gpu" in speed
    assert speed.count("Nothing is recorded yet") == 5
    assert models.count("Nothing is recorded yet") == 2
    assert images(place) == {"state"}
    assert report(place, "--check") == 0


def test_cpu_results_do_not_count_as_gpu_results(place: Path) -> None:
    record(place, "optimizers", CPU)
    record(place, "host", GPU)  # host time is not device time
    report(place)
    assert "No GPU was at hand" in page(place, "performance.md")
    assert "No time on a GPU is known yet" in (place / "README.md").read_text()


def tamper_row(place: Path) -> None:
    path = place / "results" / "optimizers_abacus-3000.json"
    content = json.loads(path.read_text())
    row = next(r for r in content["rows"] if r["metric"] == "step_time" and not r["clipped"])
    row["median"] *= 3
    path.write_text(json.dumps(content))


def tamper_page(place: Path) -> None:
    path = place / "docs" / "quality.md"
    path.write_text(path.read_text().replace("1.570 ± 0.010", "1.470 ± 0.010"))


def tamper_block(place: Path) -> None:
    path = place / "README.md"
    path.write_text(path.read_text().replace("1.570 ± 0.010", "1.470 ± 0.010"))


def tamper_picture(place: Path) -> None:
    path = place / "docs" / "images" / "losses_cpu.svg"
    path.write_text(re.sub("drawn from .{8}", "drawn from 00000000", path.read_text()))


TAMPERED = {
    "steps_abacus-3000.svg: drawn from other rows": tamper_row,
    r"quality.md:\d+: not what the results say": tamper_page,
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


def test_unknown_block_is_refused_by_name(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "docs" / "traps.md").write_text("<!-- mistyped -->\n<!-- /mistyped -->\n")
    assert report(place) == 1
    assert "mistyped" in capsys.readouterr().err


def test_newest_run_of_each_setting_is_shown(place: Path) -> None:
    """The newest is open; that of other threads is folded; older ones of the same threads are named."""
    record(place, "optimizers", CPU, "a")
    record(place, "optimizers", CPU | {"date": "2026-03-04T05:06:07+00:00"}, "b")
    record(place, "optimizers", CPU | {"date": "2026-02-04T05:06:07+00:00", "threads": 1}, "c")
    report(place)
    speed = page(place, "performance_optimizers.md")
    folded = "<summary>Run of 2026-02-04"
    assert speed.index("`bench/results/optimizers_b.json`") < speed.index(folded)
    assert speed.index(folded) < speed.index("`bench/results/optimizers_c.json`")
    assert "`bench/results/optimizers_a.json`" not in speed
    assert "Older runs of the same settings, in `bench/results`: `optimizers_a.json`." in speed


def test_every_block_stands_on_a_page() -> None:
    root = Path(__file__).parents[2]
    found = [
        match["name"] for path in blocks.pages(root, GENERATED) for match in blocks.BLOCK.finditer(path.read_text())
    ]
    assert set(found) == set(blocks.BLOCKS)
    assert len(found) == len(set(found))  # no table twice


def test_equal_columns_are_shown_once() -> None:
    """On a CPU the wall time and the host's are those of the step."""
    found = optimizer_rows(CPU)
    keys = ("model", "optimizer", "weights", "clipped")
    step = {tuple(map(row.get, keys)): row["median"] for row in found if row["metric"] == "step_time"}
    same = [
        row | {"median": step[tuple(map(row.get, keys))]} if row["metric"] == "wall_time" else row for row in found
    ]
    for rows_, shown in ((found, True), (same, False)):
        run = Run("f", "optimizers", "d", rows_)
        table = optimizers.steps_table(optimizers.steps_by_model(run)["llama_60m"])
        assert ("wall, ms" in table) == shown


@pytest.mark.parametrize(
    ("note", "reason"),
    [
        ("cannot run here: ModuleNotFoundError: No module named 'apollo_torch'", "apollo_torch is not installed"),
        ("cannot run here: AssertionError: Torch not compiled with CUDA enabled", "needs a GPU"),
        ("cannot run here: RuntimeError: 0 active drivers ([]). There should only be one.", "needs a GPU"),
        ("cannot run here: ValueError: odd width", "cannot run here: odd width"),
        ("does not fit: needs 20 GiB", "does not fit: needs 20 GiB"),
    ],
)
def test_reasons_are_words(note: str, reason: str) -> None:
    missing = {"model": "m", "optimizer": "Peer", "weights": "float32"} | measured("step_time", "s", None, 0, note)
    (found,) = optimizers.steps_by_model(Run("f", "optimizers", "d", [missing])).values()
    assert optimizers.steps_table(found).endswith(f"- Peer, fp32: {reason}")


def test_each_panel_shows_one_run() -> None:
    """A model missing from the newest run is shown from the run before."""
    old = rows.Run("old", "optimizers", "d", optimizer_rows(GPU))
    new = rows.Run("new", "optimizers", "d", optimizer_rows(GPU, ("llama_1b",)))
    for row in new.rows:
        if row["metric"] == "step_time" and row["median"]:
            row["median"] *= 2
    panels = {panel["title"]: panel["entries"] for panel in optimizers.step_panels([new, old])}
    assert list(panels) == ["LLaMA-60M", "LLaMA-1B", "LLaMA-7B"]
    assert panels["LLaMA-60M"][0]["median"] == pytest.approx(0.018)
    assert panels["LLaMA-1B"][0]["median"] == pytest.approx(2 * 0.018)  # its rows come first in both runs
    assert not any("clipped" in entry["label"] for entries in panels.values() for entry in entries)


def test_unfinished_runs_have_no_final_loss() -> None:
    found = quality_rows(CPU)
    cut = [r for r in found if not (r["optimizer"] == "gwt2" and r["seed"] == 2 and r.get("step", 0) > 200)]
    (comparison,) = comparisons.comparisons([rows.Run("f", "quality", "d", cut)])
    losses = {setting.optimizer: values for setting, values in comparisons.final_losses(comparison).items()}
    assert losses["gwt2"] == pytest.approx([1.56, 1.57])
    assert len(losses["adamw"]) == 3
    assert "| 2, 1 not finished |" in quality.final_table(comparison)
    curve = next(series for series in quality.curves(comparison) if series["label"] == "GWT level 2")
    assert curve["tokens"] == [1024 * step for step in range(40, 201, 40)]  # as far as all seeds went


def test_a_repeated_run_replaces_the_older_one() -> None:
    old, new = (rows.Run(name, "quality", "d", quality_rows(CPU)) for name in ("old", "new"))
    for row in new.rows:
        if row["metric"] == "heldout_loss":
            row["median"] += 1
    (comparison,) = comparisons.comparisons([new, old])
    losses = next(iter(comparisons.final_losses(comparison).values()))
    assert losses == pytest.approx([2.6, 2.61, 2.62])


@pytest.mark.parametrize(
    ("value", "text"),
    [(1234.5, "1,230"), (99.96, "100"), (12.345, "12.3"), (0.012345, "0.0123"), (0, "0"), (None, "-"), (1, "1.00")],
)
def test_numbers_have_three_significant_digits(value: float | None, text: str) -> None:
    assert markdown.number(value) == text


def test_a_new_column_keeps_cases_apart() -> None:
    what = {"optimizer": "a", "weights": "float32", "level": 2}
    found = rows.cases([what | {"graph": on} | measured("step_time", "s", 1.0 + on) for on in (False, True)])
    assert len(found) == 2
    assert rows.telling_columns(found, ["optimizer"]) == ["optimizer", "graph"]


def test_a_run_with_changed_sources_is_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    """So is a run of the step in C without a digest; runs of other benchmarks are not marked."""
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
