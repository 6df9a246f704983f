"""The folded step in plain PyTorch alone: its chunks, and memory around them."""

from __future__ import annotations

import pytest
import torch

from gwt_kernels.backends.torch import step as torch_step
from gwt_kernels.functional import Hyper
from tests.support.poisoned import LAYOUTS
from tests.support.steps import Bucket

HYPER = Hyper(lr=0.01, weight_decay=0.1)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("level", [0, 1, 2, 3])
@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
def test_chunks_cover_every_tensor(monkeypatch, chunk, level, layout):
    """Check chunks smaller than a row, of some rows and of everything, with and without a float32 copy."""
    monkeypatch.setattr(torch_step, "CHUNK", chunk)
    for dtype in (torch.float64, torch.bfloat16):
        bucket = Bucket(
            [(6, 40), (5, 37), (3, 4, 16), (90,)], level, dtype=dtype, layouts=[layout], limited=level > 0
        )
        bucket.check_step(HYPER, 3, backend="torch")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("level", [0, 1, 3])
def test_chunks_draw_the_bits_of_the_whole(monkeypatch, level, layout):
    """Check that the random bits of an element depend only on its index in the tensor."""

    def run(chunk: int, key: int = 5) -> list[torch.Tensor]:
        monkeypatch.setattr(torch_step, "CHUNK", chunk)
        kinds = {"dtype": torch.bfloat16, "moment_dtype": torch.bfloat16, "layouts": [layout]}
        bucket = Bucket([(6, 40), (5, 37), (3, 4, 16), (90,)], level, **kinds)
        bucket.step(HYPER, 3, backend="torch", rounding="stochastic", keys=[key] * 4)
        return bucket.results()

    whole = run(1 << 20)
    for chunk in (1, 7, 64, 100):
        assert all(map(torch.equal, run(chunk), whole))
    assert not any(map(torch.equal, run(64, key=6), whole))


@pytest.mark.parametrize("level", [0, 2])
def test_a_tensor_of_several_real_chunks(level):
    shapes = [(1100, 1000), (3, torch_step.CHUNK), (2 * torch_step.CHUNK + 3,)]
    bucket = Bucket(shapes, level, limited=level > 0)
    bucket.check_step(HYPER, 3, backend="torch")


@pytest.mark.parametrize("maximize", [False, True])
def test_maximize_equals_negated_gradients(maximize):
    """Check that maximizing with a gradient is minimizing with its negative, bit for bit."""
    one, other = (Bucket([(4, 32), (3, 37)], 2, limited=True) for _ in range(2))
    for g in other.grads:
        g.tensor.neg_()
    one.step(HYPER._replace(maximize=maximize), 2, backend="torch")
    other.step(HYPER._replace(maximize=not maximize), 2, backend="torch")
    assert all(map(torch.equal, one.results(), other.results()))


def test_limiter_worked_by_hand():
    """Check growth from 2 to 6, by 3, where 2 is allowed: the update is divided by 1.5, and the new norm is 4."""
    previous = torch.tensor(2.0, dtype=torch.float64)
    limit = torch_step.limit_(previous, torch.tensor(6.0, dtype=torch.float64), 2.0)
    assert limit.item() == pytest.approx(1.5, rel=1e-8)  # the limiter's own 1e-8
    assert previous.item() == pytest.approx(4.0, rel=1e-8)
    for before, norm in ((0.0, 6.0), (3.0, 3.3), (5.0, 0.0)):
        previous = torch.tensor(before)
        assert torch_step.limit_(previous, torch.tensor(norm), 1.5).item() == 1
        assert previous.item() == pytest.approx(norm)
