"""Telemetry callbacks write each parameter's numbers to TensorBoard's files, every n steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer
from transformers.integrations import TensorBoardCallback

from gwt_kernels import GWTAdamW
from gwt_kernels.integrations.telemetry import scalars, with_telemetry
from tests.support.lightning_runs import fit, pl
from tests.support.tiny import llama, sentences
from tests.support.trainer_runs import arguments, with_mixin

pytest.importorskip("tensorboard", reason="needs TensorBoard: pip install tensorboard")

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gwt_kernels.integrations import lightning, transformers

TensorBoardLogger = pl.loggers.TensorBoardLogger


def logged(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Return every telemetry scalar under a folder: (step, value) by tag."""
    (file,) = folder.rglob("events.out.tfevents.*")
    events = EventAccumulator(str(file))
    events.Reload()
    tags = [tag for tag in events.Tags()["scalars"] if "telemetry" in tag]
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in tags}


def tracked(folder: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Trainer:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(folder / "logs"))
    return with_mixin(arguments(folder, report_to="tensorboard"), **options)


def assert_logged(tags: dict[str, list[tuple[int, float]]], optimizer: Any, prefix: str) -> None:
    """Raise AssertionError unless steps 2, 4 and 6 are logged, the last with the optimizer's numbers."""
    measured = getattr(optimizer, "optimizer", optimizer).telemetry()
    assert len(measured) == len(list(llama().parameters()))
    expected = {f"{prefix}telemetry/{what}/{name}": v for name, row in measured.items() for what, v in row.items()}
    assert tags.keys() == expected.keys()
    for tag, values in tags.items():
        assert [step for step, _ in values] == [2, 4, 6]
        assert values[-1][1] == pytest.approx(expected[tag], rel=1e-6)  # the files hold float32
    moving = [tag for tag in tags if "update_rms" in tag and len({value for _, value in tags[tag]}) == 3]
    assert len(moving) == len(measured)


def test_trainer(tmp_path, monkeypatch):
    trainer = tracked(tmp_path, monkeypatch, telemetry=True)
    trainer.add_callback(transformers.TelemetryCallback(trainer, every=2))
    trainer.train()
    assert_logged(logged(tmp_path / "logs"), trainer.optimizer, "train/")
    assert not any("telemetry" in key for row in trainer.state.log_history for key in row)


def test_lightning(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    callbacks = [lightning.TelemetryCallback(every=2)]
    _, optimizer = fit(tmp_path, telemetry=True, logger=logger, callbacks=callbacks, accumulate_grad_batches=2)
    assert_logged(logged(tmp_path), optimizer, "")


def test_a_tracker_passed_explicitly(tmp_path):
    trainer = with_mixin(arguments(tmp_path, max_steps=1), telemetry=True)
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


def test_no_tracker_to_log_to(tmp_path):
    with pytest.raises(ValueError, match="set report_to='tensorboard'"):
        transformers.TelemetryCallback(with_mixin(arguments(tmp_path), telemetry=True))
    with pytest.raises(ValueError, match="pass logger=TensorBoardLogger"):
        fit(tmp_path, telemetry=True, logger=False, callbacks=[lightning.TelemetryCallback()])


def test_an_optimizer_without_telemetry(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path))
    trainer = Trainer(llama(), arguments(tmp_path, report_to="tensorboard"), train_dataset=sentences())
    trainer.add_callback(transformers.TelemetryCallback(trainer))
    with pytest.raises(TypeError, match="but found AdamW"):
        trainer.train()
    assert trainer.state.global_step == 0
    with pytest.raises(TypeError, match="but found SGD"):
        with_telemetry([torch.optim.SGD([torch.ones(2)])])


def test_telemetry_that_is_off(tmp_path, monkeypatch):
    """Check that the callback raises after one step, although it would log after 50."""
    trainer = tracked(tmp_path, monkeypatch)
    trainer.add_callback(transformers.TelemetryCallback(trainer))
    with pytest.raises(ValueError, match="pass telemetry=True"):
        trainer.train()
    assert trainer.state.global_step == 1
    with pytest.raises(ValueError, match="pass telemetry=True"):
        fit(tmp_path, logger=TensorBoardLogger(tmp_path), callbacks=[lightning.TelemetryCallback()])


def test_several_optimizers():
    """Check that optimizers without telemetry are left out, and equal names are made distinct."""
    ours = [GWTAdamW([("w", torch.nn.Parameter(torch.ones(2, 8)))], telemetry=True) for _ in range(2)]
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
