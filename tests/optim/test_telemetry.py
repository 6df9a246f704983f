"""Telemetry on all backends, against values computed from the weights and gradients of a step."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from gwt_kernels import GWTAdamW, GWTMuon
from tests.support import interpreter
from tests.support.runs import BACKENDS, assert_same_bits, backends, give_gradients, parameters, place, results

SHAPES = {"flat": (64, 256), "odd": (5, 37), "bias": (64,), "scalar": (), "empty": (0, 8)}
EXPECTED_ERROR = 1e-4


def build(backend, device, **options):
    params = dict(zip(SHAPES, parameters(SHAPES.values(), place(backend, device)), strict=True))
    groups = [
        {"params": [(k, params[k]) for k in ("flat", "odd")], "level": 2},
        {"params": [(k, params[k]) for k in ("bias", "scalar", "empty")], "level": 0},
    ]
    return GWTAdamW(groups, lr=0.01, backend=backend, **options), params


def step(optimizer):
    with interpreter.like_a_gpu():
        optimizer.step()


def share_of_details(g: torch.Tensor, width: int) -> float:
    g = g.double()
    blocks = torch.nn.functional.pad(g, (0, -g.shape[-1] % width)).reshape(-1, width)
    return float((blocks - blocks.mean(1, keepdim=True)).square().sum() / g.square().sum())


@pytest.mark.parametrize("options", [{}, {"rule": "foam"}, {"weight_decay": 0.5}, {"max_grad_norm": 0.1}], ids=str)
@backends
def test_telemetry_equals_values_computed_from_the_step(backend, device, options):
    optimizer, params = build(backend, device, telemetry=True, **options)
    for t in range(3):
        give_gradients(params.values(), seed=t, factor=1.0 if t < 2 else 40.0)
        before = {name: p.detach().double().clone() for name, p in params.items()}
        norms = {n: float(optimizer.state[p].get("limiter_norm", 0.0)) if t else 0.0 for n, p in params.items()}
        step(optimizer)
    told = optimizer.telemetry()
    assert list(told) == ["flat", "odd", "bias", "scalar", "empty"]
    decay = 1 - 0.01 * options.get("weight_decay", 0.0)
    for name, p in params.items():
        if not p.numel():
            continue
        update = p.detach().double() - decay * before[name]
        assert told[name]["update_rms"] == pytest.approx(float(update.square().mean().sqrt()), rel=EXPECTED_ERROR)
        wide = name in ("flat", "odd")
        expected = share_of_details(p.grad, 4) if wide else 0.0
        assert told[name]["detail_energy"] == pytest.approx(expected, rel=EXPECTED_ERROR)
        assert told[name]["nonfinite"] == 0
        if wide and norms[name]:
            grown = float(optimizer.state[p]["limiter_norm"]) * told[name]["limiter"]
            assert told[name]["limiter"] == pytest.approx(max(grown / norms[name], 1.01) / 1.01, rel=1e-3)
        else:
            assert told[name]["limiter"] == 1
    assert told["flat"]["limiter"] > 1.002 or "rule" in options  # control: the values are not all zero


@pytest.mark.parametrize("state_dtype", ["bfloat16", "int8"])
def test_backends_agree_for_narrow_moments(device, state_dtype):
    told = []
    for backend in BACKENDS:
        optimizer, params = build(backend, device, telemetry=True, state_dtype=state_dtype)
        for t in range(2):
            give_gradients(params.values(), seed=t)
            step(optimizer)
        told.append(optimizer.telemetry())
    for other in told[1:]:
        for name in ("flat", "odd", "bias"):
            assert other[name] == pytest.approx(told[0][name], rel=1e-4)


@pytest.mark.parametrize("skip", [False, True])
@backends
def test_fraction_of_nonfinite_steps(backend, device, skip):
    optimizer, params = build(backend, device, telemetry=True, skip_nonfinite=skip)
    for t in range(4):
        give_gradients(params.values(), seed=t)
        if t == 3:
            params["odd"].grad[-1, -1] = math.nan
        step(optimizer)
    told = optimizer.telemetry()
    assert told["odd"]["nonfinite"] == 0.25
    assert told["flat"]["nonfinite"] == (0.25 if skip else 0)
    assert math.isfinite(told["odd"]["update_rms"]) == skip


@backends
def test_telemetry_changes_no_step_and_is_off_by_default(backend, device):
    one, params = build(backend, device, telemetry=True)
    other, others = build(backend, device)
    for t in range(3):
        give_gradients(params.values(), seed=t)
        give_gradients(others.values(), seed=t)
        step(one)
        step(other)
    assert_same_bits(results(one), results(other))
    assert other.telemetry() == {}
    assert "telemetry" not in one.state_dict()["param_groups"][0]


@backends
def test_rows_are_kept_when_buckets_change(backend, device):
    optimizer, params = build(backend, device, telemetry=True)
    for t, gone in enumerate((None, "odd", None)):
        give_gradients(params.values(), seed=t)
        if gone:
            params[gone].grad = None
        else:
            params["odd"].grad[0, 0] = math.inf
        step(optimizer)
    told = optimizer.telemetry()
    assert (told["odd"]["nonfinite"], told["flat"]["nonfinite"]) == (1, 0)


@backends
def test_a_copy_continues_from_the_rows(backend, device):
    optimizer, params = build(backend, device, telemetry=True)
    give_gradients(params.values(), seed=0)
    step(optimizer)
    copied = copy.deepcopy(optimizer)
    assert copied.telemetry() == optimizer.telemetry()
    own = [p for group in copied.param_groups for p in group["params"]]
    for one, its in ((optimizer, list(params.values())), (copied, own)):
        give_gradients(its, seed=1)
        step(one)
    assert copied.telemetry() == optimizer.telemetry()


def test_detail_energy_of_muon_is_that_of_the_orthogonalised_matrix():
    """Check it for a gradient whose blocks are nearly constant: the energy is not the gradient's, as documented."""
    g = torch.ones(32, 64) + 1e-2 * torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    energies = []
    for make in (GWTAdamW, GWTMuon):
        p = torch.nn.Parameter(torch.zeros(32, 64))
        optimizer = make([("p", p)], lr=1.0, level=2, scale=1.0, telemetry=True)
        p.grad = g.clone()
        optimizer.step()
        energies.append(optimizer.telemetry()["p"]["detail_energy"])
    means = g.unflatten(-1, (16, 4)).mean(-1, keepdim=True).expand(-1, -1, 4).flatten(-2)
    assert energies[0] == pytest.approx(float((g - means).square().sum() / g.square().sum()), rel=1e-2)
    update = -p.detach().double()  # started at 0, without decay: a multiple of the matrix
    means = update.unflatten(-1, (16, 4)).mean(-1, keepdim=True).expand(-1, -1, 4).flatten(-2)
    assert energies[1] == pytest.approx(float((update - means).square().sum() / update.square().sum()), rel=1e-3)
    assert energies[1] > 100 * energies[0]


def test_unnamed_parameters_are_named_by_index(device):
    params = parameters([(4, 8), (4,)])
    optimizer = GWTAdamW([{"params": params[:1]}, {"params": params[1:], "level": 0}], telemetry=True)
    assert optimizer.telemetry() == {}
    give_gradients(params, seed=0)
    optimizer.step()
    assert list(optimizer.telemetry()) == ["0.0", "1.0"]


def test_bad_options():
    params = parameters([(4, 8)])
    with pytest.raises(TypeError, match="telemetry must be True or False, got 1"):
        GWTAdamW(params, telemetry=1)
    pytest.importorskip("pywt", reason="needs PyWavelets: pip install -e '.[test]'")
    with pytest.raises(ValueError, match="telemetry=True knows no wavelet 'db2'"):
        GWTAdamW(params, telemetry=True, wavelet="db2")
