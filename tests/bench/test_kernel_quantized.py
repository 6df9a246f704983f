"""Int8 moments in the kernel benchmark: both backends pass its oracle, and wrong values fail."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.kernels import oracle
from bench.kernels.cases import Case
from bench.kernels.oracle import Buffers, check
from tests.support import interpreter

STEP = oracle.gwt_adamw_


def error_of(shape: tuple[int, ...], kernel: str = "step", device: str = "cpu", backend: Any = None) -> float:
    case = Case(kernel, shape, 2, torch.bfloat16, torch.int8)
    before = Buffers(case, torch.device(device), backend)
    return check(before.clone(), before)


@pytest.mark.parametrize("shape", [(8, 1024), (5, 333)], ids=str)
@pytest.mark.parametrize("kernel", ["step", "step_limiter"])
def test_int8_moments_through_the_triton_kernels(shape: tuple[int, ...], kernel: str, device: torch.device) -> None:
    with interpreter.like_a_gpu():
        assert 0 < error_of(shape, kernel, str(device), "triton") <= 1


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize(
    "spoil",
    [
        lambda values, scales: values.view(-1)[5:6].sub_(2),
        lambda values, scales: scales[1:2].mul_(1 + 2**-17),
        lambda values, scales: scales[1:2].fill_(float("nan")),
        lambda values, scales: scales.copy_(scales.roll(1)),
    ],
    ids=["two steps off", "scale too large", "scale not a number", "scales of other blocks"],
)
def test_wrong_quantized_values_are_noticed(spoil: Any, which: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoiled(**arguments: Any) -> None:
        STEP(**arguments)
        values = arguments[("exp_avgs", "exp_avg_sqs")[which]][0]
        spoil(values, arguments["scales"][0][which])

    assert error_of((8, 1024)) <= 1
    monkeypatch.setattr(oracle, "gwt_adamw_", spoiled)
    assert error_of((8, 1024)) > 1
