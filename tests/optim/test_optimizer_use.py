"""GWTAdamW is used like any optimizer of torch, and supports changes by users between steps."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from gwt_kernels import GWTAdamMini, GWTAdamW
from tests.support import interpreter
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
    train,
)

SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda t: 1 / (1 + t)),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=5),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.5, total_steps=8, cycle_momentum=True),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.3, step_size_up=3, base_momentum=0.7, max_momentum=0.95),
    "warm-up then cosine": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.CosineAnnealingLR(o, 4)], [3]
    ),
}


@pytest.mark.parametrize("tensor_lr", [False, True], ids=["float", "tensor"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers(name, tensor_lr):
    def rate():
        return torch.tensor(0.1, dtype=torch.float64) if tensor_lr else 0.1

    ours = GWTAdamW(
        [{"params": parameters([(4, 8)]), "level": 2}, {"params": parameters([(5,)]), "level": 0}], lr=rate()
    )
    theirs = torch.optim.AdamW(
        [{"params": parameters([(4, 8)])}, {"params": parameters([(5,)])}], lr=rate(), foreach=False
    )
    schedulers = [SCHEDULERS[name](o) for o in (ours, theirs)]
    seen = set()
    for t in range(7):
        for optimizer in (ours, theirs):
            give_gradients(parameters_of(optimizer), seed=t)
        for a, b in zip(ours.param_groups, theirs.param_groups, strict=True):
            assert (float(a["lr"]), a["betas"]) == (float(b["lr"]), b["betas"])
        seen.add((float(ours.param_groups[0]["lr"]), ours.param_groups[0]["betas"]))
        checked_step(ours)
        theirs.step()
        for scheduler in schedulers:
            scheduler.step()
    assert len(seen) > 4
    if name in ("OneCycleLR", "CyclicLR"):
        assert len({betas for _, betas in seen}) > 3


@backends
def test_a_tensor_as_learning_rate(backend, device):
    on = place(backend, device)
    rate = torch.tensor(0.1)
    as_tensor = GWTAdamW(parameters([(4, 8)], on), lr=rate, backend=backend)
    as_float = GWTAdamW(parameters([(4, 8)], on), lr=float(rate), backend=backend)
    train(as_tensor, range(2))
    train(as_float, range(2))
    rate.mul_(0.5)
    as_float.param_groups[0]["lr"] *= 0.5
    train(as_tensor, [2])
    train(as_float, [2])
    assert_same_bits(results(as_tensor), results(as_float))


@backends
def test_closure(backend, device):
    (p,) = parameters([(4, 8)], place(backend, device))
    optimizer = GWTAdamW([p], lr=0.1, backend=backend)
    losses = []

    def closure():
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        losses.append(loss.item())
        return loss

    with torch.no_grad():
        returned = [optimizer.step(closure).item() for _ in range(4)]
    assert returned == losses
    assert sorted(losses, reverse=True) == losses
    assert optimizer.step() is None

    def failing():
        raise KeyError("from the closure")

    before = results(optimizer)
    with pytest.raises(KeyError, match="from the closure"):
        optimizer.step(failing)
    assert_same_bits(results(optimizer), before)


@backends
@pytest.mark.parametrize("set_to_none", [False, True])
def test_zero_grad(backend, device, set_to_none):
    params = parameters([(4, 8), (5,)], place(backend, device))
    optimizer = GWTAdamW(params, lr=0.1, level=1, backend=backend)
    for _ in range(3):
        optimizer.zero_grad(set_to_none=set_to_none)
        sum(p.square().sum() for p in params).backward()
        assert checked_step(optimizer) == 2
    optimizer.zero_grad(set_to_none=set_to_none)
    assert checked_step(optimizer) == (0 if set_to_none else 2)
    assert int(optimizer.state[params[0]]["step"]) == (3 if set_to_none else 4)


def test_named_parameters_and_hooks():
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    optimizer = GWTAdamW(model.named_parameters(), lr=0.1, level=1)
    assert optimizer.param_groups[0]["param_names"] == ["0.weight", "0.bias", "1.weight", "1.bias"]
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    before = [p.detach().clone() for p in model.parameters()]
    train(optimizer, range(2))
    assert calls == ["before", "after"] * 2
    assert all((a != b).all() for a, b in zip(before, model.parameters(), strict=True))


def test_a_graph_of_gradients_is_not_extended():
    (p,) = parameters([(4, 8)])
    optimizer = GWTAdamW([p], lr=0.1)
    with warnings.catch_warnings(action="ignore"):  # about the cycle that is broken below
        p.pow(3).sum().backward(create_graph=True)
    assert p.grad.requires_grad
    checked_step(optimizer)
    assert not any(x.requires_grad for x in optimizer.state[p].values())
    assert p.is_leaf
    p.grad = None


@backends
@pytest.mark.parametrize("way", ["to(dtype)", "data of another dtype", "data elsewhere", "data of other strides"])
def test_parameters_changed_between_steps(backend, device, way):
    on = place(backend, device)
    model = nn.ParameterList(parameters([(4, 8), (3, 6)], on))
    optimizer = GWTAdamW(model.parameters(), lr=0.1, level=1, weight_decay=0.1, backend=backend)
    for t, dtype in enumerate((torch.float32, torch.bfloat16, torch.float32, torch.float16)):
        if way == "to(dtype)":
            model.to(dtype)
        for p in model:
            if way == "data of another dtype":
                p.grad = None
                p.data = p.data.to(dtype)
            elif way == "data elsewhere":
                p.data = p.data.clone()
            elif way == "data of other strides":
                p.data = p.data.t().contiguous().t() if t % 2 else p.data.contiguous()
        give_gradients(model, seed=t)
        assert checked_step(optimizer) == 2
    assert all(optimizer.state[p]["exp_avg"].dtype == torch.float32 for p in model)


@backends
@pytest.mark.parametrize("renewed", [("exp_avg", "exp_avg_sq", "limiter_norm", "step"), ("step",), ("exp_avg",)])
def test_a_state_moved_to_other_memory_between_steps_is_used(backend, device, renewed):
    on = place(backend, device)
    moved, kept = (GWTAdamW(parameters([(4, 8), (4, 8)], on), lr=0.1, backend=backend) for _ in range(2))
    for t in range(6):
        for p in parameters_of(moved) if t else ():
            for key in renewed:
                # New tensors in the memory, and perhaps at the address, of the previous ones.
                moved.state[p][key] = moved.state[p].pop(key).clone()
        train(moved, [t])
        train(kept, [t])
        assert_same_bits([sorted(s.items()) for s in results(moved)["state"]],
                         [sorted(s.items()) for s in results(kept)["state"]])  # fmt: skip
    assert_same_bits(results(moved)["params"], results(kept)["params"])


@backends
def test_a_state_changed_between_steps_is_used(backend, device):
    params = parameters([(4, 8), (3, 6)], place(backend, device))
    optimizer = GWTAdamW(params, lr=0.1, level=1, backend=backend)
    for t in range(4):
        give_gradients(params, seed=t)
        checked_step(optimizer)
        state = optimizer.state[params[0]]
        state["exp_avg"].zero_()
        (state["step"].data if t % 2 else state["step"]).fill_(10 * t)  # .data does not change the version counter
        state["limiter_norm"].mul_(0.5)
        state["exp_avg_sq"] = state["exp_avg_sq"] * 2
    optimizer.state.clear()
    give_gradients(params, seed=9)
    assert checked_step(optimizer) == 2
    assert [int(optimizer.state[p]["step"]) for p in params] == [1, 1]
    del optimizer.state[params[1]]
    assert checked_step(optimizer) == 2
    assert [int(optimizer.state[p]["step"]) for p in params] == [2, 1]


def test_inference_mode_may_be_entered_in_mid_run():
    params = parameters([(4, 8), (3, 6)])
    optimizer = GWTAdamW(params, lr=0.1, level=1)
    give_gradients(params, seed=0)
    optimizer.step()
    with torch.inference_mode():
        assert checked_step(optimizer) == 2
    assert checked_step(optimizer) == 2
    assert [int(optimizer.state[p]["step"]) for p in params] == [3, 3]


def test_new_tensors_at_the_address_of_old_ones_are_detected():
    (p,) = parameters([(4, 8)])
    optimizer = GWTAdamW([p], lr=0.1)
    for t in range(20):
        give_gradients([p], seed=t)
        checked_step(optimizer)
        del optimizer.state[p]["step"]
        optimizer.state[p]["step"] = torch.tensor(3.0 * t)


def test_parameters_exchanged_in_a_group_are_used():
    params = parameters([(4, 8), (3, 6)])
    optimizer = GWTAdamW(params, lr=0.1, level=1)
    train(optimizer, range(2))
    for t in range(4):
        optimizer.param_groups[0]["params"][1] = parameters([(3, 6)], seed=t)[0]
        optimizer.param_groups[0]["params"].reverse()
        give_gradients(parameters_of(optimizer), seed=t)
        assert checked_step(optimizer) == 2


@backends
def test_steps_are_deterministic(backend, device):
    on = place(backend, device)
    shapes = [(8, 64), (5, 33), (128,)]
    first, *others = [GWTAdamW(parameters(shapes, on), lr=0.1, backend=backend) for _ in range(3)]
    for optimizer in (first, *others):
        train(optimizer, range(3))
    for other in others:
        assert_same_bits(results(first), results(other))


@pytest.mark.parametrize("layout", ["contiguous", "copied"])
@pytest.mark.parametrize("options", [{"level": 0}, {"level": 2}, {"level": 2, "skip_nonfinite": True}], ids=str)
@backends
def test_updates_increase_the_version_counter(backend, options, layout, device):
    """Check the counter, without which a second backward pass would silently use the new weights."""
    p = torch.nn.Parameter(torch.randn(8, 16, device=place(backend, device)))
    if layout == "copied":
        p.data = p.data.t().contiguous().t()
    loss = p.square().sum()
    loss.backward(retain_graph=True)
    optimizer = GWTAdamW([p], backend=backend, **options)
    with interpreter.like_a_gpu():
        optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# Rounding errors around 0 -----------------------------------------------------------------------------------


def test_a_scheduler_may_end_slightly_below_0():
    (p,) = parameters([(8, 8)])
    optimizer = GWTAdamW([p], lr=1e-3, weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / 3, 0.0, total_iters=5)
    for t in range(8):
        before = p.detach().clone()
        train(optimizer, [t])
        scheduler.step()
        assert torch.equal(p, before) == (t > 4)
    assert -1e-19 < optimizer.param_groups[0]["lr"] < 0
    resumed = GWTAdamW([p], lr=1e-3, weight_decay=0.1)
    resumed.load_state_dict(optimizer.state_dict())
    train(resumed, [8])
    assert float(resumed.state[p]["step"]) == 9


@pytest.mark.parametrize("lr", [-1e-17, torch.tensor(-1e-17, dtype=torch.float64)], ids=["float", "tensor"])
def test_every_number_slightly_below_0_counts_as_0(lr):
    small, none = (GWTAdamW(parameters([(8, 8)]), lr=0.1) for _ in range(2))
    for optimizer, hair in ((small, -1e-17), (none, 0.0)):
        optimizer.param_groups[0].update(lr=0.1, weight_decay=hair, eps=hair, betas=(hair, 0.9))
        train(optimizer, range(2))
        optimizer.param_groups[0]["lr"] = lr if hair else 0.0
        train(optimizer, [2])
    assert_same_bits(results(small), results(none))


@pytest.mark.parametrize("option", ["lr", "weight_decay", "eps"])
def test_negative_options_are_refused_except_tiny_ones_set_later(option):
    params = parameters([(8, 8)])
    with pytest.raises(ValueError, match=rf"{option} must be finite and at least 0, got -1e-17"):
        GWTAdamW(params, **{option: -1e-17})
    optimizer = GWTAdamW(params, lr=0.1)
    with pytest.raises(ValueError, match=rf"{option} must be finite and at least 0, got -1e-17"):
        optimizer.add_param_group({"params": parameters([(8, 8)]), option: -1e-17})
    optimizer.param_groups[0][option] = -1e-9
    give_gradients(params, seed=0)
    with refused(optimizer, ValueError, option, "-1e-09"):
        optimizer.step()


# Options that states depend on


@pytest.mark.parametrize(
    ("kind", "option", "value", "made"),
    [
        (GWTAdamW, "rule", "foam", {"norm_growth_limit": None}),
        (GWTAdamMini, "head_rows", 2, {}),
    ],
)
@pytest.mark.parametrize("alone", [False, True])
def test_option_that_states_depend_on_is_refused_in_mid_run(kind, option, value, made, alone):
    p = torch.nn.Parameter(torch.ones(4, 17))
    optimizer = kind([p], backend="torch", **made)
    group = optimizer.param_groups[0]

    def step():
        p.grad = torch.ones_like(p)
        if alone:
            optimizer.step_parameter(p)
        else:
            optimizer.step()

    before = group[option]
    group[option] = value
    step()  # there is no state yet
    group[option] = before
    changed = f"{option} of group 0 was changed from {value!r} to {before!r}"
    with refused(optimizer, ValueError, option if option == "head_rows" else changed, "migrate"):
        step()
    group[option] = value
    step()
    optimizer.state.clear()
    group[option] = before
    step()
    copy.deepcopy(optimizer).load_state_dict(optimizer.state_dict())


def test_rules_that_are_one_at_level_0_may_be_changed():
    p = torch.nn.Parameter(torch.ones(4, 16))
    optimizer = GWTAdamW([p], level=0, norm_growth_limit=None)
    for rule in ("gwt", "foam", "gwt"):
        optimizer.param_groups[0]["rule"] = rule
        p.grad = torch.ones_like(p)
        optimizer.step()
    assert optimizer.state[p]["step"] == 3
