"""Candidates before timing: checked steps, clipping, and the counted bytes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bench.common.models import Shape, shapes_of
from bench.optimizers import rules
from bench.optimizers.candidate import (
    WEIGHT_DECAY,
    Candidate,
    Group,
    adamw,
    build,
    bytes_moved,
    gwt,
    ptwt,
    set_rate,
)
from bench.optimizers.checks import check
from gwt_kernels import GWTAdamW
from tests.support.candidates import CPU, HALF, SHAPES, SINGLE, needs_ptwt

WIDE = [Shape("wide", (64, 128), True, True)]


@pytest.mark.parametrize(
    "candidate",
    [
        *(gwt(level, dtype, limiter=level == 2) for level in range(4) for dtype in (SINGLE, HALF)),
        *(gwt(2, dtype, limiter=False, rule="foam", moments=m) for dtype in (SINGLE, HALF) for m in (None, HALF)),
        *(gwt(2, HALF, limiter=on, moments=moments) for on in (False, True) for moments in (HALF, torch.int8)),
        adamw(SINGLE, foreach=True),
        *(adamw(HALF, **how) for how in ({"fused": True}, {"foreach": True}, {"foreach": False})),
        *(pytest.param(ptwt(3, dtype), marks=needs_ptwt) for dtype in (SINGLE, HALF)),
        *(candidate for dtype in (SINGLE, HALF) for candidate in rules.suite(dtype, [0, 2])),
    ],
    ids=lambda candidate: f"{candidate.name} {candidate.dtype}",
)
def test_right_results_pass_the_check(candidate: Candidate) -> None:
    error = check(build(candidate, SHAPES, CPU))
    assert 0 < error <= 1


@pytest.mark.parametrize("index", range(8))
def test_wrong_results_of_other_rules_fail_the_check(index: int) -> None:
    candidate = rules.suite(SINGLE, [2])[index]

    def build_wrong(groups: list[Group]) -> torch.optim.Optimizer:
        optimizer = candidate.build(groups)
        own = [group for group in optimizer.param_groups if group["transformed"]]
        for group in own:
            group["weight_decay"] += 0.5
        return optimizer

    built = build(candidate._replace(build=build_wrong), WIDE, CPU)
    for p in built.tensors:
        p.data.mul_(50)  # so that weight decay is seen
    assert check(built) > 1
    assert 0 < check(build(candidate, WIDE, CPU)) <= 1


def test_muon_leaves_the_rest_to_adamw() -> None:
    built = build(rules.suite(SINGLE, [2])[0], SHAPES, CPU)
    kept = [set(built.optimizer.state[p]) for p in built.tensors]
    assert kept == [{"momentum_buffer"}] * 2 + [{"step", "exp_avg", "exp_avg_sq"}] * 2
    before = [p.detach().clone() for p in built.tensors]
    set_rate(built.optimizer, 0.0)
    built.optimizer.step()
    assert all(torch.equal(p, old) for p, old in zip(built.tensors, before, strict=True))


def test_clipping_is_part_of_the_timed_step() -> None:
    built = build(gwt(2, SINGLE, limiter=False), SHAPES, CPU)
    steps = []
    built.optimizer.register_step_pre_hook(
        lambda *_: steps.append(sum(float(p.grad.square().sum()) for p in built.tensors))
    )
    built.optimizer.step()
    built.clipped_step()
    assert steps[0] > 100
    assert steps[1] == pytest.approx(1, rel=1e-4)


@pytest.mark.parametrize(
    ("candidate", "per_parameter"),
    [
        (adamw(HALF, fused=True), 14),  # g 2, p 4, m and v 8
        (adamw(SINGLE, fused=True), 28),
        (
            gwt(2, HALF, limiter=False),
            10,
        ),  # g 2, p 4, float32 m and v read and written for each four elements 4
        (gwt(2, HALF, limiter=True), 14),  # g, m and v once more
        (gwt(0, HALF, limiter=False), 22),
        (gwt(2, HALF, limiter=False, extra="clips in the step"), 12),
        (gwt(2, HALF, limiter=True, extra="clips in the step"), 16),
        (gwt(2, HALF, limiter=False, extra="skips bad batches"), 12),
        (gwt(2, HALF, limiter=True, extra="skips bad batches"), 14),  # its first pass checks the gradients
        (gwt(3, SINGLE, limiter=False), 14),
    ],
    ids=lambda value: value.name if isinstance(value, Candidate) else str(value),
)
def test_bytes_that_must_move(candidate: Candidate, per_parameter: int) -> None:
    built = build(candidate, SHAPES[:1], CPU)
    assert bytes_moved(built) == per_parameter * 6 * 16


@needs_ptwt
@pytest.mark.parametrize("level", [0, 1, 2, 3])
@pytest.mark.parametrize("width", [16, 37, 41])
@pytest.mark.parametrize("gamma", [1.01, None])
def test_the_ptwt_step_is_the_folded_step(level: int, width: int, gamma: float | None) -> None:
    from bench.optimizers.ptwt_step import LiteralGWTAdamW

    torch.manual_seed(level * width)
    start = torch.randn(4, width, dtype=torch.float64)
    literal, folded = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    options = {"lr": 0.1, "weight_decay": WEIGHT_DECAY, "level": level, "norm_growth_limit": gamma}
    steps = [LiteralGWTAdamW([literal], **options), GWTAdamW([folded], **options)]
    for growth in (1.0, 3.0, 0.2, 5.0):  # the limiter acts on a growing gradient
        grad = growth * torch.randn_like(start)
        for p, optimizer in zip((literal, folded), steps, strict=True):
            p.grad = grad.clone()
            optimizer.step()
        torch.testing.assert_close(literal, folded, rtol=1e-10, atol=1e-12)
    assert not torch.allclose(literal, start, rtol=0.01)


def test_shapes_of_a_published_model() -> None:
    shapes = shapes_of("llama_60m")
    assert sum(torch.Size(shape.size).numel() for shape in shapes) == 58_073_600
    assert sum(shape.transformed for shape in shapes) == 7 * 8
    layer = shapes_of("llama_1b", layers=1, embeddings=False)
    assert sorted(shape.size for shape in layer if shape.transformed) == sorted(
        [(2048, 2048)] * 4 + [(5461, 2048)] * 2 + [(2048, 5461)]
    )
    assert [shape.decayed for shape in layer if not shape.transformed] == [False, False]
