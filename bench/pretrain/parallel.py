"""The processes of a run: their rendezvous, their part of the model, and their windows."""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

from bench.common.models import build_model

MODES = ("ddp", "fsdp2", "hsdp", "tp")
_REPLICAS = 2  # of hsdp: number of copies of the model, each sharded over the rest of the processes
_WAIT = datetime.timedelta(minutes=10)  # time that the other processes wait for the slowest one
_T = TypeVar("_T")


class Processes:
    """This process among those of a run; the only one if `mode` is None.

    Args:
        mode: How the model is divided: `ddp`, `fsdp2`, `hsdp`, `tp`, or None for a single process.
        device: Device of this process.

    Raises:
        ValueError: The mode needs another number of processes.
    """

    def __init__(self, mode: str | None, device: torch.device) -> None:
        self.mode, self.device = mode, device
        self.rank = 0 if mode is None else dist.get_rank()
        self.world = 1 if mode is None else dist.get_world_size()
        # Tensor parallelism divides the layers, so all of its processes take all windows.
        self.shares, self._own = (1, 0) if mode == "tp" else (self.world, self.rank)
        self._mesh = self._make_mesh()

    @property
    def is_first(self) -> bool:
        """Whether this process writes log, result and table."""
        return self.rank == 0

    def _make_mesh(self) -> DeviceMesh | None:
        if self.mode == "hsdp":
            if self.world % _REPLICAS:
                raise ValueError(
                    f"--parallel hsdp keeps {_REPLICAS} copies of the model, for which {self.world} processes "
                    f"are no multiple: start another number of them, or use fsdp2"
                )
            shape = (_REPLICAS, self.world // _REPLICAS)
            return init_device_mesh(self.device.type, shape, mesh_dim_names=("replicate", "shard"))
        if self.mode in ("fsdp2", "tp"):
            return init_device_mesh(self.device.type, (self.world,), mesh_dim_names=(self.mode,))
        return None

    def check_batch(self, batch: int) -> None:
        """Raise a `ValueError` unless a batch divides equally among the processes."""
        if batch % self.shares:
            raise ValueError(
                f"--batch {batch} is that of all processes together, and no multiple of the {self.shares} here: "
                f"choose one that is, so that the mean over processes is the mean over windows"
            )

    def share(self, windows: Tensor) -> Tensor:
        """Return this process's windows of a batch; the mean of all processes' means is that of the batch."""
        return windows.chunk(self.shares)[self._own]

    def weighted_share(self, windows: Tensor) -> tuple[Tensor, int]:
        """Return this process's share of any number of windows, and how many of them count here.

        Every process gets at least one, since all of them have to run a sharded model together.
        """
        own = windows[self._own :: self.shares]
        return (own, len(own)) if len(own) else (windows[:1], 0)

    def mean(self, x: Tensor) -> Tensor:
        """Return the mean over processes of a number computed from their windows."""
        return self.total(x) / self.shares

    def total(self, x: Tensor) -> Tensor:
        """Return the sum over processes of a number computed from their windows."""
        if self.shares > 1:
            x = x.clone()
            dist.all_reduce(x)
        return x

    def build(self, config: LlamaConfig, *, seed: int, dtype: torch.dtype) -> LlamaForCausalLM:
        """Build the model that `build_model` returns for the same seed, or this process's part of it.

        If it is sharded, processes start from a meta model, and the first one sends the others their parts of the
        model that a single process would build; only the first ever holds all weights.
        """
        if self._mesh is None:
            return build_model(config, seed=seed, device=self.device, dtype=dtype)
        model = build_model(config, seed=seed, device=torch.device("meta"), dtype=dtype)
        if self.mode == "tp":
            _divide_layers(model, self._mesh)
        else:
            for layer in model.model.layers:
                fully_shard(layer, mesh=self._mesh)
            fully_shard(model, mesh=self._mesh)
        model.to_empty(device=self.device)
        model.tie_weights()  # to_empty has untied the weights
        whole = build_model(config, seed=seed, device=self.device, dtype=dtype) if self.is_first else None
        set_model_state_dict(
            model,
            whole.state_dict() if whole is not None else {},
            options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True),
        )
        for name, buffer in model.named_buffers():  # rotary frequencies, which a state dict omits
            if whole is not None:
                buffer.copy_(whole.get_buffer(name))
            dist.broadcast(buffer, 0)
        return model

    def wrap(self, model: nn.Module, *, compiled: bool) -> nn.Module:
        """Return the module to call to run `model`."""
        if self.mode == "ddp":
            own = [self.device] if self.device.type == "cuda" else None
            model = DistributedDataParallel(model, device_ids=own)
        return torch.compile(model) if compiled else model  # type: ignore[return-value]

    def clip(self, parameters: Iterable[Tensor], max_norm: float) -> None:
        """Scale gradients down to a norm of `max_norm` over the whole model, as `clip_grad_norm_` does."""
        if self._mesh is None:
            nn.utils.clip_grad_norm_(parameters, max_norm)
            return
        # Under tensor parallelism some gradients are DTensors and some are not, which clip_grad_norm_ cannot mix.
        grads = [p.grad for p in parameters if p.grad is not None]
        sharded = [g for g in grads if isinstance(g, DTensor)]
        norms = [nn.utils.get_total_norm([g for g in grads if not isinstance(g, DTensor)]).to(self.device)]
        if sharded:
            norms.append(nn.utils.get_total_norm(sharded).full_tensor())  # type: ignore[attr-defined]
        factor = (max_norm / (torch.linalg.vector_norm(torch.stack(norms)) + 1e-6)).clamp(max=1.0)
        for g in grads:
            (g.to_local() if isinstance(g, DTensor) else g).mul_(factor)

    def agree(self, work: Callable[[], _T]) -> list[_T]:
        """Call `work` on every process; return the results of all, or raise everywhere if one failed.

        Raises:
            ValueError: Some processes failed; the message names them and their errors.
        """
        result: _T | None = None
        failure = ""
        try:
            result = work()
        except (OSError, ValueError, RuntimeError, KeyError, EOFError) as error:
            failure = f"{type(error).__name__}: {error}" if not isinstance(error, ValueError) else str(error)
        everywhere: list[Any] = [None] * self.world
        dist.all_gather_object(everywhere, (result, failure))
        failed = [f"process {i}: {why}" for i, (_, why) in enumerate(everywhere) if why]
        if failed:
            raise ValueError("; ".join(failed))
        return [value for value, _ in everywhere]

    def on_first(self, work: Callable[[], _T]) -> _T:
        """Call `work` on the first process alone and return its result on all; raise everywhere if it fails."""
        said = self.agree(lambda: work() if self.is_first else None)[0]
        return said  # type: ignore[return-value]


def _divide_layers(model: LlamaForCausalLM, mesh: DeviceMesh) -> None:
    """Shard attention by heads, MLPs by width, and embedding and head by vocabulary."""
    config, n = model.config, mesh.size()
    for field in ("num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size"):
        if getattr(config, field) % n:
            raise ValueError(
                f"--parallel tp divides {field} ({getattr(config, field)}) among {n} processes: start a number "
                f"of them that divides it, or use fsdp2"
            )
    layers = "model.layers.*"
    plan: dict[str, Any] = {f"{layers}.self_attn.{name}_proj": ColwiseParallel() for name in "qkv"}
    plan |= {f"{layers}.mlp.{name}_proj": ColwiseParallel() for name in ("gate", "up")}
    plan |= {f"{layers}.self_attn.o_proj": RowwiseParallel(), f"{layers}.mlp.down_proj": RowwiseParallel()}
    if not config.tie_word_embeddings:
        plan["model.embed_tokens"] = RowwiseParallel(input_layouts=Replicate())
        plan["lm_head"] = ColwiseParallel(output_layouts=Replicate())
    parallelize_module(model, mesh, plan)


def started_by_torchrun() -> bool:
    """Return whether this process is one of several, according to torchrun's environment."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def start(mode: str, device: str) -> Processes:
    """Join the other processes started by torchrun, over NCCL on CUDA devices, else over gloo.

    Raises:
        ValueError: torchrun did not start this process, or there are fewer CUDA devices than processes.
    """
    if not dist.is_initialized() and not {"RANK", "WORLD_SIZE", "LOCAL_RANK"} <= os.environ.keys():
        raise ValueError(
            f"--parallel {mode} is for processes that torchrun starts: "
            f"torchrun --standalone --nproc-per-node 2 -m bench.pretrain --parallel {mode} ..."
        )
    own = torch.device(device)
    if own.type == "cuda":
        local, present = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= present:
            raise ValueError(
                f"--parallel {mode}: process {local} of this machine has no CUDA device of its own, there are "
                f"{present}; start as many processes, or use --device cpu"
            )
        own = torch.device("cuda", local)
        torch.cuda.set_device(own)
    if not dist.is_initialized():
        # gloo, in addition to NCCL, transfers Python objects: names of files, errors.
        dist.init_process_group("cpu:gloo,cuda:nccl" if own.type == "cuda" else "gloo", timeout=_WAIT)
    return Processes(mode, own)
