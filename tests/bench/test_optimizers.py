"""The optimizer benchmark from its command line to its rows, on a tiny model."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

from bench.common import records
from bench.common.bandwidth import StepBandwidth
from bench.optimizers import __main__ as optimizers
from bench.optimizers.candidate import adamw, gwt
from tests.support import pretraining
from tests.support.candidates import HALF, SINGLE, ScaledWrong, needs_ptwt


@pytest.fixture
def tiny_model(tmp_path: Path) -> str:
    return str(pretraining.tiny_model(tmp_path, num_hidden_layers=2))


@pytest.fixture(autouse=True)
def _small_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure the bandwidth on little memory."""
    monkeypatch.setattr(optimizers, "StepBandwidth", partial(StepBandwidth, size=1 << 20))


@needs_ptwt
def test_from_command_line_to_rows(tiny_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "results"
    arguments = [
        "--device",
        "cpu",
        "--models",
        tiny_model,
        "--repetitions",
        "2",
        "--commit",
        "abc",
        "--levels",
        "2",
    ]
    assert optimizers.main([*arguments, "--peers", "gwt", "torch", "ptwt", "--out", str(out)]) == 0

    printed = capsys.readouterr().out
    assert "times as fast as the ptwt step" in printed
    assert "target: at least 10" in printed
    assert "times as long as AdamW(foreach=False)" in printed
    assert "target: at most 1.2" in printed

    (path,) = out.glob("*.json")
    _, rows = records.read(path)
    fields = set(rows[0])
    origin = {"commit", "date", "device", "driver", "torch", "triton", "command", "python", "threads"}
    origin |= {"own_backend", "sources"}
    place = {"model", "optimizer", "peer", "weights", "level", "limiter", "clipped", "check"}
    place |= {"layers", "embeddings", "parameters"}
    assert origin | place | {"metric", "unit", "median", "p20", "p80", "samples", "note"} == fields
    assert all(set(row) == fields for row in rows)
    assert all(row[key] not in (None, "") for row in rows for key in origin)
    assert {row["commit"] for row in rows} == {"abc"}

    names = ["GWTAdamW level 2, limiter", "GWTAdamW level 2", "ptwt level 2, limiter"]
    names += [f"{name}, clips in the step" for name in names[:2]] + ["GWTAdamW level 2, telemetry"]
    names.append("GWTAdamW level 2, limiter, skips bad batches")
    names += [f"GWTAdamW level 2, {what}" for what in ("foam", "stochastic rounding", "split rounding")]
    names += [f"GWTAdamW level 2, {dtype} moments" for dtype in ("bfloat16", "int8")]
    names += [f"{name}, stochastic rounding" for name in names[-2:]] + ["GWTAdamW level 2, foam, bfloat16 moments"]
    names += [f"AdamW({how}=True)" for how in ("foreach", "fused")] + ["AdamW(foreach=False)"]
    times = {"step_time", "host_time", "wall_time"}
    metrics = times | {"bytes_moved", "roofline_time", "in_place_bandwidth_fraction"}
    metrics |= {"state_bytes", "state_bytes_per_parameter", "check_error"}
    found = {(row["optimizer"], row["metric"], row["clipped"]) for row in rows if row["optimizer"]}
    assert found == {(name, metric, False) for name in names for metric in metrics} | {
        (name, metric, True) for name in names for metric in times
    }
    assert [row["metric"] for row in rows if not row["optimizer"]] == ["in_place_bandwidth", *["ratio"] * 13]
    assert {row["weights"] for row in rows if row["optimizer"]} == {"float32", "bfloat16", "float16"}
    assert all(0 < row["p20"] <= row["median"] <= row["p80"] for row in rows if row["metric"] == "step_time")
    assert all(row["samples"] == 2 for row in rows if row["metric"] == "step_time")
    assert {row["check"] for row in rows if row["optimizer"]} == {"oracle"}


def test_a_run_for_each_number_of_threads(tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that each run has its own record, and that the number of threads is restored."""
    before = torch.get_num_threads()
    monkeypatch.setattr(optimizers, "suite", lambda *_: [gwt(2, SINGLE, limiter=True)])
    dates = iter(["2026-01-01T00:00:00+00:00", "2026-01-01T00:00:01+00:00"])
    own = optimizers.facts
    monkeypatch.setattr(optimizers, "facts", lambda *args: own(*args) | {"date": next(dates)})
    arguments = ["--device", "cpu", "--models", tiny_model, "--repetitions", "1", "--out", str(tmp_path / "out")]
    assert optimizers.main([*arguments, "--threads", "1", "2"]) == 0
    counts = [
        {row["threads"] for row in records.read(path)[1]} for path in sorted((tmp_path / "out").glob("*.json"))
    ]
    assert counts == [{1}, {2}]
    assert torch.get_num_threads() == before


def test_a_failed_check_fails_the_run(
    tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = gwt(2, SINGLE, limiter=True)._replace(build=ScaledWrong)
    monkeypatch.setattr(optimizers, "suite", lambda *_: [broken, adamw(SINGLE, foreach=False)])
    arguments = [
        "--device",
        "cpu",
        "--models",
        tiny_model,
        "--repetitions",
        "1",
        "--out",
        str(tmp_path / "out"),
    ]
    assert optimizers.main(arguments) == 1
    assert "times as long as" not in capsys.readouterr().out


def test_an_interrupted_run_keeps_its_results(
    tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(groups: list[dict]) -> None:
        raise KeyboardInterrupt

    good, loop = gwt(2, SINGLE, limiter=True), adamw(SINGLE, foreach=False)
    last = good._replace(name="last", dtype=HALF, peer="other", build=interrupt)
    monkeypatch.setattr(optimizers, "suite", lambda *_: [good, loop, last])
    arguments = ["--device", "cpu", "--models", tiny_model, "--repetitions", "1", "--out", str(tmp_path / "out")]
    with pytest.raises(KeyboardInterrupt):
        optimizers.main(arguments)
    (path,) = (tmp_path / "out").glob("*.json")
    _, rows = records.read(path)
    assert {row["optimizer"] for row in rows} == {None, good.name, loop.name}
    assert sum(row["metric"] == "step_time" for row in rows) == 4
    assert [row["metric"] for row in rows if row["optimizer"] is None] == ["in_place_bandwidth", "ratio"]


def test_candidates_beyond_the_time_limit_become_rows(
    tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(optimizers, "suite", lambda *_: [gwt(2, SINGLE, limiter=True)])
    arguments = ["--device", "cpu", "--models", tiny_model, "--minutes", "1e-9", "--out", str(tmp_path / "out")]
    assert optimizers.main(arguments) == 0
    (path,) = (tmp_path / "out").glob("*.json")
    _, rows = records.read(path)
    assert [row["note"] for row in rows if row["optimizer"]] == ["left out: --minutes 1e-09 were over"]
    assert "left out" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--threads", "2", "0"], "--threads 0: must be at least 1"),
        (["--layers", "0"], "--layers 0: must be at least 1"),
        (["--repetitions", "-1"], "--repetitions -1: must be at least 1"),
        (["--minutes", "0"], "--minutes 0.0: must be above 0"),
        (["--peers", "gwt", "sophia"], "invalid choice: 'sophia'"),
        (["--models", "llama_9t"], "llama_9t: no such configuration"),
        (["--device", "meta"], "--device meta: must be cpu or cuda"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        optimizers.parse(["--device", "cpu", *arguments])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_a_missing_device_becomes_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(optimizers, "StepBandwidth", lambda *_: pytest.fail("measured"))
    assert optimizers.main(["--device", "cuda:1", "--out", str(tmp_path), "--commit", "abc"]) == 1
    (path,) = tmp_path.glob("*.json")
    (row,) = records.rows_of(path, "optimizers")
    assert (row["metric"], row["median"]) == ("step_time", None)
    assert row["note"] == "no device: PyTorch finds no cuda:1 here, so nothing was measured"


@pytest.mark.parametrize("name", ["cuda", "cuda:0"])
def test_a_cuda_device_gets_an_index(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check the index, without which `torch.cuda.set_device` refuses a device."""
    made: list[torch.device] = []

    def first_step(device: torch.device) -> None:
        raise InterruptedError

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", made.append)
    monkeypatch.setattr(optimizers, "facts", lambda *_: {"device": "made up", "date": "2026"})
    monkeypatch.setattr(optimizers, "StepBandwidth", first_step)
    with pytest.raises(InterruptedError):
        optimizers.main(["--device", name])
    assert made == [torch.device("cuda", 0)]


def test_a_time_budget_on_cuda_starts_with_the_targets() -> None:
    candidates = [adamw(HALF, foreach=False), adamw(HALF, fused=True), gwt(2, HALF, limiter=False)]
    order = optimizers.batches(["llama_1b", "llama_7b"], candidates, torch.device("cuda"))
    assert [(model, candidate.name) for model, (candidate,) in order] == [
        ("llama_7b", "AdamW(fused=True)"),
        ("llama_7b", "GWTAdamW level 2"),
        *(("llama_1b", candidate.name) for candidate in candidates),
        ("llama_7b", "AdamW(foreach=False)"),
    ]


@pytest.mark.gpu
def test_the_cuda_suite(tiny_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "--device",
        "cuda",
        "--models",
        tiny_model,
        "--repetitions",
        "2",
        "--out",
        str(tmp_path / "out"),
    ]
    assert optimizers.main(arguments) == 0
    printed = capsys.readouterr().out
    for name in ("AdamW(fused=True)", "GWTAdamW level 0", "GWTAdamW level 3, limiter", "AdamW(foreach=False)"):
        assert name in printed
    (path,) = (tmp_path / "out").glob("*.json")
    _, rows = records.read(path)
    assert {row["metric"] for row in rows} >= {
        *("peak_extra_bytes", "host_time", "wall_time", "kernel_launches", "copy_bandwidth", "launch_latency")
    }
