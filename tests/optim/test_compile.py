"""GWTAdamW inside torch.compile: equally many graph breaks for few and many tensors, and no recompilation."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters

from gwt_kernels import GWTAdamW
from tests.support.runs import assert_same_bits


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def training_step(layers: int, **options):
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(layers)))
    optimizer = GWTAdamW(model.parameters(), level=1, **options)

    def step(x):
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step, optimizer, list(model.parameters())


@pytest.mark.parametrize("lr", [0.01, torch.tensor(0.01)], ids=["float", "tensor"])
def test_a_compiled_training_step(lr):
    """Check that a changing rate and step count recompile nothing, and that training equals the eager one."""
    trained = []
    for compiled in (False, True):
        step, optimizer, params = training_step(3, lr=lr.clone() if isinstance(lr, torch.Tensor) else lr)
        step = torch.compile(step, backend="eager") if compiled else step
        compilations = []
        for t in range(6):
            step(torch.linspace(-1, 1, 32).view(4, 8) * (t + 1))
            for group in optimizer.param_groups:
                if isinstance(lr, torch.Tensor):
                    group["lr"].fill_(0.01 / (t + 2))
                else:
                    group["lr"] = 0.01 / (t + 2)
            compilations.append(counters["stats"]["unique_graphs"])
        trained.append([p.detach().clone() for p in params])
    assert compilations[0] > 0
    assert compilations[1:] == compilations[:1] * 5
    assert_same_bits(*trained)


def test_graph_breaks_do_not_grow_with_the_tensors():
    breaks = []
    for layers in (1, 4):
        torch._dynamo.reset()
        counters.clear()
        step, _, _ = training_step(layers)
        torch.compile(step, backend="eager")(torch.ones(4, 8))
        breaks.append(sum(counters["graph_break"].values()))
    assert breaks[0] == breaks[1] > 0
