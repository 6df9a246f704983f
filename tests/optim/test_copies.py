"""Copies and pickles of an optimizer continue like the original, bit for bit."""

from __future__ import annotations

import copy
import pickle

import pytest
from torch import nn

from gwt_kernels import GWTAdamW
from tests.support.mixed import model, used
from tests.support.runs import (
    assert_differ,
    assert_same_bits,
    backends,
    checked_step,
    give_gradients,
    parameters,
    parameters_of,
    place,
    results,
    snapshot,
    train,
)


@backends
@pytest.mark.parametrize(
    "way", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"]
)
def test_a_copy_of_the_optimizer_continues_like_the_original(backend, device, way):
    original = model(place(backend, device), backend)
    train(original, range(3), params=used(original))
    other = way(original)
    assert_same_bits(snapshot(other), snapshot(original))
    before = snapshot(original)
    train(other, range(3, 5), params=used(other))
    assert_same_bits(snapshot(original), before)
    assert_differ(results(other), results(original))
    train(original, range(3, 5), params=used(original))
    assert_same_bits(snapshot(other), snapshot(original))
    assert [int(s["step"]) for s in other.state.values() if s] == [5] * len(used(other))
    other.add_param_group({"params": parameters([(4, 8)], place(backend, device))})
    assert "differentiable" not in other.param_groups[-1]


def test_a_model_and_its_optimizer_copied_together_stay_tied():
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    optimizer = GWTAdamW(net.parameters(), lr=0.1, level=1)
    train(optimizer, range(2))
    net2, optimizer2 = copy.deepcopy((net, optimizer))
    assert all(p is q for p, q in zip(net2.parameters(), parameters_of(optimizer2), strict=True))
    for o in (optimizer, optimizer2):
        train(o, range(2, 4))
    assert_same_bits(snapshot(optimizer), snapshot(optimizer2))
    assert_same_bits([p.detach() for p in net2.parameters()], snapshot(optimizer)["params"])


def test_a_shallow_copy_shares_the_state_and_its_step_count():
    a = GWTAdamW(parameters([(4, 8), (3, 6)]), lr=0.1, level=1)
    train(a, range(2))
    b = copy.copy(a)
    for optimizer in (a, b, b, a, b):
        give_gradients(parameters_of(a), seed=1)
        assert checked_step(optimizer) == 2
    assert {int(s["step"]) for s in a.state.values()} == {7}
