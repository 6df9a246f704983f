"""Stochastically rounded weights and moments train like float32 ones on average, in any bucket and range."""

from __future__ import annotations

import copy
import functools
import itertools
import math
import zlib

import pytest
import torch
from torch import Tensor

from gwt_kernels import GWTAdamMini, GWTAdamW, GWTLion
from gwt_kernels.core.hyper import key_of
from gwt_kernels.core.philox import random_halves, random_words
from gwt_kernels.formats.stochastic import stochastic_round
from tests.support.narrow import BF16, FP16, FP32, OPTIONS, SHAPES, float32_of, gradients, step
from tests.support.runs import (
    BACKENDS,
    CPU,
    assert_differ,
    assert_same_bits,
    backends,
    checked_step,
    give_gradients,
    parameters,
    parameters_of,
    place,
)

narrow = pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)


# Stochastic rounding -----------------------------------------------------------------------------------


def rounded(
    x: Tensor, dtype: torch.dtype, t: int, key: int, width: int, level: int, what: str = "weights"
) -> Tensor:
    """Return float32 results as they have to be stored, by the published generator and the element's index only.

    Rows of ``width`` weights that are no whole blocks count as padded to whole groups of 4 blocks.
    """
    own, on = x.shape[-1] if x.dim() else 1, CPU
    pitch = (
        own if width % 2**level == 0 else -(-width // (4 * 2**level)) * 4 * (2**level if what == "weights" else 1)
    )
    n = x.numel() // own * pitch
    if what == "weights":
        bits = random_halves(0, n, t, key, on)
    else:
        words = random_words(0, n, t, key, on)
        bits = words & 0xFFFF if what == "exp_avg" else words >> 16 & 0xFFFF
    bits = bits.view(-1, pitch)[:, :own].reshape(x.shape)
    return stochastic_round(x.detach().cpu(), bits, dtype)


@pytest.mark.parametrize(
    ("dtype", "rule", "level", "state_dtype"),  # every three of them
    [(BF16, "gwt", 0, None), (BF16, "gwt", 2, BF16), (BF16, "foam", 0, BF16), (BF16, "foam", 2, None),
     (FP16, "gwt", 0, BF16), (FP16, "gwt", 2, None), (FP16, "foam", 0, None), (FP16, "foam", 2, BF16),
     (BF16, "adam_mini", 2, BF16), (BF16, "lion", 2, BF16)],
    ids=str,
)  # fmt: skip
@backends
def test_stored_values_are_float32_results_rounded_by_seed_step_and_index(
    backend, device, state_dtype, level, rule, dtype
):
    """Compare each step with a float32 twin's from the same state; controls: another step, seed or parameter."""
    on = place(backend, device)
    kind = {"adam_mini": GWTAdamMini, "lion": GWTLion}.get(rule, functools.partial(GWTAdamW, rule=rule))
    options = {**OPTIONS, "level": level, "backend": backend, "seed": 7}
    own = parameters(SHAPES, on, dtype)
    optimizer = kind(own, weight_rounding="stochastic", state_dtype=state_dtype, **options)
    twin = kind([torch.nn.Parameter(p.detach().float()) for p in own], **options)
    for t in range(1, 4):
        for p, q in zip(own, parameters_of(twin), strict=True):
            q.data.copy_(p.detach())
            for name, value in optimizer.state[p].items():
                twin.state[q][name].copy_(value)
        grads = gradients(t, dtype)
        step(optimizer, grads)
        step(twin, [g.float() for g in grads])
        for place_, (p, q) in enumerate(zip(own, parameters_of(twin), strict=True)):
            key = key_of(7, place_)
            assert_same_bits(
                p.detach().cpu(), rounded(q, dtype, t, key, p.shape[-1], level), f"step {t}, parameter {place_}"
            )
            if state_dtype:
                narrow_names = [name for name, value in optimizer.state[p].items() if value.dtype == BF16]
                assert "exp_avg" in narrow_names
                for name in narrow_names:
                    state, expected = optimizer.state[p][name], twin.state[q][name]
                    assert_same_bits(state.cpu(), rounded(expected, BF16, t, key, p.shape[-1], level, name))
            for wrong in ((t + 1, key), (t, key_of(8, place_)), (t, key_of(7, place_ + 1))):
                assert_differ(p.detach().cpu(), rounded(q, dtype, *wrong, p.shape[-1], level))


def named(names: list[str], on: torch.device, dtype: torch.dtype = BF16) -> list[tuple[str, torch.nn.Parameter]]:
    """Return parameters whose weights and gradients depend only on their names."""
    index = sorted({"a", "b", "c", "d"})
    return [(name, parameters([SHAPES[index.index(name)]], on, dtype, seed=ord(name))[0]) for name in names]


def train_named(optimizer: GWTAdamW, steps: range) -> dict[str, Tensor]:
    pairs = [pair for g in optimizer.param_groups for pair in zip(g["param_names"], g["params"], strict=True)]
    for t in steps:
        step(optimizer, [gradients(100 * t + ord(name), p.dtype, [p.shape])[0] for name, p in pairs])
    return {name: [p.detach().clone(), copy.deepcopy(dict(optimizer.state[p]))] for name, p in sorted(pairs)}


@backends
def test_bits_do_not_depend_on_order_and_groups(backend, device):
    """Check that named parameters have the same bits alone, in any order and group; another seed changes them."""
    on = place(backend, device)
    options = {**OPTIONS, "weight_rounding": "stochastic", "state_dtype": BF16, "backend": backend}

    def run(*groups: str, **changed: object) -> dict[str, Tensor]:
        lists = [{"params": named(list(names), on), "lr": 0.03} for names in groups]
        return train_named(GWTAdamW(lists, **options | changed), range(3))

    together = run("abcd")
    assert_same_bits(run("dcba"), together)
    assert_same_bits(run("ca", "db"), together)
    for name in "abcd":
        assert_same_bits(run(name), {name: together[name]})
        assert_differ(run(name, seed=1), {name: together[name]})
    assert key_of(0, zlib.crc32(b"a")) != key_of(0, zlib.crc32(b"b"))


@backends
def test_equal_parameters_draw_different_bits(backend, device):
    """Check that bits differ, since otherwise the errors of equal tensors would add up."""
    on = place(backend, device)
    twice = [torch.nn.Parameter(torch.ones(8, 32, dtype=BF16, device=on)) for _ in range(2)]
    optimizer = GWTAdamW(twice, lr=1e-3, level=0, weight_rounding="stochastic", backend=backend)
    for _ in range(3):
        step(optimizer, [torch.ones(8, 32, dtype=BF16)] * 2)
    assert 0.1 < float((twice[0] != twice[1]).float().mean()) < 0.9


@pytest.mark.parametrize(("rule", "weight_rounding"), [("gwt", "stochastic"), ("foam", "split")])
@backends
def test_a_resumed_run_draws_the_same_bits(backend, device, weight_rounding, rule):
    on = place(backend, device)

    def new() -> GWTAdamW:
        return GWTAdamW(
            parameters(SHAPES, on, BF16),
            **OPTIONS,
            rule=rule,
            weight_rounding=weight_rounding,
            state_dtype=BF16,
            seed=3,
            backend=backend,
        )

    whole, first, second, amnesiac = new(), new(), new(), new()
    for t in range(6):
        step(whole, gradients(t, BF16))
        if t < 3:
            step(first, gradients(t, BF16))
    for other in (second, amnesiac):
        for p, q in zip(parameters_of(other), parameters_of(first), strict=True):
            p.data.copy_(q.detach())
    saved = copy.deepcopy(first.state_dict())
    second.load_state_dict(saved)
    for state in saved["state"].values():  # control: the step count enters
        state["step"] += 1
    amnesiac.load_state_dict(saved)
    for t in range(3, 6):
        step(second, gradients(t, BF16))
        step(amnesiac, gradients(t, BF16))
    for p, q, r in zip(*map(parameters_of, (whole, second, amnesiac)), strict=True):
        assert_same_bits([q.detach(), dict(second.state[q])], [p.detach(), dict(whole.state[p])])
        assert_differ(r.detach(), p.detach())


@narrow
def test_all_backends_round_equal_float32_values_alike(device, dtype):
    """Check that from one state, where float32 results are equal bit for bit, stored values are equal."""
    shapes = [(16, 64), (9, 37)]
    stored, wide = {}, {}
    for backend in BACKENDS:
        on = place(backend, device)
        for target, kind, options in ((stored, dtype, {"weight_rounding": "stochastic"}), (wide, FP32, {})):
            weights = [p.detach().to(on, kind) for p in parameters(shapes, CPU, dtype)]
            optimizer = GWTAdamW([torch.nn.Parameter(p) for p in weights], backend=backend, **OPTIONS, **options)
            step(optimizer, [g.to(kind) for g in gradients(1, dtype, shapes)])
            target[backend] = [p.detach().cpu() for p in parameters_of(optimizer)]
    for one, other in itertools.combinations(BACKENDS, 2):
        for p, q, x, y in zip(stored[one], stored[other], wide[one], wide[other], strict=True):
            agree = x == y
            assert float(agree.float().mean()) > 0.3
            assert torch.equal(p[agree], q[agree])
            assert float((p.float() != x).float().mean()) > 0.9  # control: values that need rounding exist


# On average --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "level", "rule"),  # every pair of two of them
    [(0.0, 0, "gwt"), (0.0, 2, "foam"), (0.1, 0, "foam"), (0.1, 2, "gwt"), (1.5, 0, "gwt"), (1.5, 2, "foam")],
)
@backends
def test_a_bfloat16_second_moment_decays(backend, device, size, level, rule):
    """b2 = 0.999 changes it by less than half an ulp per step, so that rounding to nearest never changes it."""
    steps, beta = 40, 0.999
    p = torch.nn.Parameter(torch.zeros(64, 64, device=place(backend, device), dtype=BF16))
    optimizer = GWTAdamW([p], lr=0.0, betas=(0.9, beta), rule=rule, level=level, state_dtype=BF16, backend=backend)
    g = torch.full(p.shape, size, dtype=BF16)
    step(optimizer, [g])
    state = optimizer.state[p]
    state["exp_avg_sq"].fill_(1.0)
    nearest, exact = torch.ones((), dtype=BF16), 1.0
    square = float(g[0, 0]) ** 2 * (2**level if rule == "gwt" else 1)
    for _ in range(steps):
        step(optimizer, [g])
        exact = beta * exact + (1 - beta) * square
        nearest = (beta * nearest.float() + (1 - beta) * square).to(BF16)
    v = state["exp_avg_sq"].double()
    deviation = 0.5 * 2**-7 * math.sqrt(steps)  # at most, of one element: the ulp is 2**-7 up to 2
    tolerance = 5 * deviation / math.sqrt(v.numel())
    assert abs(float(v.mean()) - exact) < tolerance
    if square < 4:  # control
        assert float(nearest) == 1.0
        assert abs(1.0 - exact) > 5 * tolerance


@narrow
@backends
def test_tiny_updates_of_narrow_weights_accumulate_on_average(backend, device, dtype):
    """Updates of a sixteenth of an ulp add up under stochastic rounding as in float32; rounding to nearest drops
    them.
    """
    on, steps = place(backend, device), 24
    ulp = torch.finfo(dtype).eps / 2  # below 1
    end = {}
    for kind, rounding in ((dtype, "stochastic"), (dtype, "nearest"), (FP32, "nearest")):
        p = torch.nn.Parameter(torch.ones(32, 128, dtype=kind, device=on))
        optimizer = GWTAdamW([p], lr=ulp / 16, level=0, weight_rounding=rounding, backend=backend)
        for _ in range(steps):
            step(optimizer, [torch.ones(p.shape, dtype=kind)])
        end[kind, rounding] = p.detach().double()
    moved = 1 - float(end[FP32, "nearest"].mean())
    assert moved == pytest.approx(steps * ulp / 16, rel=0.01)
    assert bool((end[dtype, "nearest"] == 1).all())
    deviation = ulp * math.sqrt(steps / 16)  # of one element, at most
    tolerance = 5 * deviation / math.sqrt(32 * 128)
    assert tolerance < moved / 5
    assert abs(1 - float(end[dtype, "stochastic"].mean()) - moved) < tolerance


# At the ends of the range ------------------------------------------------------------------------------


@narrow
@pytest.mark.parametrize("sign", [1, -1])
@backends
def test_the_largest_weight_stays_finite(backend, device, dtype, sign):
    """Check an update by most of the distance to infinity; rounding to nearest, the control, reaches it."""
    on, largest = place(backend, device), torch.finfo(dtype).max
    outwards = {BF16: 1e36, FP16: 20.0}[dtype]
    for rounding, infinite in (("stochastic", False), ("nearest", True)):
        p = torch.nn.Parameter(torch.full((4, 32), sign * largest, dtype=dtype, device=on))
        optimizer = GWTAdamW([p], lr=outwards, level=0, weight_rounding=rounding, backend=backend)
        for _ in range(2 if rounding == "stochastic" else 1):
            step(optimizer, [torch.full(p.shape, -sign, dtype=dtype)])
        assert bool((p.isinf() if infinite else p == sign * largest).all())


@pytest.mark.parametrize(
    ("dtype", "rounding", "level", "rule"),  # every pair of two of them
    [(FP32, None, 0, "gwt"), (FP32, None, 2, "foam"), (BF16, None, 0, "foam"), (BF16, None, 2, "gwt"),
     (BF16, "stochastic", 0, "gwt"), (BF16, "stochastic", 2, "foam"), (BF16, "split", 0, "foam"),
     (BF16, "split", 2, "gwt")],
    ids=str,
)  # fmt: skip
@backends
def test_denormal_gradients_move_weights(backend, device, dtype, rounding, level, rule):
    """Check gradients whose squares alone underflow: the update is ``m / eps``, or ``(m + r) / eps``."""
    on, small, lr, eps = place(backend, device), 1e-39, 1.0, 1e-6
    p = torch.nn.Parameter(torch.zeros(4, 32, dtype=dtype, device=on))
    optimizer = GWTAdamW(
        [p], lr=lr, eps=eps, level=level, rule=rule, scale=1.0, weight_rounding=rounding, backend=backend
    )
    g = torch.full(p.shape, small, dtype=dtype)
    assert 0 < float(g[0, 0]) < torch.finfo(dtype).smallest_normal
    step(optimizer, [g])
    got = float32_of(p, optimizer.state[p]) if rounding == "split" else p.detach()
    expected = -math.sqrt(1 - 0.999) / (1 - 0.9) * 0.1 * float(g[0, 0]) / eps
    coarse = 2**-7 if dtype == BF16 and rounding != "split" else 0.0
    torch.testing.assert_close(
        got.double().cpu(), torch.full(p.shape, expected, dtype=torch.float64), rtol=2**-10 + coarse, atol=0
    )


# Rules side by side ------------------------------------------------------------------------------------


@backends
def test_groups_of_both_rules_and_of_every_rounding(backend, device):
    """Compare each tensor with the oracle, with its rule's default limiter."""
    on = place(backend, device)
    groups = [
        {"params": parameters(SHAPES[:2], on, BF16, seed=0)},
        {"params": parameters(SHAPES[:2], on, BF16, seed=1), "rule": "foam", "weight_rounding": "split"},
        {"params": parameters(SHAPES[:2], on, FP16, seed=2), "rule": "foam", "weight_rounding": "stochastic"},
        {"params": parameters(SHAPES[:2], on, BF16, seed=3), "state_dtype": BF16, "weight_rounding": "stochastic"},
        {"params": parameters(SHAPES[:2], on, FP32, seed=4), "level": 0, "rule": "foam"},
    ]
    optimizer = GWTAdamW(groups, **OPTIONS, level=1, backend=backend)
    assert [g["norm_growth_limit"] for g in optimizer.param_groups] == [1.01, None, None, 1.01, None]
    for t in range(3):
        give_gradients(parameters_of(optimizer), seed=t)
        assert checked_step(optimizer) == 10
    kinds = [sorted(set(optimizer.state[g["params"][0]]) - {"step"}) for g in optimizer.param_groups]
    moments = ["exp_avg", "exp_avg_sq"]
    assert kinds == [
        [*moments, "limiter_norm"],
        [*moments, "weight_low"],
        moments,
        [*moments, "limiter_norm"],
        moments,
    ]


def test_steps_are_counted_beyond_the_integers_of_float32():
    """Check counts beyond 2**24, where a float32 count, and with it the random bits, would stay."""
    p = torch.nn.Parameter(torch.ones(2, 8, dtype=torch.bfloat16))
    optimizer = GWTAdamW([p], state_dtype=torch.bfloat16)
    p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.state[p]["step"].fill_(2.0**24)
    for count in (1, 2, 3):
        optimizer.step()
        assert int(optimizer.state[p]["step"]) == 2**24 + count
    other = GWTAdamW([p], state_dtype=torch.bfloat16)
    other.load_state_dict(optimizer.state_dict())
    assert int(other.state[p]["step"]) == 2**24 + 3
