"""Tests Lion on block means: its formula on every backend and in every format, and ``GWTLion`` as an optimizer."""

from __future__ import annotations

import math

import pytest
import torch

import gwt_kernels
from gwt_kernels import GWTAdamW, GWTLion, gwt_param_groups, migrate
from gwt_kernels.formats.int8 import decode_first
from gwt_kernels.functional import Hyper, gwt_adamw_
from tests.support import interpreter, poisoned, runs
from tests.support.poisoned import Poisoned
from tests.test_functional import backends, on

HYPER = Hyper(lr=0.01, beta1=0.9, beta2=0.99, weight_decay=0.1, scale=0.7, detail_scale=0.8)
SHAPES = [(6, 40), (5, 37), (3, 4, 16), (90,)]
EPS = {torch.float64: 2e-15, torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}


def lion(p, g, m, hyper, level, t=1):
    """Return new weights, new moment and the size of the sign's argument after one step in float64."""
    width, n = 2**level, p.shape[-1]
    g = torch.nn.functional.pad(g * hyper.signed_factor, (0, -n % width)).reshape(*p.shape[:-1], -1, width)
    mean = g.mean(-1)
    direction = hyper.beta1 * m + (1 - hyper.beta1) * mean
    direction = direction.unsqueeze(-1) + hyper.detail_scale * (g - mean.unsqueeze(-1))
    direction = direction.reshape(*p.shape[:-1], -1)[..., :n]
    new_p = p * (1 - hyper.lr * hyper.weight_decay) - hyper.lr * hyper.scale * direction.sign()
    return new_p, hyper.beta2 * m + (1 - hyper.beta2) * mean, direction.abs()


def made(level, device, dtype, grad_dtype=None, moment_dtype=None, layout="contiguous"):
    """Return weights, gradients and moments in poisoned memory."""
    generator = torch.Generator().manual_seed(level)
    wide = torch.promote_types(dtype, torch.float32)

    def place(shape, to, size=1.0, layout="contiguous"):
        values = size * torch.randn(shape, generator=generator, dtype=torch.float64) + 0.3
        return Poisoned(values.to(device, to), layout)

    params = [place(s, dtype, layout=layout) for s in SHAPES]
    grads = [place(s, grad_dtype or dtype, layout=layout) for s in SHAPES]
    moments = [place((*s[:-1], -(-s[-1] // 2**level)), moment_dtype or wide, 0.5) for s in SHAPES]
    return params, grads, moments


def check(level, backend, *, dtype=torch.float32, hyper=HYPER, moment_dtype=None, layout="contiguous", by=None):
    """Compare a step with the formula, by other options if they are given."""
    params, grads, moments = made(level, on(backend), dtype, moment_dtype=moment_dtype, layout=layout)
    arrays = params, grads, moments
    before = [[x.tensor.detach().to("cpu", torch.float64, copy=True) for x in own] for own in arrays]
    with interpreter.like_a_gpu(), poisoned.uninitialized():
        gwt_adamw_(
            params=[x.tensor for x in params], grads=[x.tensor for x in grads],
            exp_avgs=[x.tensor for x in moments],
            exp_avg_sqs=None, steps=[3] * len(SHAPES), hypers=[hyper] * len(SHAPES), level=level, rule="lion",
            backend=backend,
        )  # fmt: skip
    unit = EPS[torch.promote_types(dtype, torch.float32)]
    for p, g, m, *own in zip(*before, params, moments, strict=True):
        new_p, new_m, distance = lion(p, g, m, by or hyper, level)
        own[0].check()
        own[1].check()
        certain = distance > 8 * unit * (g.abs().amax() + m.abs().amax())
        assert certain.double().mean() > 0.9
        got = own[0].tensor.detach().to("cpu", torch.float64)
        stored = EPS[dtype] * new_p.abs() + 8 * unit * new_p.abs() + 1e-12
        assert bool(((got - new_p).abs() <= stored)[certain].all())
        moment = own[1].tensor.detach().to("cpu", torch.float64)
        kept = EPS[moment_dtype or torch.promote_types(dtype, torch.float32)]
        assert bool(((moment - new_m).abs() <= 2 * kept * new_m.abs() + 8 * unit).all())


@pytest.mark.parametrize("level", [0, 1, 2, 3, 5])
@backends
def test_a_step_follows_the_formula(backend, level):
    check(level, backend)
    if backend == "torch":
        check(level, backend, dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@backends
def test_a_step_of_16_bit_weights(backend, dtype):
    check(2, backend, dtype=dtype)
    check(2, backend, dtype=dtype, moment_dtype=torch.bfloat16)


@pytest.mark.parametrize("layout", ["misaligned", "transposed"])
@backends
def test_a_step_of_any_layout(backend, layout):
    check(2, backend, layout=layout)


@backends
def test_options_change_the_step_as_the_formula_says(backend):
    for hyper in (HYPER._replace(maximize=True), HYPER._replace(grad_factor=0.3), HYPER._replace(detail_scale=0.0)):
        check(2, backend, hyper=hyper)
    with pytest.raises(AssertionError):  # control: the formula with another weight of the moment
        check(2, backend, by=HYPER._replace(beta1=0.5))


@pytest.mark.parametrize("level", [0, 2])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@backends
def test_a_zero_gradient_moves_nothing_and_a_bad_one_shows_in_its_block_alone(backend, bad, level):
    p, g, m = torch.ones(2, 8), torch.zeros(2, 8), torch.zeros(2, 8 >> level)
    g[1, 0] = bad
    p, g, m = (x.to(on(backend)) for x in (p, g, m))
    hyper = Hyper(lr=0.1, beta1=0.9, beta2=0.99, scale=1.0)
    gwt_adamw_(
        params=[p], grads=[g], exp_avgs=[m], exp_avg_sqs=None, steps=[1], hypers=[hyper], level=level, rule="lion",
        backend=backend,
    )  # fmt: skip
    spoilt = torch.zeros(2, 8, dtype=torch.bool)
    spoilt[1, : 1 << level] = True
    assert torch.equal(p.cpu().isnan(), spoilt)
    assert (p.cpu()[~spoilt] == 1.0).all()
    assert torch.equal(~m.cpu().isfinite(), spoilt[:, :: 1 << level])


def parameters(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(s).to(dtype)) for s in ((64, 96), (33, 70), (128,))]


def steps(optimizer, params, n, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(n):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(p.device, p.dtype)
        optimizer.step()


@pytest.mark.parametrize("level", [0, 2])
def test_the_optimizer_is_lion_at_level_0_and_keeps_one_number_a_block(level):
    params = parameters(torch.float64)
    expected = [p.detach().clone() for p in params]
    moments = [torch.zeros(*p.shape[:-1], -(-p.shape[-1] // 2**level), dtype=torch.float64) for p in params]
    optimizer = GWTLion(params, lr=0.01, weight_decay=0.1, level=level, backend="torch")
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        for i, p in enumerate(params):
            p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            hyper = Hyper(lr=0.01, beta1=0.9, beta2=0.99, weight_decay=0.1, scale=1.0)
            expected[i], moments[i], _ = lion(expected[i], p.grad, moments[i], hyper, level)
        optimizer.step()
    for p, want, m in zip(params, expected, moments, strict=True):
        torch.testing.assert_close(p.detach(), want, rtol=1e-13, atol=1e-13)
        assert set(optimizer.state[p]) == {"step", "exp_avg"}
        torch.testing.assert_close(optimizer.state[p]["exp_avg"], m, rtol=1e-13, atol=1e-13)


@backends
def test_scalars_and_empty_tensors_are_stepped(backend):
    params = [torch.nn.Parameter(torch.ones(s, device=on(backend))) for s in ((), (0, 8), (5,))]
    optimizer = GWTLion(params, lr=0.25, level=0, backend=backend)
    with interpreter.like_a_gpu():
        for _ in range(2):
            for p in params:
                p.grad = torch.full_like(p, 3.0)
            optimizer.step()
    assert [p.detach().flatten().tolist() for p in params] == [[0.5], [], [0.5] * 5]
    assert [float(optimizer.state[p]["step"]) for p in params] == [2.0] * 3


def test_int8_moments_follow_float32_ones_within_their_step():
    exact, narrow = ([p] for p in (parameters()[0], parameters()[0]))
    wide, small = GWTLion(exact, lr=1e-3), GWTLion(narrow, lr=1e-3, state_dtype=torch.int8)
    for optimizer, params in ((wide, exact), (small, narrow)):
        steps(optimizer, params, 4)
    state = small.state[narrow[0]]
    assert set(state) == {"step", "exp_avg"}, "64 x 24 coefficients are fewer than 4096, and stay float32"
    large = [torch.nn.Parameter(torch.randn(256, 128))]
    optimizer = GWTLion(large, lr=1e-3, state_dtype=torch.int8)
    steps(optimizer, large, 4)
    state = optimizer.state[large[0]]
    assert set(state) == {"step", "exp_avg", "exp_avg_scale"}
    assert state["exp_avg"].dtype == torch.int8
    decoded = decode_first(state["exp_avg"], state["exp_avg_scale"], 2)
    again = [torch.nn.Parameter(torch.randn(256, 128))]
    reference = GWTLion(again, lr=1e-3)
    steps(reference, again, 4)
    error = (decoded - reference.state[again[0]]["exp_avg"]).abs().max() / decoded.abs().max()
    assert float(error) < 0.05


def test_groups_left_alone_are_adamw_and_take_its_own_betas():
    torch.manual_seed(0)
    model = torch.nn.Sequential()
    model.layers = torch.nn.ModuleList(torch.nn.Sequential(torch.nn.Linear(16, 16)) for _ in range(2))
    groups = gwt_param_groups(model, include=["weight"], adamw_lr=5e-4)
    optimizer = GWTLion(groups, lr=1e-4, adamw_betas=(0.8, 0.95))
    rules = [(group["rule"], group["level"], group["betas"], group["lr"]) for group in optimizer.param_groups]
    assert rules == [("lion", 2, (0.9, 0.99), 1e-4), ("adamw", 0, (0.8, 0.95), 5e-4)]
    runs.assert_left_to_adamw(optimizer, lr=5e-4, betas=(0.8, 0.95), eps=1e-8)


def test_checkpoints_resume_bit_for_bit_and_are_refused_by_other_rules():
    params, resumed = parameters(), parameters()
    optimizer = GWTLion(params, lr=1e-3)
    steps(optimizer, params, 3)
    for p, q in zip(params, resumed, strict=True):
        q.data.copy_(p)
    again = GWTLion(resumed, lr=1e-3)
    again.load_state_dict(optimizer.state_dict())
    steps(optimizer, params, 2, seed=5)
    steps(again, resumed, 2, seed=5)
    assert all(torch.equal(p, q) for p, q in zip(params, resumed, strict=True))
    with pytest.raises(ValueError, match="rule='lion', the optimizer rule='foam'"):
        GWTAdamW(parameters(), rule="foam").load_state_dict(optimizer.state_dict())


def test_migration_takes_the_first_moment_of_adamw_and_between_levels():
    params = parameters()
    adamw = torch.optim.AdamW(params, betas=(0.99, 0.999))
    steps(adamw, params, 3)
    lion_ = GWTLion(params, level=2)
    made_ = migrate(adamw.state_dict(), lion_)
    lion_.load_state_dict(made_.state_dict)
    mean = torch.nn.functional.pad(adamw.state[params[1]]["exp_avg"], (0, 2)).view(33, 18, 4).mean(-1)
    torch.testing.assert_close(lion_.state[params[1]]["exp_avg"], mean)
    assert "dropped" in made_.tensors[0].notes["exp_avg_sq"]
    deeper = GWTLion(params, level=3)
    deeper.load_state_dict(migrate(lion_.state_dict(), deeper).state_dict)
    with pytest.raises(ValueError, match="keeps no exp_avg_sq"):
        migrate(lion_.state_dict(), GWTAdamW(params))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rule": "foam"}, "rule='foam' is no rule of GWTLion"),
        ({"rule": "adamw", "level": 2}, "rule='adamw' transforms nothing"),
        ({"detail_scale": -1.0}, "detail_scale must be finite and at least 0"),
        ({"betas": (0.9, 1.0)}, r"betas\[1\] must be at least 0 and below 1"),
    ],
)
def test_bad_options_are_refused_by_name(options, words):
    with pytest.raises(ValueError, match=words):
        GWTLion([{"params": parameters(), **options}])


def test_adamw_refuses_what_is_lions():
    with pytest.raises(ValueError, match="rule='lion' is no rule of GWTAdamW"):
        GWTAdamW(parameters(), rule="lion")
    with pytest.raises(ValueError, match=r"res_scale is 0\.5, but rule='gwt' takes none"):
        GWTAdamW(parameters(), res_scale=0.5)


def test_a_step_is_one_launch_with_clipping_skipping_and_telemetry():
    params = parameters()
    optimizer = GWTLion(params, lr=1e-3, max_grad_norm=1.0, skip_nonfinite=True, telemetry=True)
    steps(optimizer, params, 2)
    before = [p.detach().clone() for p in params]
    params[0].grad[0, 0] = math.inf
    optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
    assert float(optimizer.skipped_steps) == 1
    told = optimizer.telemetry()["0.0"]
    assert 0 < told["detail_energy"] < 1
    assert gwt_kernels.__all__.count("GWTLion") == 1


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_scalar_takes_a_step(backend):
    p = torch.nn.Parameter(torch.ones((), device=on(backend)))
    optimizer = GWTLion([p], lr=0.1, level=0, backend=backend)
    p.grad = torch.full_like(p, 2.0)
    optimizer.step()
    assert p.item() == pytest.approx(0.9)
