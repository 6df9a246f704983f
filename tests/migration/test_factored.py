"""Tests migrations of factors: from other Adafactors, between levels, from and to Adam's moments."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from gwt_kernels import GWTAdafactor, GWTAdamW, GWTLion, migrate
from tests.support import runs

SHAPES = ((64, 96), (33, 70), (128,), (3, 8, 24))


def parameters(shapes=SHAPES, dtype=torch.float32):
    return runs.parameters(shapes, dtype=dtype)


def steps(optimizer, params, ts, dtype=None):
    for t in ts:
        runs.give_gradients(params, t)
        optimizer.step()


def migrated(source, target):
    """Return the target with the source's migrated state."""
    made = migrate(source.state_dict(), target)
    target.load_state_dict(made.state_dict)
    return made


def test_adafactor_of_torch_goes_on_as_it_would_have():
    params = parameters(dtype=torch.float64)
    theirs = torch.optim.Adafactor(params, lr=1.0, eps=(1e-30, 1e-3))
    steps(theirs, params, range(3))
    own = copy.deepcopy(params)
    ours = GWTAdafactor(own, lr=1.0, level=0, beta1=None, scale_parameter=True)
    made = migrated(theirs, ours)
    assert made.is_exact, str(made)
    assert all(float(ours.state[p]["step"]) == 3 for p in own)
    steps(theirs, params, [3])
    ours.param_groups[0]["lr"] = 0.5  # 1 / sqrt(4), as torch caps it
    steps(ours, own, [3])
    for p, q in zip(params, own, strict=True):
        torch.testing.assert_close(q, p, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("beta1", [None, 0.9])
def test_adafactor_of_transformers_goes_on_as_it_would_have(beta1, relative):
    transformers = pytest.importorskip("transformers")
    params = parameters()
    options = {"beta1": beta1, "scale_parameter": True, "relative_step": relative, "warmup_init": False}
    theirs = transformers.Adafactor(params, lr=None if relative else 0.05, weight_decay=0.1, **options)
    steps(theirs, params, range(20))
    own = copy.deepcopy(params)
    ours = GWTAdafactor(own, lr=None if relative else 0.05, level=0, weight_decay=0.1, **options)
    made = migrated(theirs, ours)
    assert made.is_exact == (beta1 is None), str(made)
    before = [p.detach().clone() for p in own]
    steps(theirs, params, [20])
    steps(ours, own, [20])
    # Their first moment is of updates times learning rates, which change a little with the weights' RMS.
    for p, q, old in zip(params, own, before, strict=True):
        moved = (p - old).abs().max()
        assert (q - p).abs().max() < (0.03 if beta1 else 1e-5) * moved + 2**-22 * p.detach().abs().max()


def test_between_levels_rows_stay_and_columns_are_averaged():
    params = parameters()
    optimizer = GWTAdafactor(params, level=1)
    steps(optimizer, params, range(3))
    deeper = GWTAdafactor(params, level=3, state_dtype=torch.bfloat16)
    made = migrated(optimizer, deeper)
    for p in params:
        old, new = optimizer.state[p], deeper.state[p]
        key = "exp_avg_sq_col" if p.dim() > 1 else "exp_avg_sq"
        wide = torch.nn.functional.pad(old[key], (0, -old[key].shape[-1] % 4))
        torch.testing.assert_close(new[key], wide.unflatten(-1, (-1, 4)).mean(-1))
        if p.dim() > 1:
            torch.testing.assert_close(new["exp_avg_sq_row"], old["exp_avg_sq_row"])
        wide = torch.nn.functional.pad(old["exp_avg"], (0, -old["exp_avg"].shape[-1] % 4))
        expected = wide.unflatten(-1, (-1, 4)).sum(-1) / 2
        assert new["exp_avg"].dtype == torch.bfloat16
        torch.testing.assert_close(new["exp_avg"].float(), expected, rtol=2**-8, atol=1e-6)
    assert "uncorrelated" in made.tensors[0].notes["exp_avg_sq_col"]
    back = GWTAdafactor(params, level=1)
    made = migrated(deeper, back)
    assert "spread evenly" in made.tensors[0].notes["exp_avg"]
    same = GWTAdafactor(params, level=1, details="published", lr=1e-3)
    made = migrated(optimizer, same)
    assert made.is_exact, str(made)
    runs.assert_same_bits([dict(same.state[p]) for p in params], [dict(optimizer.state[p]) for p in params])


def test_int8_moments_are_carried_over():
    params = parameters(((128, 256), (10, 10)))
    optimizer = GWTAdafactor(params, state_dtype=torch.int8)
    steps(optimizer, params, range(2))
    again = GWTAdafactor(params, state_dtype=torch.int8)
    assert migrated(optimizer, again).is_exact
    runs.assert_same_bits([dict(again.state[p]) for p in params], [dict(optimizer.state[p]) for p in params])
    wide = GWTAdafactor(params, level=3)
    migrated(optimizer, wide)
    assert wide.state[params[0]]["exp_avg"].dtype == torch.float32


def test_adams_moments_become_factors_and_back():
    params = parameters()
    adam = torch.optim.AdamW(params, betas=(0.9, 0.99))
    steps(adam, params, range(5))
    optimizer = GWTAdafactor(params, level=2)
    made = migrated(adam, optimizer)
    p = params[0]
    square = adam.state[p]["exp_avg_sq"] / (1 - 0.99**5)
    square = square.view(64, 24, 4).mean(-1)
    state = optimizer.state[p]
    torch.testing.assert_close(state["exp_avg_sq_row"], square.mean(-1))
    torch.testing.assert_close(state["exp_avg_sq_col"], square.mean(-2))
    root = (square.mean(-1, keepdim=True) * square.mean(-2, keepdim=True) / square.mean()).sqrt()
    mean = adam.state[p]["exp_avg"].view(64, 24, 4).mean(-1)
    torch.testing.assert_close(state["exp_avg"], 2 * mean / root)
    assert "approximate" in made.tensors[0].notes["exp_avg"]
    steps(optimizer, params, [5])
    back = GWTAdamW(params, level=2, betas=(0.9, 0.99))
    made = migrated(optimizer, back)
    assert "product of the factors" in made.tensors[0].notes["exp_avg_sq"]
    assert made.tensors[0].before.rule == "adafactor"
    assert set(back.state[p]) == {"step", "exp_avg", "exp_avg_sq", "limiter_norm"}
    row, col = (optimizer.state[p][f"exp_avg_sq_{key}"] for key in ("row", "col"))
    square = row[:, None] * col / row.mean()
    torch.testing.assert_close(back.state[p]["exp_avg_sq"], square * (1 - 0.99**6))
    torch.testing.assert_close(back.state[p]["exp_avg"], optimizer.state[p]["exp_avg"] * square.sqrt())
    steps(back, params, [6])
    assert all(p.isfinite().all() for p in params)


def test_a_rule_without_a_second_moment_drops_the_factors():
    params = parameters()
    optimizer = GWTAdafactor(params, level=2)
    steps(optimizer, params, range(3))
    notes = migrated(optimizer, GWTLion(params, level=2)).tensors[0].notes
    assert notes["exp_avg"].startswith("approximate: times the root of the factors; ")
    assert notes["exp_avg_sq"] == "dropped: rule='lion' keeps none"


def test_groups_at_adamw_take_over_adafactors():
    transformers = pytest.importorskip("transformers")
    params = parameters()
    theirs = transformers.Adafactor(params, lr=0.01, relative_step=False, scale_parameter=False)
    steps(theirs, params, range(3))
    groups = [{"params": params[:2]}, {"params": params[2:], "rule": "adamw", "lr": 1e-3}]
    names = [f"p{i}" for i in range(4)]
    for group, own in zip(groups, (names[:2], names[2:]), strict=True):
        group["params"] = list(zip(own, group["params"], strict=True))
    ours = GWTAdafactor(groups)
    made = migrate(theirs.state_dict(), ours, names=names)
    ours.load_state_dict(made.state_dict)
    assert made.tensors[2].notes["exp_avg"] == "new: zeros"
    assert set(ours.state[params[2]]) == {"step", "exp_avg", "exp_avg_sq"}
    steps(ours, params, [3])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.update(strange=torch.ones(3)), "has 'strange', which no Adafactor keeps"),
        (lambda s: s.update(row_var=torch.ones(5, 1)), r"exp_avg_sq_row has shape \(5, 1\)"),
        (lambda s: s.pop("col_var"), "exp_avg_sq_col has no tensor"),
        (lambda s: s["row_var"].fill_(math.nan), "exp_avg_sq_row holds numbers that are not finite"),
        (lambda s: s["col_var"].fill_(-1.0), "exp_avg_sq_col holds numbers that are not finite, or below 0"),
        (lambda s: s.update(step=torch.tensor(math.inf)), "its step is"),
        (lambda s: s.update(exp_avg=torch.ones(3)), r"exp_avg has shape \(3,\)"),
    ],
)
def test_damaged_states_are_refused_by_name(change, words):
    params = parameters(((8, 16),))
    theirs = torch.optim.Adafactor(params)
    steps(theirs, params, range(1))
    state = theirs.state_dict()
    change(state["state"][0])
    with pytest.raises(ValueError, match=f"parameter 0 of shape .*{words}"):
        migrate(state, GWTAdafactor(params, level=1))


def test_what_says_nothing_of_factors_is_refused():
    params = parameters()
    lion = GWTLion(params)
    steps(lion, params, range(1))
    with pytest.raises(ValueError, match="keeps no exp_avg_sq"):
        migrate(lion.state_dict(), GWTAdafactor(params))
    optimizer = GWTAdafactor(params)
    steps(optimizer, params, range(1))
    with pytest.raises(ValueError, match="wavelet"):
        migrate(optimizer.state_dict(), GWTAdafactor(params, wavelet="db2"))


def test_empty_tensors_take_over_adams_state_and_give_it_back():
    params = parameters(((0, 4), (4, 0), (3, 0, 5)))
    adamw, adafactor = torch.optim.AdamW(params, lr=0.1), GWTAdafactor(params, lr=0.1, level=0)
    steps(adamw, params, range(2))
    adafactor.load_state_dict(migrate(adamw.state_dict(), adafactor).state_dict)
    for state in adafactor.state.values():
        assert all(x.isfinite().all() for x in state.values())
    steps(adafactor, params, range(2))
    ours = GWTAdamW(params, lr=0.1, level=0)
    ours.load_state_dict(migrate(adafactor.state_dict(), ours).state_dict)
