"""Comparisons over seeds: settings from the sweep, failures as rows, interruptions, and the record."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import mean, stdev
from types import SimpleNamespace
from typing import Any

import pytest

from bench.common import records
from bench.pretrain import __main__ as pretrain
from bench.pretrain import clocks, quality
from bench.pretrain.compare import check_same_batches, curve, with_spread
from bench.pretrain.training import Run, read_log, read_result
from tests.support.pretraining import run_of, tiny_model, tiny_options, trained

Row = dict[str, Any]


@pytest.fixture
def options(tmp_path: Path) -> list[str]:
    return tiny_options(tmp_path)


def swept(folder: Path, **best_lr: float) -> list[str]:
    """Return options with a sweep in which each optimizer's best run had the given rate."""
    model = str(tiny_model(folder))
    rows = [
        {"model": model, "optimizer": name, "lr": rate, "scale": 0.5, "seed": 0, "heldout_loss": loss}
        for name, lr in best_lr.items()
        for rate, loss in ((lr, 1.0), (2 * lr, 2.0))
    ]
    records.append(folder / "sweep.json", "sweep", rows)
    return ["--sweep-record", str(folder / "sweep.json")]


def rows_by(rows: list[Row], **what: Any) -> list[Row]:
    return [row for row in rows if all(row[key] == value for key, value in what.items())]


def test_compare_over_seeds_end_to_end(
    tmp_path: Path, options: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from matplotlib.image import imread

    monkeypatch.setitem(sys.modules, "galore_torch", None)
    names, out, record = ["adamw", "galore", "gwt3", "gwt2"], tmp_path / "out", tmp_path / "quality.json"
    line = [*options, *swept(tmp_path, adamw=0.004, gwt2=0.02, gwt3=1e30), "--compare", *names, "--seeds", "2"]
    pretrain.main([*line, "--out", str(out), "--record", str(record)])

    results = json.loads((out / "compare.json").read_text())
    assert [(r["seed"], r["optimizer"]) for r in results] == [(seed, name) for seed in (0, 1) for name in names]
    done = [result for result in results if "failed" not in result]
    assert [(r["optimizer"], r["lr"], r["scale"]) for r in done] == [
        ("adamw", 0.004, 0.5),
        ("gwt2", 0.02, 0.5),
    ] * 2
    assert done[0]["data_digest"] == done[1]["data_digest"] != done[2]["data_digest"] == done[3]["data_digest"]
    assert len({result["heldout_loss"] for result in done}) == 4
    assert all(result["state_bytes_measured"] == result["state_bytes_predicted"] for result in done)
    assert done[0]["state_bytes_measured"] > done[1]["state_bytes_measured"]

    table = (out / "table.txt").read_text()
    for name in ("adamw", "gwt2"):
        losses = [result["heldout_loss"] for result in done if result["optimizer"] == name]
        assert f"{mean(losses):.4f} ± {stdev(losses):.4f}" in table
    (galore,) = (row for row in table.splitlines() if row.startswith("│ galore"))
    assert "package missing" in galore
    (gwt3,) = (row for row in table.splitlines() if row.startswith("│ gwt3"))
    assert "diverged" in gwt3
    assert "pip install galore-torch bitsandbytes" in " ".join(table.split())
    assert "lower --lr (1e+30)" in table
    assert f"{done[0]['state_bytes_measured']:,}" in table
    assert table.rstrip() in capsys.readouterr().out
    image = imread(out / "losses.png")
    assert image.shape[1] > 1.5 * image.shape[0]  # two panels
    assert image[..., :3].std() > 0.05  # the figure has lines

    benchmark, rows = records.read(record)
    assert benchmark == "quality"
    assert {row["preset"] for row in rows} == {"cpu"}
    for result in done:
        own = rows_by(rows, optimizer=result["optimizer"], seed=result["seed"])
        log = read_log(out / result["optimizer"] / f"seed{result['seed']}" / "log.jsonl", "eval")
        losses = rows_by(own, metric="heldout_loss", unit="nats/token")
        assert [(r["step"], r["tokens"], r["seconds"], r["median"]) for r in losses] == [
            (entry["step"], 32 * entry["step"], entry["seconds"], entry["loss"]) for entry in log
        ]
        assert [row["step"] for row in losses] == [2, 4, 6, 8, 10]
        final, state, time = own[len(losses) :]
        assert (final["metric"], final["median"], final["step"]) == ("final_loss", result["heldout_loss"], 10)
        assert (state["metric"], state["median"]) == ("state_bytes", result["state_bytes_measured"])
        assert (time["metric"], time["unit"], time["samples"]) == ("optimizer_step", "ms", 7)
        assert 0 < time["p20"] <= time["median"] <= time["p80"]
        assert {row["level"] for row in own} == {0 if result["optimizer"] == "adamw" else 2}
        assert {row["parameters"] for row in own} == {result["parameters"]}
        for row in own:
            assert row["command"].startswith("python -m bench.pretrain")
            assert row["device"]
            assert row["commit"]
            assert row["threads"] == 1
    for name, why in (("galore", "package missing: galore needs"), ("gwt3", "diverged: gwt3: the loss is")):
        failed = rows_by(rows, optimizer=name)
        assert [(row["metric"], row["median"], row["seed"]) for row in failed] == [
            ("final_loss", None, 0),
            ("final_loss", None, 1),
        ]
        assert all(row["note"].startswith(why) for row in failed)


def without_times(rows: list[Row]) -> list[Row]:
    timed = ("seconds", "date", "command")
    kept = [{key: value for key, value in row.items() if key not in timed} for row in rows]
    return [row for row in kept if row["metric"] != "optimizer_step"]


def test_an_interrupted_comparison_resumes(
    tmp_path: Path, options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    line = [*options, "--compare", "adamw", "gwt2", "gwt3", "--save-every", "3"]
    whole, cut = ([*line, "--out", str(tmp_path / n), "--record", str(tmp_path / f"{n}.json")] for n in "ab")
    pretrain.main(whole)

    honest_step = Run.train_step
    steps: list[str] = []

    def counted(run: Run) -> None:
        if (run.config.optimizer, run.step) == ("gwt2", 8) and "crashed" not in steps:
            steps.append("crashed")
            raise KeyboardInterrupt
        honest_step(run)
        steps.append(run.config.optimizer)

    monkeypatch.setattr(Run, "train_step", counted)
    with pytest.raises(KeyboardInterrupt):
        pretrain.main([*cut, "--resume"])
    assert {row["optimizer"] for row in records.read(tmp_path / "b.json")[1]} == {"adamw"}
    steps[:] = ["crashed"]
    pretrain.main([*cut, "--resume"])
    assert steps[1:] == ["gwt2"] * 4 + ["gwt3"] * 10  # from the checkpoint of step 6
    ours, theirs = (records.read(tmp_path / f"{name}.json")[1] for name in "ba")
    assert without_times(ours) == without_times(theirs)
    assert [row["metric"] for row in ours] == [row["metric"] for row in theirs]


def test_a_repeated_run_replaces_its_rows(tmp_path: Path, options: list[str]) -> None:
    record = tmp_path / "quality.json"

    def run(*more: str) -> list[Row]:
        line = [*options, "--optimizer", "gwt1", "--out", str(tmp_path / "out"), "--record", str(record), *more]
        pretrain.main(line)
        return records.read(record)[1]

    first = run()
    second = run()
    assert without_times(second) == without_times(first)
    assert [row["seconds"] for row in second] != [row["seconds"] for row in first]
    third = run("--seed", "1")
    assert third[: len(second)] == second
    assert {row["seed"] for row in third[len(second) :]} == {1}
    assert len(run("--steps", "9", "--stop-at", "5")) == len(third)  # an unfinished run leaves no rows
    assert len(run("--steps", "9")) > len(third)


def test_record_defaults_to_the_file_of_the_preset(options: list[str]) -> None:
    assert pretrain.parse([*options, "--record"])[0].record == records.RESULTS / "quality_cpu.json"
    assert pretrain.parse([*options, "--preset", "small", "--record"])[0].record.name == "quality_small.json"
    assert pretrain.parse([*options, "--record", "x.json"])[0].record == Path("x.json")
    assert pretrain.parse(options)[0].record is None


def test_a_single_run_that_diverges_is_an_error(tmp_path: Path, options: list[str]) -> None:
    with pytest.raises(FloatingPointError, match=r"gwt2: the loss is .* at step \d+; lower --lr"):
        pretrain.main([*options, "--lr", "1e30", "--out", str(tmp_path / "out")])


def test_a_comparison_in_which_every_run_diverges(
    tmp_path: Path, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    pretrain.main([*options, "--lr", "1e30", "--compare", "adamw", "gwt2", "--out", str(tmp_path / "out")])
    assert capsys.readouterr().out.count("diverged") >= 2
    assert not (tmp_path / "out" / "losses.png").exists()


def test_mean_and_spread_worked_by_hand() -> None:
    runs = [
        [{"tokens": 10, "seconds": 1.0, "loss": 4.0}, {"tokens": 20, "seconds": 2.0, "loss": 2.0}],
        [{"tokens": 10, "seconds": 3.0, "loss": 6.0}, {"tokens": 20, "seconds": 6.0, "loss": 2.0}],
    ]
    assert curve(runs, "tokens") == ([10, 20], [5.0, 2.0], [pytest.approx(2**0.5), 0.0])
    assert curve(runs, "seconds")[0] == [2.0, 4.0]
    assert curve(runs[:1], "tokens") == ([10, 20], [4.0, 2.0], [0.0, 0.0])
    assert with_spread([1.0, 3.0], 2) == "2.00 ± 1.41"
    assert with_spread([1.0], 2) == "1.00"


def test_training_seconds_add_up_across_a_resume(
    tmp_path: Path, options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]

    def lasting(seconds: float, name: str) -> None:
        honest = getattr(Run, name)

        def slow(run: Run, *arguments: Any) -> Any:
            now[0] += seconds
            return honest(run, *arguments)

        monkeypatch.setattr(Run, name, slow)

    monkeypatch.setattr(clocks, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    lasting(1.0, "train_step")
    lasting(100.0, "heldout_loss")
    lasting(10_000.0, "save")
    trained(options, tmp_path / "out", stop_at=5)
    now[0] += 1e6
    trained(options, tmp_path / "out", resume=True)
    evaluations = read_log(tmp_path / "out" / "log.jsonl", "eval")
    assert [(e["step"], e["seconds"], e["tokens"]) for e in evaluations] == [
        (step, float(step), 32 * step) for step in (2, 4, 6, 8, 10)
    ]
    assert read_result(tmp_path / "out")["seconds"] == 10.0


def test_runs_on_different_batches_are_not_compared(options: list[str]) -> None:
    assert run_of(options, "gwt2", "--seed", "1").data_digest == 0
    one = {"optimizer": "adamw", "seed": 0, "data_digest": "1", "step": 10, "text": "x", "heldout_tokens": 9}
    check_same_batches([one, {**one, "optimizer": "gwt2"}, {**one, "seed": 1, "data_digest": "2"}])
    with pytest.raises(ValueError, match="gwt2 and adamw cannot be compared: data_digest is '2' and '1'"):
        check_same_batches([one, {**one, "optimizer": "gwt2", "data_digest": "2"}])


def test_a_run_too_short_to_time_says_so(tmp_path: Path, options: list[str]) -> None:
    result = trained([*options, "--steps", "4"], tmp_path / "out")
    (row,) = rows_by(quality.rows_of("cpu", result), metric="optimizer_step")
    assert (row["median"], row["samples"], row["note"]) == (None, 0, "too few steps to time")
