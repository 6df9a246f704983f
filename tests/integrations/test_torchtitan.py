"""torchtitan builds GWTAdamW from a configuration, saves it in shards and resumes it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from tests.support import forked, torchtitan_runs

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("torchtitan") is None,
    reason="torchtitan is kept apart: make build/torchtitan/.made, then PYTHONPATH=$PWD/build/torchtitan",
)


def test_sharded_and_resumed_like_the_optimizer_alone(tmp_path: Path) -> None:
    forked.run(2, torchtitan_runs.main, tmp_path)


def test_muon_is_built_by_its_kind_and_steps() -> None:
    from gwt_kernels import GWTMuon

    groups = {"rule": "muon", "scale": 1.0, "adamw_lr": 1e-3}
    config = torchtitan_runs.example().gwt_adamw(lr=0.02, kind=GWTMuon, groups=groups, ns_steps=4)
    model = torchtitan_runs.model()
    container = config.build(model_parts=[model])
    (optimizer,) = container.optimizers
    assert type(optimizer) is GWTMuon
    assert [g["rule"] for g in optimizer.param_groups][:2] == ["muon", "adamw"]
    assert optimizer.param_groups[0]["ns_steps"] == 4
    before = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    container.step()
    assert not any(map(torch.equal, before, model.parameters()))


def test_torchtitans_own_groups_are_refused() -> None:
    from torchtitan.components.optimizer import ParamGroupConfig

    config = torchtitan_runs.example().gwt_adamw()
    config.param_groups = [ParamGroupConfig(pattern=".*", optimizer_name="AdamW")]
    with pytest.raises(ValueError, match="gwt_param_groups"):
        config.build(model_parts=[torchtitan_runs.model()])
