"""Tests that the C oracle's folded rule has the properties for which FOAM is chosen, beyond the golden vectors.

These are an example worked by hand; what the rule shares with AdamW and with the other rule; its bound, which is
reached and never exceeded; and the effects of padding and of the limiter's arguments. Of the golden vectors only
the control is here: test_reference.py compares them, and tests refusals.
"""

from __future__ import annotations

import ctypes
import math

import numpy as np
import pytest

from tests.support import golden, reference

DTYPES = (np.float64, np.float32)
BETAS = [(0.9, 0.999), (0.9, 0.95), (0.95, 0.9), (0.0, 0.5), (0.99, 0.5)]


def steps(grads: np.ndarray, level: int, p: np.ndarray | None = None, **settings: object) -> list[np.ndarray]:
    """Return the weights before the first step and after each step, from a state of zeros; then both moments."""
    p = np.zeros_like(grads[0]) if p is None else p.copy()
    m, v = np.zeros((2, *reference.moment_shape(p.shape, level)), p.dtype)
    settings = {"rule": "foam", "norm_growth_limit": None, "lr": 1.0} | settings
    weights = [p.copy()]
    for t, g in enumerate(grads, 1):
        reference.adamw_step(p, np.ascontiguousarray(g), m, v, level=level, step=t, **settings)
        weights.append(p.copy())
    return [*weights, m, v]


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"rule": "gwt"},
        {"scale": 0.26},
        {"level": 2},
        {"level": 4},
        {"eps": 1e-6},
        {"betas": (0.9, 0.951)},
        {"betas": (0.89, 0.95)},
        {"weight_decay": 0.1},
        {"maximize": True},
    ],
    ids=str,
)
def test_golden_vectors_notice_a_changed_setting(changed):
    case = next(case for case in golden.foam_cases() if case.name == "foam3_odd")
    settings = {key: getattr(case, key) for key in ("rule", "level", "betas", "eps", "weight_decay", "scale")}
    (lr,) = set(case.lr)
    *_, last, _, _ = steps(case.grads, p=case.p0, lr=lr, **settings | changed)
    worst = np.abs(last / case.params[-1] - 1).max()
    assert worst > 1e-6 if changed else worst < 1e-12


def test_step_by_hand():
    """Check a whole block and a padded one; every root is that of a square.

    With beta1 = beta2 = 3/4, the gradient (7 1)(8 [0]):

        mean   4  4      mean of squares  25  32      r = 3 -3, 4
        m = 3/4 * 4 + 1/4 * 4 = 4            3/4 * 8 + 1/4 * 4 = 7
        v = 3/4 * 13 + 1/4 * 25 = 16         3/4 * 16 + 1/4 * 32 = 20
        u = 7/(5 + 3), 1/(5 + 3)             11/(6 + 3)

    Bias correction at t = 1: sqrt(1/4) / (1/4) = 2. Decay: 8 * 3/4 = 6.
    """
    p, g = np.full(3, 8.0), np.array([7.0, 1, 8])
    m, v = np.array([4.0, 8]), np.array([13.0, 16])
    options = {"lr": 0.5, "betas": (3 / 4, 3 / 4), "eps": 3.0, "weight_decay": 0.5, "scale": 0.25}
    reference.adamw_step(p, g, m, v, level=1, step=1, rule="foam", norm_growth_limit=None, **options)
    np.testing.assert_allclose(p, 6 - 0.5 * 2 * 0.25 * np.array([7 / 8, 1 / 8, 11 / 9]), rtol=1e-15, atol=0)
    np.testing.assert_array_equal(m, [4, 7])
    np.testing.assert_array_equal(v, [16, 20])


@pytest.mark.parametrize("dtype", DTYPES)
def test_level_0_is_that_of_the_other_rule(dtype):
    rng = np.random.default_rng(0)
    grads, p = rng.standard_normal((5, 3, 7)).astype(dtype), rng.standard_normal((3, 7)).astype(dtype)
    folded = steps(grads, 0, p, weight_decay=0.1, scale=99.0)  # level 0 ignores scale
    other = steps(grads, 0, p, weight_decay=0.1, rule="gwt", norm_growth_limit=1.01)
    for ours, theirs in zip(folded, other, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    at_1 = steps(grads, 1, p, weight_decay=0.1), steps(grads, 1, p, weight_decay=0.1, rule="gwt")
    assert np.abs(at_1[0][5] - at_1[1][5]).max() > 0.1


@pytest.mark.parametrize("level", [1, 2, 3, 4, 5])
def test_constant_blocks_move_as_in_adamw(level):
    """Check that without residuals a block is one parameter of AdamW, at `scale` times the learning rate."""
    grads = np.random.default_rng(level).standard_normal((6, 4, 3))
    *one_each, m, v = steps(grads, 0, lr=0.25)
    *whole, folded_m, folded_v = steps(grads.repeat(2**level, axis=-1), level, scale=0.25)
    for ours, theirs in zip(whole, one_each, strict=True):
        np.testing.assert_allclose(ours, theirs.repeat(2**level, axis=-1), rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(folded_m, m, rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(folded_v, v, rtol=1e-12, atol=1e-15)


# The bound ----------------------------------------------------------------------------------------------


def largest_update(t: int, betas: tuple[float, float], width: int) -> float:
    """Return the supremum of an element of bias-corrected u at step t, at scale 1, in blocks of `width`.

    Let a_s be the block's mean at step s, w_s = (1-b2) b2**(t-s), and r an element's residual at step t. The
    mean of squares at s is a_s**2 and the mean of squared residuals. At step t that is at least
    r**2 / (width-1), as the residuals (those of the padding too) sum to 0. So

        v + r**2 >= sum_s w_s a_s**2 + r**2 * (1 + (1-b2) / (width-1)),
        m + r = sum_s (1-b1) b1**(t-s) a_s + r,

    and by Cauchy's inequality (m + r)**2 <= (v + r**2) * (kappa + (width-1) / (width-b2)), where kappa is the
    sum of ((1-b1) b1**(t-s))**2 / w_s. `worst_gradients` makes both into equalities.
    """
    b1, b2 = betas
    kappa = sum((1 - b1) ** 2 / (1 - b2) * (b1**2 / b2) ** age for age in range(t))
    correction = math.sqrt(1 - b2**t) / (1 - b1**t)
    return correction * math.sqrt(kappa + (width - 1) / (width - b2))


def worst_gradients(t: int, betas: tuple[float, float], width: int) -> np.ndarray:
    """`[t, width]`: one block whose first element reaches `largest_update` at step t, with eps near 0."""
    b1, b2 = betas
    means = np.array([(1 - b1) / (1 - b2) * (b1 / b2) ** (t - s) for s in range(1, t + 1)])
    grads = means[:, None].repeat(width, axis=1)
    residual = (width - 1) / (width - b2)
    grads[-1] += np.where(np.arange(width) == 0, residual, -residual / max(width - 1, 1))
    return grads


def adversaries(width: int, block: int) -> dict[str, np.ndarray]:
    """Return gradients `[steps, width]` that make a shared denominator small beside its numerators, and others."""
    rng = np.random.default_rng(width * block)
    t, k = 12, np.arange(width)
    noise = rng.standard_normal((t, width))
    balanced = noise.copy()  # every block has mean 0, but for rounding
    for first in range(0, width, block):
        balanced[:, first : first + block] -= balanced[:, first : first + block].mean(axis=1, keepdims=True)
    return {
        "noise": noise,
        "mean 0": balanced,
        "alternating": np.tile((-1.0) ** k, (t, 1)),
        "huge and alternating": 1e100 * (-1.0) ** k * rng.integers(0, 2, (t, 1)),
        "one spike in a block": np.tile(np.where(k % block == 0, 1.0, 0.0), (t, 1)),
        "a spike after silence": np.where((np.arange(t)[:, None] == t - 1) & (k % block == 0), 1e6, 1e-6),
        "fading": noise * 10.0 ** -np.arange(0, 10 * t, 10)[:, None],
        "tiny": noise * 1e-150,
        "in step, then balanced": np.concatenate([np.ones((t - 1, width)), balanced[:1] * 3]),
    }


@pytest.mark.parametrize("betas", BETAS, ids=str)
@pytest.mark.parametrize(("width", "level"), [(1, 0), (8, 1), (8, 2), (13, 1), (13, 3), (37, 2), (64, 5), (65, 6)])
@pytest.mark.parametrize("eps", [1e-300, 1e-6])
def test_every_element_of_the_update_is_bounded(width, level, betas, eps):
    scale = 0.25 if level else 1.0
    for name, grads in adversaries(width, 2**level).items():
        weights = steps(grads, level, betas=betas, eps=eps)[:-2]
        for t in range(1, len(weights)):
            update = np.abs(weights[t] - weights[t - 1]).max()
            rounding = 1e-13 * max(1, np.abs(weights[t]).max())  # of the weights that the update was added to
            assert update <= scale * largest_update(t, betas, 2**level) + rounding, (name, t)


@pytest.mark.parametrize("betas", BETAS, ids=str)
@pytest.mark.parametrize("level", [1, 2, 5])
@pytest.mark.parametrize("t", [1, 2, 7, 40])
def test_the_bound_is_reached(t, level, betas):
    """Check that the bound is reached: it is the smallest, and updates of a wrong formula would exceed it."""
    grads = worst_gradients(t, betas, 2**level)
    weights = steps(grads, level, betas=betas, eps=1e-300, scale=0.25)[:-2]
    update = (weights[t - 1] - weights[t])[0]
    np.testing.assert_allclose(update, 0.25 * largest_update(t, betas, 2**level), rtol=1e-11)


def test_the_other_rule_has_no_such_bound():
    """Check a block of mean 0: the other rule divides its details by eps only, this rule by their own size."""
    grads = np.tile([1.0, -1.0], (1, 1, 4))
    folded, other = steps(grads, 1)[1], steps(grads, 1, rule="gwt")[1]
    assert np.abs(folded).max() < 0.25 * largest_update(1, (0.9, 0.999), 2) < 0.27
    assert np.abs(other).max() > 1e4


# Padding, and the limiter's arguments -------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [*range(1, 34), 37, 65, 127])
def test_a_row_that_ends_within_a_block_is_one_padded_with_zeros(width, dtype):
    rng = np.random.default_rng(width)
    grads = rng.standard_normal((3, 2, width)).astype(dtype)
    level = 1
    while 2 ** (level - 1) < width:
        columns = -(-width // 2**level) * 2**level
        padded = np.pad(grads, ((0, 0), (0, 0), (0, columns - width)))
        *short, m, v = steps(grads, level)
        *whole, whole_m, whole_v = steps(padded, level)
        for ours, theirs in zip(short, whole, strict=True):
            np.testing.assert_array_equal(ours, theirs[:, :width])
        np.testing.assert_array_equal(m, whole_m)
        np.testing.assert_array_equal(v, whole_v)
        level += 1


def test_the_mean_over_a_padded_block_counts_the_padding():
    """Check one element in a block of 4: its mean, and the mean of squares, are over all four."""
    *_, m, v = steps(np.full((1, 1), 8.0), 0, betas=(0.0, 0.0))
    assert (m.item(), v.item()) == (8, 64)
    *_, m, v = steps(np.full((1, 5), 8.0), 2, betas=(0.0, 0.0))
    np.testing.assert_array_equal(m, [8, 2])
    np.testing.assert_array_equal(v, [64, 16])


@pytest.mark.parametrize("gamma", [None, 0.0, -1.0, math.nan, -math.inf])
@pytest.mark.parametrize("norm", [0.0, 1e-30, 7.0, -1.0, math.nan, None])
def test_the_limiter_and_its_norm_have_no_part_in_it(gamma, norm):
    rng = np.random.default_rng(3)
    g = rng.standard_normal((2, 8)) * np.array([[1e-3], [1e3]])
    expected = steps(g[None], 2, lr=0.1)
    p, (m, v) = np.zeros((2, 8)), np.zeros((2, 2, 2))
    number = math.nan if gamma is None else gamma
    folded = reference.RULES.index("foam")
    options = reference.Options(1, 0.1, 0.9, 0.999, 1e-6, 0.0, 0.25, number, 2, 0, folded, 1, 1.0)
    pointers = [a.ctypes.data for a in (p, g, m, v)]
    stored = None if norm is None else ctypes.c_double(norm)
    reference.call("gwt_adamw_step", p.dtype, *pointers, stored, 2, 8, options)
    for ours, theirs in zip((p, m, v), expected[1:], strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert stored is None or stored.value == norm or (math.isnan(norm) and math.isnan(stored.value))


def test_an_unknown_rule_is_refused():
    arrays = [np.zeros(8), np.ones(8), np.zeros(2), np.zeros(2)]
    with pytest.raises(ValueError, match=r"'fold'.*'gwt', 'foam'"):
        reference.adamw_step(*arrays, level=2, step=1, lr=0.1, rule="fold")
    assert not arrays[0].any()
