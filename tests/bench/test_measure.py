"""The common measurements of the benchmarks: bytes held, the spread of samples, and facts about the machine."""

from __future__ import annotations

import pytest
import torch

from bench.common.bandwidth import StepBandwidth
from bench.common.measure import Spread, facts, held_bytes, plain_tensors
from bench.optimizers.candidate import build, gwt
from tests.support.candidates import CPU, SHAPES, SINGLE


def test_a_step_on_a_cpu_is_compared_with_a_pass_in_place() -> None:
    bandwidth = StepBandwidth(CPU, size=1 << 20)
    assert (bandwidth.metric, bandwidth.words) == ("in_place_bandwidth", "bandwidth in place")
    assert 1e7 < bandwidth.spread.p20 <= bandwidth.spread.median <= bandwidth.spread.p80 < 1e14
    assert bandwidth.spread.samples == 20
    assert 1e7 < bandwidth.now() < 1e14


def test_held_bytes() -> None:
    built = build(gwt(2, SINGLE, limiter=True), SHAPES[1:2], CPU)
    (p,) = built.tensors
    moments_and_scalars = 2 * 5 * 10 * 4 + 8 + 4  # moments of ceil(37/4) columns; step and limiter norm
    assert held_bytes(built.optimizer, [p, p.grad]) == moments_and_scalars
    assert held_bytes(built.optimizer, [p]) >= moments_and_scalars


def test_held_bytes_of_tensor_subclasses() -> None:
    class Wrapped(torch.Tensor):
        """A tensor that claims 4 bytes per element and holds one, like quantized states."""

        @staticmethod
        def __new__(cls, values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
            return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=SINGLE)

        def __init__(self, values: torch.Tensor, scale: torch.Tensor) -> None:
            self.values, self.scale = values, scale

        def __tensor_flatten__(self) -> tuple[list[str], None]:
            return ["values", "scale"], None

        @classmethod
        def __torch_dispatch__(cls, *_: object) -> None:
            pytest.fail("its bytes are counted without an operation")

    class Object:
        def __init__(self, *parts: object) -> None:
            self.parts = parts

    shared = torch.zeros(50, dtype=torch.uint8)
    wrapped = Wrapped(torch.zeros(100, dtype=torch.uint8), torch.zeros(2))
    cyclic: list[object] = [shared[10:]]
    cyclic.append(cyclic)
    holder = {"a": Object(wrapped, [shared]), "b": cyclic, "c": torch.nn.Linear, "d": None}
    assert held_bytes(holder) == 100 + 8 + 50
    assert len(list(plain_tensors(holder))) == 4
    assert held_bytes(holder, [shared]) == 108


def test_spread_of_samples() -> None:
    assert Spread.of([5.0, 1.0, 2.0, 3.0, 4.0, 6.0]) == Spread(3.5, 2.0, 5.0, 6)


def test_facts_about_the_machine() -> None:
    about = facts(CPU, "bench.optimizers", ["--device", "cpu"])
    assert about["command"] == "python -m bench.optimizers --device cpu"
    assert about["torch"] == torch.__version__
