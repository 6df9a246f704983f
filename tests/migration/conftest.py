"""The trained model whose checkpoints the tests of ``gwt-kernels migrate`` convert."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.support.migrated_files import LLAMA, step


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return a model, its configuration file, and AdamW's state after two steps over ``model.parameters()``."""
    folder = tmp_path_factory.mktemp("model")
    config = folder / "config.json"
    config.write_text(json.dumps({"model_type": "llama", **LLAMA}))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **LLAMA))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.003, betas=(0.8, 0.9), eps=1e-7, weight_decay=0.1)
    step(model, optimizer, 0, 1)
    return SimpleNamespace(config=config, model=model, state=optimizer.state_dict())
