"""README's table of which optimizer to choose: state, loss and time from comparable records."""

from __future__ import annotations

import re
from typing import Any

from bench.report import choice
from bench.report.comparisons import comparisons
from bench.report.rows import Run
from bench.report.tradeoff import of_preset
from tests.support.made_up_rows import CPU, GPU, Row, measured, quality_rows

MUON, FOAM, FUSED = "GWTMuon level 0", "GWTAdamW level 2, foam", "AdamW(fused=True)"


def run(seconds: dict[str, float], *, day: int, peer: str = "gwt", **about: Any) -> Run:
    """Return a run that timed these optimizers, in float32 unless a name says otherwise."""
    what = {"model": "llama_350m", "layers": 2, "embeddings": False, "clipped": False, "peer": peer}
    rows: list[Row] = []
    for name, time in seconds.items():
        optimizer, _, weights = name.partition(" in ")
        own = {"optimizer": optimizer, "weights": weights or "float32"} | measured("step_time", "s", time, 9)
        rows.append(what | own | CPU | {"date": f"2026-03-{day:02d}T00:00:00+00:00"} | about)
    return Run(f"run_{day}.json", "optimizers", rows[0]["device"], rows)


def table_of(runs: list[Run]) -> tuple[dict[str, list[str]], str]:
    """Return the cells of each row after the optimizer's call, and the text below the table."""
    newest_first = sorted(runs, key=lambda each: each.date, reverse=True)
    text = choice.block(newest_first, of_preset(comparisons(newest_first)))
    rows = dict(re.findall(r"^\| [^|]* \| `(.*?)`[^|]* \| (.*) \|$", text, re.MULTILINE))
    return {call: cells.split(" | ") for call, cells in rows.items()}, text.rpartition("|\n\n")[2]


def test_state_loss_and_time() -> None:
    quality = Run("q.json", "quality", "cpu", quality_rows(CPU, {"adamw": 1.5, "muon0": 1.2, "foam2": 1.4}))
    rows, below = table_of(
        [quality, run({FUSED: 0.010, FOAM: 0.0062, MUON: 0.3, f"{FOAM} in bfloat16": 0.001}, day=2)]
    )
    assert rows["GWTMuon(level=0)"] == ["4", "1.310 ± 0.010", "30"]
    assert rows['GWTAdamW(level=2, rule="foam")'] == ["2", "1.510 ± 0.010", "0.62"]
    assert rows["GWTAdamW(level=0)"] == ["8", "1.610 ± 0.010", "-"]
    assert rows["GWTMuon(level=2, state_dtype=torch.int8)"] == ["0.26", "-", "-"]
    assert "float32 weights, Abacus 3000, 2 layers of LLaMA-350M, 2 threads, 2026-03-02" in below
    assert "⁴" not in below


def test_a_time_of_another_run_is_over_as_many_layers_and_marked() -> None:
    main = run({FUSED: 0.010, FOAM: 0.0062}, day=3)
    alike = run({FUSED: 0.005}, day=1, layers=1)
    other_threads = run({FUSED: 0.001}, day=2, layers=1, threads=1)
    rules = run({MUON: 0.3}, day=4, peer="rules", layers=1)
    rows, below = table_of([main, alike, other_threads, rules])
    assert rows["GWTMuon(level=0)"][-1] == "60⁴"
    assert "⁴ 1 layer;" in below
    assert table_of([main, other_threads, rules])[0]["GWTMuon(level=0)"][-1] == "-"
    rules.rows.append(run({FUSED: 0.006}, day=4, peer="rules", layers=1).rows[0])
    rows, below = table_of([main, alike, rules])
    assert rows["GWTMuon(level=0)"][-1] == "50"  # from its own run
    assert "⁴" not in below


def test_a_gpu_is_shown_with_its_own_weights() -> None:
    timed = {f"{name} in bfloat16": time for name, time in ((FUSED, 0.002), (FOAM, 0.001))}
    rows, below = table_of([run({FUSED: 0.010, FOAM: 0.0062}, day=3), run(timed, day=1, **GPU)])
    assert rows['GWTAdamW(level=2, rule="foam")'][-1] == "0.50"
    assert "bfloat16 weights, NVIDIA H100" in below


def test_without_records() -> None:
    rows, below = table_of([])
    assert all(cells[1:] == ["-", "-"] for cells in rows.values())
    assert below.endswith("² Not compared yet.\n³ Nothing is timed yet.")
