"""Bad options are refused with a clear message, before anything is changed."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from gwt_kernels import GWTAdafactor, GWTAdamMini, GWTAdamW, GWTLion
from gwt_kernels.optim.options import check_group, hyper_of, rounding_of, state_dtype_name, state_dtype_of
from tests.support.runs import (
    BACKENDS,
    assert_same_bits,
    checked_step,
    give_gradients,
    parameters,
    parameters_of,
    place,
    refused,
    train,
)

NAN, INF = math.nan, math.inf

# option: (value, exception, words of the message)
BAD = [
    ("lr", -1e-3, ValueError, "-0.001", "at least 0"),
    ("lr", NAN, ValueError, "nan", "finite"),
    ("lr", INF, ValueError, "inf", "finite"),
    ("lr", "1e-3", TypeError, "'1e-3'", "number"),
    ("lr", None, TypeError, "None", "number"),
    ("lr", [0.1], TypeError, "[0.1]", "number"),
    ("lr", True, TypeError, "True", "number"),
    ("lr", 1j, TypeError, "1j", "real number"),
    ("lr", torch.tensor(-1.0), ValueError, "-1.0", "at least 0"),
    ("lr", torch.tensor(NAN), ValueError, "nan", "finite"),
    ("lr", torch.ones(2), ValueError, "(2,)", "one number"),
    ("lr", torch.tensor(1j), TypeError, "complex64", "number"),
    ("lr", np.True_, TypeError, "True", "number"),
    ("lr", torch.tensor(True), TypeError, "torch.bool", "number"),
    ("lr", torch.empty((), device="meta"), TypeError, "meta", "a float or a tensor on the CPU"),
    ("betas", (1.0, 0.9), ValueError, "[0]", "1.0", "below 1"),
    ("betas", (0.9, 1.0), ValueError, "[1]", "1.0", "below 1"),
    ("betas", (-0.1, 0.9), ValueError, "[0]", "-0.1", "at least 0"),
    ("betas", (0.9, NAN), ValueError, "[1]", "nan", "below 1"),
    ("betas", (0.9,), TypeError, "(0.9,)", "pair"),
    ("betas", (0.9, 0.99, 0.999), TypeError, "0.99", "pair"),
    ("betas", 0.9, TypeError, "0.9", "pair"),
    ("betas", (0.9, "0.99"), TypeError, "[1]", "'0.99'"),
    ("eps", -1e-8, ValueError, "-1e-08", "at least 0"),
    ("eps", NAN, ValueError, "nan", "finite"),
    ("eps", None, TypeError, "None", "number"),
    ("weight_decay", -0.1, ValueError, "-0.1", "at least 0"),
    ("weight_decay", NAN, ValueError, "nan", "finite"),
    ("scale", 0.0, ValueError, "0.0", "above 0"),
    ("scale", -0.25, ValueError, "-0.25", "0.25"),
    ("scale", NAN, ValueError, "nan", "finite"),
    ("norm_growth_limit", 0.99, ValueError, "0.99", "at least 1", "None turns the limiter off"),
    ("norm_growth_limit", NAN, ValueError, "nan", "at least 1"),
    ("norm_growth_limit", INF, ValueError, "inf", "None turns the limiter off"),
    ("norm_growth_limit", "1.01", TypeError, "'1.01'", "number"),
    ("level", -1, ValueError, "-1", "negative", "0 is plain AdamW"),
    ("level", 1.0, TypeError, "1.0", "integer"),
    ("level", 2.5, TypeError, "2.5", "integer"),
    ("level", True, TypeError, "True", "integer"),
    ("level", "2", TypeError, "'2'", "integer"),
    ("level", None, TypeError, "None", "integer"),
    ("level", 4, ValueError, "level 4", "parameter 0", "(3, 8)", "level 3 or less"),
    ("rule", "adam", ValueError, "'adam'", "'gwt'"),
    ("rule", None, ValueError, "None", "'gwt'"),
    ("rule", "muon", ValueError, "'muon'", "no rule of GWTAdamW", "'gwt'"),
    ("res_scale", -0.5, ValueError, "-0.5", "at least 0"),
    ("res_scale", "1", TypeError, "'1'", "number"),
    ("wavelet", "mexican", ValueError, "'mexican'", "'haar'"),
    ("wavelet", None, ValueError, "None", "'haar'"),
    ("wavelet", "morl", ValueError, "'morl'", "'haar'"),
    ("boundary", "edge", ValueError, "'edge'", "'zero'", "'symmetric'"),
    ("boundary", "periodization", ValueError, "'periodization'", "'periodic'"),
    ("boundary", None, ValueError, "None", "'zero'"),
    ("boundary", ["zero"], ValueError, "['zero']", "'zero'"),
    ("correct_bias", 1, TypeError, "1", "True or False"),
    ("correct_bias", None, TypeError, "None", "True or False"),
    ("maximize", "yes", TypeError, "'yes'", "True or False"),
    ("state_dtype", torch.float16, ValueError, "float16", "torch.float32"),
    ("state_dtype", "half", ValueError, "'half'", "torch.float32"),
    ("state_dtype", torch.int32, ValueError, "int32", "torch.float32"),
    ("weight_rounding", "up", ValueError, "'up'", "'nearest'", "'stochastic'", "'split'"),
    ("weight_rounding", 1, ValueError, "1", "'split'"),
    ("weight_rounding", "split", ValueError, "parameter 0", "torch.bfloat16", "not torch.float32", "'nearest'"),
    ("weight_rounding", "stochastic", ValueError, "parameter 0", "torch.float16", "not torch.float32", "'nearest'"),
    ("seed", -1, ValueError, "-1", "at least 0"),
    ("seed", 2**32, ValueError, "4294967296", "below 2**32"),
    ("seed", 1.5, ValueError, "1.5", "integer"),
    ("seed", None, ValueError, "None", "integer"),
    ("seed", True, ValueError, "True", "integer"),
    ("backend", "cuda", ValueError, "'cuda'", "'triton'", "'torch'"),
    ("backend", True, ValueError, "True", "'torch'"),
]
bad = pytest.mark.parametrize(
    ("option", "value", "error", "words"),
    [(o, v, e, (o, *w)) for o, v, e, *w in BAD],
    ids=[f"{o}={v!r}"[:40] for o, v, *_ in BAD],
)


def optimizer_of(backend, device, **options):
    on = place(backend, device)
    groups = [
        {"params": parameters([(3, 8), (4, 16)], on), "level": 1},
        {"params": parameters([(3, 8)], on), "level": 0},
    ]
    return GWTAdamW(groups, lr=0.1, backend=backend, **options)


# Options --------------------------------------------------------------------------------------------------


@bad
def test_bad_options_are_refused_by_the_constructor(option, value, error, words):
    params = parameters([(3, 8)])
    before = params[0].detach().clone()
    for build in (
        lambda: GWTAdamW(params, **{"lr": 0.1, option: value}),
        lambda: GWTAdamW([{"params": params, option: value}], lr=0.1),
    ):
        with pytest.raises(error) as caught:
            build()
        assert type(caught.value) is error
        assert all(word in str(caught.value) for word in words), str(caught.value)
    assert_same_bits(params[0].detach(), before)


@bad
def test_bad_options_are_refused_by_add_param_group(option, value, error, words):
    optimizer = GWTAdamW(parameters([(4, 16)]), lr=0.1, level=1)
    train(optimizer, range(1))
    new = parameters([(3, 8)])
    with pytest.raises(error) as caught:
        optimizer.add_param_group({"params": new, option: value})
    words = [word.replace("parameter 0", "parameter 0 of group 1") for word in words]
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert len(optimizer.param_groups) == 1
    give_gradients(parameters_of(optimizer), seed=2)
    assert checked_step(optimizer) == 1
    optimizer.add_param_group({"params": new, "level": 3})
    give_gradients(parameters_of(optimizer), seed=3)
    assert checked_step(optimizer) == 2


@pytest.mark.parametrize("backend", BACKENDS)
@bad
def test_options_made_bad_in_mid_run_are_refused(backend, device, option, value, error, words):
    optimizer = optimizer_of(backend, device)
    give_gradients(parameters_of(optimizer), seed=1)
    for group in optimizer.param_groups if (option, value) == ("level", 1.0) else ():
        group["level"] = 2  # 1.0 == 1 would change nothing
    for i in (1, 0):
        good = optimizer.param_groups[i][option]
        optimizer.param_groups[i][option] = value
        with refused(optimizer, error, *(w.replace("parameter 0", f"parameter 0 of group {i}") for w in words)):
            optimizer.step()
        optimizer.param_groups[i][option] = good


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_run_continues_after_a_refused_step(backend, device):
    optimizer = optimizer_of(backend, device)
    give_gradients(parameters_of(optimizer), seed=1)
    assert checked_step(optimizer) == 3
    unfit = RuntimeError if backend == "triton" else ValueError  # the state's error, or before it the backend's
    for option, value, error in (
        ("lr", NAN, ValueError),
        ("level", 2, ValueError),
        ("wavelet", "db2", unfit),
        ("wavelet", "bior2.2", unfit),
        ("boundary", "edge", ValueError),
        ("state_dtype", torch.float64, unfit),
        ("backend", "gpu", ValueError),
    ):
        good = optimizer.param_groups[0][option]
        optimizer.param_groups[0][option] = value
        with refused(optimizer, error, option):
            optimizer.step()
        optimizer.param_groups[0][option] = good
        assert checked_step(optimizer) == 3


@pytest.mark.parametrize("betas", [(0.0, 0.0), [0.9, 0.99], (torch.tensor(0.9), np.float32(0.5)), (0, 0)])
@pytest.mark.parametrize("lr", [0, 0.0, 1, np.float32(0.1), np.int64(1), torch.tensor([0.1]), torch.tensor(1)])
def test_good_numbers_of_other_types_are_accepted(betas, lr):
    optimizer = GWTAdamW(parameters([(3, 8)]), lr=lr, betas=betas, eps=1e-3)
    for t in range(2):
        give_gradients(parameters_of(optimizer), seed=t)
        assert checked_step(optimizer) == 1


@pytest.mark.parametrize("kind", [GWTAdamW, GWTLion, GWTAdamMini, GWTAdafactor])
def test_a_group_may_hold_the_momentum_of_another_optimizer(kind):
    (group,) = torch.optim.SGD(parameters([(4, 8)]), momentum=0.9).param_groups
    optimizer = kind([{"params": group["params"], "momentum": group["momentum"]}], lr=0.1)
    give_gradients(group["params"], 0)
    optimizer.step()
    assert optimizer.state[group["params"][0]]["step"] == 1


@pytest.mark.parametrize("width", [1, 2, 3, 4, 5, 7, 8, 9, 31, 32, 33])
def test_a_level_fits_while_its_block_is_below_twice_the_width(width):
    deepest = max(level for level in range(10) if 2**level < 2 * width)
    optimizer = GWTAdamW(parameters([(2, width), (width,)]), lr=0.1, level=deepest)
    give_gradients(parameters_of(optimizer), seed=0)
    assert checked_step(optimizer) == 2
    with pytest.raises(
        ValueError, match=rf"level {deepest + 1} is too deep .* {width}: .* use level {deepest} or less"
    ):
        GWTAdamW(parameters([(2, width)]), level=deepest + 1)


def test_state_dtypes():
    p16, p64 = torch.zeros((), dtype=torch.bfloat16), torch.zeros((), dtype=torch.float64)
    assert [state_dtype_name(x) for x in (None, "float32", torch.float64)] == [None, "float32", "float64"]
    assert [state_dtype_of(p, None) for p in (p16, p64)] == [torch.float32, torch.float64]
    assert [state_dtype_of(p16, x) for x in ("float64", torch.float64)] == [torch.float64] * 2


def test_hyper_of_reads_tensors_and_numbers():
    group = GWTAdamW(parameters([(3, 8)]), lr=torch.tensor(0.5), betas=(0.1, 0.2), weight_decay=1).param_groups[0]
    assert hyper_of(group) == (0.5, 0.1, 0.2, 1e-6, 1.0, 0.25, 1.01, False, 1.0, True, 1.0, None)
    assert all(type(x) in (float, bool) for x in hyper_of(group)[:-1])
    check_group(group)


def test_bfloat16_moments_and_nearest_rounding_of_float32_weights_are_accepted():
    p16, p32 = torch.zeros(3, 8, dtype=torch.bfloat16), torch.zeros(3, 8)
    assert state_dtype_name(torch.bfloat16) == "bfloat16"
    assert [state_dtype_of(p, "bfloat16") for p in (p16, p32)] == [torch.bfloat16] * 2
    assert [rounding_of(p, None) for p in (p16, p32)] == ["nearest"] * 2
    assert [rounding_of(p16, x) for x in ("nearest", "stochastic", "split")] == ["nearest", "stochastic", "split"]
    assert rounding_of(p32, "nearest") == "nearest"


@pytest.mark.parametrize(
    ("dtype", "rounding", "takes"),
    [
        (torch.float16, "split", "torch.bfloat16 weights"),
        (torch.float32, "split", "torch.bfloat16 weights"),
        (torch.float64, "split", "torch.bfloat16 weights"),
        (torch.float32, "stochastic", "torch.bfloat16 or torch.float16 weights"),
        (torch.float64, "stochastic", "torch.bfloat16 or torch.float16 weights"),
    ],
)
def test_a_rounding_that_does_not_fit_the_weights_is_refused_by_name(dtype, rounding, takes):
    good, wide = parameters([(3, 8)], dtype=torch.bfloat16)[0], parameters([(4, 8)], dtype=dtype)[0]
    words = ("'norm'", f"weight_rounding={rounding!r}", takes, f"not {dtype}", "use 'nearest'")
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        GWTAdamW([("good", good), ("norm", wide)], weight_rounding=rounding)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    optimizer = GWTAdamW([("good", good), ("norm", wide)], lr=0.1)
    train(optimizer, range(1))
    give_gradients(parameters_of(optimizer), seed=1)
    optimizer.param_groups[0]["weight_rounding"] = rounding
    with refused(optimizer, ValueError, *words):
        optimizer.step()
    optimizer.param_groups[0]["weight_rounding"] = None
    assert checked_step(optimizer) == 2


@pytest.mark.parametrize(
    "options", [{"state_dtype": torch.bfloat16}, {"weight_rounding": "stochastic"}, {"weight_rounding": "split"}]
)
@pytest.mark.parametrize(("option", "value", "good"), [("wavelet", "db2", "haar"), ("boundary", "reflect", "zero")])
def test_other_wavelets_and_boundaries_only_round_to_nearest(options, option, value, good):
    (name,) = options
    words = (f"{option} {value!r}", "wavelet='haar'", "boundary='zero'")
    with pytest.raises(ValueError, match=rf"{name}=.*{words[0]}.*{words[1]} and {words[2]}"):
        GWTAdamW(parameters([(3, 8)], dtype=torch.bfloat16), **{option: value}, **options)
    optimizer = GWTAdamW(parameters([(3, 8)], dtype=torch.bfloat16), lr=0.1, level=1, **options)
    give_gradients(parameters_of(optimizer), seed=1)
    checked_step(optimizer)
    optimizer.param_groups[0][option] = value
    with refused(optimizer, ValueError, name, *words):
        optimizer.step()
    optimizer.param_groups[0][option] = good
    assert checked_step(optimizer) == 1


# The limiter of a rule ------------------------------------------------------------------------------------


def limits(groups, **options):
    return [g["norm_growth_limit"] for g in GWTAdamW(groups, **options).param_groups]


def test_each_rule_has_its_default_limiter():
    def groups(*options):
        return [{"params": parameters([(3, 8)]), **o} for o in options]

    assert limits(groups({})) == [1.01]
    assert limits(groups({}), norm_growth_limit=None) == [None]
    assert limits(groups({}), rule="foam") == limits(groups({}), rule="foam", norm_growth_limit=None) == [None]
    assert limits(groups({}, {"rule": "foam"}, {"norm_growth_limit": 1.5})) == [1.01, None, 1.5]
    assert limits(groups({}, {"rule": "gwt"}), rule="foam") == [None, 1.01]
    assert limits(groups({}, {"rule": "foam"}, {"rule": "gwt"}), norm_growth_limit=1.2) == [1.2, None, 1.2]
    assert limits(groups({}, {"rule": "gwt", "norm_growth_limit": 1.1}), rule="foam") == [None, 1.1]
    assert limits(groups({"rule": "gwt"}), rule="foam", norm_growth_limit=None) == [None]
    optimizer = GWTAdamW(groups({}), lr=0.1)
    optimizer.add_param_group({"params": parameters([(3, 8)]), "rule": "foam"})
    assert optimizer.param_groups[1]["norm_growth_limit"] is None
    give_gradients(parameters_of(optimizer), seed=1)
    assert checked_step(optimizer) == 2


@pytest.mark.parametrize("level", [0, 2])
def test_a_limiter_with_the_folded_rule_is_refused(level):
    words = r"norm_growth_limit is 1.01, but rule='foam' has no limiter: leave it out, or pass None"
    params = parameters([(3, 8)])
    both = {"rule": "foam", "norm_growth_limit": 1.01}
    with pytest.raises(ValueError, match=words):
        GWTAdamW(params, level=level, **both)
    with pytest.raises(ValueError, match=words):
        GWTAdamW([{"params": params, **both}], level=level)
    with pytest.raises(ValueError, match=words):
        GWTAdamW([{"params": params, "norm_growth_limit": 1.01}], rule="foam", level=level)
    optimizer = GWTAdamW(params, lr=0.1, level=level)
    with pytest.raises(ValueError, match=words):
        optimizer.add_param_group({"params": parameters([(4, 8)]), **both})
    assert len(optimizer.param_groups) == 1
    give_gradients(params, seed=1)
    assert checked_step(optimizer) == 1
    optimizer.param_groups[0]["rule"] = "foam"
    with refused(optimizer, ValueError, "norm_growth_limit is 1.01", "rule='foam'"):
        optimizer.step()


def test_the_folded_rule_has_one_wavelet():
    with pytest.raises(ValueError, match=r"rule='foam' .*'db2'.*'haar'"):
        GWTAdamW(parameters([(3, 8)]), rule="foam", wavelet="db2")
    with pytest.raises(ValueError, match=r"rule='foam' .*boundary 'periodic'.*boundary='zero'"):
        GWTAdamW(parameters([(3, 8)]), rule="foam", boundary="periodic")


def test_a_wavelet_that_is_no_string_and_numbers_beyond_floats_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown wavelet"):
        GWTAdamW([torch.zeros(4, 8, requires_grad=True)], wavelet=["haar"])
    with pytest.raises(ValueError, match="lr must be finite"):
        GWTAdamW([torch.zeros(4, 8, requires_grad=True)], lr=10**400)


def test_huge_level_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="use level 3 or less"):
        GWTAdamW([torch.zeros(4, 8, requires_grad=True)], level=10**18)


def test_triton_refuses_float64_moments_but_no_wavelet_at_level_0(device: torch.device) -> None:
    p = torch.zeros(4, 8, requires_grad=True, device=device)
    with pytest.raises(RuntimeError, match="float64"):
        GWTAdamW([p], state_dtype=torch.float64, backend="triton")
    GWTAdamW([p], level=0, wavelet="db2", backend="triton")
