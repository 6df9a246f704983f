"""torchtitan's own model under GWTAdamW, in processes that tests/integrations/test_torchtitan.py starts."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.fsdp import fully_shard

from gwt_kernels import GWTAdamW, gwt_param_groups
from tests.support import runs
from tests.support.sharded import close, give, mesh_of, whole

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
OPTIONS: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.95)}
GROUPS: dict[str, Any] = {"level": 2, "weight_decay": 0.1, "exclude": [r"layers\.0\."]}


def example() -> Any:
    """Import the module that users copy."""
    sys.path.insert(0, str(EXAMPLES))
    spec = importlib.util.spec_from_file_location("with_torchtitan", EXAMPLES / "with_torchtitan.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["with_torchtitan"] = module
    spec.loader.exec_module(module)
    return module


def model() -> nn.Module:
    """Build two layers of torchtitan's LLaMA from its debugging preset, with fixed weights."""
    from torchtitan.models.llama3 import model_registry

    built = model_registry("debugmodel").model.build().double()
    for name in list(built.layers)[2:]:
        del built.layers[name]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in built.parameters():
            p.copy_(0.02 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return built


def steps(run: tuple[nn.Module, Any], reference: tuple[nn.Module, Any], first: int, last: int) -> None:
    """Take steps of both with the same gradients."""
    for t in range(first, last):
        give(list(run[0].parameters()), list(reference[0].parameters()), t)
        for _, optimizer in (run, reference):
            optimizer.step()


def state_of(container: Any) -> dict[str, Any]:
    return {key: whole(value) for key, value in container.state_dict().items()}


def main(folder: Path) -> None:
    """Check that a run sharded and resumed through torchtitan's container equals GWTAdamW on the whole model."""
    titan = example()
    mesh = mesh_of(2)
    reference = model()
    alone = GWTAdamW(gwt_param_groups(reference, **GROUPS), **OPTIONS)

    def sharded() -> tuple[nn.Module, Any]:
        built = model()
        fully_shard(built, mesh=mesh)
        return built, titan.gwt_adamw(OPTIONS["lr"], groups=GROUPS, betas=OPTIONS["betas"]).build(
            model_parts=[built]
        )

    first, container = sharded()
    steps((first, container), (reference, alone), 0, 3)
    saved = {"optimizer": container.state_dict(), "model": first.state_dict()}
    dcp.save(saved, checkpoint_id=folder)
    second, resumed = sharded()
    state = {"optimizer": resumed.state_dict(), "model": second.state_dict()}
    assert all(value == 0 for key, value in state["optimizer"].items() if key.endswith(".step"))
    dcp.load(state, checkpoint_id=folder)
    second.load_state_dict(state["model"])
    resumed.load_state_dict(state["optimizer"])
    runs.assert_same_bits(state_of(resumed), state_of(container))
    steps((second, resumed), (reference, alone), 3, 5)
    for (name, p), expected in zip(second.named_parameters(), reference.parameters(), strict=True):
        close(whole(p.detach()), expected.detach(), name)
    levels = {name: group["level"] for group in resumed.optimizers[0].param_groups for name in group["param_names"]}
    assert levels["layers.1.attention.wo.weight"] == 2
    assert levels["layers.0.attention.wo.weight"] == levels["tok_embeddings.weight"] == 0
    dist.barrier()
