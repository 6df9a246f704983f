"""The benchmark of several processes: bytes and collectives equal the plan's, and predictions are recorded."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from bench.common import records
from bench.common.measure import Spread
from bench.report import blocks, rows
from bench.report.scaling import measured as page_of
from bench.scaling import __main__ as scaling
from bench.scaling.processes import LARGE, SETTINGS

LAYER = (4 * [(12, 12)], 2 * [(7, 12)], [(12, 7)])
"""Shapes of the model below: attention, gate and up, down. Of 7 rows one of two processes has 4, the other 3."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "model.json"
    sizes = {"hidden_size": 12, "intermediate_size": 7, "num_hidden_layers": 2, "num_attention_heads": 2}
    path.write_text(json.dumps({**sizes, "vocab_size": 9, "tie_word_embeddings": False}))
    return path


@pytest.fixture(scope="module")
def record(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the record of a run on two processes."""
    out = tmp_path_factory.mktemp("out")
    arguments = ["--model", str(model), "--processes", "2", "--repetitions", "2", "--out", str(out)]
    assert scaling.main([*arguments, "--note", "Nothing else ran."]) == 0
    (path,) = out.glob("*.json")
    return path


def medians(record: Path) -> dict[tuple[int, str | None, str], float]:
    found = records.rows_of(record, "scaling")
    return {(row["processes"], row["setting"], row["metric"]): row["median"] for row in found if "bytes" not in row}


def test_bytes_and_collectives_equal_those_of_the_shapes(record: Path) -> None:
    found = medians(record)
    limited = 2 * sum(map(len, LAYER))
    for setting, expected in (
        ("no limiter", (0, 0)),
        ("foam", (0, 0)),
        ("limiter", (1, 4 * limited)),
        ("limiter, max_grad_norm", (2, 4 * limited + 16)),
    ):
        assert (found[2, setting, "collectives"], found[2, setting, "collective_bytes"]) == expected
        assert (found[1, setting, "collectives"], found[1, setting, "collective_bytes"]) == (0, 0)
        for n in (1, 2):
            blocked = 2 * sum(-(-rows // n) * -(-columns // 4) for part in LAYER for rows, columns in part)
            whole = 5 * -(-12 // n) + 2 * -(-9 // n) * 12  # norms, embedding and head are not transformed
            tensors = limited + 5 + 2
            scalars = 2 * tensors + (limited if setting.startswith("limiter") else 0)
            # `step` is 8 bytes, everything else 4.
            assert found[n, setting, "state_bytes"] == 4 * (2 * (blocked + whole) + scalars)


def test_every_case_is_timed_and_predicted(record: Path) -> None:
    found = medians(record)
    for n in (1, 2):
        assert found[n, None, "copy_bandwidth"] > 0
        for setting in SETTINGS:
            for metric in ("step_time", "step_cpu_time", "predicted_step_time", "predicted_step_cpu_time"):
                assert found[n, setting, metric] > 0
    sizes = [row["bytes"] for row in records.rows_of(record, "scaling") if row["metric"] == "all_reduce_time"]
    assert sorted(sizes) == [16, 4 * 14, LARGE]


def measured(n: int, setting: str, **seconds: float) -> scaling.Measured:
    """Return a made-up run in which the second process has the longer wall time."""
    steps = {f"{k}/{what}/{name}": 0.1 / k for k in (1, n) for what in ("step", "host") for name in SETTINGS}
    steps |= {f"{n}/all-reduce/16": 1e-3, f"{n}/all-reduce/168": 2e-3, f"{n}/all-reduce/{LARGE}": 5e-3}
    steps |= {act: 0.01 for act in steps if "/host/" in act} | seconds
    first, other = ({act: [(2 * f * s, s)] * 3 for act, s in steps.items()} for f in (0.9, 1.0))
    plans = scaling.planned("llama_small", n, setting)
    sent = [[c.kind, c.processes, c.total_bytes] for c in plans.collectives if not c.engine]
    case = f"{n}/{setting}"
    counted = [
        {case: {"state_bytes": plans.held_by(rank, 0).state_bytes, "collectives": sent}} for rank in range(n)
    ]
    return scaling.Measured(counted, [first, other])


def test_prediction_worked_by_hand() -> None:
    run = measured(2, "limiter")
    found = {row["metric"]: row["median"] for row in scaling.rows_of("llama_small", 2, "limiter", run)}
    alone = scaling.planned("llama_small", 1, "no limiter").largest.moved_bytes
    assert found["bandwidth"] == pytest.approx(alone / 0.09, rel=1e-12)  # 0.1 s, of which the host takes 0.01
    cpu = 0.01 + found["moved_bytes"] / found["bandwidth"]
    assert found["predicted_step_cpu_time"] == pytest.approx(cpu, rel=1e-12)
    assert found["crowding"] == pytest.approx(2, rel=1e-12)
    links = scaling.links_of(2, run)
    assert links["latency"] == pytest.approx(4e-3 / 2, rel=1e-12)  # for 168 bytes, in wall time
    assert links["link_bandwidth"] == pytest.approx(LARGE / 6e-3, rel=1e-12)
    assert found["predicted_collective_time"] == pytest.approx(4e-3 + 168 / links["link_bandwidth"], rel=1e-12)
    wall = 2 * cpu + found["predicted_collective_time"]
    assert found["predicted_step_time"] == pytest.approx(wall, rel=1e-12)
    assert (found["step_cpu_time"], found["step_time"]) == pytest.approx((0.05, 0.1), rel=1e-12)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("key", "value"), [("state_bytes", 1), ("collectives", []), ("collectives", [["all-reduce", 2, 172]])]
)
def test_a_deviation_from_the_plan_stops_the_run(rank: int, key: str, value: Any) -> None:
    sharded = scaling.planned("llama_small", 2, "limiter")
    counted = measured(2, "limiter").counted
    scaling.check(sharded, "limiter", counted)
    counted[rank]["2/limiter"][key] = value
    with pytest.raises(RuntimeError, match=rf"process {rank} of 2, limiter: planned .*168.* but found"):
        scaling.check(sharded, "limiter", counted)


def test_page_shows_predictions_and_measurements(record: Path, tmp_path: Path) -> None:
    assert "python -m bench.scaling" in page_of([])
    runs = rows.load(record.parent)
    page = blocks.fill("<!-- measured -->\n<!-- /measured -->", runs, "")
    assert "Nothing else ran." in page
    found = {(row["processes"], row["setting"], row["metric"]): row for row in runs[0].rows if "bytes" not in row}
    shown = re.findall(r"^\| (\d) \| ([a-z, _]+) \| (.*) \|$", page, re.MULTILINE)
    assert [(int(n), setting) for n, setting, _ in shown] == [(n, setting) for n in (1, 2) for setting in SETTINGS]
    for n, setting, cells in shown:
        size, collectives, sent, predicted, _, off, *_ = cells.split(" | ")
        case = {metric: found[int(n), setting, metric]["median"] for metric in ("state_bytes", "collectives")}
        assert (size, collectives) == (f"{case['state_bytes']:,}", str(case["collectives"]))
        assert (predicted == "input") == (off == "") == (n == "1" and setting in ("no limiter", "foam"))
        assert (sent == "0") == (n == "1" or not setting.startswith("limiter"))
    other = json.loads(record.read_text())
    next(row for row in other["rows"] if row["metric"] == "state_bytes")["median"] += 4
    (tmp_path / record.name).write_text(json.dumps(other))
    assert blocks.fill(page, rows.load(tmp_path), "") != page  # so that --check notices


def test_spread_uses_first_cpu_time_and_slowest_wall_time() -> None:
    times = [{"2/copy": [(1.0, 0.1), (5.0, 0.2)]}, {"2/copy": [(2.0, 0.3), (3.0, 0.1)]}, {}]
    run = scaling.Measured([], times)
    assert run.spread("2/copy", cpu=False) == Spread.of([2.0, 5.0])
    assert run.median("2/copy", cpu=True) == pytest.approx(0.15)
