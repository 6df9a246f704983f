"""Sharded states that move in memory, and other default dtypes; test_sharding.py starts the processes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch.distributed.tensor import DTensor

from gwt_kernels import GWTAdamW
from tests.optim.test_defaults import wrong_defaults
from tests.support import runs
from tests.support.sharded import ROWS, give, mesh_of, shard

SHAPES = ((16, 32), (7, 8))


def move_data(optimizer: GWTAdamW) -> None:
    """Give tensors other memory under the same objects, like states that are offloaded and brought back."""
    for state in optimizer.state.values():
        for value in state.values():
            local = value._local_tensor if isinstance(value, DTensor) else value
            local.data = local.data.clone()


def replace_local_tensors(optimizer: GWTAdamW) -> None:
    for state in optimizer.state.values():
        for key, value in state.items():
            if isinstance(value, DTensor):
                value._local_tensor = value._local_tensor.clone()
            else:
                state[key] = value.clone()


def write(optimizer: GWTAdamW, key: str, number: float) -> None:
    for state in optimizer.state.values():
        value = state[key]
        (value._local_tensor if isinstance(value, DTensor) else value).fill_(number)


def main() -> None:
    """Check that moved states continue like others, and values written to moved memory are used."""
    mesh = mesh_of(2)
    for backend in ("compiled", "torch"):
        for options in ({}, {"max_grad_norm": 1.0}, {"weight_rounding": "split"}):
            for move in (move_data, replace_local_tensors):
                _compare(mesh, move, backend=backend, **options)
    _under_wrong_defaults(mesh)


def _compare(mesh: object, move: Callable[[GWTAdamW], None], **options: object) -> None:
    dtype = torch.bfloat16 if options.get("weight_rounding") else torch.float32
    values = runs.parameters(SHAPES, dtype=dtype)
    both = [[shard(p, mesh, [ROWS]) for p in values] for _ in range(2)]
    expected, moved = (GWTAdamW(params, lr=0.1, level=2, **options) for params in both)

    def step(t: int) -> None:
        for params, optimizer in zip(both, (expected, moved), strict=True):
            give(params, values, t)
            optimizer.step()

    for t in range(4):
        step(t)
        move(moved)
    for key in ("step", "limiter_norm", "exp_avg"):
        move(moved)
        for optimizer in (expected, moved):
            write(optimizer, key, 3)
        step(4)
        states = [[dict(s) for s in optimizer.state.values()] for optimizer in (expected, moved)]
        plain = [
            [{k: v.to_local() if isinstance(v, DTensor) else v for k, v in s.items()} for s in own]
            for own in states
        ]
        runs.assert_same_bits(plain[1], plain[0], f"{move.__name__}, {options}, {key}")
        runs.assert_same_bits([p.to_local() for p in both[1]], [p.to_local() for p in both[0]])
        for own in plain[1]:
            assert float(own["step"]) == (4 if key == "step" else 5 if key == "limiter_norm" else 6)


def _under_wrong_defaults(mesh: object) -> None:
    """Check that the limiter's sums are float32 on the CPU, whatever the default dtype and device are."""
    values = runs.parameters([(64, 128)])

    def stepped(defaults: Callable[[], AbstractContextManager[None]]) -> list[torch.Tensor]:
        params = [shard(p, mesh, [ROWS]) for p in values]
        optimizer = GWTAdamW(params, lr=0.1)
        for t in range(2):
            give(params, values, t)
            with defaults():
                optimizer.step()
        (state,) = optimizer.state.values()
        return [state["limiter_norm"], params[0].to_local()]

    runs.assert_same_bits(stepped(wrong_defaults), stepped(nullcontext))
