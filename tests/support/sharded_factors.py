"""Compare GWTAdafactor on shards, in processes that test_sharded_factors.py starts, with whole parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard

from gwt_kernels import GWTAdafactor, gwt_param_groups
from tests.ptx import plugin
from tests.support import interpreter, resharded
from tests.support.sharded import COLUMNS, ROWS, WHOLE, Layout, close, compare, layouts_of, mesh_of, on_each_number


def more_layouts(n: int, line: DeviceMesh, grid: DeviceMesh | None) -> list[Layout]:
    """Return layouts that shard batches of matrices, or vectors."""
    layouts: list[Layout] = [
        ((2 * n, 3, 8), line, [ROWS]),  # whole matrices
        ((3, 3, 8 * n), line, [Shard(2)]),
        ((2, 2, 2 * n + 1, 6), line, [Shard(2)]),
        ((16 * n,), line, [ROWS]),
    ]
    if grid is not None:
        layouts += [((2, 6, 16), grid, [ROWS, COLUMNS]), ((2, 6, 32), grid, [COLUMNS, Shard(2)])]
    return layouts


def narrow(line: DeviceMesh) -> list[Layout]:
    """Return layouts in which all processes but the first hold no weights, but still whole factors."""
    return [((3, 1), line, [COLUMNS]), ((1, 5), line, [ROWS])]


def float64() -> None:
    """Check that sharded equals unsharded, whatever the options."""
    on_each_number(_float64, [2, 4])


def _float64(n: int, line: DeviceMesh, grid: DeviceMesh | None) -> None:
    layouts = [*layouts_of(n, line, grid), *more_layouts(n, line, grid)]
    groups = [
        {"level": 2},
        {"level": 2, "beta1": None, "scale_parameter": True, "clip_threshold": 0.5},
        {"level": 1, "details": "published", "maximize": True},
        {"level": 0, "lr": 3e-3, "relative_step": True},
        {"level": 0, "rule": "adamw"},
    ]
    with mock.patch("torch.distributed.all_reduce", side_effect=dist.all_reduce) as sent:
        optimizer = compare(layouts, close, steps=6, groups=groups, lr=1e-2, weight_decay=0.1, kind=GWTAdafactor)
    rounds = len(optimizer._plan._factors[torch.device("cpu")]._sums._rounds)
    assert sent.call_count == 2 * 6 * rounds, "two collectives a step"
    for group, p in ((g, p) for g in optimizer.param_groups for p in g["params"]):
        state = optimizer.state[p]
        if isinstance(p, DTensor) and group["rule"] == "adafactor" and p.dim() > 1:
            row, col = state["exp_avg_sq_row"], state["exp_avg_sq_col"]
            assert all(isinstance(x, DTensor) and x.device_mesh == p.device_mesh for x in (row, col))
            if p.placements == (Shard(0),) and p.dim() == 2:
                assert (row.placements, col.placements) == ((Shard(0),), (Replicate(),))
            if p.placements == (Shard(1),) and p.dim() == 2:
                assert (row.placements, col.placements) == ((Replicate(),), (Shard(0),))
    rows = [x for x in layouts if len(x[0]) == 2 and x[2] in ([ROWS], [WHOLE])]
    compare(rows, close, steps=5, level=2, wavelet="db2", lr=1e-2, kind=GWTAdafactor)
    compare(narrow(line), close, steps=5, level=0, lr=1e-2, kind=GWTAdafactor)
    everything = [x for x in layouts if x[1] in (None, line)]
    clipped = compare(everything, close, steps=6, max_grad_norm=3.0, skip_nonfinite=True, kind=GWTAdafactor)
    assert bool(clipped.grad_norm > 3), "nothing was clipped"


def triton() -> None:
    """Check that with Triton's kernels sharded equals unsharded up to the order of sums, with empty shards too."""
    plugin.begin()
    on_each_number(_triton, [2])


def _triton(n: int, line: DeviceMesh, grid: DeviceMesh | None) -> None:
    layouts: list[Layout] = [
        ((4 * n, 16), line, [ROWS]),
        ((2 * n + 1, 13), line, [ROWS]),
        ((1, 24), line, [ROWS]),  # empty everywhere but on the first process
        ((3, 8 * n), line, [COLUMNS]),
        ((n, 3, 8), line, [ROWS]),
        ((6, 10), None, []),
    ]

    def alike(a: Tensor, b: Tensor, where: str) -> None:
        torch.testing.assert_close(a, b, rtol=2e-5, atol=1e-6, msg=lambda text: f"{where}: {text}")

    groups = [{"level": 2}, {"level": 2, "scale_parameter": True, "beta1": None}]
    options: dict[str, Any] = {"dtype": torch.float32, "lr": 1e-2, "backend": "triton", "kind": GWTAdafactor}
    options["whole_by"] = "torch"  # independent of the kernels, and quicker than Triton's interpreter
    with interpreter.like_a_gpu():
        compare(layouts, alike, steps=3, groups=groups, **options)
        compare(layouts[:-1], alike, steps=3, level=2, max_grad_norm=1.0, relative_step=True, **options)
        compare(narrow(line), alike, steps=2, level=0, **options)


def checkpoints(folder: Path) -> None:
    """Resume a run of two processes on one, on two others, and from a gathered state."""
    pair, alone = mesh_of(2), mesh_of(1)

    def build(mesh: DeviceMesh | None) -> tuple[nn.Module, GWTAdafactor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(24, 22), nn.Tanh(), nn.Linear(22, 6)).double()
        if mesh is not None:
            fully_shard(model, mesh=mesh)
        groups = gwt_param_groups(model, level=2, include=[r"0\.weight"])
        groups[-1].update(rule="adafactor")
        return model, GWTAdafactor(groups, lr=1e-2)

    run, reference = build(pair), build(None)
    for each in (run, reference):
        resharded.train(each, 0, 3)
    dcp.save(resharded.state_of(run), checkpoint_id=folder)
    gathered = get_optimizer_state_dict(*run, options=StateDictOptions(full_state_dict=True))
    resharded.train(reference, 3, 5)
    resharded.assert_goes_on_with(build, folder, reference, [pair, alone])
    again = build(pair)
    set_model_state_dict(again[0], get_model_state_dict(run[0]))
    set_optimizer_state_dict(*again, gathered, options=StateDictOptions(full_state_dict=True))
    resharded.train(again, 3, 5)
    resharded.assert_continues(again, reference)
