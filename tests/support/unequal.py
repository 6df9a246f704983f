"""Run optimizers on sharded parameters that are frozen, or that (or whose gradients) some processes lack."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from gwt_kernels import GWTAdafactor, GWTAdamMini, GWTAdamW, GWTMuon, gwt_param_groups
from tests.support import runs
from tests.support.sharded import COLUMNS, ROWS, Layout, close, give, mesh_of, on_each_number, shard, whole


def matrices() -> None:
    """Check Muon if a gradient is missing on some processes: it counts as zeros, and no weight changes there."""
    on_each_number(_matrices, (2, 3, 4))


def _matrices(n: int, line: DeviceMesh, grid: DeviceMesh | None) -> None:
    layouts: list[Layout] = [
        ((2 * n, 12), line, [ROWS]),
        ((2 * n + 1, 8), line, [ROWS]),
        ((6, 4 * n), line, [COLUMNS]),
        ((2 * n, 12), line, [ROWS]),
        ((2 * n + 1, 3, 8), line, [ROWS]),
    ]
    absent = [set(), {0}, {n - 1}, set(range(1, n)), set(range(n))]  # processes without the parameter's gradient
    for shift in range(len(absent)):
        without = absent[shift:] + absent[:shift]
        # Every layout meets every way and every set of processes, but not every pair of these.
        ways = ({"level": 0}, {"level": 1}, {"level": 1, "workspace_bytes": 24 << 10})
        _matrices_without(layouts, without, ways[shift % len(ways)])
        # If a row is one block, a part without gradient still has the row's momentum.
        rows = [i for i, (_, _, placements) in enumerate(layouts) if placements == [ROWS]]
        _matrices_without([layouts[i] for i in rows], [without[i] for i in rows], {"level": "row"})
    _matrices_without(layouts, [{0}] * len(layouts), {"level": 1})  # one process has no gradients
    _wide_gradients_without(n, line)


def _matrices_without(layouts: Sequence[Layout], absent: Sequence[set[int]], options: dict[str, Any]) -> None:
    own = {"lr": 0.02, "ns_dtype": torch.float64, "backend": "torch", "weight_decay": 0.0, **options}
    references = runs.parameters([shape for shape, _, _ in layouts], dtype=torch.float64)
    params = [shard(r, mesh, at) for r, (_, mesh, at) in zip(references, layouts, strict=True)]
    both = [GWTMuon(params, **own), GWTMuon(references, **own)]
    for t in range(4):
        give(params, references, t)
        if t < 3:  # a later gradient meets the momentum that zeros have left
            for p, r, without in zip(params, references, absent, strict=True):
                _remove(p, r, without)
        before = [p.detach().clone() for p in params]
        for optimizer in both:
            optimizer.step()
        for p, old in zip(params, before, strict=True):
            if p.grad is None:
                runs.assert_same_bits(p.detach().to_local(), old.to_local())
        for p, r in zip(params, references, strict=True):
            close(whole(p.detach()), r.detach(), f"step {t}, {tuple(p.shape)}, without {absent}, {options}")


def _wide_gradients_without(n: int, line: DeviceMesh) -> None:
    """Check float32 gradients of bfloat16 weights, the first of which only the first process has."""
    references = runs.parameters([(2 * n, 8)] * 2, dtype=torch.bfloat16)
    params = [shard(r, line, [ROWS]) for r in references]
    for p in (*params, *references):
        p.grad_dtype = torch.float32
    both = [GWTMuon(own, lr=0.02, level=1, backend="torch") for own in (params, references)]
    for t in range(2):
        for p, r in zip(params, references, strict=True):
            r.grad = torch.randn(r.shape, generator=torch.Generator().manual_seed(t))
            p.grad = distribute_tensor(r.grad, line, [ROWS], src_data_rank=None)
        _remove(params[0], references[0], set(range(1, n)))
        for optimizer in both:
            optimizer.step()
        assert torch.equal(whole(params[1].detach()), references[1].detach())


def _remove(p: Any, r: Tensor, without: set[int]) -> None:
    """Remove the gradient on some processes, and zero their parts of the whole one."""
    if not without:
        return
    mesh = p.device_mesh
    g = p.grad.to_local()
    g = torch.zeros_like(g) if mesh.get_local_rank() in without else g
    left = DTensor.from_local(g, mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride())
    r.grad = None if set(range(mesh.size())) <= without else left.full_tensor()
    if mesh.get_local_rank() in without:
        p.grad = None


def frozen() -> None:
    """Check parameters that are frozen but have gradients, and that get new ones on one process first."""
    on_each_number(_frozen, (2,))


def _frozen(n: int, line: DeviceMesh, grid: DeviceMesh | None) -> None:
    layouts: list[Layout] = [((2 * n, 8), line, [ROWS]), ((4, 8 * n), line, [COLUMNS]), ((2 * n, 8), line, [ROWS])]
    kinds: list[tuple[Any, dict[str, Any]]] = [
        (GWTAdamW, {"level": 1}),
        (GWTAdamW, {"level": "row"}),
        (GWTAdafactor, {"level": 1}),
        (GWTMuon, {"level": 1, "ns_dtype": torch.float64, "backend": "torch"}),
    ]
    for kind, options in kinds:
        references = runs.parameters([shape for shape, _, _ in layouts], dtype=torch.float64)
        params = [shard(r, mesh, at) for r, (_, mesh, at) in zip(references, layouts, strict=True)]
        both = [kind(params, lr=0.01, **options), kind(references, lr=0.01, **options)]
        for t in range(4):
            for own in (params, references):
                own[0].requires_grad_(t in (0, 3))
            give(params, references, t)
            if t == 2:  # frozen, and without a gradient now
                params[0].grad = references[0].grad = None
            for optimizer in both:
                optimizer.step()
            for p, r in zip(params, references, strict=True):
                close(whole(p.detach()), r.detach(), f"{kind.__name__}, {options}, step {t}")
    for kind, options in kinds:  # unfrozen on all, while one process has the first gradient
        params = [shard(torch.randn(4 * n, 8), line, [ROWS]) for _ in range(3)]
        params[0].requires_grad_(False)
        optimizer = kind(params, lr=0.01, **options)
        for t in range(3):
            for p in params[0 if t == 1 and dist.get_rank() == 0 else 1 :]:
                p.grad = DTensor.from_local(torch.ones(4, 8), line, [ROWS])
            params[0].requires_grad_(t > 0)
            optimizer.step()
        assert all(optimizer.state[p]["step"] == 3 for p in params[1:])


def meshes() -> None:
    """Check that parameters of some processes only do not change sums over processes for the other parameters."""
    everyone = init_device_mesh("cpu", (4,))
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    some = grid["tensor"]
    layouts: list[Layout] = [((8, 8), everyone, [ROWS]), ((8, 8), grid, [ROWS, COLUMNS]), ((8, 8), some, [ROWS])]
    _steps_on(layouts, 3 if dist.get_rank() < 2 else 2)


def meshes_of_some() -> None:
    """Check the same as :func:`meshes` if no mesh has all processes, in both orders of the parameters."""
    grid = mesh_of(2, 2)
    if grid.get_coordinate() is None:
        return
    layouts: list[Layout] = [((8, 8), grid, [ROWS, COLUMNS]), ((8, 8), grid["b"], [ROWS])]
    for backwards in (False, True):
        _steps_on(layouts, 2 if dist.get_rank() < 2 else 1, backwards)


def matrices_of_some() -> None:
    """Check Muon's matrices of two dtypes, the first of which only some processes have."""
    line, grid = mesh_of(4), mesh_of(2, 2)
    layouts: list[Layout] = [((8, 8), grid["b"], [ROWS]), ((8, 12), line, [ROWS]), ((12, 8), line, [ROWS])]
    references = runs.parameters([shape for shape, _, _ in layouts], dtype=torch.float64)
    references[1].data = references[1].data.float()
    own = slice(0 if dist.get_rank() < 2 else 1, None)
    params = [shard(r, mesh, at) for r, (_, mesh, at) in zip(references[own], layouts[own], strict=True)]
    options: dict[str, Any] = {"lr": 0.02, "level": 1, "ns_dtype": torch.float64, "backend": "torch"}
    both = [GWTMuon(each, **options) for each in (params, references[own])]
    for t in range(3):
        runs.give_gradients(references, t)
        for p, r in zip(params, references[own], strict=True):
            p.grad = distribute_tensor(r.grad, p.device_mesh, p.placements, src_data_rank=None)
        for optimizer in both:
            optimizer.step()
        for p, r in zip(params, references[own], strict=True):
            close(whole(p.detach()).double(), r.detach().double(), f"step {t}, {tuple(p.shape)}")


def _steps_on(layouts: Sequence[Layout], n: int, backwards: bool = False) -> None:
    """Check steps of the first ``n`` parameters, those that this process has, against whole ones."""
    references = runs.parameters([shape for shape, _, _ in layouts[:n]], dtype=torch.float64)
    params = [shard(r, mesh, at) for r, (_, mesh, at) in zip(references, layouts, strict=False)]
    order = slice(None, None, -1 if backwards else 1)
    both = [GWTAdamW(own[order], lr=0.01, level=1) for own in (params, references)]
    for t in range(4):
        give(params, references, t, factor=1.0 + t)
        for optimizer in both:
            optimizer.step()
        for p, r in zip(params, references, strict=True):
            close(whole(p.detach()), r.detach(), f"step {t}")


def strided() -> None:
    """Check tensor parallelism under FSDP2: heads and levels have to fit the shards that processes really hold."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))

    def sharded(rows: int, columns: int, style: Any, dim: int = 0) -> Any:
        model = nn.Sequential(nn.Linear(columns, rows, bias=False))
        parallelize_module(model, mesh["tensor"], {"0": style})
        fully_shard(model, mesh=mesh["data"], shard_placement_fn=lambda p: torch.distributed.tensor.Shard(dim))
        return model[0].weight

    heads = sharded(32, 16, ColwiseParallel())
    for head_rows, n in ((8, 1), (16, 2)):  # one head of 8 rows on each process; those of 16 on all
        optimizer = GWTAdamMini([heads], head_rows=head_rows, level=0)
        heads.grad = torch.ones_like(heads)
        optimizer.step()
        assert len(optimizer.state[heads]["exp_avg_sq"].to_local()) == n
    wide = sharded(8, 32, RowwiseParallel(), dim=1)
    GWTAdamW([wide], level=3)  # 8 columns each
    with pytest.raises(ValueError, match=r"widths of \[8\], which level 4 needs .*: use level 3 at most"):
        GWTAdamW([wide], level=4)


def partitioned() -> None:
    """Check ``ZeroRedundancyOptimizer``, which gives each process some parameters of a group and all its names."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(8 + 4 * i, 12 + 4 * i, bias=False) for i in range(4)))
    groups = gwt_param_groups(model, include=["weight"], level=1)
    optimizer = ZeroRedundancyOptimizer(groups, GWTAdamW, lr=0.01)
    own: Any = optimizer.optim
    (group,) = own.param_groups
    assert 0 < len(group["params"]) < len(group["param_names"])
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert set(own.state) == set(group["params"])
    group["params"][0].grad = torch.ones_like(group["params"][0]).to_sparse()
    with pytest.raises(RuntimeError, match="parameter 0 of group 0"):
        own.step()
