"""Tests that split bfloat16 weights train like float32 ones, bit for bit."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from gwt_kernels import GWTAdamW, migrate
from gwt_kernels.formats.split import split_low
from gwt_kernels.optim.state import low_bits_of
from tests.support.narrow import BF16, FP16, FP32, OPTIONS, SHAPES, float32_of, gradients, rules, step
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
)


@pytest.mark.parametrize(
    ("rule", "level", "grad_dtype"),  # every pair of two of them
    [("gwt", 0, BF16), ("foam", 2, BF16), ("gwt", 2, FP32), ("foam", 0, FP32), ("gwt", 0, FP16), ("foam", 2, FP16)],
)
@backends
def test_split_weights_follow_float32_weights_to_the_bit(backend, device, rule, level, grad_dtype):
    """Compare with a spike at step 4 for the limiter; bfloat16 rounded to nearest, the control, differs."""
    on = place(backend, device)
    options = {**OPTIONS, "rule": rule, "level": level, "backend": backend}
    start = parameters(SHAPES, on, BF16)
    wide = GWTAdamW([torch.nn.Parameter(p.detach().float()) for p in start], **options)
    split = GWTAdamW([torch.nn.Parameter(p.detach().clone()) for p in start], weight_rounding="split", **options)
    nearest = GWTAdamW(start, **options)
    norms = []
    for t in range(5):
        for optimizer in (wide, split, nearest):
            step(optimizer, gradients(t, grad_dtype, factor=50.0 if t == 3 else 1.0))
        for p, q in zip(parameters_of(split), parameters_of(wide), strict=True):
            state = split.state[p]
            assert_same_bits(float32_of(p, state), q.detach(), f"step {t}")
            assert_same_bits([p.detach(), low_bits_of(state["weight_low"])], list(split_low(q.detach())))
            assert_same_bits({k: v for k, v in state.items() if k != "weight_low"}, dict(wide.state[q]))
            norms.append(float(state.get("limiter_norm", 0.0)))
    if rule == "gwt" and level:
        growth = [b / a for a, b in zip(norms, norms[len(SHAPES) :], strict=False)]
        assert max(growth) == pytest.approx(1.01, rel=1e-5)  # the limiter was active
    for p, q in zip(parameters_of(nearest), parameters_of(wide), strict=True):
        assert float((p != q.to(BF16)).float().mean()) > 0.2


@backends
def test_split_weights_of_any_layout(backend, device):
    """Check a transposed parameter, whose low bits are contiguous."""
    on = place(backend, device)
    start = parameters([(6, 20)], on, BF16)[0].detach()
    options = {**OPTIONS, "backend": backend}
    wide = GWTAdamW([torch.nn.Parameter(start.float())], **options)
    split = GWTAdamW([torch.nn.Parameter(start.t().contiguous().t())], weight_rounding="split", **options)
    for t in range(3):
        for optimizer in (wide, split):
            step(optimizer, [g.to(parameters_of(optimizer)[0].dtype) for g in gradients(t, BF16, [(6, 20)])])
    (p,), (q,) = parameters_of(split), parameters_of(wide)
    assert not p.is_contiguous()
    assert_same_bits(float32_of(p, split.state[p]), q.detach())


@rules
@backends
def test_split_steps_follow_the_oracle(backend, device, rule):
    optimizer = GWTAdamW(
        [
            {"params": parameters(SHAPES, place(backend, device), BF16), "level": 1},
            {"params": parameters(SHAPES, place(backend, device), BF16, seed=1), "level": 0},
        ],
        **OPTIONS,
        rule=rule,
        weight_rounding="split",
        state_dtype=BF16,
        backend=backend,
    )
    for t in range(3):
        give_gradients(parameters_of(optimizer), seed=t)
        assert checked_step(optimizer) == 2 * len(SHAPES)


def trained_split(**options) -> GWTAdamW:
    optimizer = GWTAdamW(parameters(SHAPES, dtype=BF16), **{**OPTIONS, "weight_rounding": "split"} | options)
    for t in range(2):
        step(optimizer, gradients(t, BF16))
    return optimizer


LOW = torch.zeros(3, 37, dtype=torch.int16)  # as in older checkpoints
SPLIT_MISFITS = {
    "none": (lambda state: state.pop("weight_low"), ("lacks weight_low",)),
    "a number": (lambda state: state.update(weight_low=0), ("lacks weight_low",)),
    "another dtype": (lambda state: state.update(weight_low=LOW.to(torch.int32)), ("torch.int32", "uint8")),
    "floats": (lambda state: state.update(weight_low=LOW.to(BF16)), ("torch.bfloat16", "uint8")),
    "another shape": (lambda state: state.update(weight_low=LOW.t().contiguous()), ("(37, 3, 2)", "(3, 37, 2)")),
    "too few": (lambda state: state.update(weight_low=LOW[:1]), ("(1, 37, 2)", "(3, 37, 2)")),
}


@pytest.mark.parametrize("kind", SPLIT_MISFITS)
def test_bad_low_bits_are_refused_and_change_nothing(kind):
    spoil, words = SPLIT_MISFITS[kind]
    optimizer, other = (trained_split() for _ in range(2))
    state_dict = copy.deepcopy(optimizer.state_dict())
    spoil(state_dict["state"][1])
    with refused(optimizer, ValueError, "parameter 1 of group 0", "weight_low", *words):
        optimizer.load_state_dict(state_dict)
    for o in (optimizer, other):
        step(o, gradients(2, BF16))
    assert_same_bits(snapshot(optimizer), snapshot(other))


def test_int16_low_bits_of_older_checkpoints_are_loaded():
    optimizer = trained_split()
    old = copy.deepcopy(optimizer.state_dict())
    for state in old["state"].values():
        state["weight_low"] = low_bits_of(state["weight_low"]).clone()
        assert (state["weight_low"].dtype, state["weight_low"].any()) == (torch.int16, True)
    start = [torch.nn.Parameter(p.detach().clone()) for p in parameters_of(optimizer)]
    for taken in (old, migrate(old, GWTAdamW(start, **OPTIONS, weight_rounding="split")).state_dict):
        other = GWTAdamW(start, **OPTIONS, weight_rounding="split")
        other.load_state_dict(taken)
        assert_same_bits(snapshot(other), snapshot(optimizer))


def test_int16_low_bits_of_older_pickles_are_loaded():
    optimizer = trained_split()
    old = copy.deepcopy(optimizer)
    for state in old.state.values():
        state["weight_low"] = low_bits_of(state["weight_low"]).clone()
    taken = pickle.loads(pickle.dumps(old))
    assert_same_bits(snapshot(taken), snapshot(optimizer))
    for o in (taken, optimizer):
        step(o, gradients(3, BF16))
    assert_same_bits(snapshot(taken), snapshot(optimizer))


def test_low_bits_are_not_dropped_in_mid_run():
    """Check that missing low bits start as zeros when the option is turned on, and cannot be dropped later."""
    optimizer = trained_split(weight_rounding=None)
    optimizer.param_groups[0]["weight_rounding"] = "split"
    give_gradients(parameters_of(optimizer), seed=5)
    assert checked_step(optimizer) == len(SHAPES)
    assert all(s["weight_low"].any() for s in optimizer.state.values())
    for other in ("nearest", None, "stochastic"):
        optimizer.param_groups[0]["weight_rounding"] = other
        with refused(optimizer, ValueError, "weight_low", "parameter 0 of group 0", "weight_rounding='split'"):
            optimizer.step()
    optimizer.param_groups[0]["weight_rounding"] = "split"
    assert checked_step(optimizer) == len(SHAPES)
