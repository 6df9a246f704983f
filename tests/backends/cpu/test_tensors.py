"""The step in C on tensors whose memory is not described by their address alone."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from gwt_kernels.functional import Hyper, gwt_adamw_
from tests.support.native import needs_step_in_c
from tests.support.steps import update_sums

pytestmark = needs_step_in_c


def step(p: Tensor, g: Tensor, backend: str | None, level: int = 1, **options: object) -> Tensor:
    m = p.new_zeros(*p.shape[:-1], p.shape[-1] >> level)
    arguments = {"params": [p], "grads": [g], "exp_avgs": [m], "exp_avg_sqs": [m.clone()], "limiter_norms": [None]}
    gwt_adamw_(**arguments, steps=[1], hypers=[Hyper(lr=0.1)], level=level, backend=backend, **options)
    return p


def test_fake_tensors_have_no_memory():
    """Check a step on fake tensors, as when it is traced for shapes only."""
    with FakeTensorMode():
        assert step(torch.zeros(4, 8), torch.ones(4, 8), None).shape == (4, 8)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_batched_tensors_have_no_memory():
    p, g = torch.zeros(3, 2, 8), torch.randn(3, 2, 8)
    torch.func.vmap(lambda p, g: step(p, g, None))(p, g)
    expected = [step(torch.zeros(2, 8), each, "torch") for each in g]
    torch.testing.assert_close(p, torch.stack(expected))


def test_gradient_of_zeros_without_memory():
    """Check gradients as forward-mode differentiation makes them, which the torch backend refuses."""
    with pytest.raises(RuntimeError, match="ZeroTensors are immutable"):
        step(torch.ones(4, 8), torch._efficientzerotensor(4, 8), None)


NEGATIVES: dict[str, Callable[[], Tensor]] = {
    "strided": lambda: torch.complex(torch.ones(4, 8), torch.linspace(-1, 1, 32).view(4, 8)).conj().imag,
    "contiguous": lambda: torch._neg_view(torch.linspace(-1, 1, 32).view(4, 8)),
}


@pytest.mark.parametrize("kind", NEGATIVES)
def test_views_that_negate(kind):
    """Check weights and gradients whose memory holds their negatives."""
    got, expected, plain = NEGATIVES[kind](), NEGATIVES[kind](), NEGATIVES[kind]().resolve_neg().clone()
    assert got.is_neg()
    for p, backend in ((got, "compiled"), (expected, "torch"), (plain, "compiled")):
        step(p, NEGATIVES[kind](), backend)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7)
    assert torch.equal(got, plain)
    assert not torch.equal(got, NEGATIVES[kind]())


def test_torch_compile_makes_one_graph_of_it():
    """Check that with the default backend it traces PyTorch's operators, since it cannot trace C."""
    torch._dynamo.reset()
    p, q, g = torch.zeros(4, 8), torch.zeros(4, 8), torch.randn(4, 8)
    torch.compile(lambda p, g: step(p, g, None), backend="eager", fullgraph=True)(p, g)
    torch.testing.assert_close(p, step(q, g, "torch"))


@pytest.mark.parametrize(("level", "rule"), [(0, "gwt"), (1, "foam")])
def test_no_division_by_the_limiter_without_one(level, rule):
    arguments = (torch.zeros(4, 8), torch.ones(4, 8), "compiled", level)
    limited = step(*arguments, rule=rule, limits=torch.tensor([10.0])).clone()
    assert torch.equal(limited, step(torch.zeros(4, 8), *arguments[1:], rule=rule))
    limits = {"limits": torch.tensor([10.0])}  # control
    assert not torch.equal(step(*arguments[:3], **limits), step(torch.zeros(4, 8), *arguments[1:3]))


def test_int8_moments_without_scales_are_refused():
    p, m = torch.zeros(4, 8), torch.zeros(4, 4, dtype=torch.int8)
    arguments = {"params": [p], "grads": [p], "exp_avgs": [m], "exp_avg_sqs": [m.to(torch.uint8)]}
    with pytest.raises(ValueError, match="scales must hold a pair of tensors"):
        update_sums(**arguments, steps=[1], hypers=[Hyper()], level=1, backend="compiled")


LATE = """
import threading, torch
from gwt_kernels import GWTAdamW
torch.set_num_threads(2)
p = torch.nn.Parameter(torch.ones(512, 512))
p.grad = torch.ones(512, 512)
optimizer = GWTAdamW([p], backend="compiled")
main = threading.main_thread()
def train():
    main.join()
    optimizer.step()
    print(bool((p != 1).all()))
threading.Thread(target=train).start()
"""


def test_training_thread_outlives_the_main_thread():
    """Check steps in a thread after the main one has ended, when no thread pool can be started any more."""
    done = subprocess.run([sys.executable, "-c", LATE], capture_output=True, text=True, check=True)
    assert done.stdout == "True\n", done.stderr
