"""Saves runs on four processes and resumes them on others; test_sharding.py starts the processes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from gwt_kernels import GWTAdamW, gwt_param_groups
from tests.support import runs
from tests.support.sharded import close, mesh_of, whole

Run = tuple[nn.Module, GWTAdamW]
ANY = (Exception, dcp.api.CheckpointException)  # the latter is no Exception
FOAM = {"rule": "foam", "norm_growth_limit": None}


def build(mesh: DeviceMesh | None, dtype: torch.dtype = torch.float64, level: int = 2, **options: Any) -> Run:
    """Build a small network with uneven and some empty shards; without a mesh a whole one."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 22), nn.Tanh(), nn.Linear(22, 6), nn.Tanh(), nn.Linear(6, 2)).to(dtype)
    groups = gwt_param_groups(model, level=level, include=["0", "2"], weight_decay=0.1)
    if mesh is not None:
        fully_shard(model, mesh=mesh)
        groups = gwt_param_groups(model, level=level, include=["0", "2"], weight_decay=0.1)
    return model, GWTAdamW(groups, **{"lr": 1e-2, **options})


def train(run: Run, first: int, last: int) -> None:
    """Take steps with data that depend only on the step's number."""
    model, optimizer = run
    dtype = next(model.parameters()).dtype
    for t in range(first, last):
        generator = torch.Generator().manual_seed(t)
        x = (1 + t % 3) * torch.randn(8, 24, generator=generator, dtype=torch.float64)
        optimizer.zero_grad()
        model(x.to(dtype)).square().mean().backward()
        optimizer.step()


def state_of(run: Run) -> dict[str, Any]:
    """Return the content of a checkpoint; its tensors are those of the run."""
    return {"model": get_model_state_dict(run[0]), "optimizer": get_optimizer_state_dict(*run)}


def gathered(run: Run) -> dict[str, Any]:
    """Return gathered copies of all weights and state, by name."""
    names = {p: name for name, p in run[0].named_parameters()}
    state = {names[p]: {k: whole(v).clone() for k, v in own.items()} for p, own in run[1].state.items()}
    return {
        "weights": {name: whole(p.detach()).clone() for p, name in names.items()},
        "state": {name: state[name] for name in sorted(state)},
    }


def resume(run: Run, folder: Path, group: Any = None) -> None:
    """Resume from separately loaded tensors, so that a failure leaves the run unchanged."""
    state = copy.deepcopy(state_of(run))
    dcp.load(state, checkpoint_id=folder, process_group=group, no_dist=group is None)
    set_optimizer_state_dict(*run, state["optimizer"])  # may refuse the state
    set_model_state_dict(run[0], state["model"])


def assert_continues(run: Run, reference: Run) -> None:
    a, b = gathered(run), gathered(reference)
    for name in b["weights"]:
        close(a["weights"][name], b["weights"][name], name)
        for key, value in b["state"][name].items():
            close(a["state"][name][key], value, f"{name}: {key}")


def assert_goes_on_with(
    build: Callable[[DeviceMesh | None], Run], folder: Path, reference: Run, meshes: Sequence[DeviceMesh]
) -> None:
    """Assert that a checkpoint after three steps, resumed on each mesh, reaches ``reference`` after five.

    All processes have to call it.
    """
    for mesh in meshes:
        if dist.get_rank() < mesh.size():
            again = build(mesh)
            resume(again, folder, mesh.get_group())
            train(again, 3, 5)
            assert_continues(again, reference)
        dist.barrier()


def main(folder: Path) -> None:
    """Resume from four processes on one, two and three, and back."""
    root, rank = folder, dist.get_rank()
    meshes = {n: mesh_of(n) for n in (1, 2, 3, 4)}
    reference = build(None)
    train(reference, 0, 8)
    run = build(meshes[4])
    train(run, 0, 5)
    saved = gathered(run)
    assert all("limiter_norm" in saved["state"][f"{i}.weight"] for i in (0, 2))
    _a_getter_changes_nothing(run, meshes[4])
    dcp.save(state_of(run), checkpoint_id=root / "4")
    full = copy.deepcopy(get_optimizer_state_dict(*run, options=StateDictOptions(full_state_dict=True)))
    own_group = dist.new_group(backend="gloo")  # its collectives run during those of the steps
    pending = dcp.async_save(state_of(run), checkpoint_id=root / "async", process_group=own_group)
    train(run, 5, 7)
    pending.result()
    for n in (1, 2, 3):
        if rank < n:
            group = meshes[n].get_group()
            other = build(meshes[n], lr=0.5, weight_decay=0.3, seed=7, betas=(0.5, 0.6))
            resume(other, root / ("async" if n == 2 else "4"), group)
            runs.assert_same_bits(gathered(other), saved)
            train(other, 5, 8)
            assert_continues(other, reference)
            if n == 3:
                dcp.save(state_of(other), checkpoint_id=root / "3", process_group=group)
                saved_by_three = gathered(other)
        dist.barrier()
    back = build(meshes[4], lr=0.5)
    resume(back, root / "3", dist.group.WORLD)
    if rank < 3:
        runs.assert_same_bits(gathered(back), saved_by_three)
    else:
        gathered(back)
    train(back, 8, 10)
    train(reference, 8, 10)
    assert_continues(back, reference)
    # One process without shards loads the same files, and a gathered state.
    alone = build(None, lr=0.5)
    resume(alone, root / "4")
    runs.assert_same_bits(gathered(alone), saved)
    gathered_into = build(None, lr=0.5)
    set_optimizer_state_dict(*gathered_into, full, options=StateDictOptions(full_state_dict=True))
    runs.assert_same_bits(gathered(gathered_into)["state"], saved["state"])
    _errors_are_alike_everywhere(meshes[4], root, full)


def _a_getter_changes_nothing(run: Run, mesh: DeviceMesh) -> None:
    before = gathered(run)
    state_of(run)
    runs.assert_same_bits(gathered(run), before)
    # A new optimizer's state is created, and the run then continues as if it had not been.
    for options in ({}, {"eps": 0.0}, FOAM):
        asked, other = build(mesh, **options), build(mesh, **options)
        state_of(asked)
        assert all(own["step"] == 0 for own in asked[1].state.values())
        for a in (asked, other):
            train(a, 0, 2)
        runs.assert_same_bits(gathered(asked), gathered(other))


def _errors_are_alike_everywhere(mesh: DeviceMesh, root: Path, full: dict[str, Any]) -> None:
    """Check that errors of unloadable checkpoints are raised on every process, and change nothing."""
    rank = dist.get_rank()

    def load_gathered(run: Run) -> None:
        set_optimizer_state_dict(*run, full, options=StateDictOptions(full_state_dict=True))

    def load_files(run: Run) -> None:
        resume(run, root / "4", dist.group.WORLD)

    for load, words, options in (
        (load_gathered, "level", {"level": 1}),
        (load_files, "[Ss]ize", {"level": 1}),
        (load_files, "rule", FOAM),
    ):
        run = build(mesh, **options)
        train(run, 0, 1)
        before = gathered(run)
        with pytest.raises(ANY, match=words):
            load(run)
        runs.assert_same_bits(gathered(run), before)
        dist.barrier()
    run = build(mesh)
    train(run, 0, 1)
    before = gathered(run)
    dist.barrier()
    if rank == 0:
        sorted((root / "4").glob("*.distcp"))[1].unlink()
    dist.barrier()
    with pytest.raises(ANY, match=r"distcp|No such file"):
        load_files(run)
    runs.assert_same_bits(gathered(run), before)
