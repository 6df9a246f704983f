"""Tests the C oracle's optimizers beyond Adam against independent results.

These are trajectories of the published optimizers; torch.optim.Muon, run in float64, torch.optim.Adafactor and
AdamW; and the singular values of a matrix. test_folded.py tests every update again, as one pass over blocks.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tests.support import golden, reference, torch_muon
from tests.support import reference_optimizers as oracle

CASES = {family: golden.optimizer_cases(family) for family in ("muon", "adafactor", "adam_mini")}
EVERY = [pytest.param(family, case, id=case.name) for family, cases in CASES.items() for case in cases]


def momentum_of(shape: tuple[int, ...], level: reference.Level) -> np.ndarray:
    """Return the state of Muon before the first step."""
    return np.zeros(reference.moment_shape(shape, level))


# The published optimizers -------------------------------------------------------------------------------


def run_golden(
    family: str, case: golden.OptimizerCase, **changed: object
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Return the weights after each step, and the state after the last, with some settings changed."""
    settings = {key: getattr(case, key) for key in ("level", "weight_decay", "wavelet", "boundary")}
    settings |= case.options | changed
    p, params = case.p0.copy(), np.full_like(case.params, np.nan)
    if family == "adafactor":
        settings = {"details": "published"} | settings
        state = oracle.adafactor_state(p.shape, settings["level"], settings["beta1"], settings["wavelet"])
    elif family == "muon":
        settings = {"summed": True, "added_eps": True} | settings
        state = {"momentum_buffer": momentum_of(p.shape, settings["level"])}
    else:
        state = {"exp_avg": np.zeros(p.shape), "exp_avg_sq": np.zeros(case.state["exp_avg_sq"].shape)}
    for t, (g, lr) in enumerate(zip(case.grads, case.lr, strict=True)):
        if family == "adafactor":
            oracle.adafactor_step(p, g, state, step=t + 1, lr=lr, **settings)
        elif family == "muon":
            oracle.muon_step(p, g, **state, lr=lr, **settings)
        else:
            oracle.adam_mini_step(p, g, **state, step=t + 1, lr=lr, **settings)
        params[t] = p
    return params, state


@pytest.mark.parametrize(("family", "case"), EVERY)
def test_golden_vectors(family, case):
    params, state = run_golden(family, case)
    movement = case.params - case.p0
    np.testing.assert_allclose(params - case.p0, movement, rtol=0, atol=1e-12 * np.abs(movement).max())
    assert state.keys() == case.state.keys()
    for name, expected in case.state.items():
        np.testing.assert_allclose(state[name], expected, rtol=0, atol=1e-12 * np.abs(expected).max(), err_msg=name)


def test_golden_vectors_hold_what_the_tests_rely_on():
    assert {family: len(cases) for family, cases in CASES.items()} == {"muon": 3, "adafactor": 26, "adam_mini": 3}
    adafactor = CASES["adafactor"]
    assert {case.level for case in adafactor} == {0, 1, 2, 3, 4}
    assert {case.p0.ndim for case in adafactor} == {1, 2, 3}
    assert {case.wavelet for case in adafactor} == {"haar", "db2", "sym4"}
    assert sum(case.options["beta1"] is None for case in adafactor) == 5
    assert {np.sign(case.p0.shape[0] - case.p0.shape[1]) for case in CASES["muon"]} == {-1, 0, 1}
    assert {case.state["exp_avg_sq"].size / len(case.p0) for case in CASES["adam_mini"]} == {1, 1 / 4}


NOTICED = {
    "muon_tall": [
        {"summed": False},
        {"added_eps": False},
        {"nesterov": False},
        {"ns_steps": 4},
        {"momentum": 0.9},
        {"weight_decay": 0.0},
        {"adjust_lr_fn": "original"},
        {"eps": 1e-6},
        {"ns_coefficients": (3.4445, -4.775, 2.0316)},
        {"scale": 0.99},
        {"maximize": True},
        {"level": 1},
    ],
    "adafactor2_clip": [
        {"details": "divided"},
        {"beta1": 0.89},
        {"beta1": None},
        {"clip_threshold": 0.31},
        {"decay_rate": -0.79},
        {"scale": 0.26},
        {"scale_parameter": True},
        {"weight_decay": 0.1},
        {"level": 1},
        {"eps": (1e-3, 1e-3)},
        {"wavelet": "db2"},
        {"maximize": True},
    ],
    "adafactor2_relative_step": [{"warmup_init": False}, {"relative_step": False, "warmup_init": False}],
    "adafactor2_scale_parameter": [{"eps": (1e-30, 1.0)}],
    "mini_rows": [{"betas": (0.9, 0.99)}, {"betas": (0.89, 0.999)}, {"eps": 1e-4}, {"weight_decay": 0.0}],
}


@pytest.mark.parametrize(("family", "case"), [pair for pair in EVERY if pair.id in NOTICED])
def test_golden_vectors_notice_a_changed_setting(family, case):
    movement = np.abs(case.params - case.p0).max()
    for changed in NOTICED[case.name]:
        assert np.abs(run_golden(family, case, **changed)[0] - case.params).max() > 1e-9 * movement, changed


@pytest.mark.parametrize("case", CASES["muon"], ids=lambda case: case.name)
def test_a_sum_as_buffer_is_an_average_with_a_smaller_eps(case):
    """Check torch's buffer against golden vectors, if Newton-Schulz divides by `norm + (1 - momentum) * eps`."""
    rest = 1 - case.options["momentum"]
    params, state = run_golden("muon", case, summed=False, eps=rest * 1e-7)
    movement = case.params - case.p0
    np.testing.assert_allclose(params - case.p0, movement, rtol=0, atol=1e-12 * np.abs(movement).max())
    np.testing.assert_allclose(
        state["momentum_buffer"], rest * case.state["momentum_buffer"], rtol=1e-12, atol=1e-15
    )
    for scale in (1.0, 0.5):
        params = [
            run_golden("muon", case, level=1, detail_scale=scale, **way)[0] for way in ({}, {"summed": False})
        ]
        np.testing.assert_allclose(*params, rtol=0, atol=1e-6 * np.abs(movement).max())  # for eps


# torch.optim --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(9, 4), (4, 9), (5, 5), (1, 6), (6, 1)])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"nesterov": False},
        {"momentum": 0.0},
        {"momentum": 0.6, "weight_decay": 0.0},
        *({"adjust_lr_fn": name} for name in torch_muon.ADJUSTMENTS),
        {"ns_steps": 0},
        {"ns_steps": 7, "ns_coefficients": (1.875, -1.25, 0.375)},
        {"eps": 30.0},
    ],
    ids=str,
)
def test_muon_at_level_0_is_that_of_torch(shape, options, monkeypatch):
    """Run torch's own code without its one rounding to bfloat16."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    rng = np.random.default_rng(0)
    p, buffer = rng.standard_normal(shape), momentum_of(shape, 0)
    tensor = torch.nn.Parameter(torch.tensor(p))
    theirs = torch.optim.Muon([tensor], **options)
    for t in range(1, 7):
        lr, g = 0.1 / t, rng.standard_normal(shape)
        theirs.param_groups[0]["lr"] = lr
        tensor.grad = torch.tensor(g)
        theirs.step()
        oracle.muon_step(p, g, buffer, level=0, lr=lr, **options)
        np.testing.assert_allclose(p, tensor.detach().numpy(), rtol=0, atol=1e-13)
    np.testing.assert_allclose(buffer, theirs.state[tensor]["momentum_buffer"].numpy(), rtol=0, atol=1e-15)


def test_muon_at_level_0_has_the_defaults_of_torch():
    theirs = torch.optim.Muon([torch.nn.Parameter(torch.zeros(2, 2))]).defaults
    ours = dict(oracle.muon_step.__kwdefaults__)
    assert {name: value for name, value in theirs.items() if name != "lr"} == {
        n: ours[n] for n in theirs if n != "lr"
    }


@pytest.mark.parametrize("shape", [(6, 4), (2, 3, 5), (7,)])
def test_adafactor_at_level_0_is_that_of_torch(shape):
    """Compare with torch: no first moment, rates scaled by the weights and capped, no eps added to squares."""
    rng = np.random.default_rng(1)
    p, state = rng.standard_normal(shape), oracle.adafactor_state(shape, 0, None)
    tensor = torch.nn.Parameter(torch.tensor(p))
    theirs = torch.optim.Adafactor([tensor], lr=0.5, eps=(1e-30, 1e-3), foreach=False)
    clipped = 0
    for t in range(1, 8):
        g = rng.standard_normal(shape) * t**2  # growing, so that updates are clipped
        tensor.grad = torch.tensor(g)
        theirs.step()
        before, rate = p.copy(), {"step": t, "lr": min(0.5, 1 / math.sqrt(t)), "scale_parameter": True}
        oracle.adafactor_step(p, g, state, level=0, beta1=None, scale=99.0, **rate)  # level 0 ignores scale
        np.testing.assert_allclose(p, tensor.detach().numpy(), rtol=0, atol=1e-13)
        moved = np.sqrt(np.mean((p - before) ** 2) / np.mean(before**2)) / rate["lr"]
        clipped += abs(moved - 1) < 1e-12
    assert clipped >= 4
    moments = theirs.state[tensor]
    for ours, name in (("exp_avg_sq", "variance"), ("exp_avg_sq_row", "row_var"), ("exp_avg_sq_col", "col_var")):
        if ours in state:
            np.testing.assert_allclose(state[ours], moments[name].numpy().reshape(state[ours].shape), rtol=1e-13)


def test_adam_mini_with_a_group_an_element_is_adam():
    rng = np.random.default_rng(2)
    p, m, v = rng.standard_normal((6, 1)), np.zeros((6, 1)), np.zeros(6)
    tensor = torch.nn.Parameter(torch.tensor(p))
    theirs = torch.optim.AdamW([tensor], lr=0.1, betas=(0.8, 0.97), eps=1e-3, weight_decay=0.2, foreach=False)
    for t in range(1, 8):
        g = rng.standard_normal((6, 1))
        tensor.grad = torch.tensor(g)
        theirs.step()
        options = {"lr": 0.1, "betas": (0.8, 0.97), "eps": 1e-3, "weight_decay": 0.2}
        oracle.adam_mini_step(p, g, m, v, level=0, step=t, scale=99.0, **options)  # level 0 ignores scale
        np.testing.assert_allclose(p, tensor.detach().numpy(), rtol=1e-12, atol=1e-14)


# The Newton-Schulz iteration ----------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [0, 1, 5, 8])
@pytest.mark.parametrize("shape", [(4, 4), (3, 9), (9, 3), (1, 5), (2, 3, 4)])
def test_newton_schulz_maps_singular_values_and_keeps_vectors(shape, steps):
    x = np.random.default_rng(3).standard_normal(shape)
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    a, b, c = oracle.COEFFICIENTS
    for added_eps in (False, True):
        norm = np.linalg.norm(x, axis=(-2, -1))[..., None]
        mapped = s / (norm + 0.5 if added_eps else np.maximum(norm, 0.5))
        for _ in range(steps):
            mapped = a * mapped + b * mapped**3 + c * mapped**5
        got = oracle.newton_schulz(x, ns_steps=steps, eps=0.5, added_eps=added_eps)
        np.testing.assert_allclose(got, (u * mapped[..., None, :]) @ vt, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("width", "level"), [(8, 1), (8, 3), (24, 3), (12, 2)])
@pytest.mark.parametrize("rows", [3, 30])
def test_newton_schulz_commutes_with_the_orthonormal_transform(rows, width, level):
    x = np.random.default_rng(4).standard_normal((rows, width))

    def transformed(matrix: np.ndarray) -> np.ndarray:
        return np.concatenate(reference.dwt(matrix, level), axis=-1)

    after, before = transformed(oracle.newton_schulz(x)), oracle.newton_schulz(transformed(x))
    np.testing.assert_allclose(after, before, rtol=0, atol=1e-12)
    crossed = np.concatenate(reference.dwt(x, level, "bior2.2"), axis=-1)  # whose filters are not orthogonal
    other = np.concatenate(reference.dwt(oracle.newton_schulz(x), level, "bior2.2"), axis=-1)
    assert np.abs(other - oracle.newton_schulz(crossed)).max() > 1e-3


def test_newton_schulz_of_nothing():
    zeros = np.zeros((2, 3, 4))
    assert not oracle.newton_schulz(zeros).any()
    assert not oracle.newton_schulz(zeros, added_eps=True).any()
    assert oracle.newton_schulz(np.zeros((2, 0, 4))).shape == (2, 0, 4)
    with pytest.raises(ValueError, match=r"shape \(4,\)"):
        oracle.newton_schulz(np.zeros(4))
