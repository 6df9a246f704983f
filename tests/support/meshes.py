"""Processes of a simulated mesh: PyTorch's engines shard a model for one rank without the others."""

from __future__ import annotations

import itertools
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.testing._internal.distributed.fake_pg import FakeStore

from bench.scaling.collectives import Recorder
from gwt_kernels import GWTAdamW, gwt_param_groups
from gwt_kernels.mesh import Mesh
from gwt_kernels.optim.base import PlannedOptimizer

TENSOR_PARALLEL = {"layers.*.mlp.up": "colwise", "layers.*.mlp.down": "rowwise", "embed": "embedding_rowwise"}
STYLES = {"colwise": ColwiseParallel, "rowwise": RowwiseParallel, "embedding_rowwise": RowwiseParallel}


class Block(nn.Module):
    """An MLP with a norm; its matrices have 24 rows and 13 columns, and 13 rows and 24 columns."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(13, bias=bias)
        self.mlp = nn.ModuleDict({"up": nn.Linear(13, 24, bias=bias), "down": nn.Linear(24, 13, bias=bias)})

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp["down"](self.mlp["up"](self.norm(x)).relu())


class Small(nn.Module):
    """Two blocks, an embedding and a frozen layer, which PyTorch shards too."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 13)
        self.layers = nn.ModuleList([Block(bias), Block(bias)])
        self.frozen = nn.Linear(13, 5, bias=False).requires_grad_(False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.frozen(x)


@contextmanager
def process(rank: int, mesh: Mesh) -> Iterator[Any]:
    """Create a process group in which this process has a rank and all others are simulated."""
    dist.init_process_group("fake", rank=rank, world_size=mesh.size, store=FakeStore())
    try:
        yield init_device_mesh("cpu", tuple(mesh), mesh_dim_names=("dp", "fsdp", "tp"))
    finally:
        dist.destroy_process_group()


def in_dtypes(model: nn.Module, wide: str) -> nn.Module:
    """Make modules whose names end with ``wide`` float64, and the others bfloat16."""
    model.to(torch.bfloat16)
    for name, module in model.named_modules():
        if wide and name.endswith(wide):
            module.double()
    return model


def divide(model: nn.Module, mesh: Mesh, devices: Any, plan: dict[str, str] = TENSOR_PARALLEL) -> nn.Module:
    """Shard a model by PyTorch's own functions, each layer by itself."""
    if mesh.tp > 1:
        ways = {
            f"layers.{i}.{name.removeprefix('layers.*.')}" if "*" in name else name: STYLES[way]()
            for name, way in plan.items()
            for i in range(2)
        }
        parallelize_module(model, devices["tp"], ways)
    if mesh.fsdp > 1:
        own = devices["dp", "fsdp"] if mesh.dp > 1 else devices["fsdp"]
        for layer in model.layers:
            fully_shard(layer, mesh=own)
        fully_shard(model, mesh=own)
    return model


def local(x: Any) -> Tensor:
    return x.to_local() if isinstance(x, DTensor) else x


def held(optimizer: torch.optim.Optimizer) -> int:
    """Count the bytes of local state after a step."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    optimizer.step()
    states = [local(x) for state in optimizer.state.values() for x in state.values() if isinstance(x, Tensor)]
    return sum(x.nbytes for x in states)


def shares(rank: int, mesh: Mesh, *moments: torch.dtype | None) -> dict[str, Any]:
    """Return a rank's shapes of weights, and bytes of weights, gradients and states (for each dtype of moments)."""
    with process(rank, mesh) as devices:
        model = divide(Small().to(torch.bfloat16), mesh, devices)
        params = {name: local(p) for name, p in model.named_parameters()}
        trained = [p for p in model.parameters() if p.requires_grad]
        return {
            "shapes": {name: tuple(p.shape) for name, p in params.items()},
            "weights": sum(p.nbytes for p in params.values()),
            "states": [held(GWTAdamW(gwt_param_groups(model, level=2), state_dtype=each)) for each in moments],
            "gradients": sum(local(p.grad).nbytes for p in trained),
            "adamw": held(torch.optim.AdamW(trained)),
        }


def on_every_rank(
    function: Callable[..., Any], mesh: Mesh, *arguments: Any, ranks: Sequence[int] | None = None
) -> dict[tuple[int, ...], Any]:
    """Call ``function(rank, mesh, *arguments)`` for all or some ``ranks``, and return the results by coordinate.

    Each call gets a new process, since torch caches meshes and the rank for the life of a process.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "torch._dynamo"])  # imported by a first step
    with context.Pool(2, initializer=torch.set_num_threads, initargs=(1,), maxtasksperchild=1) as pool:
        places = dict(enumerate(itertools.product(*map(range, mesh))))
        ranks = list(places) if ranks is None else ranks
        jobs = [(rank, mesh, *arguments) for rank in ranks]
        return dict(zip([places[rank] for rank in ranks], pool.starmap(function, jobs, chunksize=1), strict=True))


def sent(rank: int, mesh: Mesh, options: dict[str, Any]) -> list[list[tuple[str, int, int]]]:
    """Return the collectives of forward and backward, then those of a step."""
    with process(rank, mesh) as devices:
        model = divide(Small().to(torch.bfloat16), mesh, devices)
        optimizer = GWTAdamW(gwt_param_groups(model, level=2), **options)
        with Recorder() as engine:
            model(torch.arange(5)).float().sum().backward()
        with Recorder() as step:
            optimizer.step()
    return [engine.calls, step.calls]


def stepped(
    rank: int,
    mesh: Mesh,
    kind: type[PlannedOptimizer],
    grouping: dict[str, Any],
    options: dict[str, Any],
    ways: dict[str, str],
    wide: str,
) -> tuple[int, list[tuple[str, int, int]]]:
    """Return the bytes of state of an optimizer after a step, and the collectives of the step.

    ``ways`` is the plan for tensor parallelism. Parameters whose names have ``wide`` in them are float64.
    """
    with process(rank, mesh) as devices:
        model = divide(in_dtypes(Small(), wide), mesh, devices, ways)
        optimizer = kind(gwt_param_groups(model, **grouping), **options)
        with Recorder() as step:
            state_bytes = held(optimizer)
    return state_bytes, step.calls


def refusal(rank: int, mesh: Mesh, moments: torch.dtype | None, options: dict[str, Any]) -> str:
    """Return the optimizer's error for a model with unsupported sharding."""
    with process(rank, mesh) as devices:
        model = Small().to(torch.bfloat16)
        if moments == torch.int8:
            model.add_module("big", nn.Linear(128, 128, bias=False, dtype=torch.bfloat16))
        try:
            GWTAdamW(gwt_param_groups(divide(model, mesh, devices), level=2), state_dtype=moments, **options)
        except ValueError as error:
            return str(error)
    return ""
