"""States with damaged groups and numbers: the command and the library name the damage in one sentence."""

from __future__ import annotations

import copy
import re

import pytest
import torch

from gwt_kernels import GWTAdafactor, GWTAdamW, GWTLion, GWTMuon, gwt_param_groups, migrate
from gwt_kernels.migration.carried import Recipe, optimizer_for
from tests.support.migrated_files import file_of, run

HUGE = 10**400
OF_TORCH = {"beta2_decay": -0.8, "d": 1.0, "eps": (None, 1e-3)}
GROUPS = {
    "a level without a scale": ({"level": 2}, [], "group 0 of the state has no scale: say it with --scale"),
    "no lr": ({"lr": ...}, [], "group 0 of the state has no lr: say it with --lr"),
    "Adafactor's without lr": (
        OF_TORCH | {"lr": ...},
        ["--rule", "adafactor", "--adamw-lr", "1"],
        "group 0 of the state has no lr",
    ),
    "Adafactor's with one eps": (
        OF_TORCH | {"eps": 1e-8},
        ["--rule", "adafactor", "--adamw-lr", "1"],
        "group 0 of the state has beta2_decay, but not lr, d and two eps",
    ),
    "a huge decay": ({"weight_decay": HUGE}, [], "weight_decay must be finite, got an integer of 401 digits"),
    "no decay": ({"weight_decay": None}, [], "weight_decay must be a real number, got None"),
    "a decay in words": ({"weight_decay": "x"}, [], "weight_decay must be a real number, got 'x'"),
    "no rate": ({"lr": None}, [], "group 0 of the state are damaged: lr must be a real number, got None"),
    "two rates": ({"lr": torch.ones(2)}, [], "lr must be one number, got a tensor of shape (2,)"),
    "a complex rate": ({"lr": 1j}, [], "lr must be a real number, got 1j"),
    "an unknown rule": ({"rule": "zzz"}, [], "group 0 of the state has rule='zzz', which is none of 'gwt', 'foam'"),
    "rules": ({"rule": ["gwt"]}, [], "group 0 of the state has rule=['gwt'], which is none of"),
    "a beta": ({"betas": (0.9,)}, [], "group 0 of the state has betas=(0.9,), not two numbers"),
    "betas in words": ({"betas": ("a", 0.9)}, [], "betas[0] must be a real number, got 'a'"),
    "a dict of betas": ({"betas": {0.9: 1}}, [], "group 0 of the state has betas={0.9: 1}, not two numbers"),
    "a beta alone": ({"betas": 3}, [], "group 0 of the state has betas=3, not two numbers"),
    "an eps of two": ({"eps": torch.ones(2)}, [], "eps must be one number, got a tensor of shape (2,)"),
    "a tensor for a level": (
        {"level": torch.ones(2)},
        [],
        "group 0 of the state is damaged: level must be an integer",
    ),
    "a tensor for a name": (
        {"boundary": torch.tensor(1j)},
        [],
        "boundary must be a real number, got a torch.complex64",
    ),
    "no word for a name": ({"wavelet": {"haar"}}, [], "wavelet {'haar'}: use 'haar'"),
    "keys that are none": ({"params": [{}]}, [], "group 0 of the state has {} among its params"),
}
NUMBERS = {
    "a huge step": ("step", HUGE, "its step is inf, not a finite number of at least 0"),
    "a complex step": ("step", torch.tensor(1j), "its step is 1j, not a finite number of at least 0"),
    "three steps": ("step", torch.zeros(3), "its step is tensor([0., 0., 0.]), not a finite number"),
    "a huge norm": ("limiter_norm", HUGE, "not a finite number of at least 0: take another state"),
    "a norm that is none": ("limiter_norm", float("nan"), "its limiter_norm is nan, not a finite number"),
}


def refused(state, flags, trained, folder, capsys):
    """Return the command's message for a state that it refuses."""
    assert run(file_of(folder, state), folder / "gwt.pt", trained.config, *flags) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("gwt-kernels migrate: ")
    assert said.err.count("\n") == 1
    assert not (folder / "gwt.pt").exists()
    return said.err


@pytest.mark.parametrize("case", GROUPS)
def test_damaged_groups(case, trained, tmp_path, capsys):
    changes, flags, words = GROUPS[case]
    state = copy.deepcopy(trained.state)
    group = state["param_groups"][0]
    group.update(changes)
    for option in [option for option, value in changes.items() if value is ...]:
        del group[option]
    assert words in refused(state, flags, trained, tmp_path, capsys)


@pytest.mark.parametrize("case", NUMBERS)
@pytest.mark.parametrize(
    "flags", [(), ("--rule", "adafactor", "--lr", "1", "--adamw-lr", "1")], ids=("gwt", "factors")
)
def test_damaged_numbers(case, flags, trained, tmp_path, capsys):
    key, value, words = NUMBERS[case]
    state = copy.deepcopy(trained.state)
    state["state"][3][key] = value
    said = refused(state, flags, trained, tmp_path, capsys)
    assert words in said
    assert "'model.layers.0" in said


def test_a_state_without_groups(trained, tmp_path, capsys):
    state = {"state": trained.state["state"], "param_groups": []}
    assert "the state has no groups of parameters" in refused(state, (), trained, tmp_path, capsys)


def test_numbers_of_factors(trained):
    """Check states of Adafactor, whose step is read by other code than that of moments."""
    p = torch.nn.Parameter(torch.ones(8, 8))
    adafactor = torch.optim.Adafactor([("p", p)])
    p.grad = torch.ones(8, 8)
    adafactor.step()
    optimizer = GWTAdamW([("p", p)])
    for step in (HUGE, torch.tensor(1j), torch.zeros(3)):
        state = copy.deepcopy(adafactor.state_dict())
        state["state"][0]["step"] = step
        with pytest.raises(ValueError, match=r"its step is .*, not a finite number of at least 0"):
            migrate(state, optimizer)


def test_the_library_refuses_what_the_command_does(trained):
    optimizer = GWTAdamW(gwt_param_groups(trained.model))
    for option, value in (("weight_decay", HUGE), ("rule", "zzz"), ("betas", 3)):
        state = copy.deepcopy(trained.state)
        state["param_groups"][0][option] = value
        with pytest.raises(ValueError, match=f"group 0 of the state.*{option}"):
            migrate(state, optimizer, names=trained.model)


def test_what_other_optimizers_leave_out_is_no_damage(trained):
    """Check a missing rate with relative steps, and options that None turns off."""
    state = copy.deepcopy(trained.state)
    state["param_groups"][0] |= {"norm_growth_limit": None, "max_grad_norm": None, "beta1": None}
    optimizer = optimizer_for(trained.model, state, Recipe(), {"rule": "gwt"})
    assert migrate(state, optimizer, names=trained.model).tensors


@pytest.mark.parametrize("target", ["factors", "moments"])
def test_a_first_moment_beside_factors_that_is_no_tensor(target):
    p = torch.nn.Parameter(torch.ones(8, 8))
    ours = GWTAdafactor([("p", p)], lr=0.1, beta1=0.9)
    p.grad = torch.ones(8, 8)
    ours.step()
    state = ours.state_dict()
    state["state"][0]["exp_avg"] = [0.5]
    optimizer = ours if target == "factors" else GWTAdamW([("p", p)])
    with pytest.raises(ValueError, match=r"parameter 'p' .*its exp_avg is \[0.5\], no tensor"):
        migrate(state, optimizer)


@pytest.mark.parametrize(
    ("kind", "option", "target"), [(GWTAdafactor, "decay_rate", GWTAdamW), (GWTMuon, "nesterov", GWTLion)]
)
def test_an_option_of_the_old_rule_that_is_missing_is_named(kind, option, target):
    p = torch.nn.Parameter(torch.ones(8, 8))
    old = kind([("p", p)], lr=0.1)
    p.grad = torch.ones(8, 8)
    old.step()
    state = old.state_dict()
    del state["param_groups"][0][option]
    with pytest.raises(ValueError, match=f"parameter 'p' .*the group has no '{option}', which rule="):
        migrate(state, target([("p", p)], lr=0.1))


@pytest.mark.parametrize("key", ["step", "exp_avg"])
def test_tensors_without_numbers(key, trained, tmp_path, capsys):
    state = copy.deepcopy(trained.state)
    state["state"][3][key] = state["state"][3][key].to("meta")
    assert f"its {key} is on the meta device" in refused(state, (), trained, tmp_path, capsys)


def test_two_entries_of_one_name(trained, tmp_path, capsys):
    state = copy.deepcopy(trained.state)
    for each in state["state"].values():
        each["slow"] = each["exp_avg"].clone()
    words = "has 'exp_avg' and 'slow', which would both be 'exp_avg': leave one of them behind"
    assert words in refused(state, ("--rename", "slow=exp_avg"), trained, tmp_path, capsys)
    assert words not in refused(state, ("--rename", "slow=", "--rename", "exp_avg="), trained, tmp_path, capsys)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"names": [None] * 20}, "names must be a module or a sequence of names, got None among them"),
        ({"names": ["a", 1]}, "names must be a module or a sequence of names, got 1 among them"),
        ({"keys": ["exp_avg"]}, "keys must be a dict, such as {'norm': 'limiter_norm'}, got list"),
    ],
)
def test_arguments_of_other_types(how, words, trained):
    optimizer = GWTAdamW(gwt_param_groups(trained.model))
    with pytest.raises(TypeError, match=re.escape(words)):
        migrate(trained.state, optimizer, **{"names": trained.model, **how})


def test_moments_in_eight_bits_without_scales(trained):
    state = copy.deepcopy(trained.state)
    for each in state["state"].values():
        each.update({key: each[key].to(torch.float8_e5m2) for key in ("exp_avg", "exp_avg_sq")})
    with pytest.raises(ValueError, match=r"its moments are torch.float8_e5m2, in which nothing is computed"):
        migrate(state, GWTAdamW(gwt_param_groups(trained.model)), names=trained.model)
