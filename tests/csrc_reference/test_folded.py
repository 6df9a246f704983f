"""Tests that the C oracle's steps, level by level, equal one pass over blocks, for every optimizer.

Each update is computed again in NumPy, from the means of blocks and the differences of elements from them: the form
that the package computes. Rows as blocks, batches and bad arguments are tested, too.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from tests.support import reference
from tests.support import reference_optimizers as oracle

SHAPES = [((3, 8), 0), ((3, 8), 1), ((4, 16), 2), ((3, 13), 2), ((5, 6), 2), ((2, 37), 3), ((1, 32), 5)]
SHAPES += [((2, 3, 20), 2), ((4, 12), "row"), ((3, 7), "row"), ((2, 2, 5), "row"), ((3, 1), "row")]
VECTORS = [((30,), 2), ((29,), 3), ((9,), "row"), ((9,), 0)]
STEPS = 4


class Blocks:
    """A gradient `[..., N]` in blocks of `width`: `mean` `[..., blocks]` and `rest` `[..., N]`."""

    def __init__(self, g: np.ndarray, level: reference.Level) -> None:
        self.width, self.length = reference.block_width(g.shape, level), g.shape[-1]
        padding = -self.length % self.width
        padded = np.pad(g, [(0, 0)] * (g.ndim - 1) + [(0, padding)])
        self.mean = padded.reshape(*g.shape[:-1], -1, self.width).mean(-1)
        self.rest = g - self.spread(self.mean)

    def spread(self, blocks: np.ndarray) -> np.ndarray:
        """Repeat the number of a block for each of its elements."""
        return blocks.repeat(self.width, axis=-1)[..., : self.length]


def start(shape: tuple[int, ...], seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return weights, and the gradients of some steps."""
    rng = np.random.default_rng(seed)
    return rng.standard_normal(shape), rng.standard_normal((STEPS, *shape))


def close(ours: np.ndarray, theirs: np.ndarray) -> None:
    np.testing.assert_allclose(ours, theirs, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize(("shape", "level"), SHAPES + VECTORS)
@pytest.mark.parametrize("rho", [1.0, 0.3, 0.0])
def test_lion(shape, level, rho):
    p, grads = start(shape)
    exp_avg, m, expected = np.zeros(reference.moment_shape(shape, level)), 0.0, p.copy()
    scale = 0.7 if level else 1.0
    for g in grads:
        blocks = Blocks(g, level)
        update = np.sign(blocks.spread(0.8 * m + 0.2 * blocks.mean) + rho * blocks.rest)
        m = 0.95 * m + 0.05 * blocks.mean
        expected = expected * (1 - 0.1 * 0.2) - 0.1 * scale * update
        options = {"betas": (0.8, 0.95), "weight_decay": 0.2, "scale": 0.7, "detail_scale": rho}
        oracle.lion_step(p, g, exp_avg, level=level, lr=0.1, **options)
        close(p, expected)
    close(exp_avg, math.sqrt(blocks.width) * m)


def test_lion_by_hand():
    """The means of (5 1)(2 -2)(0 0) are 3, 0 and 0.

    3/4 * -4 + 1/4 * 3 + (2 -2) is (-1/4 -17/4); 3/4 * 4 + (2 -2) is (5 1); and 0 has no sign.
    """
    p, g = np.zeros(6), np.array([5.0, 1, 2, -2, 0, 0])
    m = np.array([-4.0, 4, 0]) * math.sqrt(2)
    oracle.lion_step(p, g, m, level=1, lr=0.5, betas=(0.75, 0.5), scale=0.5)
    np.testing.assert_array_equal(p, [0.25, 0.25, -0.25, -0.25, 0, 0])
    np.testing.assert_allclose(m, np.array([-0.5, 2, 0]) * math.sqrt(2), rtol=1e-15)


@pytest.mark.parametrize(("shape", "level"), SHAPES)
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("adjust", [None, "match_rms_adamw", "spectral_unclamped"])
def test_muon(shape, level, nesterov, adjust):
    p, grads = start(shape)
    buffer, m, expected = np.zeros(reference.moment_shape(shape, level)), 0.0, p.copy()
    rows, columns = shape[-2:]
    factor = {
        None: math.sqrt(max(1, rows / columns)),
        "match_rms_adamw": 0.2 * math.sqrt(max(rows, columns)),
        "spectral_unclamped": math.sqrt(rows / columns),
    }[adjust]
    for g in grads:
        blocks = Blocks(g, level)
        m = 0.9 * m + 0.1 * blocks.mean
        mixed = 0.9 * m + 0.1 * blocks.mean if nesterov else m
        o = oracle.newton_schulz(blocks.spread(mixed) + 0.8 * blocks.rest)
        expected = expected * (1 - 0.1 * 0.2) - 0.1 * 0.7 * factor * o  # scale at level 0 too
        options = {"momentum": 0.9, "nesterov": nesterov, "adjust_lr_fn": adjust, "weight_decay": 0.2}
        oracle.muon_step(p, g, buffer, level=level, lr=0.1, scale=0.7, detail_scale=0.8, **options)
        close(p, expected)
    close(buffer, math.sqrt(blocks.width) * m)


@pytest.mark.parametrize(("shape", "level"), SHAPES + VECTORS)
@pytest.mark.parametrize("details", ["divided", "published"])
@pytest.mark.parametrize("beta1", [0.9, None])
@pytest.mark.parametrize("clip", [1.0, 0.4])
def test_adafactor(shape, level, details, beta1, clip):
    p, grads = start(shape)
    state, expected, m, row, column, full = (
        oracle.adafactor_state(shape, level, beta1),
        p.copy(),
        0.0,
        0.0,
        0.0,
        0.0,
    )
    for t, g in enumerate(grads, 1):
        blocks, beta2 = Blocks(g, level), 1 - t**-0.7
        a = math.sqrt(blocks.width) * blocks.mean
        squares = a * a + 1e-3
        if g.ndim > 1:
            row = beta2 * row + (1 - beta2) * squares.mean(-1)
            column = beta2 * column + (1 - beta2) * squares.mean(-2)
            d = np.sqrt(row / row.mean(-1, keepdims=True))[..., None] * np.sqrt(column)[..., None, :]
        else:
            full = beta2 * full + (1 - beta2) * squares
            d = np.sqrt(full)
        clipped = max(1, np.sqrt(np.mean((a / d) ** 2)) / clip)
        u = a / d / clipped
        m = u if beta1 is None else beta1 * m + (1 - beta1) * u
        rest = blocks.rest / blocks.spread(d * clipped) if details == "divided" else blocks.rest
        rate, scale = 0.1 * max(0.5, np.sqrt(np.mean(expected**2))), 0.7 if level else 1.0
        expected = expected * (1 - rate * 0.2) - rate * scale * (rest + blocks.spread(m) / math.sqrt(blocks.width))
        options = {"eps": (1e-3, 0.5), "decay_rate": -0.7, "clip_threshold": clip, "scale_parameter": True}
        options |= {"beta1": beta1, "weight_decay": 0.2, "scale": 0.7, "details": details}
        oracle.adafactor_step(p, g, state, level=level, step=t, lr=0.1, **options)
        close(p, expected)
    for name, moment in {"exp_avg": m, "exp_avg_sq_row": row, "exp_avg_sq_col": column, "exp_avg_sq": full}.items():
        if name in state:
            close(state[name], moment)


@pytest.mark.parametrize("warmup", [False, True])
def test_adafactor_finds_its_own_rate(warmup):
    for t in (1, 99, 10_000, 40_000, 10**6):
        p, g = start((3, 8))
        other, state = p.copy(), [oracle.adafactor_state((3, 8), 1) for _ in range(2)]
        rate = min(1e-6 * t if warmup else 1e-2, t**-0.5)
        relative = {"relative_step": True, "warmup_init": warmup}
        oracle.adafactor_step(p, g[0], state[0], level=1, step=t, lr=None, weight_decay=0.5, **relative)
        oracle.adafactor_step(other, g[0], state[1], level=1, step=t, lr=rate, weight_decay=0.5)
        np.testing.assert_allclose(p, other, rtol=1e-14)


@pytest.mark.parametrize(
    ("shape", "level", "count"),
    [(s, k, count) for s, k in SHAPES for count in (math.prod(s[:-1]), 2, 1) if math.prod(s[:-1]) % count == 0],
)
def test_adam_mini(shape, level, count):
    """Compare with a second moment per row, per half of the rows, and per tensor."""
    p, grads = start(shape)
    rows = math.prod(shape[:-1])
    exp_avg, exp_avg_sq = np.zeros(reference.moment_shape(shape, level)), np.zeros(count)
    expected, m, v = p.copy(), 0.0, np.zeros(count)
    for t, g in enumerate(grads, 1):
        blocks = Blocks(g, level)
        a = math.sqrt(blocks.width) * blocks.mean
        m = 0.8 * m + 0.2 * blocks.mean
        v = 0.95 * v + 0.05 * (a * a).reshape(count, -1).mean(-1)
        root = (np.sqrt(v / (1 - 0.95**t)) + 1e-3).repeat(rows // count).reshape(*shape[:-1], 1)
        update = (blocks.rest + blocks.spread(m) / (1 - 0.8**t)) / root
        expected = expected * (1 - 0.1 * 0.2) - 0.1 * (0.7 if level else 1.0) * update
        options = {"betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.2, "scale": 0.7}
        oracle.adam_mini_step(p, g, exp_avg, exp_avg_sq, level=level, step=t, lr=0.1, **options)
        close(p, expected)
    close(exp_avg, math.sqrt(blocks.width) * m)
    close(exp_avg_sq, v)


@pytest.mark.parametrize(("shape", "level"), [(s, k) for s, k in SHAPES + VECTORS if k])
@pytest.mark.parametrize("rule", reference.RULES)
@pytest.mark.parametrize("correct_bias", [True, False])
def test_adamw(shape, level, rule, correct_bias):
    """Compare with a limiter, and with scaled residuals."""
    p, grads = start(shape)
    (exp_avg, exp_avg_sq), expected = np.zeros((2, *reference.moment_shape(shape, level))), p.copy()
    m = v = 0.0
    norm = previous = 0.0
    for t, g in enumerate(grads * np.array([1, 9, 1, 9]).reshape(-1, *[1] * p.ndim), 1):
        blocks, limit = Blocks(g, level), 1.0
        root = math.sqrt(blocks.width)
        if rule == "gwt":
            a = root * blocks.mean
            m, v = 0.5 * m + 0.5 * a, 0.9 * v + 0.1 * a * a
            d = np.sqrt(v) + 1e-3
            length = np.linalg.norm(m / d)
            limit = max(length / (previous + 1e-8), 1.01) / 1.01 if previous else 1.0
            previous = length / limit
            update = (blocks.rest + blocks.spread(m) / root) / blocks.spread(d)
        else:
            m = 0.5 * m + 0.5 * blocks.mean
            v = 0.9 * v + 0.1 * Blocks(g * g, level).mean
            rest = 0.6 * blocks.rest
            update = (blocks.spread(m) + rest) / (np.sqrt(blocks.spread(v) + rest**2) + 1e-3)
        correction = math.sqrt(1 - 0.9**t) / (1 - 0.5**t) if correct_bias else 1.0
        expected = expected * (1 - 0.1 * 0.2) - 0.1 * correction * 0.7 / limit * update
        options = {
            "betas": (0.5, 0.9),
            "eps": 1e-3,
            "weight_decay": 0.2,
            "scale": 0.7,
            "correct_bias": correct_bias,
        }
        options |= {"rule": rule, "res_scale": 0.6, "norm_growth_limit": 1.01 if rule == "gwt" else None}
        norm = reference.adamw_step(p, g, exp_avg, exp_avg_sq, norm, level=level, step=t, lr=0.1, **options)
        close(p, expected)
        assert norm == pytest.approx(previous, rel=1e-12)
    close(exp_avg, m)
    close(exp_avg_sq, v)


# Rows as blocks, and batches ----------------------------------------------------------------------------

Run = Callable[[reference.Level, tuple[int, ...]], np.ndarray]


def runs() -> dict[str, Run]:
    """Return a function for each optimizer that takes some steps at a level on a shape, and returns the weights."""

    def adamw(rule: str) -> Run:
        def run(level: reference.Level, shape: tuple[int, ...]) -> np.ndarray:
            p, grads = start(shape)
            m, v = np.zeros((2, *reference.moment_shape(shape, level)))
            norm, gamma = 0.0, 1.01 if rule == "gwt" else None
            for t, g in enumerate(grads, 1):
                options = {"level": level, "lr": 0.1, "rule": rule, "norm_growth_limit": gamma}
                norm = reference.adamw_step(p, g, m, v, norm, step=t, **options)
            return p

        return run

    def first_moment(step: Callable[..., None]) -> Run:
        def run(level: reference.Level, shape: tuple[int, ...]) -> np.ndarray:
            p, grads = start(shape)
            m = np.zeros(reference.moment_shape(shape, level))
            for g in grads:
                step(p, g, m, level=level, lr=0.1)
            return p

        return run

    def adafactor(level: reference.Level, shape: tuple[int, ...]) -> np.ndarray:
        p, grads = start(shape)
        state = oracle.adafactor_state(shape, level)
        for t, g in enumerate(grads, 1):
            oracle.adafactor_step(p, g, state, level=level, step=t, lr=0.1)
        return p

    def adam_mini(level: reference.Level, shape: tuple[int, ...]) -> np.ndarray:
        p, grads = start(shape)
        m, v = np.zeros(reference.moment_shape(shape, level)), np.zeros(math.prod(shape[:-1]))
        for t, g in enumerate(grads, 1):
            oracle.adam_mini_step(p, g, m, v, level=level, step=t, lr=0.1)
        return p

    return {
        "gwt": adamw("gwt"),
        "foam": adamw("foam"),
        "lion": first_moment(oracle.lion_step),
        "muon": first_moment(oracle.muon_step),
        "adafactor": adafactor,
        "adam_mini": adam_mini,
    }


@pytest.mark.parametrize("name", runs())
def test_rows_as_blocks_are_a_level_where_that_makes_one_block_a_row(name):
    run = runs()[name]
    close(run("row", (3, 16)), run(4, (3, 16)))
    # Blocks of 16 pad rows of 13 with zeros, which the mean of a row does not count.
    assert np.abs(run("row", (3, 13)) - run(4, (3, 13))).max() > 1e-3


@pytest.mark.parametrize("name", ["muon", "adam_mini"])
def test_a_batch_is_its_matrices(name):
    """Compare a batch with its matrices one by one, with a second moment per row for Adam-mini."""
    p, grads = start((3, 4, 12))
    m = np.zeros(reference.moment_shape(p.shape, 2))
    v, alone, alone_m, alone_v = np.zeros(12), p.copy(), m.copy(), np.zeros((3, 4))
    for t, g in enumerate(grads, 1):
        if name == "muon":
            oracle.muon_step(p, g, m, level=2, lr=0.1)
        else:
            oracle.adam_mini_step(p, g, m, v, level=2, lr=0.1, step=t)
        for e in range(3):
            if name == "muon":
                oracle.muon_step(alone[e], g[e], alone_m[e], level=2, lr=0.1)
            else:
                oracle.adam_mini_step(alone[e], g[e], alone_m[e], alone_v[e], level=2, lr=0.1, step=t)
    np.testing.assert_array_equal(p, alone)
    np.testing.assert_array_equal(m, alone_m)
