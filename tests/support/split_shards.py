"""Gather and reshard split bfloat16 weights; test_sharding.py starts the processes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, distribute_tensor

from gwt_kernels import GWTAdamW
from gwt_kernels.distributed.sharding import zeros_like_shard
from gwt_kernels.optim.state import low_bits_of
from tests.support import runs
from tests.support.resharded import FOAM, Run, build, gathered, resume, state_of
from tests.support.sharded import COLUMNS, mesh_of, shard, whole

FULL = StateDictOptions(full_state_dict=True)


def fresh(mesh: DeviceMesh | None) -> Run:
    return build(mesh, torch.bfloat16, weight_rounding="split", **FOAM)


def take(run: Run, first: int, last: int) -> None:
    """Take steps with the same gradients for every sharding."""
    for t in range(first, last):
        generator = torch.Generator().manual_seed(t)
        for p in run[0].parameters():
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
            if isinstance(p, DTensor):
                p.grad = distribute_tensor(p.grad, p.device_mesh, p.placements, src_data_rank=None)
        run[1].step()


def load(run: Run, model: dict[str, Any], optimizer: dict[str, Any]) -> None:
    set_model_state_dict(run[0], model, options=FULL)
    set_optimizer_state_dict(*run, optimizer, options=FULL)


def main(folder: Path) -> None:
    """Check that a run gathered to one process and sharded again over two continues with the same bits."""
    line = mesh_of(2)
    run, alone = fresh(line), fresh(None)
    take(run, 0, 5)
    take(alone, 0, 5)
    saved = gathered(run)
    runs.assert_same_bits(saved, gathered(alone))
    lows = [state["weight_low"] for state in saved["state"].values()]
    assert all(low.any() for low in lows)
    dcp.save(state_of(run), checkpoint_id=folder / "files")
    full = copy.deepcopy((get_model_state_dict(run[0], options=FULL), get_optimizer_state_dict(*run, options=FULL)))
    others = [fresh(None), fresh(line), fresh(None), fresh(line)]
    for other in others[:2]:
        load(other, *full)
    resume(others[2], folder / "files")
    resume(others[3], folder / "files", dist.group.WORLD)
    for other in others:
        runs.assert_same_bits(gathered(other), saved)
    for each in (run, alone, *others):
        take(each, 5, 8)
    for each in (alone, *others):
        runs.assert_same_bits(gathered(each), gathered(run))
    runs.assert_differ(gathered(run)["weights"], saved["weights"])
    _columns(line)


def _columns(line: DeviceMesh) -> None:
    """Check column shards, and a sharded state in the form of older checkpoints."""
    start = torch.randn(3, 7, generator=torch.Generator().manual_seed(0)).bfloat16()
    p, q = shard(start, line, [COLUMNS]), torch.nn.Parameter(start.clone())
    options: dict[str, Any] = {"level": 0, "weight_rounding": "split", "lr": 1e-2}
    optimizers = [GWTAdamW([x], **options) for x in (p, q)]
    p.grad, q.grad = distribute_tensor(start, line, [COLUMNS], src_data_rank=None), start.clone()
    for optimizer in optimizers:
        optimizer.step()
    low = optimizers[0].state[p]["weight_low"]
    runs.assert_same_bits(whole(low), optimizers[1].state[q]["weight_low"])
    old = copy.deepcopy(optimizers[0].state_dict())
    old["state"][0]["weight_low"] = zeros_like_shard(p, p.shape, torch.int16)
    old["state"][0]["weight_low"]._local_tensor.copy_(low_bits_of(low))
    other = GWTAdamW([shard(start, line, [COLUMNS])], **options)
    other.load_state_dict(old)
    (loaded,) = other.state.values()
    runs.assert_same_bits(whole(loaded["weight_low"]), whole(low))
