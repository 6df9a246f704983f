"""Statistics of gradients in the limiter's first pass: values, launches saved, and nothing else changed."""

from __future__ import annotations

import math
from unittest.mock import patch

import pytest
import torch

from gwt_kernels import GWTAdamW
from gwt_kernels.backends.step_decision import ClipRequest, squares
from gwt_kernels.backends.triton import control_launch, launch
from gwt_kernels.functional import Hyper
from gwt_kernels.optim import step_plan
from tests.support import interpreter
from tests.support.poisoned import LAYOUTS
from tests.support.runs import assert_same_bits, give_gradients, parameters, place, results, snapshot
from tests.support.steps import ARRAYS, Bucket, prepared

# Several tiles of either path, one block, part of a block, and an empty tensor.
SHAPES = [(5, 1024), (3, 700), (0, 8), (8,), (1, 9)]


def grad_stats_of(bucket: Bucket, decision=None, **options):
    n = len(bucket.params)
    arguments = {name: bucket.tensors(name) for name in ARRAYS} | {
        "limiter_norms": bucket.tensors("norms") if bucket.norms else [None] * n,
        "steps": torch.full((n,), 4.0, dtype=torch.float64, device=bucket.device),
        "hypers": [Hyper(maximize=True)] * n,
        "level": bucket.level,
        "backend": "triton",
    }
    with interpreter.like_a_gpu(), torch.no_grad():
        runner, inputs = prepared(**(arguments | options))
        return runner.reduce(inputs, decision, grad_stats=True).grad_stats


def total_of(stats, device) -> list[float]:
    with interpreter.like_a_gpu():
        return squares([torch.zeros(0, device=device)], "triton", grad_stats=stats).tolist()


CHUNKS = [1, 3, launch.MAX_CHUNKS]  # chunks of several tiles, as large models have them, and of one


# Values -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("level", "dtype", "chunks"),  # every pair of two of them
    [(level, dtype, CHUNKS[(level + i) % 3])
     for level in (1, 2, 3) for i, dtype in enumerate((torch.float32, torch.bfloat16, torch.float16))],
)  # fmt: skip
def test_squares_of_all_gradients(device, monkeypatch, level, dtype, chunks):
    monkeypatch.setattr(launch, "MAX_CHUNKS", chunks)
    bucket = Bucket(SHAPES, level, dtype=dtype, layouts=LAYOUTS, limited=True, device=device)
    before = bucket.results()
    total, bad = total_of(grad_stats_of(bucket), device)
    assert total == pytest.approx(sum(float(g.double().square().sum()) for g in bucket.tensors("grads")), rel=2e-6)
    assert bad == 0
    assert_same_bits(bucket.results(), before)


@pytest.mark.parametrize(
    ("tensor", "element", "chunks", "value"),  # every place in chunks of every size, each with another value
    [(*place, chunks, (math.inf, -math.inf, math.nan)[(i + j) % 3])
     for i, place in enumerate([(0, 0), (0, 4095), (0, 5119), (1, 699), (1, 2099), (3, 3), (4, 8)])
     for j, chunks in enumerate(CHUNKS)],
)  # fmt: skip
def test_every_nonfinite_element_is_found(device, monkeypatch, tensor, element, chunks, value):
    monkeypatch.setattr(launch, "MAX_CHUNKS", chunks)
    bucket = Bucket(SHAPES, 2, limited=True, device=device)
    bucket.tensors("grads")[tensor].view(-1)[element] = value
    total, bad = total_of(grad_stats_of(bucket), device)
    assert bad > 0
    assert not math.isfinite(total)


def test_finite_gradients_with_overflowing_sums_are_finite(device):
    bucket = Bucket([(4, 64), (3, 37)], 2, limited=True, device=device)
    for g in bucket.tensors("grads"):
        g.fill_(3e38)
    total, bad = total_of(grad_stats_of(bucket), device)
    assert (total, bad) == (math.inf, 0)


# Launches -----------------------------------------------------------------------------------------------


class Counted:
    """A kernel whose launches are counted."""

    def __init__(self, kernel) -> None:
        self.kernel, self.launches = kernel, 0

    def __getitem__(self, grid):
        self.launches += 1
        return self.kernel[grid]


@pytest.mark.parametrize(
    ("levels", "options", "expected"),
    [
        ([2, 3], {"skip_nonfinite": True}, 0),
        ([2, 3], {"max_grad_norm": math.inf}, 0),
        ([2, 3], {"skip_nonfinite": True, "max_grad_norm": math.inf}, 0),
        ([2, 0], {"skip_nonfinite": True}, 1),  # level 0 has no limiter
        ([2, 3], {"skip_nonfinite": True, "norm_growth_limit": None}, 1),
        ([2, 3], {"skip_nonfinite": True, "max_grad_norm": 1.0}, 1),  # the first pass needs clipped gradients
    ],
    ids=str,
)
def test_gradients_are_not_read_again_where_a_limiter_reads_them(device, levels, options, expected):
    params = parameters([(8, 64)] * len(levels), device)
    groups = [{"params": [p], "level": level} for p, level in zip(params, levels, strict=True)]
    optimizer = GWTAdamW(groups, backend="triton", **options)
    for t in range(2):
        give_gradients(params, seed=t)
        kernel = Counted(control_launch.squares_kernel)
        with interpreter.like_a_gpu(), patch.object(control_launch, "squares_kernel", kernel):
            optimizer.step()
        assert kernel.launches == expected
        norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in params))
        assert float(optimizer.grad_norm) == pytest.approx(norm, rel=1e-6)


# Results ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"telemetry": True},
        {"dtype": torch.bfloat16, "weight_rounding": "stochastic", "state_dtype": "bfloat16"},
        {"dtype": torch.bfloat16, "weight_rounding": "split", "state_dtype": "int8"},
        {"maximize": True, "weight_decay": 0.1},
    ],
    ids=str,
)
def test_steps_equal_those_without_statistics(device, monkeypatch, options):
    """Compare bit for bit, since the pass that stores moments computes them again."""
    options = dict(options)
    dtype = options.pop("dtype", torch.float32)
    runs = []
    for can_wait in (ClipRequest.can_wait, False):  # control: reads all gradients beforehand
        monkeypatch.setattr(ClipRequest, "can_wait", can_wait)
        params = parameters([(32, 512), (3, 37), (0, 8), (16, 8)], place("triton", device), dtype)
        params[1] = torch.nn.Parameter(params[1].detach().t().contiguous().t())  # updated in a copy
        groups = [{"params": params[:3], "level": 2}, {"params": params[3:], "level": 0}]
        optimizer = GWTAdamW(groups, lr=0.01, backend="triton", skip_nonfinite=True, **options)
        for t in range(4):
            give_gradients(params, seed=t)
            params[0].grad = params[0].grad.t().contiguous().t()
            if t in (1, 3):
                params[t // 2].grad[0, 0] = math.nan
            with interpreter.like_a_gpu():
                optimizer.step()
        runs.append((results(optimizer), optimizer.telemetry(), float(optimizer.skipped_steps)))
    assert_same_bits(*runs)


def test_the_second_phase_updates_a_parameter_in_a_copy(device):
    p = torch.nn.Parameter(torch.randn(16, 8, device=device).t())
    moments = [torch.zeros(8, 4, device=device) for _ in range(2)]
    norm, steps = torch.zeros((), device=device), torch.zeros(1, dtype=torch.float64, device=device)
    before = p.detach().clone()
    with interpreter.like_a_gpu(), torch.no_grad():
        runner, inputs = prepared(
            params=[p], grads=[torch.randn(8, 16, device=device)], exp_avgs=moments[:1], exp_avg_sqs=moments[1:],
            limiter_norms=[norm], steps=steps, hypers=[Hyper()], level=2, backend="triton",
        )  # fmt: skip
        runner.reduce(inputs, grad_stats=True)
        assert torch.equal(p, before)
        runner.apply(inputs, torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64, device=device))
    assert not torch.equal(p, before)
    assert p.is_leaf
    assert steps == 1


def test_a_step_that_ends_after_the_first_pass_changes_nothing(device):
    params = parameters([(8, 64), (3, 37), (0, 8)], place("triton", device))
    optimizer = GWTAdamW(params, backend="triton", skip_nonfinite=True)
    for t in range(3):
        give_gradients(params, seed=t)
        before = snapshot(optimizer)
        with interpreter.like_a_gpu():
            if t == 1:
                with patch.object(step_plan, "control_", side_effect=MemoryError), pytest.raises(MemoryError):
                    optimizer.step()
                assert_same_bits(snapshot(optimizer), before)
            else:
                optimizer.step()
    assert {float(s["step"]) for s in optimizer.state.values()} == {2}


@pytest.mark.parametrize(
    "options",
    [
        {"limiter_norms": None, "rule": "foam"},
        {"level": 0},
        {"steps": [1] * 5},
        {"decision": torch.ones(3, dtype=torch.float64)},
        {"backend": "torch"},
    ],
    ids=["no limiter", "level 0", "the host counts", "decided", "torch"],
)
def test_unsupported_statistics_are_refused(device, options):
    bucket = Bucket(SHAPES, 2, limited=True, device=device)
    before = bucket.results()
    with pytest.raises(ValueError, match="first pass"):
        grad_stats_of(bucket, **options)
    assert_same_bits(bucket.results(), before)
