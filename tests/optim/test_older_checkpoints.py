"""Checkpoints and pickles that lack options of later versions load with what these then were."""

from __future__ import annotations

import copy

import pytest

from gwt_kernels import GWTAdamW
from tests.support.mixed import DTYPES, copy_weights, model, through_a_file, used
from tests.support.runs import (
    assert_differ,
    assert_same_bits,
    parameters,
    refused,
    results,
    train,
)


def without_new_options(options):
    return {key: value for key, value in options.items() if key not in ("boundary", "correct_bias")}


def older(state_dict):
    return {**state_dict, "param_groups": [without_new_options(group) for group in state_dict["param_groups"]]}


def test_an_older_checkpoint_has_zero_boundaries_and_bias_correction():
    source, resumed = model(), model(lr=5.0)
    train(source, range(2), params=used(source))
    copy_weights(source, resumed)
    resumed.load_state_dict(through_a_file(older(source.state_dict())))
    for optimizer in (source, resumed):
        train(optimizer, [2], params=used(optimizer))
    assert_same_bits(results(source), results(resumed))
    assert [dict(sorted(g.items())) for g in resumed.state_dict()["param_groups"]] == [
        dict(sorted(g.items())) for g in source.state_dict()["param_groups"]
    ]
    for options in ({"boundary": "reflect"}, {"correct_bias": False}):
        ((name, value),) = options.items()
        with refused(other := model(**options), ValueError, f"the optimizer {name}={value!r}"):
            other.load_state_dict(older(source.state_dict()))


def test_missing_options_of_an_older_checkpoint_are_not_the_optimizers_defaults():
    def build(**options):
        return GWTAdamW([{"params": parameters([(4, 7)]), "boundary": "zero", "correct_bias": True}], **options)

    source, resumed = build(), build(boundary="reflect", correct_bias=False)
    train(source, range(1))
    resumed.load_state_dict(older(source.state_dict()))
    group = resumed.param_groups[0]
    assert (group["boundary"], group["correct_bias"]) == ("zero", True)
    assert (resumed.defaults["boundary"], resumed.defaults["correct_bias"]) == ("reflect", False)


def test_an_older_pickle_continues():
    source = model()
    train(source, range(2), params=used(source))
    state = copy.deepcopy(source).__getstate__()
    state["defaults"] = without_new_options(state["defaults"])
    state["param_groups"] = [without_new_options(group) for group in state["param_groups"]]
    back = GWTAdamW.__new__(GWTAdamW)
    back.__setstate__(state)
    assert back.defaults == source.defaults
    for optimizer in (source, back):
        train(optimizer, [2], params=used(optimizer))
    assert_same_bits(results(source), results(back))


@pytest.mark.parametrize("options", [{"boundary": "reflect"}, {"wavelet": "rbio2.2"}, {"correct_bias": False}])
def test_a_resumed_run_with_the_new_options_equals_the_uninterrupted_one(options):
    whole, begun, resumed = (model(dtypes=DTYPES, **options) for _ in range(3))
    train(whole, range(4), params=used(whole))
    train(begun, range(2), params=used(begun))
    copy_weights(begun, resumed)
    resumed.load_state_dict(through_a_file(begun.state_dict()))
    train(resumed, range(2, 4), params=used(resumed))
    assert_same_bits(results(whole), results(resumed))
    plain = model(dtypes=DTYPES)
    train(plain, range(4), params=used(plain))
    assert_differ(results(whole), results(plain))
