"""Options of a short fine-tuning run, and a list of the runs that a comparison makes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bench.finetune import __main__ as finetune
from bench.finetune.training import RunConfig, train
from tests.support.finetuning import tiny_options


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[RunConfig]:
    """Return a list of the runs, made in this process, since new ones take seconds to start."""
    made: list[RunConfig] = []

    def here(config: RunConfig, *rest: Any) -> dict[str, Any]:
        result = train(config, *rest)
        made.append(config)
        return result

    monkeypatch.setattr(finetune, "train_apart", here)
    return made


@pytest.fixture
def options(tmp_path: Path) -> list[str]:
    return tiny_options(tmp_path)
