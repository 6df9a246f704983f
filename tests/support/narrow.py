"""Steps of narrow weights for tests: shapes, options, dtypes, and gradients of any dtype."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gwt_kernels import GWTAdamW
from gwt_kernels.formats.split import join_low
from gwt_kernels.optim.state import low_bits_of
from tests.support import interpreter
from tests.support.runs import parameters_of

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SHAPES = [(4, 32), (3, 37), (33,), (2, 3, 9)]  # whole blocks, short last blocks, no dimension that divides
OPTIONS = {"lr": 0.03, "weight_decay": 0.1}

rules = pytest.mark.parametrize("rule", ["gwt", "foam"])
levels = pytest.mark.parametrize("level", [0, 2])


def step(optimizer: GWTAdamW, grads: list[Tensor]) -> None:
    """Take a step with gradients of any dtype."""
    for p, g in zip(parameters_of(optimizer), grads, strict=True):
        p.grad = None
        if g.dtype != p.dtype:
            p.grad_dtype = None
        p.grad = g.to(p.device, copy=True)
    with interpreter.like_a_gpu():
        optimizer.step()


def gradients(t: int, dtype: torch.dtype, shapes=SHAPES, factor: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(50 + t)
    return [(factor * (torch.randn(s, generator=generator) + 0.3)).to(dtype) for s in shapes]


def float32_of(p: Tensor, state: dict[str, Tensor]) -> Tensor:
    return join_low(p.detach(), low_bits_of(state["weight_low"]))
