"""A CUDA graph of a capturable step, simulated in the interpreter: the recorded launches, repeated.

A graph replays kernels with the arguments of the capture; whatever changes from step to step has to be in memory to
which these arguments point. Launches are recorded during a step, and repeated in order.
"""

from __future__ import annotations

import contextlib
import weakref
from unittest.mock import patch

import pytest
import torch
from torch.distributed.tensor import DTensor, Shard

from gwt_kernels import GWTAdafactor, GWTAdamW
from gwt_kernels.backends.triton import control_launch, launch
from gwt_kernels.mesh import Mesh
from gwt_kernels.optim.checks import check_captured_everywhere
from tests.support import interpreter, meshes
from tests.support.runs import assert_differ, assert_same_bits, parameters, results

if torch.cuda.is_available():
    pytest.skip(
        "needs kernels that run on the CPU: test_gpu_capture.py captures real graphs here", allow_module_level=True
    )

KERNELS = {
    launch: ("norm_kernel", "limiter_kernel", "step_kernel", "observe_kernel"),
    control_launch: ("squares_kernel", "total_kernel", "decide_kernel", "rows_kernel"),
}
SHAPES = [(8, 64), (3, 37), (64,)]


class Graph:
    """Recorded launches with their arguments, in order."""

    def __init__(self) -> None:
        self.calls = []

    def capture(self, step) -> None:
        graph = self

        class Recorder:
            def __init__(self, kernel) -> None:
                self.kernel = kernel

            def __getitem__(self, grid):
                def call(*args, **kwargs):
                    graph.calls.append((self.kernel, grid, args, kwargs))
                    self.kernel[grid](*args, **kwargs)

                return call

        patches = [
            patch.object(module, name, Recorder(getattr(module, name)))
            for module, names in KERNELS.items()
            for name in names
        ]
        for one in patches:
            one.start()
        try:
            step()
        finally:
            for one in patches:
                one.stop()

    def replay(self) -> None:
        with interpreter.like_a_gpu():
            for kernel, grid, args, kwargs in self.calls:
                kernel[grid](*args, **kwargs)


class Training:
    """Parameters with static gradients, as a graph needs them, and the learning rate in a tensor."""

    def __init__(self, **options) -> None:
        self.params = parameters(SHAPES)
        self.lr = torch.tensor(0.01)
        groups = [{"params": self.params[:2], "level": 2}, {"params": self.params[2:], "level": 0}]
        self.optimizer = GWTAdamW(groups, lr=self.lr, backend="triton", capturable=True, **options)
        for p in self.params:
            p.grad = torch.zeros_like(p)

    def batch(self, t: int) -> None:
        generator = torch.Generator().manual_seed(t)
        for p in self.params:
            p.grad.copy_(torch.randn(p.shape, generator=generator) * (1 + t % 4))
        if t % 5 == 4:
            self.params[1].grad[1, 2] = float("nan")
        self.lr.fill_(0.01 / (1 + t % 3))

    def step(self) -> None:
        with interpreter.like_a_gpu():
            self.optimizer.step()

    def results(self):
        return results(self.optimizer) | {"skipped": self.optimizer.skipped_steps.clone()}


@pytest.mark.parametrize(
    "options",
    [
        {"skip_nonfinite": True},
        {"skip_nonfinite": True, "max_grad_norm": 2.0, "weight_decay": 0.1, "telemetry": True},
        {"skip_nonfinite": True, "rule": "foam", "state_dtype": "bfloat16"},
        {"skip_nonfinite": True, "correct_bias": False},
    ],
    ids=["limiter", "clipped", "random bits", "no bias correction"],
)
def test_replays_equal_eager_steps(options):
    eager, captured = Training(**options), Training(**options)
    for training in (eager, captured):
        for t in range(2):
            training.batch(t)
            training.step()
    graph = Graph()
    for t in range(2, 7):
        eager.batch(t)
        eager.step()
        captured.batch(t)
        if t == 2:
            graph.capture(captured.step)
        else:
            graph.replay()
        assert_same_bits(captured.results(), eager.results())
    assert captured.optimizer.skipped_steps == 1
    assert len(graph.calls) > 2
    if options.get("telemetry"):
        assert captured.optimizer.telemetry() == eager.optimizer.telemetry()


def test_a_step_that_is_not_capturable_would_repeat_itself():
    """Control: with counts and rates on the host a replay is not the next step."""
    eager, captured = Training(), Training()
    for training in (eager, captured):
        training.optimizer.capturable = False
        training.batch(0)
        training.step()
    graph = Graph()
    for t in (1, 2):
        for training in (eager, captured):
            training.batch(t)
        eager.step()
        if t == 1:
            graph.capture(captured.step)
        else:
            graph.replay()
    assert_differ(captured.results(), eager.results())


def test_memory_has_what_a_step_with_other_options_replaces():
    p = parameters([(8, 64)])[0]
    optimizer = GWTAdafactor([p], level=2, backend="triton", clip_threshold=1.0)

    def step() -> None:
        p.grad = torch.ones_like(p)
        with interpreter.like_a_gpu():
            optimizer.step()

    step()
    launched = optimizer._plan.buckets[0].runner._launches[0]
    numbers, values = launched._numbers, launched._numbers.clone()
    held = optimizer._plan.memory()
    optimizer.param_groups[0]["clip_threshold"] = 2.0
    step()
    assert optimizer._plan.buckets[0].runner._launches[0]._numbers is not numbers
    assert any(x is numbers for runners in held if isinstance(runners, list) for x in runners)
    assert torch.equal(numbers, values)


@pytest.mark.parametrize("kind", [GWTAdafactor, GWTAdamW])
def test_memory_has_what_steps_on_shards_read(kind):
    """Check buffers of sums over processes, and numbers that a step with other options would replace."""
    with meshes.process(0, Mesh(fsdp=2)) as mesh:
        params = [DTensor.from_local(torch.ones(4, 8), mesh["fsdp"], [Shard(0)]) for _ in range(2)]
        groups = [{"params": [torch.nn.Parameter(p)]} for p in params]
        optimizer = kind(groups, level=2)

        def step(limit: float) -> None:
            for group in optimizer.param_groups:
                if kind is GWTAdamW:  # one limit per group
                    group["norm_growth_limit"] = limit = limit + 0.1
                for p in group["params"]:
                    p.grad = torch.ones_like(p)
            optimizer.step()

        step(1.0)
        plan = optimizer._plan
        places = [x for staged in plan._staged.values() for own in staged.values() for x in own]
        gammas = [x for limits in plan._limits.values() for x in limits._gammas.values()]
        read = [weakref.ref(x) for x in places + gammas]
        held = plan.memory()
        del plan, places, gammas
        step(2.0)
        optimizer.add_param_group({"params": torch.nn.Parameter(torch.ones(8)), "level": 0})  # forgets the plan
        assert read
        assert None not in [x() for x in read]
        del held
        assert [x() for x in read] == [None] * len(read)  # control


def test_a_learning_rate_of_a_captured_step_stays_in_memory():
    """Check this also after a loaded state has brought another rate."""
    training = Training()
    training.optimizer.load_state_dict(training.optimizer.state_dict())  # and with it its own rate
    training.batch(0)
    training.step()
    now = training.optimizer._begin()
    with interpreter.like_a_gpu():
        training.optimizer._end(now._replace(capturing=True), now.plan.step(*now[1:5]))
    rates = [weakref.ref(hyper.lr) for hyper in now.hypers]
    del now
    training.optimizer.load_state_dict(training.optimizer.state_dict())
    training.step()
    assert None not in [rate() for rate in rates]
    training.optimizer._captured.clear()
    assert [rate() for rate in rates] == [None] * len(rates)  # control


def test_chunks_of_a_norm_stay_as_they_were_captured():
    workspace = {}
    with interpreter.like_a_gpu():
        control_launch.squares([torch.ones(64), torch.ones(8)], workspace)
        ((name, chunks),) = workspace.items()
        owners = chunks.owners
        control_launch.squares([torch.ones(64), torch.ones(8)], workspace)
        assert workspace[name] is chunks
        control_launch.squares([torch.ones(16)], workspace)
    assert workspace[name] is not chunks
    assert chunks.owners is owners


@pytest.mark.parametrize("captured", [(), (0,), (1,), (0, 1)])
def test_a_capture_on_some_devices_alone_is_refused(monkeypatch, captured):
    current = [0]

    @contextlib.contextmanager
    def device(chosen):
        current.append(chosen.index)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: current[-1] in captured)
    devices = [torch.device("cuda", 0), torch.device("cuda", 1), torch.device("cpu")]
    check_captured_everywhere(devices[:1], 0 in captured)
    refused = contextlib.nullcontext()
    if len(captured) == 1:
        message = f"captured in a CUDA graph on cuda:{captured[0]} but not on cuda:{1 - captured[0]}"
        refused = pytest.raises(RuntimeError, match=message)
    with refused:
        check_captured_everywhere(devices, 0 in captured)
    assert current == [0]
