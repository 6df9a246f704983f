"""The work of one process: shard a model by FSDP2, count what a step holds and sends, and time it."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig

from bench.common.models import build_model, load_config
from bench.scaling.collectives import Recorder
from gwt_kernels import GWTAdamW, gwt_param_groups

LEVEL = 2
SETTINGS: dict[str, dict[str, Any]] = {
    "no limiter": {"norm_growth_limit": None},
    "foam": {"rule": "foam"},
    "limiter": {},
    "limiter, max_grad_norm": {"max_grad_norm": 1.0},
}
"""Options of `GWTAdamW` for each timed kind of step."""
NARROW = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2} | {
    "head_dim": 8,
    "vocab_size": 16,
}
"""Fields for a configuration with as many tensors, all tiny, so that only the host's work is left."""
COPIED = 64 * 2**20  # bytes of a buffer, far larger than a core's cache
LARGE = 4 * 2**20  # bytes of an all-reduce whose time is mostly bandwidth
WARM_UP = 3


class Job(NamedTuple):
    """Arguments of all processes."""

    store: str
    """File for the rendezvous of the processes."""
    results: str
    """Folder in which each process writes a JSON file named by its rank."""
    model: str
    """Model name or path, as `bench.common.models.load_config` takes it."""
    numbers: tuple[int, ...]
    """Numbers of processes that shard the model; the largest is the number started."""
    payloads: tuple[int, ...]
    """Bytes of the all-reduces that are timed alone."""
    repetitions: int


def work(rank: int, job: Job) -> None:
    """Run this process's part of every mesh that includes it; otherwise wait at a barrier without using a core."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{job.store}", rank=rank, world_size=job.numbers[-1])
    config = load_config(job.model)
    meshes = {n: DeviceMesh("cpu", torch.arange(n)) for n in job.numbers}  # every process creates every mesh
    mine = {n: mesh for n, mesh in meshes.items() if rank < n}
    narrow = LlamaConfig(**{**config.to_dict(), **NARROW})
    counted: dict[str, Any] = {}
    turns: dict[int, dict[str, Callable[[], object]]] = defaultdict(dict)
    for n, mesh in mine.items():
        for setting, optimizer in _optimizers(config, mesh).items():
            counted[f"{n}/{setting}"] = _count(optimizer)
            turns[n][f"step/{setting}"] = optimizer.step
        turns[n] |= {f"host/{setting}": optimizer.step for setting, optimizer in _optimizers(narrow, mesh).items()}
        turns[n] |= _pieces(mesh, job.payloads)
    times = _take_turns(mine, job, turns)
    Path(job.results, f"{rank}.json").write_text(json.dumps({"counted": counted, "times": times}))
    dist.barrier()  # no process leaves while another still communicates with it
    dist.destroy_process_group()


def _optimizers(config: LlamaConfig, mesh: DeviceMesh) -> dict[str, GWTAdamW]:
    """Build an optimizer for each setting, all over the same row shards, with gradients."""
    model = build_model(config, seed=0, device=torch.device("meta"), dtype=torch.float32)
    fully_shard(model, mesh=mesh)
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            assert isinstance(p, DTensor)
            p.grad = torch.zeros_like(p)
            for x, size in ((p, 1.0), (p.grad, 1e-2)):
                x.to_local().normal_(std=size)
    return {
        setting: GWTAdamW(gwt_param_groups(model, level=LEVEL), lr=1e-4, **options)
        for setting, options in SETTINGS.items()
    }


def _count(optimizer: GWTAdamW) -> dict[str, Any]:
    """Count the bytes of local state after a step, and record the collectives of a step."""
    optimizer.step()
    with Recorder() as recorder:
        optimizer.step()
    states = [x for state in optimizer.state.values() for x in state.values()]
    held = sum((x.to_local() if isinstance(x, DTensor) else x).nbytes for x in states)
    return {"state_bytes": held, "collectives": recorder.calls}


def _pieces(mesh: DeviceMesh, payloads: tuple[int, ...]) -> dict[str, Callable[[], object]]:
    """Return a step's components for timing alone: all-reduces, and a copy in the shared memory."""
    group, source = mesh.get_group(), torch.ones(COPIED, dtype=torch.uint8)
    target = torch.empty_like(source)
    pieces: dict[str, Callable[[], object]] = {"copy": lambda: target.copy_(source)}
    if mesh.size() > 1:
        for size in (*payloads, LARGE):
            x = torch.zeros(size // 4)
            pieces[f"all-reduce/{size}"] = lambda x=x: dist.all_reduce(x, group=group)
    return pieces


def _take_turns(
    meshes: dict[int, DeviceMesh], job: Job, turns: dict[int, dict[str, Callable[[], object]]]
) -> dict[str, list[tuple[float, float]]]:
    """Time everything in turns, so that all meet the same load: wall seconds and this thread's CPU seconds."""
    times: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for round_ in range(WARM_UP + job.repetitions):
        for n in job.numbers:
            dist.barrier()
            names = list(turns[n])
            first = round_ % max(len(names), 1)  # a different one comes first in each round
            for name in names[first:] + names[:first]:
                dist.barrier(group=meshes[n].get_group())  # start together, as after backward's last reduce-scatter
                wall, cpu = time.perf_counter(), time.thread_time()
                turns[n][name]()
                taken = time.perf_counter() - wall, time.thread_time() - cpu
                if round_ >= WARM_UP:
                    times[f"{n}/{name}"].append(taken)
    return times
