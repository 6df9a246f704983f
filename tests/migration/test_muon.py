"""Tests migrations to ``GWTMuon``: from torch's Muon and AdamW, from other rules, and between levels."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from gwt_kernels import GWTAdafactor, GWTAdamW, GWTLion, GWTMuon, migrate
from tests.support.runs import assert_same_bits, parameters, parameters_of, results, train

SHAPES = [(8, 16), (12, 22)]


def run_of(kind, shapes=SHAPES, steps=3, **options):
    optimizer = kind(parameters(shapes, dtype=torch.float64), lr=0.01, **options)
    train(optimizer, range(steps), params=parameters_of(optimizer))
    return optimizer


def moved(source, target, **how):
    """Return the target with the source's weights after it has loaded the migrated state."""
    with torch.no_grad():
        for p, q in zip(parameters_of(target), parameters_of(source), strict=True):
            p.copy_(q)
    before = copy.deepcopy(source.state_dict())
    migration = migrate(source.state_dict(), target, **how)
    assert_same_bits(source.state_dict(), before)
    target.load_state_dict(migration.state_dict)
    return migration


def means(x, level):
    return nn.functional.pad(x, (0, -x.shape[-1] % 2**level)).unflatten(-1, (-1, 2**level)).mean(-1)


def momenta(optimizer, key="exp_avg"):
    return [optimizer.state[p][key] for p in parameters_of(optimizer)]


def test_torchs_muon_goes_on_at_level_0_as_it_would_have(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)  # torch's own code, in float64
    torchs = run_of(torch.optim.Muon)
    options = {"lr": 0.01, "level": 0, "ns_dtype": torch.float64, "backend": "torch"}
    own = GWTMuon(parameters(SHAPES, dtype=torch.float64), **options)
    migration = moved(torchs, own)
    assert migration.is_exact
    assert str(migration).startswith("muon, float64 -> muon, float64: 0 and 1 more")
    assert_same_bits(momenta(own), momenta(torchs, "momentum_buffer"))
    for each in (torchs, own):
        train(each, range(3, 6), params=parameters_of(each))
    for p, q in zip(parameters_of(own), parameters_of(torchs), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-13)


@pytest.mark.parametrize("level", [1, 2, 3])
@pytest.mark.parametrize(
    ("kind", "key"), [(torch.optim.Muon, "momentum_buffer"), (torch.optim.AdamW, "exp_avg"),
                      (torch.optim.Adam, "exp_avg")],
)  # fmt: skip
def test_momentum_becomes_that_of_the_blocks_means(kind, key, level):
    source = run_of(kind)
    own = GWTMuon(parameters(SHAPES, dtype=torch.float64), level=level)
    migration = moved(source, own)
    for m, wanted in zip(momenta(own), momenta(source, key), strict=True):
        torch.testing.assert_close(m, means(wanted, level), rtol=1e-14, atol=1e-16)
    note = migration.tensors[0].notes
    assert note["exp_avg"] == "exact: sums of blocks"
    assert ("exp_avg_sq" in note) == (key == "exp_avg")
    train(own, range(3, 5))


@pytest.mark.parametrize("rule", ["gwt", "foam"])
def test_the_first_moment_of_gwt_adam_is_taken_in_its_own_unit(rule):
    source = run_of(GWTAdamW, rule=rule, level=2)
    own = GWTMuon(parameters(SHAPES, dtype=torch.float64), level=2, detail_scale=0.5)
    moved(source, own)
    for m, wanted in zip(momenta(own), momenta(source), strict=True):
        torch.testing.assert_close(m, wanted / (2.0 if rule == "gwt" else 1.0), rtol=1e-14, atol=0)
    with pytest.raises(ValueError, match="keeps no exp_avg_sq"):
        migrate(own.state_dict(), GWTAdamW(parameters(SHAPES, dtype=torch.float64), rule=rule))


def test_between_levels_rules_and_dtypes():
    source = run_of(GWTMuon, level=1)
    deeper = GWTMuon(parameters(SHAPES, dtype=torch.float64), level=3, state_dtype=torch.float32)
    assert (
        moved(source, deeper).tensors[0].notes["exp_avg"] == "exact: sums of blocks; rounded to the nearest float32"
    )
    for m, wanted in zip(momenta(deeper), momenta(source), strict=True):
        torch.testing.assert_close(m, means(wanted, 2).float(), rtol=1e-6, atol=0)
    back = GWTMuon(parameters(SHAPES, dtype=torch.float64), level=1)
    assert moved(deeper, back).tensors[0].notes["exp_avg"].startswith("approximate: spread evenly")
    lion = GWTLion(parameters(SHAPES, dtype=torch.float64), level=1)
    assert moved(source, lion).is_exact
    again = GWTMuon(parameters(SHAPES, dtype=torch.float64), level=1)
    assert moved(lion, again).is_exact
    assert_same_bits(momenta(again), momenta(source))


def test_the_states_of_a_muon_and_an_adamw_become_that_of_one_optimizer():
    def model():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(16, 24), nn.Linear(24, 8))

    def named(m, matrices):
        return [(name, p) for name, p in m.named_parameters() if (p.dim() == 2) == matrices]

    before, after = model(), model()
    two = [torch.optim.Muon(named(before, True)), torch.optim.AdamW(named(before, False), eps=1e-8)]
    for t in range(3):
        for each in two:
            train(each, [t], params=parameters_of(each))
    groups = [{"params": named(after, False), "rule": "adamw"}, {"params": named(after, True)}]
    one = GWTMuon(groups, level=2)
    one.load_state_dict(migrate([each.state_dict() for each in two], one).state_dict)
    m, v = (two[1].state[before[1].bias][key] for key in ("exp_avg", "exp_avg_sq"))
    assert_same_bits([one.state[after[1].bias][key] for key in ("exp_avg", "exp_avg_sq")], [m, v])
    wanted = means(two[0].state[before[0].weight]["momentum_buffer"], 2)
    torch.testing.assert_close(one.state[after[0].weight]["exp_avg"], wanted)
    train(one, range(2))
    with pytest.raises(ValueError, match="but list of NoneType"):
        migrate([two[0].state_dict(), None], one)


def test_an_sgds_buffer_which_is_a_sum_is_taken_only_if_it_is_said():
    sgd = run_of(torch.optim.SGD, momentum=0.9)
    own = GWTMuon(parameters(SHAPES, dtype=torch.float64), level=0)
    with pytest.raises(ValueError, match=r"no tensor exp_avg, but \['momentum_buffer'\]"):
        migrate(sgd.state_dict(), own)


@pytest.mark.parametrize("level", [0, 2])
@pytest.mark.parametrize("kind", [GWTMuon, GWTLion])
@pytest.mark.parametrize("bare", [False, True])
def test_a_momentum_by_another_name_is_taken_over(kind, level, bare):
    sgd = run_of(torch.optim.SGD, momentum=0.9)
    state = sgd.state_dict()
    if bare:  # as from an optimizer whose groups have no other options
        state["param_groups"] = [{"params": group["params"], "lr": 0.1} for group in state["param_groups"]]
    for own in state["state"].values():
        own["momentum_buffer"] = own["momentum_buffer"] * 0.1
    target = kind(parameters(SHAPES, dtype=torch.float64), level=level)
    made = migrate(state, target, keys={"momentum_buffer": "exp_avg"})
    target.load_state_dict(made.state_dict)
    assert made.is_exact
    for p, own in zip(parameters_of(target), state["state"].values(), strict=True):
        torch.testing.assert_close(target.state[p]["exp_avg"], means(own["momentum_buffer"], level))
        assert target.state[p]["step"] == 0
    train(target, range(1))
    adamw = GWTAdamW(parameters(SHAPES, dtype=torch.float64))
    with pytest.raises(ValueError, match="exp_avg_sq"):
        migrate(state, adamw, keys={"momentum_buffer": "exp_avg"})


@pytest.mark.parametrize("level", [0, 2])
@pytest.mark.parametrize("kind", [GWTMuon, GWTLion])
@pytest.mark.parametrize("source", [torch.optim.Adafactor, GWTAdafactor])
def test_adafactors_first_moment_times_the_root_of_its_factors_becomes_a_momentum(source, kind, level):
    old = run_of(source, **({} if source is torch.optim.Adafactor else {"level": level}))
    target = kind(parameters(SHAPES, dtype=torch.float64), level=level)
    target.load_state_dict(migrate(old.state_dict(), target).state_dict)
    for p, q in zip(parameters_of(target), parameters_of(old), strict=True):
        own = old.state[q]
        found = target.state[p]["exp_avg"]
        if source is torch.optim.Adafactor:
            assert not found.any()
            continue
        row, col = own["exp_avg_sq_row"].unsqueeze(-1), own["exp_avg_sq_col"].unsqueeze(-2)
        root = (row * col / row.mean(-2, keepdim=True)).sqrt()
        torch.testing.assert_close(found, own["exp_avg"] * root / 2 ** (level / 2))
    train(target, range(1))


def test_a_run_that_was_migrated_is_that_of_the_new_options():
    """Compare with a run with the new options: the state is only momentum, which is linear in the gradients."""
    torchs, new = run_of(torch.optim.Muon, steps=4), run_of(GWTMuon, steps=4, level=2)
    own = GWTMuon(parameters(SHAPES, dtype=torch.float64), lr=0.01, level=2)
    moved(torchs, own)
    for m, wanted in zip(momenta(own), momenta(new), strict=True):
        torch.testing.assert_close(m, wanted, rtol=1e-12, atol=1e-14)
    assert results(own)["params"][0].shape == SHAPES[0]
