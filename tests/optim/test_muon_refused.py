"""Tests what ``GWTMuon`` refuses: options, tensors, groups and states by name, with the remedy."""

from __future__ import annotations

import copy
import math
import re

import pytest
import torch
from torch import nn

import gwt_kernels
from gwt_kernels import GWTAdamW, GWTLion, GWTMuon
from gwt_kernels.functional import Hyper, gwt_adamw_
from tests.support.runs import assert_same_bits, give_gradients, parameters, parameters_of, refused, results, train

SHAPES = [(64, 96), (33, 70), (2, 24, 18), (16, 64)]


def build(params=None, **options):
    return GWTMuon(parameters(SHAPES) if params is None else params, lr=0.01, **options)


BAD = {
    "ns_dtype": (torch.float16, ValueError, "ns_dtype=torch.float16 must be one of torch.bfloat16, torch.float32"),
    "ns_dtype of no tenso": ("quick", ValueError, "ns_dtype='quick' must be one of"),
    "ns_steps": (100, ValueError, "ns_steps=100 must be at least 0 and less than 100"),
    "ns_steps of a float": (4.5, TypeError, "ns_steps=4.5 must be an int"),
    "ns_coefficients": ((1.0, 2.0), ValueError, "ns_coefficients=(1.0, 2.0) must be a tuple of exactly 3"),
    "ns_coefficients of a numbe": (3.0, TypeError, "ns_coefficients=3.0 must be a tuple"),
    "ns_coefficients of nan": ((1.0, math.nan, 2.0), ValueError, "exactly 3 finite numbers"),
    "eps": (-1e-7, ValueError, "eps must be finite and at least 0, got -1e-07"),
    "momentum": (1.0, ValueError, "momentum must be at least 0 and below 1, got 1.0"),
    "momentum of text": ("fast", TypeError, "momentum must be a real numbe"),
    "nesterov": (1, TypeError, "nesterov must be True or False, got 1"),
    "adjust_lr_fn": (
        "keller",
        ValueError,
        "adjust_lr_fn='keller' must be None or one of 'original', 'match_rms_adamw', 'spec",
    ),
    "adjust_lr_fn of no text": ([1.0], ValueError, "adjust_lr_fn=[1.0] must be None or one of 'original'"),
    "detail_scale": (-0.5, ValueError, "detail_scale must be finite and at least 0"),
    "scale": (0.0, ValueError, "scale must be finite and above 0"),
    "workspace_bytes": (1e8, TypeError, "workspace_bytes=100000000.0 must be an int"),
    "workspace_bytes too few": (1000, ValueError, "parameter 0 of group 0 of shape (64, 96) needs"),
    "flatten": (1, TypeError, "flatten=1 must be True or False"),
    "row_splits": ((30, 30), ValueError, "row_splits=(30, 30) must be positive and add up to the 64 rows"),
    "row_splits of a numbe": (64, TypeError, "row_splits=64 must be a tuple"),
    "row_splits of floats": ((32.0, 32.0), TypeError, "must hold numbers of rows, which are ints"),
    "adamw_betas": ((0.9, 1.0), ValueError, "adamw_betas[1] must be at least 0 and below 1"),
    "adamw_eps": (-1.0, ValueError, "adamw_eps must be finite and at least 0"),
    "level": (8, ValueError, "level 8 is too deep for parameter 0"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_options_are_refused_by_name(what):
    value, error, words = BAD[what]
    name = what.split(" ")[0]
    with pytest.raises(error, match=re.escape(words)):
        build(**{name: value})
    if not name.startswith("adamw"):  # also in a group; in mid-run below
        with pytest.raises(error, match=re.escape(words)):
            build([{"params": parameters(SHAPES[:1]), name: value}])


@pytest.mark.parametrize("what", [k for k, (_, error, _) in BAD.items() if not k.startswith("adamw")])
def test_options_made_bad_in_mid_run_are_refused_and_the_run_goes_on(what):
    value, error, words = BAD[what]
    name = what.split(" ")[0]
    optimizer, other = build(), build()
    for each in (optimizer, other):
        train(each, range(2))
    group = optimizer.param_groups[0]
    good, group[name] = group[name], value
    give_gradients(parameters_of(optimizer), seed=2)
    for _ in range(2):
        with refused(optimizer, error, "level 8" if name == "level" else words):
            optimizer.step()
    group[name] = good
    optimizer.step()
    train(other, [2])
    assert_same_bits(results(optimizer), results(other))


@pytest.mark.parametrize(
    ("named", "options", "words"),
    [
        (("model.norm.weight", (8,)), {"level": 0}, "'model.norm.weight' of shape (8,) is no matrix"),
        (("scale", ()), {"level": 0}, "'scale' of shape () is no matrix"),
        (("model.embed_tokens.weight", (40, 8)), {}, "'model.embed_tokens.weight' is called an embedding"),
        (("wte.weight", (40, 8)), {}, "'wte.weight' is called an embedding"),
        (("bert.embeddings.word_embeddings.weight", (40, 8)), {}, "is called an embedding"),
        (("stem.conv1.weight", (8, 6, 4)), {}, "of shape (8, 6, 4) is a convolution's by its name"),
        (("stem.0.weight", (8, 6, 3, 3)), {}, "of shape (8, 6, 3, 3) is a convolution's by its shape"),
    ],
)  # fmt: skip
def test_what_muon_cannot_take_is_refused_by_its_name_with_the_remedy(named, options, words):
    name, shape = named
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        GWTMuon([(name, nn.Parameter(torch.ones(shape)))], **options)
    assert "rule='adamw'" in str(caught.value)
    p = nn.Parameter(torch.ones(shape))
    GWTMuon([{"params": [p], "param_names": [name], "rule": "adamw"}])
    if "convolution" in words:
        assert "flatten=True" in str(caught.value)
        GWTMuon([(name, p)], flatten=True)


@pytest.mark.parametrize(
    ("name", "shape"), [("model.embeddings_project.weight", (8, 8)), ("patch_embed.proj.weight", (8, 8)),
                        ("conv_out.weight", (8, 8)), ("embed.experts.w1", (2, 8, 8)), ("experts", (2, 3, 5, 8))],
)  # fmt: skip
def test_what_only_sounds_like_it_is_taken(name, shape):
    GWTMuon([(name, nn.Parameter(torch.ones(shape)))])


@pytest.mark.parametrize(
    ("group", "words"),
    [
        ({"rule": "foam"}, "rule='foam' is no rule of GWTMuon: use one of 'muon', 'adamw'"),
        ({"rule": "orthogonal"}, "rule='orthogonal' is no rule of GWTMuon"),
        ({"rule": "sgd"}, "unknown rule 'sgd'"),
        ({"rule": ["muon"]}, r"unknown rule \['muon'\]"),
        ({"rule": "adamw", "level": 2}, "rule='adamw' transforms nothing"),
        ({"wavelet": "db2"}, "knows no wavelet 'db2'"),
        ({"boundary": "symmetric"}, "knows no boundary 'symmetric'"),
        ({"norm_growth_limit": 1.01}, "rule='muon' has no limiter"),
    ],
)
def test_groups_that_are_not_muons_are_refused(group, words):
    with pytest.raises(ValueError, match=words):
        build([{"params": parameters(SHAPES[:1]), **group}])


def test_bad_gradients_are_refused_before_anything_changes():
    optimizer = build(parameters([(40, 8)]))
    (p,) = parameters_of(optimizer)
    train(optimizer, range(1))
    p.grad = torch.ones(40, 8).to_sparse()
    with refused(optimizer, RuntimeError, "does not support sparse gradients", "parameter 0 of group 0"):
        optimizer.step()


def test_an_iteration_that_the_backend_does_not_know_is_refused_with_the_parameters_name():
    with pytest.raises(RuntimeError, match=r"parameter 0 of group 0 \(ns_dtype torch.float64\): backend='triton'"):
        build(backend="triton", ns_dtype=torch.float64)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [("row_splits", (8, 8), "add up to the 64 rows of parameter 0"), ("ns_dtype", "float16", "ns_dtype='float16'"),
     ("workspace_bytes", 10, "parameter 0 of group 0 of shape (64, 96) needs"), ("nesterov", "no", "nesterov")],
)  # fmt: skip
def test_a_state_whose_options_do_not_fit_is_refused_before_anything_changes(name, value, words):
    optimizer = build(parameters(SHAPES[:1]))
    train(optimizer, range(1))
    state = copy.deepcopy(optimizer.state_dict())
    state["param_groups"][0][name] = value
    with refused(optimizer, TypeError if name == "nesterov" else ValueError, words):
        optimizer.load_state_dict(state)


def test_a_rule_changed_in_mid_run_needs_what_the_other_has():
    optimizer = build(parameters(SHAPES[:1]))
    train(optimizer, range(1))
    optimizer.param_groups[0].update(rule="adamw", level=0)
    with refused(optimizer, ValueError, "no 'betas', which rule='adamw' takes"):
        optimizer.step()
    optimizer.param_groups[0].update(betas=(0.9, 0.999))
    with refused(optimizer, ValueError, "lacks exp_avg_sq"):
        optimizer.step()


@pytest.mark.parametrize("rule", ["muon", "orthogonal"])
def test_the_function_of_one_element_wise_step_refuses_matrices(rule):
    with pytest.raises(ValueError, match=r"use gwt_kernels\.GWTMuon"):
        gwt_adamw_(
            params=[torch.ones(8, 8)], grads=[torch.ones(8, 8)], exp_avgs=[torch.zeros(8, 2)], exp_avg_sqs=None,
            steps=[1], hypers=[Hyper()], level=2, rule=rule,
        )  # fmt: skip


def test_it_is_public_and_other_optimizers_refuse_its_rule():
    assert gwt_kernels.__all__.count("GWTMuon") == 1
    for kind in (GWTAdamW, GWTLion):
        with pytest.raises(ValueError, match=f"rule='muon' is no rule of {kind.__name__}"):
            kind([{"params": parameters(SHAPES[:1]), "rule": "muon"}])


def test_cuts_within_a_scale_of_int8_moments_are_refused_before_anything_changes():
    plain, batch = nn.Parameter(torch.ones(8, 8)), nn.Parameter(torch.randn(7, 50, 101))
    groups = [{"params": [plain], "rule": "adamw"}, {"params": [batch], "state_dtype": torch.int8}]
    words = "parameter 0 of group 1 of shape (7, 50, 101)", "128 of its int8 moments share a scale"
    with pytest.raises(ValueError, match=re.escape(words[0])):
        GWTMuon(copy.deepcopy(groups), workspace_bytes=80_000)
    optimizer = GWTMuon(groups, workspace_bytes=1 << 22)
    give_gradients([plain, batch], seed=0)
    optimizer.step()
    optimizer.param_groups[1]["workspace_bytes"] = 80_000
    with refused(optimizer, ValueError, *words):
        optimizer.step()
    optimizer.param_groups[1]["workspace_bytes"] = 1 << 22
    optimizer.step()
