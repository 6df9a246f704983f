"""The report: pages show the rows, the newest run of each setting."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bench.common import records
from bench.report import blocks
from bench.report.__main__ import GENERATED
from tests.support.made_up_rows import CPU, ENDS, GPU, MAKERS, host_rows, measured, quality_rows
from tests.support.reports import images, page, pages_on_quality, pages_on_speed, record, report


def test_every_benchmark_is_shown(place: Path) -> None:
    for benchmark in MAKERS:
        record(place, benchmark, CPU)
        if benchmark in ("optimizers", "kernels"):
            record(place, benchmark, GPU)
    assert report(place) == 0
    speed, models = pages_on_speed(place), pages_on_quality(place)
    assert "No GPU was at hand" not in speed
    assert speed.index("## NVIDIA H100") < speed.index("## Abacus 3000")
    assert "| optimizer | weights | step, ms | with clipping, ms | wall, ms |" in speed
    assert (
        "| AdamW(fused=True) | fp32 | 14.0 (12.6–15.4) | 16.8 (15.1–18.5) | 15.4 (13.9–16.9) | 11.2 | 80 % |"
        in speed
    )
    assert "- APOLLO, bf16: apollo_torch is not installed" in speed
    assert "| times fused AdamW |" in speed
    assert re.search(r"\| GWTAdamW level 2 \| bf16 \| 6\.00 .*\| 80 % \|.*\| 0\.86 \|$", speed, re.MULTILINE)
    assert "target: " not in speed  # bounds are only for kernel developers
    assert "Copy bandwidth: 3,000 (2,700–3,300) GB/s." in speed
    assert "Bandwidth of a pass in place: 3,000 (2,700–3,300) GB/s." in speed
    assert "| of copy bandwidth |" in speed
    assert "| of bandwidth in place |" in speed
    assert "| 2048x5461 | bf16 | fp32 |" in speed
    assert "- 1 cases: does not fit: needs 20 GiB" in speed
    assert "| GWTAdamW, limiter, re-allocated | 300 | 250 (225–275) |" in speed
    assert "| step | flat | 2 | g or p 9×128, p 2×128 | p 1×64 2×128 | 77 | 0 | 24 of 64 |" in speed
    assert "| sm_90 | 3 | 0 | 77 | 24 of 64 |" in speed
    assert "| step | 2 | 500 | 77 | 0 | 24 of 64 |" in speed
    assert "split" not in page(place, "performance_machine_code.md").partition("| kernel |")[2]
    listed = page(place, "data/machine_code.csv").splitlines()
    assert len(listed) == 1 + 2 * 3
    accesses = '"g or p 9×128, p 2×128",p 1×64 2×128'
    assert f'sm_90,"step, foam, split",bf16,fp32,flat,2,{accesses},77,0,0,24,64' in listed
    assert "| step | flat | 2 | 28.0 | 10.0 | 1.00 | 1.00 | 7 | 30 % | 100 % | 35 % | bandwidth |" in speed
    assert "| weights/moments | bandwidth | either | issue slots |" in speed
    assert "| bf16/fp32 | 1 | 1 | 1 |" in speed
    counted = page(place, "data/executed.csv")
    row, classes = 'sm_90,"step, foam, stochastic",bf16,fp32,row', 7 * ",4.00" + ",28.50,1.25"
    assert f"{row},5461,2,28.00,10.00,1.24,1.00,7,0.80,1.00,1.25,either{classes}\n" in counted
    assert f"{row},1000,2,28.00,10.00,1.24,1.00,7,1.00,0.58,1.98,issue slots{classes}\n" in counted
    assert "132 × 4 × 32 lanes' instructions a cycle" in speed
    assert "| kernels | stopped after 120 s | 90.0 |" in speed
    assert "24 of 32" in speed  # a compute unit's own limit
    assert "| GWT level 2 | 0.03 | 0.1 | - | 3 | 1.570 ± 0.010 | -0.040 | 1,500,000 | 30 % |\n" in models
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
    assert "with clipping" not in readme  # only on the page


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
    said = "Not the best of a [sweep](sweeps.md), so the comparison is not even: "
    report(place)
    assert f"{said}AdamW, APOLLO, GaLore, GWT level 1, GWT level 2, GWT level 3.\n" in page(
        place, "quality_runs.md"
    )
    record(place, "sweep", CPU)
    report(place)
    assert f"{said}APOLLO.\n" in page(place, "quality_runs.md")


def test_many_storage_options_get_their_own_table(place: Path) -> None:
    ways = ("", "-split", "-bf16", "-bf16-stochastic", "-int8")
    ends = ENDS | {f"{rule}2{way}": 1.3 + 0.01 * i for i, way in enumerate(ways) for rule in ("foam", "gwt")}
    records.append(place / "results" / "quality.json", "quality", quality_rows(CPU, ends))
    report(place)
    text = page(place, "quality_runs.md")
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
    speed, models = pages_on_speed(place), pages_on_quality(place)
    assert "No GPU was at hand" in speed
    assert "make bench-gpu" in speed
    assert speed.count("Nothing is recorded yet") == 5
    assert models.count("Nothing is recorded yet") == 3
    assert images(place) == {"state"}
    assert report(place, "--check") == 0


def test_cpu_results_do_not_count_as_gpu_results(place: Path) -> None:
    record(place, "optimizers", CPU)
    record(place, "host", GPU)  # host time is not device time
    report(place)
    assert "No GPU was at hand" in page(place, "performance.md")
    assert "No time on a GPU is known yet" in (place / "README.md").read_text()


def test_host_times_of_other_scenarios_are_no_older_runs(place: Path) -> None:
    for i, scenario in enumerate(("no limiter", "matrices alone", "matrices alone")):
        rows = host_rows(CPU | {"date": f"2026-03-0{i + 1}T05:06:07+00:00"})[:2]
        records.append(place / "results" / f"host_{i}.json", "host", [row | {"scenario": scenario} for row in rows])
    report(place)
    text = page(place, "performance_host.md")
    assert [text.count(f"| {scenario} | 300 |") for scenario in ("no limiter", "matrices alone")] == [1, 1]
    assert "Older runs of the same settings, in `bench/results`: `host_1.json`." in text


def test_newest_run_of_each_setting_is_shown(place: Path) -> None:
    """Check that the newest run is open, that of other thread counts folded, and older ones are named."""
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
