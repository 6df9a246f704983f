"""torchtitan builds GWTAdamW from a configuration, saves it in shards and resumes it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from tests.support import forked, torchtitan_runs

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("torchtitan") is None,
    reason="torchtitan is kept apart: make build/torchtitan/.made, then PYTHONPATH=$PWD/build/torchtitan",
)


def test_sharded_and_resumed_like_the_optimizer_alone(tmp_path: Path) -> None:
    forked.run(2, torchtitan_runs.main, tmp_path)


def test_torchtitans_own_groups_are_refused() -> None:
    from torchtitan.components.optimizer import ParamGroupConfig

    config = torchtitan_runs.example().gwt_adamw()
    config.param_groups = [ParamGroupConfig(pattern=".*", optimizer_name="AdamW")]
    with pytest.raises(ValueError, match="gwt_param_groups"):
        config.build(model_parts=[torchtitan_runs.model()])
