"""Migrated states against runs that had the new options from the start, and against published trajectories."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from gwt_kernels import GWTAdafactor, GWTAdamMini, GWTAdamW, GWTLion, GWTMuon, gwt_param_groups, migrate
from gwt_kernels.formats.int8 import decode_first, decode_second
from tests.support.golden import Case, adamw_cases, foam_cases, variant_cases
from tests.support.runs import (
    assert_differ,
    assert_same_bits,
    parameters,
    parameters_of,
    results,
    snapshot,
    train,
)

SHAPES = ((4, 16), (3, 13), (2, 3, 21), (30,))  # widths that levels divide, and odd ones
KINDS = [("gwt", 0), *((rule, level) for rule in ("gwt", "foam") for level in (1, 2, 3))]


def build(shapes=SHAPES, dtype=torch.float64, **options):
    return GWTAdamW(parameters(shapes, dtype=dtype), lr=0.01, **options)


def run_of(steps=5, **options):
    optimizer = build(**options)
    train(optimizer, range(steps))
    return optimizer


def of_adamw(steps=5, shapes=SHAPES, dtype=torch.float64, cls=torch.optim.AdamW, **options):
    optimizer = cls(parameters(shapes, dtype=dtype), lr=0.01, **options)
    train(optimizer, range(steps))
    return optimizer


def loaded(state_dict, optimizer, **how):
    """Return the optimizer after it has loaded the migrated state."""
    optimizer.load_state_dict(migrate(state_dict, optimizer, **how).state_dict)
    return optimizer


def entries(optimizer, key):
    return [optimizer.state[p][key] for p in parameters_of(optimizer)]


def assert_close(ours, theirs, rtol=1e-13):
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(
            a.double().numpy(), b.double().numpy(), rtol=rtol, atol=rtol * float(b.abs().max())
        )


def blocks(x, width):
    """Return ``[..., nb, width]``: blocks of neighbours, zero-padded."""
    x = x.double().numpy()
    padded = np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % width)])
    return padded.reshape(*x.shape[:-1], -1, width)


# Exact conversions: equal to a run with the new options from the start ----------------------------------------


@pytest.mark.parametrize("target", [GWTAdamW, GWTLion, GWTMuon])
@pytest.mark.parametrize("source", [GWTAdamW, GWTAdafactor, GWTAdamMini])
def test_the_factor_on_details_of_the_new_optimizer_says_nothing_of_the_state(source, target):
    old = source(parameters([(8, 16)]), level=2)
    train(old, range(2))
    named = {"rule": "foam", "res_scale": 0.5} if target is GWTAdamW else {"detail_scale": 0.5}
    plain = {key: value for key, value in named.items() if key == "rule"}
    scaled, unscaled = (target(parameters([(8, 16)]), level=2, **options) for options in (named, plain))
    assert_same_bits(*(results(loaded(old.state_dict(), optimizer)) for optimizer in (scaled, unscaled)))


@pytest.mark.parametrize(("rule", "level"), KINDS)
@pytest.mark.parametrize("cls", [torch.optim.AdamW, torch.optim.Adam])
def test_first_moment_of_adamw_equals_that_of_a_run_from_the_start(cls, rule, level):
    whole = run_of(rule=rule, level=level)
    taken = loaded(of_adamw(cls=cls).state_dict(), build(rule=rule, level=level))
    assert_close(entries(taken, "exp_avg"), entries(whole, "exp_avg"))
    assert [float(step) for step in entries(taken, "step")] == [5.0] * len(SHAPES)
    if rule == "foam" or level == 0:
        assert_close(entries(taken, "exp_avg_sq"), entries(whole, "exp_avg_sq"))


@pytest.mark.parametrize("new", KINDS, ids=str)
@pytest.mark.parametrize("old", KINDS, ids=str)
def test_between_levels_and_rules(old, new):
    (old_rule, old_level), (rule, level) = old, new
    source = run_of(rule=old_rule, level=old_level)
    before = snapshot(source)
    migration = migrate(source.state_dict(), build(rule=rule, level=level))
    assert_same_bits(snapshot(source), before)
    taken, whole = build(rule=rule, level=level), run_of(rule=rule, level=level)
    taken.load_state_dict(migration.state_dict)
    for key in ("exp_avg", "exp_avg_sq"):
        notes = {tensor.notes[key].split(":")[0] for tensor in migration.tensors}
        exact = level >= old_level and (
            key == "exp_avg" or old == new or (rule == "foam" and old in (("gwt", 0), ("foam", old_level)))
        )
        assert notes == {"exact" if exact else "approximate"}
        if exact:
            assert_close(entries(taken, key), entries(whole, key))
        else:
            with pytest.raises(AssertionError):
                assert_close(entries(taken, key), entries(whole, key))
    if old == new:
        assert_same_bits(results(taken)["state"], results(source)["state"])


def test_daubechies_level_continues_the_same_transform():
    whole = run_of(shapes=[(3, 40)], wavelet="db2", level=2)
    for source in (of_adamw(shapes=[(3, 40)]), run_of(shapes=[(3, 40)], wavelet="db2", level=1)):
        taken = loaded(source.state_dict(), build([(3, 40)], wavelet="db2", level=2))
        assert_close(entries(taken, "exp_avg"), entries(whole, "exp_avg"))


# Approximate conversions: equal in expectation --------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "level", "wavelet"),
    [
        *((*kind, "haar") for kind in KINDS if kind[1]),
        *(("gwt", *kind) for kind in ((1, "db2"), (3, "db2"), (1, "bior2.2"), (3, "bior2.2"), (2, "rbio3.3"))),
    ],
)
def test_second_moment_has_the_right_size_for_uncorrelated_neighbours(rule, level, wavelet):
    totals = {}
    generator = torch.Generator().manual_seed(3)
    shape = (60, 400)
    grads = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(40)]

    def total(optimizer):
        for g in grads:
            parameters_of(optimizer)[0].grad = g
            optimizer.step()
        return optimizer

    source = total(torch.optim.AdamW(parameters([shape], dtype=torch.float64), betas=(0.9, 0.95)))
    options = {"rule": rule, "level": level, "wavelet": wavelet, "betas": (0.9, 0.95)}
    between = total(build([shape], **(options | {"level": max(level - 1, 1)})))
    for name, optimizer in (
        ("whole", total(build([shape], **options))),
        ("taken", loaded(source.state_dict(), build([shape], **options))),
        ("taken further", loaded(between.state_dict(), build([shape], **options))),
    ):
        totals[name] = entries(optimizer, "exp_avg_sq")[0][..., 6:-6].mean().item()
    # 60 * 400 / 8 squares of deviation sqrt(2), over many steps: within 1 %, where a wrong factor would be 100 %.
    assert totals["taken"] == pytest.approx(totals["whole"], rel=0.03)
    assert totals["taken further"] == pytest.approx(totals["whole"], rel=0.03)


def test_names_that_key_a_state_win_over_its_order():
    """Check tensors of equal shapes, which no check can distinguish."""
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    theirs = torch.optim.AdamW(list(model.parameters())[::-1], lr=0.01)
    train(theirs, range(3))
    state = get_optimizer_state_dict(model, theirs)
    assert state["param_groups"][0]["params"] == ["1.weight", "0.weight"]
    ours = loaded(state, GWTAdamW(gwt_param_groups(model, level=0), lr=0.01), names=model)
    for p in model.parameters():
        assert torch.equal(ours.state[p]["exp_avg"], theirs.state[p]["exp_avg"])


@pytest.mark.parametrize("level", [1, 2, 3])
def test_second_moment_of_adamw_is_the_mean_of_its_blocks(level):
    source = of_adamw()
    taken = loaded(source.state_dict(), build(level=level))
    for v, p in zip(entries(taken, "exp_avg_sq"), parameters_of(source), strict=True):
        np.testing.assert_allclose(v.numpy(), blocks(source.state[p]["exp_avg_sq"], 2**level).mean(-1), rtol=1e-14)


@pytest.mark.parametrize("new", [0, 1, 2])
@pytest.mark.parametrize("rule", ["gwt", "foam"])
def test_lowering_the_level_and_raising_it_again_restores_the_state(rule, new):
    source = run_of(rule=rule, level=3)
    lower = loaded(source.state_dict(), build(rule=rule, level=new))
    back = loaded(lower.state_dict(), build(rule=rule, level=3))
    for key in ("exp_avg", "exp_avg_sq"):
        assert_close(entries(back, key), entries(source, key))
        for x, p in zip(entries(lower, key), parameters_of(lower), strict=True):
            inside = x[..., : p.shape[-1] // 8 * 2 ** (3 - new)]  # blocks without padding
            each = blocks(inside, 2 ** (3 - new))
            np.testing.assert_array_equal(each, each[..., :1].repeat(each.shape[-1], -1))


def test_limiter_norm_is_kept_where_its_meaning_is_and_reset_elsewhere():
    source = run_of(dtype=torch.float32, level=2)
    same = loaded(source.state_dict(), build(dtype=torch.float32, level=2, state_dtype=torch.bfloat16))
    assert_same_bits(entries(same, "limiter_norm"), entries(source, "limiter_norm"))
    free = run_of(dtype=torch.float32, level=2, norm_growth_limit=None)
    for other in (free, of_adamw(dtype=torch.float32), run_of(dtype=torch.float32, rule="foam")):
        assert not any(entries(loaded(other.state_dict(), build(dtype=torch.float32, level=2)), "limiter_norm"))


@pytest.mark.parametrize("options", [{"level": 1}, {"level": 3}, {"level": 2, "betas": (0.8, 0.99)}], ids=str)
def test_limiter_keeps_its_divisor(options):
    def shares(optimizer):
        for p in parameters_of(optimizer):
            m, v, norm = (optimizer.state[p][key] for key in ("exp_avg", "exp_avg_sq", "limiter_norm"))
            yield norm / (m / (v.sqrt() + 1e-6)).norm()

    source = run_of(level=2)
    for state in source.state.values():
        state["limiter_norm"] *= 0.3
    taken = loaded(source.state_dict(), build(**options))
    assert_close(shares(taken), shares(source), rtol=1e-12)


def test_bias_correction_is_carried_over_to_other_betas():
    constant = torch.full((4, 16), 0.5, dtype=torch.float64)

    def steps(optimizer, n):
        for _ in range(n):
            parameters_of(optimizer)[0].grad = constant.clone()
            optimizer.step()
        return optimizer

    source = steps(build([(4, 16)], level=0, betas=(0.8, 0.9)), 4)
    whole = steps(build([(4, 16)], level=0, betas=(0.9, 0.99)), 4)
    taken = loaded(source.state_dict(), build([(4, 16)], level=0, betas=(0.9, 0.99)))
    for key in ("exp_avg", "exp_avg_sq"):  # for a constant gradient every corrected average is that constant
        assert_close(entries(taken, key), entries(whole, key))


# dtypes -----------------------------------------------------------------------------------------------------

LARGE = ((64, 512), (40, 16))  # only the first is large enough for int8


def of_dtype(state_dtype, steps=3, level=2):
    return run_of(steps, shapes=LARGE, dtype=torch.float32, level=level, state_dtype=state_dtype)


def test_widening_is_exact():
    for narrow in (torch.bfloat16, torch.int8):
        source = of_dtype(narrow)
        migration = migrate(source.state_dict(), build(LARGE, torch.float32))
        assert migration.is_exact
        for i, p in enumerate(parameters_of(source)):
            state, new = source.state[p], migration.state_dict["state"][i]
            m, v = state["exp_avg"], state["exp_avg_sq"]
            if m.dtype == torch.int8:
                m = decode_first(m, state["exp_avg_scale"], 2)
                v = decode_second(v, state["exp_avg_sq_scale"], 2)
            assert_same_bits([new["exp_avg"], new["exp_avg_sq"]], [m.float(), v.float()])
            assert "exp_avg_scale" not in new


def test_bfloat16_is_rounded_to_nearest():
    source = of_dtype(None)
    migration = migrate(source.state_dict(), build(LARGE, torch.float32, state_dtype=torch.bfloat16))
    assert not migration.is_exact
    for i, p in enumerate(parameters_of(source)):
        for key in ("exp_avg", "exp_avg_sq"):
            assert_same_bits(migration.state_dict["state"][i][key], source.state[p][key].bfloat16())


@pytest.mark.parametrize("level", [1, 2, 4])
def test_int8_is_rounded_to_nearest(level):
    """Check that no other value is nearer, and that only exact zeros of the second moment become zero."""
    source = run_of(3, shapes=[(64, 2048)], dtype=torch.float32, level=level)
    state = source.state[parameters_of(source)[0]]
    state["exp_avg_sq"][0, :9] = torch.tensor([0.0, *10.0 ** -torch.arange(1, 9)])
    taken = loaded(source.state_dict(), build([(64, 2048)], torch.float32, level=level, state_dtype=torch.int8))
    new = taken.state[parameters_of(taken)[0]]
    assert (new["exp_avg"].dtype, new["exp_avg_sq"].dtype) == (torch.int8, torch.uint8)
    for key, decode, low in (("exp_avg", decode_first, -127), ("exp_avg_sq", decode_second, 0)):
        exact, values, scales = state[key].double(), new[key].int(), new[f"{key}_scale"]
        got = (decode(values, scales, level).double() - exact).abs()
        for other in (values - 1, values + 1):
            inside = (other >= low) & (other <= (127 if low else 255)) & ~((low == 0) & (other == 0))
            error = (decode(other, scales, level).double() - exact).abs()
            allowed = 1e-6 * exact.abs() + exact.abs().max() * (2e-9 if low else 5e-10)  # the encoder's integers
            assert (got <= error + allowed)[inside].all()
    assert new["exp_avg_sq"][0, 0] == 0
    assert (new["exp_avg_sq"][0, 1:9] > 0).all()
    again = loaded(taken.state_dict(), build([(64, 2048)], torch.float32, level=level, state_dtype=torch.int8))
    assert_same_bits(results(again)["state"], results(taken)["state"])


def test_low_bits_of_weights_are_kept_added_and_dropped():
    split = run_of(3, shapes=LARGE, dtype=torch.bfloat16, weight_rounding="split")
    same = loaded(split.state_dict(), build(LARGE, torch.bfloat16, weight_rounding="split", level=1))
    assert_same_bits(entries(same, "weight_low"), entries(split, "weight_low"))
    without = migrate(split.state_dict(), build(LARGE, torch.bfloat16))
    assert not without.is_exact
    assert "dropped" in without.tensors[0].notes["weight_low"]
    plain = run_of(3, shapes=LARGE, dtype=torch.bfloat16)
    added = loaded(plain.state_dict(), build(LARGE, torch.bfloat16, weight_rounding="split"))
    assert not any(low.any() for low in entries(added, "weight_low"))


# A run that switches ----------------------------------------------------------------------------------------


def halves(dtype=torch.float32, groups=1, **options):
    """Return an optimizer over named parameters, in groups that split them and reverse their order."""
    named = [(f"w{i}", p) for i, p in enumerate(parameters(SHAPES, dtype=dtype))]
    parts = [named] if groups == 1 else [named[:1:-1], named[1::-1]]
    return GWTAdamW([{"params": part} for part in parts], lr=0.01, **options)


def by_name(optimizer):
    pairs = zip(
        [n for g in optimizer.param_groups for n in g["param_names"]], parameters_of(optimizer), strict=True
    )
    return dict(sorted(pairs))


def give(optimizer, steps):
    for t in steps:
        generator = torch.Generator().manual_seed(t)
        for p in by_name(optimizer).values():
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        optimizer.step()


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, {"groups": 2}),
        ({"state_dtype": torch.bfloat16}, {"groups": 2, "state_dtype": torch.bfloat16}),
        ({"level": 0}, {"level": 0, "rule": "foam"}),
        ({"norm_growth_limit": None}, {"norm_growth_limit": None, "state_dtype": torch.float32}),
        ({"dtype": torch.bfloat16}, {"dtype": torch.bfloat16, "weight_rounding": "nearest", "groups": 2}),
    ],
)
def test_a_run_switched_by_exact_conversions_is_equal_bit_for_bit(before, after):
    whole, first, second = halves(**before), halves(**before), halves(**after)
    control = halves(**after)
    give(whole, range(6))
    give(first, range(3))
    for other in (second, control):
        for name, p in by_name(other).items():
            p.data.copy_(by_name(first)[name].data)
    migration = migrate(first.state_dict(), second)
    assert migration.is_exact
    second.load_state_dict(migration.state_dict)
    for other in (second, control):
        give(other, range(3, 6))
    ends = [[by_name(o)[name].detach() for name in by_name(whole)] for o in (whole, second, control)]
    assert_same_bits(ends[1], ends[0])
    assert_differ(ends[2], ends[0])


# The published optimizer ------------------------------------------------------------------------------------


def published_state(case: Case, steps: int) -> dict:
    """Compute the published optimizer's state after some steps: averages of PyWavelets' coefficients."""
    pywt = pytest.importorskip("pywt", reason="needs PyWavelets: pip install -e '.[test]'")
    m = v = 0.0
    for g in case.grads[:steps].copy():  # PyWavelets refuses read-only arrays
        if case.rule == "foam":
            first, second = (
                blocks(torch.tensor(g), 2**case.level).mean(-1),
                blocks(torch.tensor(g**2), 2**case.level).mean(-1),
            )
        else:
            a = pywt.wavedec(g, case.wavelet, mode=case.boundary, level=case.level, axis=-1)[0] if case.level else g
            first, second = a, a * a
        m = case.betas[0] * m + (1 - case.betas[0]) * first
        v = case.betas[1] * v + (1 - case.betas[1]) * second
    state = {"step": steps, "exp_avg": torch.tensor(m), "exp_avg_sq": torch.tensor(v)}
    if case.level and case.rule == "gwt":
        state["previous_norm"] = float(case.limiter_norm[steps - 1])
    return {"state": {0: state}, "param_groups": [{"params": [0], "lr": case.lr[0], "betas": case.betas}]}


CASES = (*adamw_cases(), *foam_cases(), *variant_cases())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_published_run_continues_from_any_step(case):
    last = published_state(case, len(case.lr))["state"][0]
    np.testing.assert_allclose(
        last["exp_avg"].numpy(), case.exp_avg, rtol=1e-12, atol=1e-12 * abs(case.exp_avg).max()
    )
    for start in range(1, len(case.lr)):
        p = nn.Parameter(torch.tensor(case.params[start - 1]))
        optimizer = GWTAdamW(
            [p], betas=case.betas, eps=case.eps, level=case.level, scale=case.scale, rule=case.rule,
            wavelet=case.wavelet, boundary=case.boundary, norm_growth_limit=case.norm_growth_limit,
            correct_bias=case.correct_bias,
        )  # fmt: skip
        state = published_state(case, start)
        how = {"keys": {"previous_norm": "limiter_norm"}, "rule": case.rule, "wavelet": case.wavelet}
        how["boundary"] = case.boundary
        migration = migrate(copy.deepcopy(state), optimizer, **how)
        assert migration.is_exact, str(migration)
        optimizer.load_state_dict(migration.state_dict)
        for t in range(start, len(case.lr)):
            optimizer.param_groups[0]["lr"] = case.lr[t]
            p.grad = torch.tensor(case.grads[t])
            optimizer.step()
            p.detach().copy_(case.decayed(p.detach(), case.lr[t]))
            np.testing.assert_allclose(p.detach().numpy(), case.params[t], rtol=1e-12, atol=1e-12)
            if case.level and case.rule == "gwt":
                norm = optimizer.state[p]["limiter_norm"].item()
                np.testing.assert_allclose(norm, case.limiter_norm[t], rtol=1e-12)
