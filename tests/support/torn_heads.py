"""Compare Adam-mini on shards that split heads (rows that share a second moment) with whole tensors."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from gwt_kernels import GWTAdamMini, GWTAdamW
from tests.ptx import plugin
from tests.support import interpreter, runs
from tests.support.sharded import (
    COLUMNS,
    ROWS,
    WHOLE,
    Layout,
    close,
    compare,
    equal,
    give,
    mesh_of,
    on_each_number,
    shard,
    whole,
)
from tests.support.sharded_rows import same_everywhere, whole_gradients

OPTIONS: dict[str, Any] = {"kind": GWTAdamMini, "lr": 1e-2, "weight_decay": 0.1}


def float64() -> None:
    """Check heads split along rows, columns or both against whole tensors, and that all processes agree."""
    on_each_number(_float64, [2, 3, 4])


def layouts_of(n: int, line: DeviceMesh, grid: DeviceMesh | None) -> list[Layout]:
    """Return every way of splitting heads of 6 rows: even, uneven, and with empty shards on some processes."""
    layouts: list[Layout] = [
        ((18, 12), line, [ROWS]),
        ((6, 12 * n), line, [ROWS]),  # one of four processes has an empty shard
        ((12, 4 * n), line, [COLUMNS]),
        ((3, 6, 12), line, [Shard(1)]),
        ((3, 6, 12), line, [ROWS]),  # whole heads, unless the tensor is one head
        ((6, 12), line, [WHOLE]),
        ((6, 12), None, []),
    ]
    if grid is not None:
        layouts += [
            ((18, 12), grid, [WHOLE, ROWS]),  # HSDP
            ((18, 32), grid, [ROWS, COLUMNS]),
            ((12, 32), grid, [COLUMNS, ROWS]),
            ((18, 12), grid, [ROWS, ROWS]),
            ((3, 6, 12), grid, [ROWS, Shard(1)]),
        ]
    return layouts


def _float64(n: int, line: DeviceMesh, grid: DeviceMesh | None) -> None:
    layouts = layouts_of(n, line, grid)
    levels: list[dict[str, Any]] = [{"level": 0}, {"level": 2}, {"level": "row", "maximize": True}]
    for head_rows in (6, None):
        made = compare(layouts, close, steps=6, groups=levels, head_rows=head_rows, **OPTIONS)
        same_everywhere(made, line)
        v = made.state[made.param_groups[0]["params"][1]]["exp_avg_sq"]
        assert v.shape == (1, 1)
        assert v.placements == (Replicate(),)
    vectors: list[Layout] = [((2 * n + 1,), line, [ROWS]), ((1, 12), line, [ROWS]), ((5, 3), line, [ROWS])]
    uneven: list[Layout] = [((10, 12), line, [ROWS]), ((5, 2 * n + 1), line, [COLUMNS])]
    compare(vectors + uneven, close, steps=6, groups=[{"level": 0}, {"level": "row"}], head_rows=None, **OPTIONS)
    compare(uneven, close, steps=6, level=0, head_rows=5, **OPTIONS)
    everything = [x for x in layouts if x[1] in (None, grid or line)]
    clipped = compare(everything, close, steps=6, level=1, head_rows=6, max_grad_norm=3.0, **OPTIONS)
    assert bool(clipped.grad_norm > 3), "nothing was clipped"


def kernels() -> None:
    """Check Triton's kernels up to the order of sums, also with steps that the device counts and may skip."""
    plugin.begin()
    on_each_number(_kernels, [2])


def _kernels(n: int, line: DeviceMesh, grid: DeviceMesh | None) -> None:
    def alike(a: Tensor, b: Tensor, where: str) -> None:
        torch.testing.assert_close(a, b, rtol=2e-5, atol=1e-6, msg=lambda text: f"{where}: {text}")

    layouts: list[Layout] = [
        ((6, 9), line, [ROWS]),
        ((2, 16), line, [ROWS]),
        ((2, 8 * n), line, [COLUMNS]),
        ((2, 2, 5), line, [Shard(1)]),
        ((2, 8), None, []),
    ]
    options = OPTIONS | {"dtype": torch.float32, "steps": 2, "backend": "triton"}
    by_torch = options | {"whole_by": "torch"}  # independent of the kernels, and quicker than Triton's interpreter
    with interpreter.like_a_gpu():
        compare(layouts, alike, groups=[{"level": 2}, {"level": "row"}], head_rows=2, **by_torch)
        compare(layouts[:3], alike, level=1, head_rows=None, max_grad_norm=1.0, skip_nonfinite=True, **by_torch)
    # Sums of whole numbers are exact in any order, so that random bits show.
    exact: list[Layout] = [((4, 16), line, [ROWS]), ((8, 8), line, [COLUMNS])]
    narrow = options | {"dtype": torch.bfloat16, "state_dtype": torch.bfloat16, "head_rows": 4, "level": 1}
    with whole_gradients(), interpreter.like_a_gpu():
        compare(exact, equal, weight_rounding="stochastic", **narrow)
        compare(exact, equal, weight_rounding="split", **narrow)


def layers() -> None:
    """Check FSDP2 alone and over tensor parallelism, whose shards are strided."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    for style, dim in ((None, 0), (ColwiseParallel(), 0), (RowwiseParallel(), 0), (ColwiseParallel(), 1)):
        for head_rows in (4, None):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(16, 12, bias=False)).double()
            reference = nn.Parameter(model[0].weight.detach().clone())
            if style is not None:
                parallelize_module(model, mesh["tensor"], {"0": style})
            fully_shard(model, mesh=mesh["data"], shard_placement_fn=lambda p, dim=dim: Shard(dim))
            p: Any = model[0].weight
            both = [GWTAdamMini([x], lr=0.01, level=1, head_rows=head_rows) for x in (p, reference)]
            for t in range(10):
                give([p], [reference], t)
                for optimizer in both:
                    optimizer.step()
            for key in ("exp_avg", "exp_avg_sq"):
                close(whole(both[0].state[p][key]), both[1].state[reference][key], f"{style}, {dim}: {key}")
            close(whole(p.detach()), reference.detach(), f"{style}, {dim}")


def collectives() -> None:
    """Check for one all-reduce for split rows and one for split heads, with one number for each."""
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    params = [shard(torch.ones(6, 8), grid, at) for at in ([ROWS, COLUMNS], [ROWS, WHOLE], [WHOLE, COLUMNS])]
    params.append(nn.Parameter(torch.ones(6, 8)))
    optimizer = GWTAdamMini(params, level=1, head_rows=2)
    for with_gradients in (True, False):
        for p in params:
            p.grad = torch.ones_like(p) if with_gradients or dist.get_rank() else None
        with mock.patch("torch.distributed.all_reduce", wraps=dist.all_reduce) as sent:
            optimizer.step()
        assert [len(call.args[0]) for call in sent.call_args_list] == [9, 6], with_gradients


def overflowing() -> None:
    """Check that gradients whose squares overflow are clipped to zero, whatever is split."""
    line = mesh_of(2)
    cases: list[tuple[Any, dict[str, Any]]] = [
        (GWTAdamMini, {"level": level, "head_rows": n}) for level in (1, "row") for n in (1, 2, None)
    ]
    for kind, options in [*cases, (GWTAdamW, {"level": "row"}), (GWTAdamW, {"level": "row", "rule": "foam"})]:
        params = [shard(torch.ones(6, 16), line, [at]) for at in (ROWS, COLUMNS)]
        optimizer = kind(params, max_grad_norm=1.0, **options)
        for p in params:
            p.grad = torch.full_like(p, 1e25)
        optimizer.step()
        for p in params:
            assert bool((whole(p.detach()) == 1).all()), options


def without_gradients() -> None:
    """Check that a missing gradient counts as zeros in heads of which other processes have parts."""
    on_each_number(_without_gradients, [2, 3])


def _without_gradients(n: int, line: DeviceMesh, grid: DeviceMesh | None) -> None:
    shapes = [(2 * n, 8), (2 * n, 8)]
    references = runs.parameters(shapes, dtype=torch.float64)
    params = [shard(r, line, [ROWS]) for r in references]
    both = [GWTAdamMini(own, lr=0.01, level=1, head_rows=None) for own in (params, references)]
    first = line.get_local_rank() == 0
    for t in range(4):
        give(params, references, t)
        if t == 2:  # the first is missing on the first process, the second on all but the last
            references[0].grad[:2] = 0
            references[1].grad[: 2 * n - 2] = 0
            params[0].grad = None if first else params[0].grad
            params[1].grad = params[1].grad if line.get_local_rank() == n - 1 else None
        before = [p.detach().to_local().clone() for p in params]
        for optimizer in both:
            optimizer.step()
        for p, r, old in zip(params, references, before, strict=True):
            own: Any = p.detach()
            if p.grad is None:
                runs.assert_same_bits(own.to_local(), old)
            part: Any = DTensor.to_local(shard(r, line, [ROWS]).detach())
            if t < 2 or line.get_local_rank() == n - 1:
                close(own.to_local(), part, f"step {t}")
