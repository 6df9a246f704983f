"""Accelerate's FSDP2 over gloo in a new process, compared with a plain loop."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from tests.support.runs import assert_differ, assert_same_bits, parameters_of
from tests.support.tiny import llama, optimizer_of, sentences


def accelerator() -> Any:
    """Return an Accelerator that shards on a CPU, which the library offers only on accelerators."""
    from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState

    os.environ |= {"RANK": str(dist.get_rank()), "WORLD_SIZE": str(dist.get_world_size()), "LOCAL_RANK": "0"}
    AcceleratorState._reset_state(reset_partial_state=True)  # else the settings of the first Accelerator stay
    sharding = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
    )
    made = Accelerator(cpu=True)
    made.state._shared_state |= {"distributed_type": DistributedType.FSDP, "fsdp_plugin": sharding}
    made.state.__dict__ |= made.state._shared_state
    return made


def train(model: nn.Module, optimizer: Any, backward: Any, clip: Any) -> None:
    for batch in DataLoader(sentences(16), batch_size=4):  # type: ignore[arg-type,var-annotated]
        backward(model(**batch).loss)
        clip(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()


def prepared(accelerator: Any) -> tuple[nn.Module, Any]:
    """Prepare model and optimizer; Accelerate shards the model after the optimizer's construction."""
    model = llama()
    model, optimizer = accelerator.prepare(model, optimizer_of(model))
    assert all(isinstance(p, DTensor) for p in parameters_of(optimizer.optimizer))
    return model, optimizer


def whole(tensor: Any) -> torch.Tensor:
    made: torch.Tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return made.detach().clone()


def everything(model: nn.Module, optimizer: Any) -> Any:
    """Return weights and state by name, gathered."""
    states = [(name, optimizer.state[p]) for name, p in model.named_parameters()]
    return (
        {name: whole(p) for name, p in model.named_parameters()},
        {name: {key: whole(value) for key, value in sorted(state.items())} for name, state in states},
    )


def fsdp2() -> None:
    """Check that a sharded run equals the plain one, bit for bit on one process."""
    made = accelerator()
    model, optimizer = prepared(made)
    begin, _ = everything(model, optimizer.optimizer)
    train(model, optimizer, made.backward, made.clip_grad_norm_)
    plain = llama()
    by_hand = optimizer_of(plain)
    train(plain, by_hand, torch.Tensor.backward, nn.utils.clip_grad_norm_)
    sharded = everything(model, optimizer.optimizer)
    assert_same_bits(sharded, everything(plain, by_hand))
    assert_differ(sharded[0], begin)
    assert [group["level"] for group in optimizer.param_groups] == [
        group["level"] for group in by_hand.param_groups
    ]
