"""Captured steps on a GPU: replays equal eager steps, and clipping or skipping never synchronises."""

from __future__ import annotations

import pytest
import torch

from gwt_kernels import GWTAdamMini, GWTAdamW

pytestmark = pytest.mark.gpu


class Training:
    """A small model, and one training step on static memory with replaceable contents."""

    def __init__(self, kind=GWTAdamW, **options) -> None:
        torch.manual_seed(0)
        layers = [torch.nn.Linear(64, 172), torch.nn.GELU(), torch.nn.Linear(172, 37), torch.nn.Linear(37, 8)]
        self.model = torch.nn.Sequential(*layers).to("cuda")
        self.lr = torch.tensor(0.01, device="cuda")
        self.params = list(self.model.parameters())
        matrices, rest = [p for p in self.params if p.dim() > 1], [p for p in self.params if p.dim() == 1]
        self.optimizer = kind(
            [{"params": matrices}, {"params": rest, "level": 0}], lr=self.lr, capturable=True, **options
        )
        self.x = torch.zeros(32, 64, device="cuda")

    def batch(self, t: int) -> None:
        generator = torch.Generator("cuda").manual_seed(t)
        self.x.copy_(torch.randn(self.x.shape, generator=generator, device="cuda"))
        if t % 7 == 5:
            self.x[0, 0] = float("inf")
        self.lr.fill_(0.01 / (1 + t % 3))

    def step(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.model(self.x).square().mean().backward()
        self.optimizer.step()

    def results(self) -> list[torch.Tensor]:
        states = [x for p in self.params for x in self.optimizer.state[p].values()]
        return [x.detach().clone() for x in (*self.params, *states, self.optimizer.skipped_steps)]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_grad_norm": 0.5, "skip_nonfinite": True},
        {"rule": "foam", "state_dtype": "bfloat16"},
        {"kind": GWTAdamMini, "head_rows": None},
    ],
    ids=["plain", "controlled", "random bits", "heads"],
)
def test_replays_equal_eager_steps(options):
    """Compare many replays with different rates and data, including bad batches."""
    options = {"skip_nonfinite": True} | options
    eager, captured = Training(**options), Training(**options)
    for t in range(3):
        eager.batch(t)
        eager.step()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for t in range(3):
            captured.batch(t)
            captured.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    captured.optimizer.zero_grad(set_to_none=True)
    with torch.cuda.graph(graph):
        captured.step()
    for t in range(3, 60):
        eager.batch(t)
        eager.step()
        captured.batch(t)
        graph.replay()
    torch.cuda.synchronize()
    for a, b in zip(eager.results(), captured.results(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    assert captured.optimizer.skipped_steps > 0


def test_a_capture_without_a_step_before_is_refused():
    training = Training()
    training.batch(0)
    training.model(training.x).square().mean().backward()
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="take a few steps before the capture"), torch.cuda.graph(graph):
        training.optimizer.step()


def test_a_capture_without_capturable_is_refused():
    training = Training()
    training.optimizer.capturable = False
    training.batch(0)
    for group in training.optimizer.param_groups:
        group["lr"] = 0.01
    training.step()
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="capturable=True"), torch.cuda.graph(graph):
        training.optimizer.step()


def test_clipping_and_skipping_do_not_synchronise():
    training = Training(max_grad_norm=0.5, skip_nonfinite=True)
    for t in range(2):
        training.batch(t)
        training.step()
    training.batch(5)
    training.optimizer.zero_grad(set_to_none=True)
    training.model(training.x).square().mean().backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        training.optimizer.step()
        training.optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_torch_backend_cannot_be_captured():
    with pytest.raises(RuntimeError, match="capturable=True needs the Triton backend"):
        Training(backend="torch")
