"""Times of steps to compare: turns, the same gradients, fused AdamW, and rows that replace older ones."""

from __future__ import annotations

import re
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from bench.common import records, step_times
from bench.common.step_times import PASSES, WARM_UP, Contender, measure
from bench.finetune import __main__ as finetune
from bench.pretrain import __main__ as pretrain
from gwt_kernels import GWTAdamW
from tests.support import finetuning, pretraining

CPU = torch.device("cpu")


class Logged(SGD):
    """An optimizer that records when it steps, and on which gradients."""

    def __init__(self, model: nn.Module, name: str, log: list[tuple[str, float]]) -> None:
        super().__init__(model.parameters(), lr=0.0)
        self.name, self.log = name, log

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        total = sum(float(p.grad.sum()) for group in self.param_groups for p in group["params"])
        self.log.append((self.name, total))


def logged(log: list[tuple[str, float]], alive: weakref.WeakSet[nn.Module] | None = None) -> list[Contender]:
    def contender(name: str) -> Contender:
        def build() -> tuple[nn.Module, Optimizer]:
            model = nn.Linear(3, 2)
            if alive is not None:
                assert not alive  # the earlier copy is gone
                alive.add(model)
            return model, Logged(model, name, log)

        return Contender(name, None, build)

    return [contender("a"), contender("b")]


def test_small_models_take_turns_on_the_same_gradients() -> None:
    log: list[tuple[str, float]] = []
    found = measure(logged(log), CPU, rounds=4)
    assert [name for name, _ in log] == ["a", "b"] * (WARM_UP + 4)
    assert len({total for _, total in log}) == 1
    for timed in found:
        assert (timed.parameters, timed.trained_parameters, timed.milliseconds.samples) == (8, 8, 4)
        assert 0 < timed.milliseconds.p20 <= timed.milliseconds.median <= timed.milliseconds.p80


def test_of_large_models_one_copy_is_held_and_all_have_several_turns() -> None:
    log: list[tuple[str, float]] = []
    found = measure(logged(log, weakref.WeakSet()), CPU, rounds=4, large=7)
    a_turn = WARM_UP + 2  # four timed steps in three turns: two in each
    assert [name for name, _ in log] == [name for _ in range(PASSES) for name in "ab" for _ in range(a_turn)]
    assert {timed.milliseconds.samples for timed in found} == {2 * PASSES}


def test_adamw_is_fused_and_keeps_its_groups() -> None:
    model = nn.Linear(3, 2)
    groups = [{"params": [model.weight], "lr": 0.5, "weight_decay": 0.1}, {"params": [model.bias]}]
    made = step_times.fused(AdamW(groups, lr=0.25, betas=(0.8, 0.9), weight_decay=0.0))
    assert [(g["lr"], g["weight_decay"], g["betas"], g["fused"]) for g in made.param_groups] == [
        (0.5, 0.1, (0.8, 0.9), True),
        (0.25, 0.0, (0.8, 0.9), True),
    ]
    model(torch.ones(3)).sum().backward()
    made.step()
    for other in (Adam(model.parameters()), GWTAdamW(model.parameters(), lr=0.1, level=0)):
        assert step_times.fused(other) is other


def test_pretraining_steps_are_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = tmp_path / "times.json"
    line = [*pretraining.tiny_options(tmp_path), "--record", str(record), "--step-times", "3"]
    pretrain.main([*line, "--compare", "adamw", "gwt2"])
    rows = records.rows_of(record, "step_times")
    assert [row["optimizer"] for row in rows] == ["adamw", "gwt2"]
    for row in rows:
        assert (row["of"], row["preset"], row["recipe"]) == ("pretrain", "cpu", None)
        assert (row["metric"], row["unit"], row["samples"]) == ("optimizer step", "ms", 3)
        assert row["command"].startswith("python -m bench.pretrain")
        assert {"date", "commit", "threads", "own_backend", "torch", "device", "sources"} <= row.keys()
        assert row["parameters"] == row["trained_parameters"] > 0
    assert re.search(r"^gwt2: \S+ ms \(\S+ to \S+ over 3 steps\)$", capsys.readouterr().out, re.MULTILINE)
    pretrain.main([*line, "--sweep", "gwt2"])
    again = records.rows_of(record, "step_times")
    assert [row["optimizer"] for row in again] == ["adamw", "gwt2"]
    assert again[0] == rows[0]
    assert again[1] != rows[1]  # replaced


def test_the_presets_grids_are_timed_by_default_and_missing_packages_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    monkeypatch.setitem(sys.modules, "galore_torch", None)
    monkeypatch.setitem(sys.modules, "apollo_torch", None)
    options, grids = pretrain.parse(["--step-times", "--device", "cpu"])
    assert (options.step_times, options.record) == (step_times.ROUNDS, tmp_path / "step_times_cpu.json")
    line = [*pretraining.tiny_options(tmp_path), "--step-times", "1"]
    pretrain.main(line)
    rows = records.rows_of(options.record, "step_times")
    assert [row["optimizer"] for row in rows] == [name for name in grids if name not in ("galore", "apollo")]
    assert "left out: galore needs other packages" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"--step-times: nothing to time is left; name optimizers after --compare"):
        pretrain.main([*line, "--compare", "galore"])


def test_finetuning_steps_are_recorded(tmp_path: Path) -> None:
    record = tmp_path / "times.json"
    line = [*finetuning.tiny_options(tmp_path), "--record", str(record), "--step-times", "3"]
    finetune.main([*line, "--recipes", "matrices", "head"])
    rows = records.rows_of(record, "step_times")
    assert [(row["optimizer"], row["recipe"]) for row in rows] == [
        ("adamw", "matrices"),
        ("gwt2", "matrices"),
        ("adamw", "head"),
    ]
    for row in rows:
        assert (row["of"], row["preset"], row["samples"], row["threads"]) == ("finetune", "reviews_own", 3, 1)
        assert 0 < row["trained_parameters"] < row["parameters"]
    assert not (tmp_path / "out" / "results.json").exists()  # nothing is trained


def test_all_recipes_of_the_preset_are_timed_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    options = finetune.parse(["--step-times", "--preset", "kernel_docs"])
    assert options.record == tmp_path / "step_times_kernel_docs.json"
    assert set(options.recipes) == {"full", "matrices", "lora", "head"}
    assert finetune.parse(["--step-times", "--recipes", "head"]).recipes == ["head"]
    assert finetune.parse([]).recipes == ["full", "lora"]
