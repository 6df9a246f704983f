"""Ideas of PyTorch's test suite of schedulers: every scheduler gives GWTAdamW the rates that it gives AdamW."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler, swa_utils
from torch.optim.lr_scheduler import ReduceLROnPlateau

from gwt_kernels import GWTAdamW
from tests.support.runs import (
    assert_differ,
    assert_same_bits,
    give_gradients,
    parameters,
    parameters_of,
    results,
    train,
)


def halved(t: int) -> float:
    return 0.5**t


def damped(t: int) -> float:
    return 0.9


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, halved),
    "LambdaLR, one a group": lambda o: lr_scheduler.LambdaLR(o, [halved, damped]),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, damped),
    "StepLR": lambda o: lr_scheduler.StepLR(o, step_size=3, gamma=0.1),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, milestones=[2, 5, 5, 9], gamma=0.1),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, factor=0.5, total_iters=5),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, start_factor=0.5, total_iters=5),
    "LinearLR to nothing": lambda o: lr_scheduler.LinearLR(o, 1 / 3, 0.0, total_iters=5),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, gamma=0.9),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, total_iters=5, power=0.9),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=4, eta_min=1e-10),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=3, T_mult=2),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.3, step_size_up=3, mode="triangular2"),
    "CyclicLR, exponential": lambda o: lr_scheduler.CyclicLR(
        o, 0.01, [0.3, 0.2], step_size_up=2, step_size_down=4, mode="exp_range", gamma=0.9, cycle_momentum=False
    ),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.5, total_steps=14),
    "OneCycleLR, three phases": lambda o: lr_scheduler.OneCycleLR(
        o, [0.5, 0.25], epochs=2, steps_per_epoch=7, three_phase=True, anneal_strategy="linear"
    ),
    "ReduceLROnPlateau": lambda o: ReduceLROnPlateau(o, patience=1, cooldown=1, factor=0.5, min_lr=[0.01, 0.001]),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.CosineAnnealingLR(o, 7)], [3]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.1, total_iters=4), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "SWALR": lambda o: swa_utils.SWALR(o, swa_lr=[0.05, 0.01], anneal_epochs=5),
}
LOSSES = [1.0, 0.9, 0.95, 0.96, 0.97, 0.5, 0.6, 0.6, 0.6, 0.6, 0.6, 0.6]
"""Losses for ReduceLROnPlateau, which twice fall and then do not."""
SHAPES = [(4, 8), (5,)]

each_scheduler = pytest.mark.parametrize("name", SCHEDULERS)
each_rate = pytest.mark.parametrize("kind", [float, torch.tensor], ids=["float", "tensor"])


def test_every_scheduler_of_torch_is_here() -> None:
    tried = {name.split(",")[0] for name in SCHEDULERS}
    assert set(lr_scheduler.__all__) - {"LRScheduler"} <= tried


def build(
    make: Callable[..., torch.optim.Optimizer], kind: Callable[[float], Any] = float
) -> torch.optim.Optimizer:
    matrix, vector = parameters(SHAPES)
    return make([{"params": [matrix]}, {"params": [vector], "lr": kind(0.05)}], lr=kind(0.1))


def ours(groups: Any, **options: Any) -> GWTAdamW:
    return GWTAdamW(groups, level=1, **options)


def advance(optimizer: torch.optim.Optimizer, scheduler: Any, begin: int, end: int) -> list[Any]:
    """Record the groups' options at each step, as numbers, before the scheduler's step."""
    seen = []
    for t in range(begin, end):
        give_gradients(parameters_of(optimizer), seed=t)
        optimizer.step()
        seen.append([(float(g["lr"]), tuple(map(float, g["betas"]))) for g in optimizer.param_groups])
        scheduler.step(*([LOSSES[t]] if isinstance(scheduler, ReduceLROnPlateau) else []))
    return seen


@each_scheduler
@each_rate
def test_rates_are_those_of_adamw(name: str, kind: Callable[[float], Any]) -> None:
    runs = []
    for make in (ours, torch.optim.AdamW):
        optimizer = build(make, kind)
        runs.append(advance(optimizer, SCHEDULERS[name](optimizer), 0, 12))
        assert all(
            isinstance(g["lr"], torch.Tensor if kind is torch.tensor else float) for g in optimizer.param_groups
        )
    assert runs[0] == runs[1]
    assert len({str(seen) for seen in runs[0]}) > 1


@each_scheduler
@each_rate
def test_the_step_uses_the_scheduled_rate(name: str, kind: Callable[[float], Any]) -> None:
    scheduled, by_hand = build(ours, kind), build(ours, float)
    seen = advance(scheduled, SCHEDULERS[name](scheduled), 0, 8)
    for t, groups in enumerate(seen):
        for group, (lr, betas) in zip(by_hand.param_groups, groups, strict=True):
            group["lr"], group["betas"] = max(lr, 0.0), betas
        train(by_hand, [t])
    assert_same_bits(results(scheduled), results(by_hand))


@each_scheduler
@each_rate
def test_saving_and_loading_in_the_middle(name: str, kind: Callable[[float], Any]) -> None:
    whole = build(ours, kind)
    schedule = SCHEDULERS[name](whole)
    advance(whole, schedule, 0, 5)
    saved = io.BytesIO()
    torch.save([whole.state_dict(), schedule.state_dict()], saved)
    saved.seek(0)

    resumed = build(ours, kind)
    schedule_resumed = SCHEDULERS[name](resumed)
    state, state_of_schedule = torch.load(saved, weights_only=False)
    resumed.load_state_dict(state)
    schedule_resumed.load_state_dict(state_of_schedule)
    with torch.no_grad():
        for p, q in zip(parameters_of(resumed), parameters_of(whole), strict=True):
            p.copy_(q)
    assert advance(resumed, schedule_resumed, 5, 10) == advance(whole, schedule, 5, 10)
    assert_same_bits(results(resumed), results(whole))


@each_scheduler
@pytest.mark.parametrize(
    "way", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"]
)
def test_a_copy_of_a_scheduled_optimizer_steps_on_its_own(name: str, way: Callable[[Any], Any]) -> None:
    """Check that copies do not keep the ``step`` bound to the original by which a scheduler replaces it."""
    optimizer = build(ours)
    schedule = SCHEDULERS[name](optimizer)
    advance(optimizer, schedule, 0, 3)
    other = way(optimizer)
    before = results(optimizer)
    train(other, [3])
    assert_same_bits(results(optimizer), before)
    assert_differ(results(other), before)
    train(optimizer, [3])
    assert_same_bits(results(other), results(optimizer))


@each_scheduler
@pytest.mark.parametrize("stepped", [True, False])
def test_the_order_of_steps_is_noticed(name: str, stepped: bool) -> None:
    """Check the scheduler's warning, for which it asks the optimizer whether it has stepped first."""
    complaints = []
    for make in (ours, torch.optim.AdamW):
        optimizer = build(make)
        schedule = SCHEDULERS[name](optimizer)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if stepped:
                train(optimizer, [0])
            schedule.step(*([1.0] if isinstance(schedule, ReduceLROnPlateau) else []))
        complaints.append(sum("before `optimizer.step()`" in str(w.message) for w in caught))
    assert complaints[0] == complaints[1]
    if name in ("StepLR", "OneCycleLR"):
        assert (complaints[0] > 0) is not stepped


def test_a_schedule_resumed_from_an_epoch() -> None:
    for last in (-1, 4):
        rates = []
        for make in (ours, torch.optim.AdamW):
            optimizer = build(make)
            for group in optimizer.param_groups if last >= 0 else []:
                group["initial_lr"] = 2 * group["lr"]
            rates.append(advance(optimizer, lr_scheduler.StepLR(optimizer, 3, 0.5, last_epoch=last), 0, 6))
        assert rates[0] == rates[1]
    with pytest.raises(KeyError, match="initial_lr"):
        lr_scheduler.StepLR(build(ours), 3, last_epoch=4)


def test_a_group_added_under_a_schedule() -> None:
    rates = []
    for make in (ours, torch.optim.AdamW):
        optimizer = build(make)
        schedule = lr_scheduler.LambdaLR(optimizer, halved)
        seen = advance(optimizer, schedule, 0, 2)
        added = {"params": parameters([(6, 8)], seed=1), "lr": 0.2, "initial_lr": 0.2}
        optimizer.add_param_group(added)
        schedule.base_lrs.append(0.2)
        schedule.lr_lambdas.append(halved)
        rates.append(seen + advance(optimizer, schedule, 2, 5))
    assert rates[0] == rates[1]
    assert [len(groups) for groups in rates[0]] == [2, 2, 3, 3, 3]
