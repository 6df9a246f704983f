"""GWTMuon, with groups of AdamW, in the loops of other libraries: saved and resumed bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

from gwt_kernels import GWTMuon, gwt_param_groups
from tests.integrations import test_accelerate
from tests.support import lightning_runs, trainer_runs
from tests.support.tiny import assert_same_run


def muon_of(model: nn.Module, **options: object) -> GWTMuon:
    groups = gwt_param_groups(model, level=1, rule="muon", scale=1.0, weight_decay=0.1, adamw_lr=0.005)
    return GWTMuon(groups, lr=0.02, **options)


def test_lightning_resumes_and_clips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lightning_runs, "optimizer_of", muon_of)
    epochs = {"max_epochs": 2, "max_steps": -1, "count": 12}
    saves = lightning_runs.ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, save_on_train_epoch_end=True)
    whole = lightning_runs.fit(tmp_path, enable_checkpointing=True, callbacks=[saves], **epochs)
    assert type(whole[1]) is GWTMuon
    resumed = lightning_runs.fit(tmp_path, resume=str(tmp_path / "step=3.ckpt"), **epochs)
    assert len(resumed[0].seen) == 3
    assert_same_run(*whole, *resumed)


def test_accelerate_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(test_accelerate, "optimizer_of", muon_of)
    test_accelerate.test_resumes_bit_for_bit(tmp_path)
    test_accelerate.test_equals_a_plain_loop()


@pytest.mark.parametrize("route", [trainer_runs.with_mixin, trainer_runs.with_factory])
def test_trainer_resumes(route, tmp_path: Path) -> None:
    options = {"rule": "muon", "adamw_lr": 0.005}
    whole = route(trainer_runs.arguments(tmp_path / "whole", save_strategy="steps", save_steps=3), **options)
    whole.train()
    resumed = route(trainer_runs.arguments(tmp_path / "resumed"), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert type(getattr(whole.optimizer, "optimizer", whole.optimizer)) is GWTMuon
    assert_same_run(whole.model, whole.optimizer, resumed.model, resumed.optimizer)
