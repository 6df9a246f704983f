"""Shows that the telemetry callbacks write each parameter's numbers into TensorBoard's files, every n steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer
from transformers.integrations import TensorBoardCallback

from gwt_kernels import GWTAdamW
from gwt_kernels.integrations.telemetry import scalars, with_telemetry
from tests.lightning_runs import fit, pl
from tests.tiny import STAND_IN, llama, stand_in
from tests.trainer_runs import arguments, with_mixin

pytest.importorskip("tensorboard", reason="needs TensorBoard: pip install tensorboard")

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gwt_kernels.integrations import lightning, transformers

TensorBoardLogger = pl.loggers.TensorBoardLogger

QUERY = "layers.1.self_attn.q_proj.weight"


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GWTAdamW, "telemetry", stand_in, raising=False)


def logged(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Every telemetry scalar under a folder: (step, value) by tag."""
    (file,) = folder.rglob("events.out.tfevents.*")
    events = EventAccumulator(str(file))
    events.Reload()
    tags = [tag for tag in events.Tags()["scalars"] if "telemetry" in tag]
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in tags}


def tracked(folder: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Trainer:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(folder / "logs"))
    return with_mixin(arguments(folder, report_to="tensorboard", **options))


def assert_logged(tags: dict[str, list[tuple[int, float]]], prefix: str) -> None:
    names = [name for name, _ in llama().named_parameters()]
    assert len(tags) == len(names) * len([*STAND_IN, "steps"])
    assert all(sum(tag.endswith(name) for tag in tags) == 3 for name in names)
    (query,) = (
        values for tag, values in tags.items() if tag.startswith(f"{prefix}telemetry/steps/") and QUERY in tag
    )
    assert query == [(2, 2.0), (4, 4.0), (6, 6.0)]
    assert all(v == [(2, 1.25), (4, 1.25), (6, 1.25)] for tag, v in tags.items() if "limiter" in tag)


def test_trainer(measured, tmp_path, monkeypatch):
    trainer = tracked(tmp_path, monkeypatch)
    trainer.add_callback(transformers.TelemetryCallback(trainer, every=2))
    trainer.train()
    assert_logged(logged(tmp_path / "logs"), "train/")
    assert not any("telemetry" in key for row in trainer.state.log_history for key in row)


def test_lightning(measured, tmp_path):
    logger = TensorBoardLogger(tmp_path)
    fit(tmp_path, logger=logger, callbacks=[lightning.TelemetryCallback(every=2)], accumulate_grad_batches=2)
    assert_logged(logged(tmp_path), "")


def test_trainer_s_own_tracker_given_by_hand(measured, tmp_path):
    trainer = with_mixin(arguments(tmp_path, max_steps=1))
    trainer.add_callback(TensorBoardCallback)
    trainer.add_callback(transformers.TelemetryCallback(trainer, every=1))
    trainer.train()
    assert {step for values in logged(tmp_path).values() for step, _ in values} == {1}


@pytest.mark.parametrize("every", [0, -1, True, 2.0])
def test_every_is_a_number_of_steps(every, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="every must be an integer of at least 1"):
        lightning.TelemetryCallback(every=every)
    with pytest.raises(ValueError, match="every must be an integer of at least 1"):
        transformers.TelemetryCallback(tracked(tmp_path, monkeypatch), every=every)


def test_nothing_to_log_to(measured, tmp_path):
    with pytest.raises(ValueError, match="set report_to='tensorboard'"):
        transformers.TelemetryCallback(with_mixin(arguments(tmp_path)))
    with pytest.raises(ValueError, match="pass logger=TensorBoardLogger"):
        fit(tmp_path, logger=False, callbacks=[lightning.TelemetryCallback()])


def test_an_optimizer_without_telemetry(tmp_path, monkeypatch):
    monkeypatch.delattr(GWTAdamW, "telemetry", raising=False)
    trainer = tracked(tmp_path, monkeypatch)
    trainer.add_callback(transformers.TelemetryCallback(trainer))
    with pytest.raises(TypeError, match="but found GWTAdamW"):
        trainer.train()
    with pytest.raises(TypeError, match="but found GWTAdamW"):
        fit(tmp_path, logger=TensorBoardLogger(tmp_path), callbacks=[lightning.TelemetryCallback()])


def test_telemetry_that_is_off(tmp_path, monkeypatch):
    """Off, an optimizer measures nothing; the callback says so after one step, though it would log after 50."""
    monkeypatch.setattr(GWTAdamW, "telemetry", lambda optimizer: {}, raising=False)
    trainer = tracked(tmp_path, monkeypatch)
    trainer.add_callback(transformers.TelemetryCallback(trainer))
    with pytest.raises(ValueError, match="pass telemetry=True"):
        trainer.train()
    assert trainer.state.global_step == 1
    with pytest.raises(ValueError, match="pass telemetry=True"):
        fit(tmp_path, logger=TensorBoardLogger(tmp_path), callbacks=[lightning.TelemetryCallback()])


def test_several_optimizers(measured):
    """Those without telemetry are left out, and equal names are told apart."""
    ours = [GWTAdamW([("w", torch.nn.Parameter(torch.ones(2, 8)))]) for _ in range(2)]
    for optimizer in ours:
        (p,) = optimizer.param_groups[0]["params"]
        p.grad = torch.ones_like(p)
        optimizer.step()
    found = with_telemetry([torch.optim.SGD([torch.ones(2)]), *ours])
    assert found == ours
    assert sorted(name for name in scalars(found) if "limiter" in name) == [
        "telemetry/limiter/w",
        "telemetry/limiter/w/optimizer_1",
    ]
