"""Tests that a state that does not fit, loaded or corrupted later, is refused and changes nothing."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from gwt_kernels import GWTAdamW
from tests.support.runs import (
    assert_same_bits,
    backends,
    checked_step,
    give_gradients,
    parameters,
    parameters_of,
    place,
    refused,
    snapshot,
    train,
)

SHAPES = ((4, 8), (3, 6), (2, 3, 5))


def trained(shapes=SHAPES, level=2, steps=2, dtype=torch.float32, **options):
    optimizer = GWTAdamW(parameters(shapes, dtype=dtype), lr=0.1, level=level, **options)
    train(optimizer, range(steps))
    return optimizer


def torch_adamw():
    optimizer = torch.optim.AdamW(parameters(SHAPES))
    train(optimizer, range(2))
    return optimizer.state_dict()


def changed(change):
    """Return a valid state with a change applied to it."""
    state_dict = copy.deepcopy(trained().state_dict())
    change(state_dict)
    return state_dict


def without(key):
    return lambda sd: sd["state"][1].pop(key)


def with_value(key, value):
    return lambda sd: sd["state"][1].update({key: value})


def with_option(key, value):
    return lambda sd: sd["param_groups"][0].update({key: value})


MIGRATE = "gwt_kernels.migrate"  # the remedy named by the errors


def freed(x):
    """The tensor without its memory."""
    x.untyped_storage().resize_(0)
    return x


MISFITS = {
    "another level": (
        lambda: trained(level=1).state_dict(),
        ("level=1", "level=2", "build the optimizer", MIGRATE),
    ),
    "level 0": (lambda: trained(level=0).state_dict(), ("level=0", "level=2", MIGRATE)),
    "another shape": (
        lambda: trained([(4, 8), (3, 9), (2, 3, 5)]).state_dict(),
        ("(3, 3)", "(3, 2)", "parameter 1"),
    ),
    "more rows": (lambda: trained([(5, 8), *SHAPES[1:]]).state_dict(), ("(5, 2)", "(4, 2)", "parameter 0")),
    "another wavelet": (lambda: trained(wavelet="db2").state_dict(), ("wavelet='db2'", "wavelet='haar'", MIGRATE)),
    "a biorthogonal wavelet": (
        lambda: trained(wavelet="bior1.1").state_dict(),
        ("wavelet='bior1.1'", "wavelet='haar'", MIGRATE),
    ),
    "another boundary": (
        lambda: trained(boundary="reflect").state_dict(),
        ("boundary='reflect'", "boundary='zero'", "state's value", MIGRATE),
    ),
    "an unknown boundary": (
        lambda: changed(with_option("boundary", "edge")),
        ("boundary='edge'", "boundary='zero'"),
    ),
    "no bias correction": (
        lambda: trained(correct_bias=False).state_dict(),
        ("correct_bias=False", "correct_bias=True", "state's value", MIGRATE),
    ),
    "another rule": (lambda: changed(with_option("rule", "other")), ("rule='other'", "rule='gwt'")),
    "a rule that is no text": (lambda: changed(with_option("rule", ["gwt"])), ("rule=['gwt']", "rule='gwt'")),
    "another state_dtype": (
        lambda: trained(state_dtype=torch.float64).state_dict(),
        ("state_dtype='float64'", "None", MIGRATE),
    ),
    "float64 moments": (
        lambda: trained(dtype=torch.float64).state_dict(),
        ("torch.float64", "torch.float32", MIGRATE),
    ),
    "fewer parameters": (lambda: trained(SHAPES[:2]).state_dict(), ("[2]", "[3]", "the same model")),
    "another number of groups": (
        lambda: GWTAdamW([{"params": parameters([s])} for s in SHAPES]).state_dict(),
        ("[1, 1, 1]", "[3]", MIGRATE),
    ),
    "torch.optim.AdamW's": (torch_adamw, ("level", "not saved by this package", MIGRATE)),
    "a model's": (lambda: nn.Linear(2, 2).state_dict(), ("weight", "param_groups", "state_dict()")),
    "the folded rule's": (
        lambda: trained(rule="foam").state_dict(),
        ("rule='foam'", "rule='gwt'", "state's value", MIGRATE),
    ),
    "bfloat16 moments asked for": (
        lambda: trained(state_dtype=torch.bfloat16).state_dict(),
        ("state_dtype='bfloat16'", "None", "state's value", MIGRATE),
    ),
    "halves of weights": (
        lambda: changed(with_value("weight_low", torch.zeros(3, 6, dtype=torch.int16))),
        ("weight_low", "parameter 1 of group 0", "weight_rounding='split'", MIGRATE),
    ),
    "an unknown rounding": (lambda: changed(with_option("weight_rounding", "up")), ("weight_rounding", "'up'")),
    "a bad seed": (lambda: changed(with_option("seed", -5)), ("seed", "-5")),
    "no step": (lambda: changed(without("step")), ("step", "parameter 1 of group 0")),
    "no exp_avg": (lambda: changed(without("exp_avg")), ("exp_avg", "parameter 1 of group 0")),
    "no limiter_norm": (lambda: changed(without("limiter_norm")), ("limiter_norm", "parameter 1 of group 0")),
    "a number as moment": (lambda: changed(with_value("exp_avg_sq", 1.0)), ("exp_avg_sq",)),
    "bfloat16 moments": (
        lambda: changed(with_value("exp_avg", torch.zeros(3, 2, dtype=torch.bfloat16))),
        ("torch.bfloat16", "exp_avg", MIGRATE),
    ),
    "a float64 norm": (
        lambda: changed(with_value("limiter_norm", torch.zeros((), dtype=torch.float64))),
        ("limiter_norm", "float64", MIGRATE),
    ),
    "a norm per row": (
        lambda: changed(with_value("limiter_norm", torch.zeros(3))),
        ("limiter_norm", "(3,)", "scalar"),
    ),
    "a negative step": (lambda: changed(with_value("step", torch.tensor(-1.0))), ("step", "-1.0")),
    "a step that is NaN": (lambda: changed(with_value("step", torch.tensor(torch.nan))), ("step", "nan")),
    "a huge step": (lambda: changed(with_value("step", 10**400)), ("step of parameter 1", "inf")),
    "a negative norm": (lambda: changed(with_value("limiter_norm", torch.tensor(-1.0))), ("limiter_norm", "-1.0")),
    "a norm that is NaN": (
        lambda: changed(with_value("limiter_norm", torch.tensor(torch.nan))),
        ("limiter_norm of parameter 1", "nan", "earlier step"),
    ),
    "a list of states": (lambda: {**trained().state_dict(), "state": []}, ("'state' is a list, not a dict",)),
    "a list for a state": (
        lambda: {**trained().state_dict(), "state": {1: []}},
        ("the state of parameter 1 of group 0", "is a list, not a dict"),
    ),
    "a dict of groups": (
        lambda: {**trained().state_dict(), "param_groups": {}},
        ("'param_groups' is a dict, not a list",),
    ),
    "a group without parameters": (
        lambda: changed(lambda saved: saved["param_groups"][0].pop("params")),
        ("group 0 of the state is no dict with a list 'params'",),
    ),
    "freed moments": (
        lambda: changed(with_value("exp_avg", freed(torch.zeros(3, 2)))),
        ("exp_avg of parameter 1 of group 0", "24 bytes", "0 are there", "bring it back"),
    ),
    "a freed norm": (lambda: changed(with_value("limiter_norm", freed(torch.ones(1)))), ("limiter_norm", "freed")),
    "a freed count": (lambda: changed(with_value("step", freed(torch.ones(1)))), ("step of parameter 1", "freed")),
    "another freed entry": (lambda: changed(with_value("mine", freed(torch.ones(1)))), ("mine of", "freed")),
    "a number for names": (
        lambda: changed(with_option("param_names", 5)),
        ("'param_names' of group 0 of the state is of type int, not a list",),
    ),
    "a negative rate": (lambda: changed(with_option("lr", -0.5)), ("lr", "-0.5")),
    "a bad beta": (lambda: changed(with_option("betas", (0.9, 1.5))), ("betas[1]", "1.5")),
}


@pytest.mark.parametrize("steps", [0, 2], ids=["before the first step", "after two steps"])
@pytest.mark.parametrize("kind", MISFITS)
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(kind, steps):
    make, words = MISFITS[kind]
    optimizer = trained(steps=steps)
    with refused(optimizer, ValueError, *words):
        optimizer.load_state_dict(make())
    assert not optimizer._optimizer_load_state_dict_pre_hooks
    other = trained(steps=steps)
    for o in (optimizer, other):
        train(o, [2])
    assert_same_bits(snapshot(optimizer), snapshot(other))


@pytest.mark.parametrize(("options", "helps"), [({}, False), ({"norm_growth_limit": None}, True)])
def test_another_dtype_of_moments_is_proposed_only_where_it_helps(options, helps):
    """Check the proposal, also with the limiter, whose norm has the dtype of the weights, not of the moments."""
    saved = trained(**options).state_dict()

    def load(**more):
        GWTAdamW(parameters(SHAPES, dtype=torch.float64), lr=0.1, **options, **more).load_state_dict(saved)

    with pytest.raises(ValueError, match="exp_avg of parameter 0") as told:
        load()
    assert ("state_dtype=torch.float32" in str(told.value)) is helps
    assert "gwt_kernels.migrate" in str(told.value)


def test_errors_name_the_parameters():
    net = nn.Sequential(nn.Linear(8, 8, bias=False))
    optimizer = GWTAdamW(net.named_parameters(), level=1)
    train(optimizer, range(1))
    state_dict = copy.deepcopy(optimizer.state_dict())
    state_dict["state"][0]["exp_avg"] = torch.zeros(8, 3)
    with refused(optimizer, ValueError, "'0.weight'", "(8, 3)", "(8, 4)", "(8, 8)"):
        optimizer.load_state_dict(state_dict)


SPOILT = {
    "exp_avg of another shape": ("exp_avg", lambda x: x[:1], "(4, 2)"),
    "exp_avg_sq of another shape": ("exp_avg_sq", lambda x: x.reshape(-1), "(4, 2)"),
    "exp_avg in bfloat16": ("exp_avg", lambda x: x.bfloat16(), "bfloat16"),
    "exp_avg_sq in float64": ("exp_avg_sq", lambda x: x.double(), "float64"),
    "exp_avg elsewhere": ("exp_avg", lambda x: x.to("meta"), "meta"),
    "limiter_norm elsewhere": ("limiter_norm", lambda x: x.to("meta"), "meta"),
    "limiter_norm in float16": ("limiter_norm", lambda x: x.half(), "float16"),
    "exp_avg transposed": ("exp_avg", lambda x: x.t().contiguous().t(), "contiguous"),
    "weight_low in int32": ("weight_low", lambda x: x.int(), "int32"),
    "weight_low of another shape": ("weight_low", lambda x: x[:1], "(1, 8, 2)"),
    "weight_low elsewhere": ("weight_low", lambda x: x.to("meta"), "meta"),
    "weight_low transposed": ("weight_low", lambda x: x.transpose(0, 1).contiguous().transpose(0, 1), "contiguous"),
    "step a list": ("step", lambda x: [1.0], "step"),
    "limiter_norm no tensor": ("limiter_norm", lambda x: "1", "limiter_norm"),
    "weight_low no tensor": ("weight_low", lambda x: [1], "weight_low"),
    "step freed": ("step", lambda x: freed(x.clone()), "freed"),
    "exp_avg freed": ("exp_avg", lambda x: freed(x.clone()), "freed"),
    "no exp_avg_sq": ("exp_avg_sq", lambda x: None, "exp_avg_sq"),
}


@backends
@pytest.mark.parametrize("kind", SPOILT)
def test_a_state_corrupted_between_steps_is_refused_before_any_parameter_changes(kind, backend, device):
    on = place(backend, device)
    key, spoil, word = SPOILT[kind]
    split = {"dtype": torch.bfloat16} if key == "weight_low" else {}
    optimizer = GWTAdamW(
        [{"params": parameters([(4, 8)], on, **split), "level": level} for level in (1, 0, 2)],
        lr=0.1,
        weight_rounding="split" if split else None,
        backend=backend,
    )
    train(optimizer, range(1))
    last = parameters_of(optimizer)[-1]
    good = optimizer.state[last][key]
    give_gradients(parameters_of(optimizer), seed=2)
    optimizer.state[last][key] = spoil(good)
    before = snapshot(optimizer) if not {"elsewhere", "freed"} & set(kind.split()) else None
    with pytest.raises(ValueError, match=r"parameter 0 of group 2") as caught:
        optimizer.step()
    assert key in str(caught.value)
    assert word in str(caught.value)
    if before:
        assert_same_bits(snapshot(optimizer), before)
    optimizer.state[last][key] = good
    assert checked_step(optimizer) == 3
