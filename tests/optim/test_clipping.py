"""Clipping, skipping and unscaling inside the step, against the framework's own functions."""

from __future__ import annotations

import copy
import math
import pickle
from fractions import Fraction

import numpy as np
import pytest
import torch

from gwt_kernels import GWTAdamW
from tests.support import interpreter
from tests.support.runs import (
    assert_same_bits,
    backends,
    give_gradients,
    parameters,
    place,
    refused,
    results,
    snapshot,
)

SHAPES = [(8, 64), (3, 37), (64,), (), (0, 8), (5, 16)]


def build(backend, device, dtype=torch.float32, **options):
    params = parameters(SHAPES, place(backend, device), dtype)
    groups = [
        {"params": params[:2], "level": 2},
        {"params": params[2:4], "level": 0, "weight_decay": 0.1},
        {"params": params[4:], "level": 1, "norm_growth_limit": None},
    ]
    return GWTAdamW(groups, lr=0.01, backend=backend, **options), params


def step(optimizer):
    with interpreter.like_a_gpu():
        optimizer.step()


# Clipping ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_norm", [0.5, 1e6, math.inf])
@pytest.mark.parametrize("rule", ["gwt", "foam"])
@backends
def test_clipping_inside_the_step_equals_the_frameworks(backend, device, rule, max_norm):
    dtype = torch.float64 if backend != "triton" else torch.float32
    clipped, params = build(backend, device, dtype, rule=rule, max_grad_norm=max_norm)
    plain, plain_params = build(backend, device, dtype, rule=rule)
    for t in range(4):
        give_gradients(params, seed=t, factor=10.0 if t == 2 else 1.0)
        give_gradients(plain_params, seed=t, factor=10.0 if t == 2 else 1.0)
        before = [p.grad.clone() for p in params]
        norm = torch.nn.utils.clip_grad_norm_(plain_params, max_norm)
        step(clipped)
        step(plain)
        assert all(torch.equal(a, p.grad) for a, p in zip(before, params, strict=True))
        rel = 1e-12 if backend != "triton" else 2e-6
        assert float(clipped.grad_norm) == pytest.approx(float(norm), rel=rel)
        for p, q in zip(params, plain_params, strict=True):
            torch.testing.assert_close(p, q, rtol=20 * rel, atol=20 * rel)
    assert clipped.skipped_steps == 0
    assert plain.grad_norm is None


@pytest.mark.parametrize(
    "max_norm",
    [Fraction(1, 2), np.float32(0.5), np.array([0.5]), torch.tensor([[0.5]]), torch.tensor(0.5).half()],
    ids=lambda x: type(x).__name__,
)
def test_a_norm_of_any_kind_of_number_clips_as_a_float_does(max_norm):
    found = []
    for norm in (max_norm, 0.5):
        optimizer, params = build("torch", torch.device("cpu"), max_grad_norm=norm)
        give_gradients(params, seed=0)
        optimizer.step()
        found.append(results(optimizer))
    assert_same_bits(*found)


@backends
def test_clipping_with_missing_gradients_and_duplicate_parameters(backend, device):
    optimizer, params = build(backend, device, max_grad_norm=1.0)
    give_gradients(params[:2], seed=0)
    step(optimizer)
    expected = math.sqrt(sum(float(p.grad.double().square().sum()) for p in params[:2]))
    assert float(optimizer.grad_norm) == pytest.approx(expected, rel=1e-6)
    for p in params:
        p.grad = None
    step(optimizer)
    assert optimizer.grad_norm is None


@backends
def test_clipping_of_gradients_in_half_precision_is_not_rounded_to_it(backend, device):
    """Check that the step applies the factor in float32; the framework rounds each clipped gradient to bfloat16."""
    optimizer, params = build(backend, device, torch.bfloat16, max_grad_norm=0.1, norm_growth_limit=None)
    exact, wide = build(backend, device, torch.bfloat16, norm_growth_limit=None)
    give_gradients(params, seed=0)
    norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in params))
    step(optimizer)
    assert float(optimizer.grad_norm) == pytest.approx(norm, rel=1e-6)
    for p, q in zip(params, wide, strict=True):
        q.grad_dtype = torch.float32
        q.grad = p.grad.float() * (0.1 / (norm + 1e-6))
    step(exact)
    for a, b in zip(results(optimizer)["state"], results(exact)["state"], strict=True):
        torch.testing.assert_close(a["exp_avg"], b["exp_avg"], rtol=1e-5, atol=1e-9)


# Skipping ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("max_norm", "value"), [(None, math.nan), (1.0, math.inf), (1.0, -math.inf)])
@backends
def test_a_bad_batch_changes_nothing(backend, device, max_norm, value):
    optimizer, params = build(backend, device, skip_nonfinite=True, max_grad_norm=max_norm)
    for t in range(4):
        give_gradients(params, seed=t)
        if t in (0, 2):
            params[5 - t].grad.view(-1)[-1] = value
            before = snapshot(optimizer)
            step(optimizer)
            assert all(torch.equal(p, q) for p, q in zip(params, before["params"], strict=True))
            if t:
                assert_same_bits(snapshot(optimizer), before)
            assert not optimizer.grad_norm.isfinite()
        else:
            step(optimizer)
    assert optimizer.skipped_steps == 2
    assert {float(s["step"]) for s in optimizer.state.values()} == {2}
    other, others = build(backend, device, max_grad_norm=max_norm)
    for t in (1, 3):
        give_gradients(others, seed=t)
        step(other)
    for a, b in zip(results(optimizer)["params"], results(other)["params"], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@backends
def test_without_the_option_a_bad_batch_acts_as_with_adamw(backend, device):
    optimizer, params = build(backend, device)
    give_gradients(params, seed=0)
    params[0].grad[0, 0] = math.nan
    step(optimizer)
    assert not params[0].isfinite().all()
    assert params[1].isfinite().all()


# GradScaler --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("unscale_first", "max_norm"), [(False, None), (False, 0.5), (True, 0.5)])
@backends
def test_with_the_real_grad_scaler(backend, device, max_norm, unscale_first):
    """Check that steps equal those with unscaled gradients bit for bit, since the scale is a power of two."""
    scaled, params = build(backend, device, max_grad_norm=max_norm)
    plain, plain_params = build(backend, device, max_grad_norm=max_norm)
    scaler = torch.amp.GradScaler(place(backend, device).type, init_scale=1024.0, growth_interval=3)
    scales = []
    for t in range(4):
        give_gradients(params, seed=t)
        give_gradients(plain_params, seed=t)
        scale = scaler.scale(torch.ones((), device=place(backend, device)))
        for p in params:
            p.grad.mul_(scale)
        if t == 2:
            params[0].grad[0, 0] = math.inf
        if unscale_first:
            scaler.unscale_(scaled)
        with interpreter.like_a_gpu():
            scaler.step(scaled)
        scaler.update()
        scales.append(scaler.get_scale())
        if t != 2:
            step(plain)
    assert scales == [1024, 1024, 512, 512]
    assert scaled.skipped_steps == 1
    assert not hasattr(scaled, "found_inf")
    for a, b in zip(results(scaled)["params"], results(plain)["params"], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    assert {float(s["step"]) for s in scaled.state.values()} == {3}


def test_autocast_and_the_scaler_train_a_model(device):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.GELU(), torch.nn.Linear(64, 8)).to(device)
    optimizer = GWTAdamW(model.parameters(), lr=0.01, level=1)
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**10)
    x, y = torch.randn(64, 32, device=device), torch.randn(64, 8, device=device)
    losses = []
    for _ in range(30):
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss = torch.nn.functional.mse_loss(model(x), y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


# In use ------------------------------------------------------------------------------------------------


@backends
def test_options_may_change_between_steps(backend, device):
    optimizer, params = build(backend, device)
    for t, (max_norm, skip) in enumerate([(None, False), (1.0, False), (None, True), (None, False)], start=1):
        optimizer.max_grad_norm, optimizer.skip_nonfinite = max_norm, skip
        give_gradients(params, seed=t)
        step(optimizer)
        assert {float(s["step"]) for s in optimizer.state.values()} == {t}
    other, others = build(backend, device)
    for t in range(1, 5):
        give_gradients(others, seed=t)
        if t == 2:
            torch.nn.utils.clip_grad_norm_(others, 1.0)
        step(other)
    for a, b in zip(params, others, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("capturable", [False, True])
@backends
def test_copies_and_checkpoints_of_device_step_counts(backend, device, capturable):
    options = {"max_grad_norm": 1.0, "skip_nonfinite": True}
    optimizer, params = build(backend, device, **options)
    if capturable and (backend == "triton" or device.type == "cpu"):
        optimizer.capturable = True
    for t in range(4):
        give_gradients(params, seed=t)
        if t == 1:
            params[0].grad.fill_(math.nan)
        step(optimizer)
    saved = copy.deepcopy(optimizer.state_dict())
    pickled = pickle.loads(pickle.dumps(optimizer))
    assert (pickled.max_grad_norm, pickled.skip_nonfinite, pickled.capturable) == (1.0, True, optimizer.capturable)
    fresh, fresh_params = build(backend, device, **options)
    fresh.load_state_dict(saved)
    with torch.no_grad():
        for p, q in zip(fresh_params, params, strict=True):
            p.copy_(q)
    copied = [p for group in pickled.param_groups for p in group["params"]]
    for one, own in ((optimizer, params), (fresh, fresh_params), (pickled, copied)):
        give_gradients(own, seed=9)
        step(one)
    assert_same_bits(results(fresh), results(optimizer))
    assert_same_bits(results(pickled), results(optimizer))
    assert optimizer.skipped_steps == pickled.skipped_steps == 1


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_grad_norm": 0.0}, ValueError, r"max_grad_norm must be above 0, got 0.0: None turns clipping off"),
        ({"max_grad_norm": -1}, ValueError, "max_grad_norm must be above 0"),
        ({"max_grad_norm": math.nan}, ValueError, "max_grad_norm must be above 0"),
        ({"max_grad_norm": "1"}, TypeError, "max_grad_norm must be a real number"),
        ({"skip_nonfinite": 1}, TypeError, "skip_nonfinite must be True or False, got 1"),
        ({"capturable": None}, TypeError, "capturable must be True or False, got None"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        build("torch", torch.device("cpu"), **options)
    optimizer, params = build("torch", torch.device("cpu"))
    for name, value in options.items():
        setattr(optimizer, name, value)
    give_gradients(params, seed=0)
    with refused(optimizer, error, next(iter(options))):
        optimizer.step()


# Regressions -------------------------------------------------------------------------------------------


def test_an_overflowing_norm_is_reported_and_clips_nothing():
    one, params = build("torch", torch.device("cpu"), max_grad_norm=math.inf)
    other, others = build("torch", torch.device("cpu"))
    for own in (params, others):
        give_gradients(own, seed=0, factor=1e25)
    one.step()
    other.step()
    assert_same_bits(results(one)["params"], results(other)["params"])


def test_a_bad_norm_is_refused_at_a_later_step_too():
    optimizer, params = build("torch", torch.device("cpu"), max_grad_norm=1.0)
    give_gradients(params, seed=0)
    optimizer.step()
    for bad in (-1.0, math.nan):
        optimizer.max_grad_norm = bad
        with refused(optimizer, ValueError, "max_grad_norm must be above 0"):
            optimizer.step()


def test_a_rate_on_a_device_survives_loading():
    params = [torch.nn.Parameter(torch.zeros(4, 8, device="meta"))]
    rate = torch.ones((), device="meta")
    optimizer = GWTAdamW(params, lr=rate, capturable=True)
    fresh = GWTAdamW(params, lr=rate, capturable=True)
    fresh.load_state_dict(optimizer.state_dict())
    assert fresh.param_groups[0]["lr"].device.type == "meta"
