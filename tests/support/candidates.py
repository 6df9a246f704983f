"""Inputs of the tests of the optimizer benchmark: tensors of every kind, and a wrong optimizer."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from bench.common.bandwidth import StepBandwidth
from bench.common.models import Shape
from gwt_kernels import GWTAdamW

needs_ptwt = pytest.mark.skipif(
    importlib.util.find_spec("ptwt") is None, reason="needs ptwt: pip install -e '.[bench]'"
)

CPU = torch.device("cpu")
SINGLE, HALF = torch.float32, torch.bfloat16
BANDWIDTH = StepBandwidth(CPU, size=1 << 20, repetitions=2)
SHAPES = [
    Shape("wide", (6, 16), True, True),
    Shape("odd", (5, 37), True, True),
    Shape("embedding", (8, 16), False, True),
    Shape("norm", (16,), False, False),
]


class ScaledWrong(GWTAdamW):
    """GWTAdamW with an update one per cent too large."""

    def __init__(self, params: list[dict]) -> None:
        super().__init__(params, scale=0.2525)
