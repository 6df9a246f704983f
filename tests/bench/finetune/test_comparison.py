"""Comparisons: every run is recorded once, and sweeps have equal settings."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.common import records
from bench.common.grids import settings_of
from bench.common.models import CONFIGS
from bench.finetune import __main__ as finetune
from bench.finetune import models, results
from bench.finetune.fetch import BUILD, MARK
from bench.finetune.table import choices
from bench.finetune.training import RunConfig, train
from bench.pretrain.optimizers import check_name
from tests.support.finetuning import write_bert, write_json_lines, write_llama, write_text

Row = results.Row
PRESETS = sorted(CONFIGS.glob("finetune_*.json"))


def rows_in(folder: Path) -> list[Row]:
    return records.rows_of(folder / "out" / "results.json", results.BENCHMARK)


def settings(made: list[RunConfig]) -> list[tuple[Any, ...]]:
    return [(config.optimizer, config.recipe, config.lr, config.scale, config.seed) for config in made]


def test_a_comparison_in_processes_of_its_own(
    tmp_path: Path, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    finetune.main([*options, "--lr", "0.01", "--scale", "0.5"])
    rows = rows_in(tmp_path)
    assert {row["optimizer"] for row in rows} == {"adamw", "gwt2"}
    assert len({row["data_digest"] for row in rows}) == 1  # the same batches
    found = {(row["optimizer"], row["metric"]): row["median"] for row in rows}
    assert found["gwt2", "state_bytes"] < found["adamw", "state_bytes"]
    for name in ("adamw", "gwt2"):
        assert 0 <= found[name, "test_accuracy"] <= 1
        assert found[name, "peak_memory"] > 10 * found[name, "state_bytes"]
    (time,) = (row for row in rows if (row["optimizer"], row["metric"]) == ("gwt2", "optimizer_step"))
    assert 0 < time["p20"] <= time["median"] <= time["p80"]
    for row in rows:
        assert row["command"].startswith("python -m bench.finetune")
        assert (row["threads"], row["examples"], row["test_size"]) == (1, 48, 20)
        assert (row["steps"], row["lr"], row["scale"], row["rank"]) == (6, 0.01, 0.5, 0)
    printed = capsys.readouterr().out
    assert "one seed: no spread is known" in printed
    assert (tmp_path / "out" / "table.txt").read_text() in printed


def test_runs_are_not_repeated_unless_asked(tmp_path: Path, options: list[str], ran: list[RunConfig]) -> None:
    line = [*options, "--lr", "0.01", "--scale", "0.5"]
    finetune.main(line)
    first = rows_in(tmp_path)
    finetune.main(line)
    assert len(ran) == 2
    assert rows_in(tmp_path) == first
    finetune.main([*line, "--again"])
    assert len(ran) == 4
    assert [row["metric"] for row in rows_in(tmp_path)] == [row["metric"] for row in first]
    finetune.main([*line, "--seeds", "2"])
    assert settings(ran[4:]) == [("adamw", "full", 0.01, 0.5, 1), ("gwt2", "full", 0.01, 0.5, 1)]
    finetune.main([*line, "--examples", "40"])  # with other data, these are new runs
    assert len(ran) == 8
    before = (tmp_path / "out" / "table.txt").read_text()
    twice = ["--optimizers", "adamw", "gwt2", "gwt2", "--recipes", "full", "full", "--lr", "0.01", "0.01"]
    finetune.main([*line, "--examples", "40", *twice])  # duplicates count once
    assert len(ran) == 8
    assert (tmp_path / "out" / "table.txt").read_text() == before


def test_an_interrupted_comparison_keeps_what_it_measured(
    tmp_path: Path, options: list[str], ran: list[RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    line = [*options, "--lr", "0.01", "--scale", "0.5"]
    here = finetune.train_apart

    def interrupted(config: RunConfig, *rest: Any) -> dict[str, Any]:
        if config.optimizer == "gwt2":
            raise KeyboardInterrupt
        return here(config, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(finetune, "train_apart", interrupted)
        with pytest.raises(KeyboardInterrupt):
            finetune.main(line)
    kept = rows_in(tmp_path)
    assert {row["optimizer"] for row in kept} == {"adamw"}
    assert "adamw" in (tmp_path / "out" / "table.txt").read_text()
    finetune.main(line)
    assert [config.optimizer for config in ran] == ["adamw", "gwt2"]
    assert rows_in(tmp_path)[: len(kept)] == kept


def test_a_run_that_memory_ends_is_left_for_another_time(
    tmp_path: Path, options: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def ended(config: RunConfig, *rest: Any) -> dict[str, Any]:
        if config.optimizer == "adamw":
            raise MemoryError("the process was ended from outside")
        return train(config, *rest)

    monkeypatch.setattr(finetune, "train_apart", ended)
    finetune.main([*options, "--lr", "0.01"])
    assert {row["optimizer"] for row in rows_in(tmp_path)} == {"gwt2"}
    assert "not finished: the process was ended" in capsys.readouterr().err


def test_a_sweep_gives_every_optimizer_the_same_settings(
    tmp_path: Path, options: list[str], ran: list[RunConfig]
) -> None:
    line = [*options, "--sweep", "--lr", "0.01", "1e30", "--scale", "0.25", "0.5", "--seeds", "2", "--steps", "10"]
    finetune.main(line)
    rows = rows_in(tmp_path)
    for name in ("adamw", "gwt2"):
        tried = {(row["lr"], row["scale"]) for row in rows if row["optimizer"] == name and row["seed"] == 0}
        assert tried == {(lr, scale) for lr in (0.01, 1e30) for scale in (0.25, 0.5)}
        best = results.best_setting(rows, name, "full")
        assert best is not None
        assert best["lr"] == 0.01
        again = [row for row in rows if row["optimizer"] == name and row["seed"] == 1]
        assert {(row["lr"], row["scale"]) for row in again} == {(best["lr"], best["scale"])}
    failed = [row for row in rows if row["lr"] == 1e30]
    assert all(row["median"] is None and "lower --lr (1e+30)" in row["note"] for row in failed)
    assert len(failed) == 4
    (adamw, gwt2) = choices(rows)
    assert (adamw.tried, gwt2.tried) == (4, 4)
    assert len(adamw.values["test_loss"]) == len(gwt2.values["test_accuracy"]) == 2


def test_the_recorded_best_is_what_a_comparison_runs(
    tmp_path: Path, options: list[str], ran: list[RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    finetune.main([*options, "--sweep", "--lr", "0.01", "0.02", "--scale", "0.25", "0.5"])
    record = tmp_path / "recorded.json"
    (tmp_path / "out" / "results.json").rename(record)
    monkeypatch.setattr(results, "default_path", lambda preset: record)
    del ran[:]
    finetune.main(options)
    rows = records.rows_of(record, results.BENCHMARK)
    for config in ran:
        best = results.best_setting(rows, config.optimizer, "full")
        assert best is not None
        assert (config.lr, config.scale) == (best["lr"], best["scale"])
    assert len(ran) == 2
    finetune.main([*options, "--lr", "0.5"])
    assert {config.lr for config in ran[2:]} == {0.5}


def test_recipes_without_matrices_run_adamw_alone(options: list[str]) -> None:
    parsed = finetune.parse([*options, "--recipes", "full", "head"])
    assert finetune.pairs_of(parsed) == [("adamw", "full"), ("gwt2", "full"), ("adamw", "head")]
    with pytest.raises(ValueError, match="use adamw with it"):
        finetune.pairs_of(finetune.parse([*options, "--optimizers", "gwt2", "--recipes", "head"]))
    with pytest.raises(ValueError, match="go with adamw alone; name it"):
        finetune.pairs_of(finetune.parse([*options, "--optimizers", "gwt2", "gwt3", "--recipes", "head"]))


def test_other_data_have_a_name_and_a_folder_of_their_own() -> None:
    assert finetune.parse([]).out == Path("runs/finetune/reviews")
    assert finetune.parse(["--record"]).record == records.RESULTS / "finetune_reviews.json"
    own = finetune.parse(["--model", "elsewhere", "--record"])
    assert own.out == Path("runs/finetune/reviews_own")
    assert own.record.name == "finetune_reviews_own.json"


def test_plain_text_and_json_lines(tmp_path: Path, options: list[str], ran: list[RunConfig]) -> None:
    data = write_json_lines(tmp_path / "reviews.jsonl")
    finetune.main([*options, "--data", str(data), "--text-column", "text", "--lr", "0.01"])
    model, text = write_llama(tmp_path / "llama"), write_text(tmp_path / "text.txt")
    line = ["--preset", "kernel_docs", "--model", str(model), "--data", str(text), "--out", str(tmp_path / "text")]
    line += [
        "--device",
        "cpu",
        "--max-length",
        "12",
        "--steps",
        "3",
        "--recipes",
        "matrices",
        "--precision",
        "float32",
    ]
    finetune.main([*line, "--threads", "1", "--validation", "2", "--test", "3"])
    rows = records.rows_of(tmp_path / "text" / "results.json", results.BENCHMARK)
    assert {row["optimizer"] for row in rows} == {"adamw", "gwt2", "foam2", "muon2"}
    assert {"untrained_loss", "test_loss"} <= {row["metric"] for row in rows}
    assert "test_accuracy" not in {row["metric"] for row in rows}


# Presets


def test_without_a_record_rates_are_the_presets_or_the_middle_of_a_grid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "default_path", lambda preset: tmp_path / "none.json")
    task = type("Nothing", (), {"facts": {}})()

    def rates(optimizer: str, recipe: str, *line: str) -> list[tuple[float, float]]:
        parsed = finetune.parse([*line, "--out", str(tmp_path)])
        return finetune.Comparison(parsed, task, torch.device("cpu")).rates(optimizer, recipe)

    assert rates("gwt2", "full") == [(3e-4, 0.3)]
    assert rates("muon2", "full") == [(3e-4, 10.0)]
    assert rates("adamw", "lora") == [(1e-3, 1.0)]
    assert rates("adamw", "head") == [(3e-3, 1.0)]
    assert rates("gwt2", "full", "--preset", "glue", "--task", "cola") == [(3e-5, 2.0)]
    assert rates("muon2", "full", "--scale", "7") == [(3e-4, 7.0)]


def test_muon_has_a_grid_of_its_own(tmp_path: Path) -> None:
    parsed = finetune.parse(["--sweep", "--out", str(tmp_path)])
    task = type("Nothing", (), {"facts": {}})()
    comparison = finetune.Comparison(parsed, task, torch.device("cpu"))
    first, *beyond = parsed.grids["full muon"]
    for name in ("muon2", "muon0"):
        tried = comparison.rates(name, "full")
        assert tried[:9] == [(lr, scale) for lr in first["lr"] for scale in first["scale"]]
        assert tried[9:] == [(lr, scale) for grid in beyond for lr in grid["lr"] for scale in grid["scale"]]
    others = {tuple(comparison.rates(name, "full")) for name in ("adamw", "gwt2", "gwt3", "foam2")}
    assert len(others) == 1
    assert others != {tuple(comparison.rates("muon2", "full"))}


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_presets_name_what_there_is_and_sweep_alike(path: Path) -> None:
    values = json.loads(path.read_text())
    known = {action.dest for action in finetune.make_parser()._actions}
    assert values.keys() <= known | {"about", "grids", "tasks", "fetch"}
    assert set(values["recipes"]) <= values["grids"].keys()
    assert {name.split()[0] for name in values["grids"]} <= models.RECIPES.keys()
    assert len({len(settings_of(grid, ("lr", "scale"))) for grid in values["grids"].values()}) == 1
    assert all(check_name(name) for name in values["optimizers"])
    assert "adamw" in values["optimizers"]
    for task, changed in values.get("tasks", {}).items():
        assert changed.keys() <= known, task


def test_the_glue_preset_is_the_published_recipe(tmp_path: Path, ran: list[RunConfig]) -> None:
    folder = write_bert(tmp_path / "bert")
    (tmp_path / "train.tsv").write_text("".join(f"s\t{i % 2}\t\tfine film {'cast ' * i}\n" for i in range(12)))
    (tmp_path / "dev.tsv").write_text("".join(f"s\t{i % 2}\t\tdull plot {'cast ' * i}\n" for i in range(6)))
    line = ["--preset", "glue", "--task", "cola", "--model", str(folder), "--out", str(tmp_path / "out")]
    line += ["--data", str(tmp_path / "train.tsv"), "--test-data", str(tmp_path / "dev.tsv"), "--device", "cpu"]
    finetune.main([*line, "--max-length", "24", "--epochs", "2"])
    assert settings(ran) == [(name, "full", 3e-5, 2.0, 0) for name in ("adamw", "gwt2")]
    assert {(config.batch, config.steps) for config in ran} == {(32, 2)}
    rows = rows_in(tmp_path)
    assert {(row["examples"], row["validation_size"], row["test_size"]) for row in rows} == {(12, 0, 6)}
    with pytest.raises(ValueError, match=r"--task None: preset 'glue' has the tasks cola, mnli, .*; name one"):
        finetune.parse(["--preset", "glue"])
    with pytest.raises(ValueError, match=r"--task sst2: preset 'reviews' has no tasks; leave it out"):
        finetune.parse(["--task", "sst2"])


# Recorded results


@pytest.mark.skipif(
    not (BUILD / "reviews" / MARK).exists(),
    reason="no downloaded model: python -m bench.finetune.fetch reviews makes build/finetune/reviews",
)
def test_the_downloaded_pair(tmp_path: Path, ran: list[RunConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(BUILD.parents[1])
    monkeypatch.setattr(sys, "argv", ["x"])
    line = [
        "--examples",
        "64",
        "--validation",
        "16",
        "--test",
        "64",
        "--recipes",
        "full",
        "--out",
        str(tmp_path / "out"),
    ]
    finetune.main([*line, "--optimizers", "adamw", "gwt2", "--steps", "2", "--device", "cpu"])
    rows = rows_in(tmp_path)
    assert {row["parameters"] for row in rows} == {22_713_986}
    assert {tuple(row["labels"]) for row in rows} == {("negative", "positive")}
    found = {(row["optimizer"], row["metric"]): row["median"] for row in rows}
    assert found["adamw", "state_bytes"] / 1e6 == pytest.approx(181.7, abs=0.1)
    assert found["gwt2", "state_bytes"] / 1e6 == pytest.approx(118.0, abs=0.1)


@pytest.mark.parametrize("record", sorted(records.RESULTS.glob("finetune_*.json")), ids=lambda path: path.stem)
def test_what_is_recorded_is_swept_alike(record: Path) -> None:
    rows = records.rows_of(record, results.BENCHMARK)
    chosen = choices(rows)
    assert len({choice.tried for choice in chosen}) == 1  # as many settings for each
    for name in ("adamw", "gwt2"):
        own = [choice for choice in chosen if choice.optimizer == name and choice.recipe in models.WHOLE]
        assert own
        assert all(len(choice.values["test_loss"]) >= 2 for choice in own)  # needed for a spread
    shared = ("model_digest", "text_digest", "steps", "batch", "warmup", "precision", "weight_decay", "grad_clip")
    assert len({tuple(row[key] for key in shared) for row in rows}) == 1
    batches = {(row["seed"], row["data_digest"]) for row in rows}
    assert len(batches) == len({seed for seed, _ in batches})  # the same ones for every optimizer
