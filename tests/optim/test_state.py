"""GWTAdamW's state survives saving and loading, bit for bit."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from gwt_kernels import GWTAdamW
from tests.support.mixed import DTYPES, SHAPES, copy_weights, model, through_a_file, used
from tests.support.runs import (
    assert_same_bits,
    backends,
    checked_step,
    give_gradients,
    parameters,
    parameters_of,
    place,
    refused,
    results,
    snapshot,
    train,
)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("state_dtype", [None, torch.float32, torch.float64, torch.bfloat16])
def test_saving_and_loading_changes_no_dtype_and_no_bit(dtype, state_dtype):
    saved = model(dtypes=[dtype], state_dtype=state_dtype)
    train(saved, range(3), params=used(saved))
    loaded = model(dtypes=[dtype], state_dtype=state_dtype, lr=7.0)
    loaded.load_state_dict(through_a_file(saved.state_dict()))
    a, b = snapshot(saved), snapshot(loaded)
    assert_same_bits(a["state"], b["state"])
    assert_same_bits(a["groups"], b["groups"])
    assert_same_bits(copy.deepcopy(saved.state_dict()), copy.deepcopy(loaded.state_dict()))
    expected = state_dtype or (torch.float64 if dtype == torch.float64 else torch.float32)
    assert all(s["exp_avg"].dtype == s["exp_avg_sq"].dtype == expected for s in loaded.state.values())
    assert loaded.param_groups[0]["lr"] == 0.1


@backends
def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(backend, device):
    on = place(backend, device)
    whole = model(on, backend)
    train(whole, range(6), params=used(whole))
    first = model(on, backend)
    train(first, range(3), params=used(first))
    file = through_a_file(first.state_dict())
    resumed, control = model(on, backend, lr=7.0), model(on, backend)
    copy_weights(first, resumed)
    copy_weights(first, control)
    resumed.load_state_dict(file)
    for optimizer in (resumed, control):
        train(optimizer, range(3, 6), params=used(optimizer))
    assert_same_bits(results(resumed), results(whole))
    for p, q in zip(used(control), used(whole), strict=True):
        assert not torch.equal(p, q)


@backends
def test_a_loaded_state_is_a_copy(backend, device):
    on = place(backend, device)
    source, target = model(on, backend), model(on, backend)
    train(source, range(2), params=used(source))
    state_dict = source.state_dict()
    kept = copy.deepcopy(state_dict)
    target.load_state_dict(state_dict)
    assert_same_bits(copy.deepcopy(state_dict), kept)
    copy_weights(source, target)
    before = snapshot(source)
    train(target, [2], params=used(target))
    assert_same_bits(snapshot(source), before)
    train(source, [2], params=used(source))
    assert_same_bits(snapshot(source), snapshot(target))
    before = snapshot(target)
    for state in source.state.values():
        for value in state.values():
            value.fill_(torch.nan)
    source.param_groups[0]["lr"] = 9.0
    assert_same_bits(snapshot(target), before)


def test_loading_the_current_state_and_an_older_one():
    optimizer = model()
    train(optimizer, range(2), params=used(optimizer))
    older = copy.deepcopy(optimizer.state_dict())
    weights = [p.detach().clone() for p in parameters_of(optimizer)]
    optimizer.load_state_dict(optimizer.state_dict())
    train(optimizer, [2], params=used(optimizer))
    expected = snapshot(optimizer)
    with torch.no_grad():
        for p, w in zip(parameters_of(optimizer), weights, strict=True):
            p.copy_(w)
    optimizer.load_state_dict(older)
    train(optimizer, [2], params=used(optimizer))
    assert_same_bits(snapshot(optimizer), expected)


def test_a_state_before_the_first_step_and_an_empty_one():
    fresh = model()
    fresh.load_state_dict(model().state_dict())
    assert not fresh.state
    saved = model()
    train(saved, range(2), params=used(saved))
    assert saved.state[parameters_of(saved)[-1]] == {}  # looking it up creates an empty one
    fresh.load_state_dict(through_a_file(saved.state_dict()))
    assert_same_bits(snapshot(fresh)["state"], snapshot(saved)["state"])
    give_gradients(parameters_of(fresh), seed=5)
    assert checked_step(fresh) == len(parameters_of(fresh))


def test_a_state_of_a_run_with_some_parameters_frozen():
    saved, loaded = model(), model()
    train(saved, range(2), params=used(saved)[::2])
    loaded.load_state_dict(through_a_file(saved.state_dict()))
    copy_weights(saved, loaded)
    for optimizer in (saved, loaded):
        train(optimizer, range(2, 4), params=used(optimizer))
    assert_same_bits(snapshot(saved), snapshot(loaded))
    assert [int(loaded.state[p]["step"]) for p in used(loaded)[:4]] == [4, 2, 4, 2]


def test_states_of_parameters_that_were_replaced_are_named_where_they_have_no_place():
    optimizer = GWTAdamW(parameters(SHAPES), level=1)
    train(optimizer, range(1))
    old, (new,) = parameters_of(optimizer)[1], parameters(SHAPES[1:2])
    optimizer.param_groups[0]["params"][1] = new
    with refused(optimizer, ValueError, "states of 1 parameters", "no group", str(SHAPES[1]), "optimizer.state"):
        optimizer.state_dict()
    del optimizer.state[old]
    train(optimizer, range(1, 2))
    assert optimizer.state_dict()["state"].keys() == {0, 1, 2}


@pytest.mark.parametrize(
    ("dtype", "before", "after"),
    [
        (torch.float32, {"norm_growth_limit": None}, {"norm_growth_limit": 1.01}),
        (torch.bfloat16, {"weight_rounding": "nearest"}, {"weight_rounding": "split"}),
    ],
    ids=["limiter", "split"],
)
@pytest.mark.parametrize("is_stepped", [False, True])
def test_what_an_option_turned_on_in_mid_run_adds_to_states_is_saved_before_their_next_step(
    dtype, before, after, is_stepped
):
    params = parameters(SHAPES, dtype=dtype)
    optimizer = GWTAdamW(params, lr=0.1, level=1, **before)
    train(optimizer, range(3))
    optimizer.param_groups[0].update(after)
    if is_stepped:  # but for a frozen parameter
        give_gradients(params, seed=3)
        params[1].grad = None
        optimizer.step()
    was = snapshot(optimizer)
    saved = through_a_file(optimizer.state_dict())
    assert_same_bits(snapshot(optimizer), was)
    resumed = GWTAdamW(copy.deepcopy(params), level=1, **after)
    resumed.load_state_dict(saved)
    optimizer.load_state_dict(optimizer.state_dict())
    for each in (optimizer, resumed):
        train(each, range(4, 6))
    assert_same_bits(results(resumed), results(optimizer))


def test_options_come_from_the_state_except_the_backend(device):
    saved = GWTAdamW(parameters(SHAPES, device), lr=0.3, betas=(0.5, 0.6), maximize=True, level=1, backend="triton")
    train(saved, range(1))
    loaded = GWTAdamW(parameters(SHAPES), lr=0.1, level=1, backend="torch")
    file = through_a_file(saved.state_dict(), map_location="cpu")
    assert file["param_groups"][0]["backend"] == "triton"
    loaded.load_state_dict(file)
    group = loaded.param_groups[0]
    assert (group["lr"], group["betas"], group["maximize"]) == (0.3, (0.5, 0.6), True)
    assert group["backend"] == "torch"
    assert file["param_groups"][0]["backend"] == "triton"


def test_a_dtype_of_moments_may_be_set_in_a_group_as_torch_spells_it():
    """Check dtypes, which a user may store later in place of the name that the constructor stores."""
    saved, loaded = (GWTAdamW(parameters(SHAPES), state_dtype=torch.bfloat16, level=1) for _ in range(2))
    saved.param_groups[0]["state_dtype"] = torch.bfloat16
    train(saved, range(1))
    loaded.load_state_dict(through_a_file(saved.state_dict()))
    for each in (saved, loaded):
        train(each, [1])
        each.param_groups[0]["state_dtype"] = "bfloat16"
        train(each, [2])
        each.param_groups[0]["state_dtype"] = torch.bfloat16
        train(each, [3])
    assert_same_bits(saved.state_dict()["state"], loaded.state_dict()["state"])
    loaded.param_groups[0]["state_dtype"] = torch.float32
    with refused(loaded, ValueError, "exp_avg", "torch.bfloat16", "torch.float32"):
        train(loaded, [4])


def test_a_tensor_learning_rate_and_names_survive():
    net = nn.Linear(6, 5)
    saved = GWTAdamW(net.named_parameters(), lr=torch.tensor(0.25), level=1)
    train(saved, range(2))
    loaded = GWTAdamW(copy.deepcopy(net).named_parameters(), lr=1.0, level=1)
    loaded.load_state_dict(through_a_file(saved.state_dict()))
    assert_same_bits(snapshot(loaded), snapshot(saved))
    saved.param_groups[0]["lr"].fill_(9.0)
    assert loaded.param_groups[0]["lr"] == 0.25
    assert loaded.param_groups[0]["param_names"] == ["weight", "bias"]


def test_numbers_of_numpy_become_plain_ones():
    """Check that a state has plain numbers, since ``torch.load`` treats NumPy's as code, and refuses them."""
    (p,) = parameters([(4, 8)])
    optimizer = GWTAdamW([p], lr=np.float64(0.1), betas=(np.float32(0.5), 0.75), seed=7, backend="torch")
    optimizer.param_groups[0] |= {"eps": np.array(1e-3), "weight_decay": np.float32(0.25), "warmup": np.int64(10)}
    optimizer.param_groups[0] |= {"of_the_user": [np.float32(0.5), np.str_("text"), True], "counts": np.arange(2)}
    train(optimizer, range(2))
    with pytest.raises(pickle.UnpicklingError):
        through_a_file(optimizer.state_dict())
    del optimizer.param_groups[0]["counts"]
    loaded = through_a_file(optimizer.state_dict())
    (group,) = loaded["param_groups"]
    expected = {"lr": 0.1, "betas": (0.5, 0.75), "eps": 1e-3, "weight_decay": 0.25, "warmup": 10, "seed": 7}
    assert {name: group[name] for name in expected} == expected
    assert [type(group[name]) for name in ("lr", "eps", "warmup")] == [float, float, int]
    assert group["of_the_user"] == [0.5, "text", True]
    assert isinstance(optimizer.param_groups[0]["lr"], np.float64)  # a scheduler's number stays in the group
    twin = GWTAdamW(parameters([(4, 8)]), backend="torch")
    twin.load_state_dict(loaded)
    twin.param_groups[0]["params"][0].data.copy_(p.detach())
    train(optimizer, range(2, 4))
    train(twin, range(2, 4))
    assert_same_bits(results(twin), results(optimizer))


def test_users_own_entries_are_kept():
    saved, loaded = model(), model()
    train(saved, range(2), params=used(saved))
    saved.state[used(saved)[0]]["note"] = torch.arange(3)
    saved.state[used(saved)[0]]["count"] = 5
    saved.state["for all"] = {"seed": 3}
    saved.param_groups[0]["label"] = "embeddings"
    loaded.load_state_dict(through_a_file(saved.state_dict()))
    assert_same_bits(snapshot(loaded)["state"], snapshot(saved)["state"])
    assert loaded.state["for all"] == {"seed": 3}
    assert loaded.param_groups[0]["label"] == "embeddings"
    for optimizer in (saved, loaded):
        train(optimizer, [2], params=used(optimizer))
    assert_same_bits(snapshot(loaded)["state"], snapshot(saved)["state"])


def test_hooks_run_in_torchs_order_and_the_checks_see_their_result():
    saved, loaded = model(), model()
    train(saved, range(2), params=used(saved))
    calls = []

    def halve(optimizer, state_dict):
        calls.append("pre 1")
        assert not optimizer.state
        first = {**state_dict["state"][0], "exp_avg": state_dict["state"][0]["exp_avg"] / 2}
        return {**state_dict, "state": {**state_dict["state"], 0: first}}

    def inspect(_, state_dict):
        calls.append("pre 2")
        assert torch.equal(state_dict["state"][0]["exp_avg"], saved.state[used(saved)[0]]["exp_avg"] / 2)

    loaded.register_load_state_dict_pre_hook(inspect)
    handle = loaded.register_load_state_dict_pre_hook(halve, prepend=True)
    loaded.register_load_state_dict_post_hook(lambda o: calls.append(f"post {len(o.state)}"))
    loaded.load_state_dict(saved.state_dict())
    assert calls == ["pre 1", "pre 2", f"post {len(used(saved))}"]
    assert torch.equal(loaded.state[used(loaded)[0]]["exp_avg"], saved.state[used(saved)[0]]["exp_avg"] / 2)
    assert torch.equal(loaded.state[used(loaded)[1]]["exp_avg"], saved.state[used(saved)[1]]["exp_avg"])
    handle.remove()
    loaded._optimizer_load_state_dict_pre_hooks.clear()
    loaded.load_state_dict(saved.state_dict())
    assert calls[3:] == [f"post {len(used(saved))}"]
    assert not loaded._optimizer_load_state_dict_pre_hooks
    loaded.register_load_state_dict_pre_hook(lambda _, sd: {**sd, "param_groups": sd["param_groups"][:1]})
    with refused(loaded, ValueError, "groups of [6]", "the same model and groups"):
        loaded.load_state_dict(saved.state_dict())
    assert len(loaded._optimizer_load_state_dict_pre_hooks) == 1


def test_state_dict_hooks():
    optimizer = model()
    optimizer.register_state_dict_pre_hook(lambda o: o.param_groups[0].update(seen=True))
    optimizer.register_state_dict_post_hook(lambda _, sd: {**sd, "version": 1})
    state_dict = optimizer.state_dict()
    assert (state_dict["version"], state_dict["param_groups"][0]["seen"]) == (1, True)


@pytest.mark.gpu
def test_a_checkpoint_moves_between_devices(device):
    on_gpu = model(device)
    train(on_gpu, range(2), params=used(on_gpu))
    on_cpu, back = model(), model(device)
    on_cpu.load_state_dict(through_a_file(on_gpu.state_dict()))
    assert all(x.device.type == "cpu" for s in on_cpu.state.values() for x in s.values())
    back.load_state_dict(through_a_file(on_cpu.state_dict()))
    assert_same_bits(snapshot(back)["state"], snapshot(on_gpu)["state"])
