"""Compare what GWTMuon computes and sends, in processes that test_matrix_work.py starts, with the plan."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.flop_counter import FlopCounterMode

from gwt_kernels import GWTMuon, gwt_param_groups
from gwt_kernels.core.level import Level
from gwt_kernels.mesh import Mesh
from gwt_kernels.plan import plan
from gwt_kernels.plan_sharded import plan_sharded
from tests.support import meshes
from tests.support.exchanged import SMALL_BATCHES


def main() -> None:
    """Check all ways of sharding a model over four processes."""
    for mesh in (Mesh(fsdp=4), Mesh(dp=2, fsdp=2), Mesh(fsdp=2, tp=2), Mesh(tp=4), Mesh(dp=2, tp=2)):
        for dtype in (torch.float32, torch.bfloat16):
            with SMALL_BATCHES if dtype == torch.bfloat16 else nullcontext():
                _check(mesh, dtype, 1)
        _check(mesh, torch.float32, "row")  # parts of rows are exchanged separately from whole rows


def _check(mesh: Mesh, dtype: torch.dtype, level: Level) -> None:
    torch.manual_seed(0)
    devices = init_device_mesh("cpu", tuple(mesh), mesh_dim_names=("dp", "fsdp", "tp"))
    model = meshes.divide(meshes.Small().to(dtype), mesh, devices)
    optimizer = GWTMuon(gwt_param_groups(model, level=level))
    sent: list[int] = []
    reduced: list[int] = []
    to_all, reduce = dist.all_to_all_single, dist.all_reduce

    def exchange(output: Any, given: Any, *arguments: Any, **options: Any) -> Any:
        sent.append(given.nbytes)
        return to_all(output, given, *arguments, **options)

    def add_up(x: Any, **options: Any) -> Any:
        if x.dtype == torch.bfloat16:  # sums over rows have a wider dtype
            reduced.append(x.nbytes)
        return reduce(x, **options)

    for p in model.parameters():
        p.grad = torch.ones_like(p) if p.requires_grad else None
    with (
        mock.patch("torch.distributed.all_to_all_single", exchange),
        mock.patch("torch.distributed.all_reduce", add_up),
        FlopCounterMode(display=False) as counter,
    ):
        optimizer.step()
    planned = plan(meshes.Small().to(dtype), level=level, rule="muon")
    sharded = plan_sharded(planned, mesh, tensor_parallel=meshes.TENSOR_PARALLEL)
    work, rank = sharded.matrices, dist.get_rank()
    assert work is not None
    counted = counter.get_total_flops(), sum(sent), sum(reduced)
    said = work.flops[rank], work.sent_bytes[rank], work.reduced_bytes[rank]
    assert counted == said, (mesh, counted, said)
    assert (len(sent), len(reduced)) == (sum(work.exchanges.values()), sum(work.reductions.values())), mesh
    assert sum(work.flops) > 0
