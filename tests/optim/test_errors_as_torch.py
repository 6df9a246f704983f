"""Bad arguments raise the type of error that torch.optim.AdamW raises on purpose."""

from __future__ import annotations

import fractions
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from gwt_kernels import GWTAdamW

NAN, INF = math.nan, math.inf
NUMBERS: list[Any] = [
    *(
        -1.0,
        -1,
        NAN,
        -INF,
        INF,
        0,
        0.0,
        -0.0,
        1,
        0.5,
        True,
        "0.1",
        b"1",
        None,
        [0.1],
        (0.1,),
        {},
        set(),
        1j,
        pytest.param(object(), id="an object"),
    ),
    *(torch.tensor(x) for x in (0.1, [0.1], [[0.1]], -1.0, NAN, 1, 1j, [0.1, 0.1], [[0.1], [0.1]], [], [1j, 1j])),
    *(
        np.float64(0.1),
        np.float32(-1),
        np.int64(1),
        np.array(0.1),
        np.array([0.1]),
        np.array([0.1, 0.1]),
        np.array("a"),
    ),
    *(fractions.Fraction(1, 2), fractions.Fraction(-1, 2), 10**400, -(10**400), torch.empty((), device="meta")),
]
PAIRS: list[Any] = [
    *((x, 0.9) for x in (1.0, -0.1, NAN, INF, "a", None, 1j, [0.9], torch.tensor(1.5))),
    *((0.9, x) for x in (1.0, -0.1, NAN, INF, "a", None, 1j, [0.9])),
    *(0.9, None, "ab", pytest.param(object(), id="an object"), 1j, [0.9, 0.99]),
    *((torch.tensor(0.9), torch.tensor(0.99)), (np.float64(0.9), 0.5)),
]
STRICTER = {"inf", "True", "an integer of many digits", "a meta tensor"}
"""Values that AdamW's constructor accepts, or fails on by accident, and GWTAdamW refuses by name."""
CHOSEN = (TypeError, ValueError)
"""Errors that AdamW raises on purpose; others come from the first operator that gets the value."""


def weights() -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(4, 8)), nn.Parameter(torch.ones(8))]


def raised(call: Callable[[], object]) -> type[Exception] | None:
    try:
        call()
    except Exception as error:
        return type(error)
    return None


def called(value: Any) -> str:
    if isinstance(value, int) and abs(value) > 10**9:
        return "an integer of many digits"
    return "a meta tensor" if isinstance(value, torch.Tensor) and value.is_meta else str(value)


CASES = [(option, value) for option in ("lr", "eps", "weight_decay") for value in NUMBERS]
CASES += [("betas", value) for value in PAIRS]


@pytest.mark.parametrize(("option", "value"), CASES, ids=lambda x: x if isinstance(x, str) else repr(x)[:40])
def test_bad_numbers(option: str, value: Any) -> None:
    theirs = raised(lambda: torch.optim.AdamW(weights(), **{option: value}))
    for build in (
        lambda: GWTAdamW(weights(), level=0, **{option: value}),
        lambda: GWTAdamW([{"params": weights(), "level": 0, option: value}]),
        lambda: GWTAdamW(weights(), level=0).add_param_group({"params": weights(), option: value}),
    ):
        ours = raised(build)
        if theirs in CHOSEN:
            assert ours is theirs
        elif theirs is not None or called(value) in STRICTER or (option == "betas" and INF in value):
            assert ours in CHOSEN
            with pytest.raises(CHOSEN, match=f"^{option}"):
                build()
        else:
            assert ours is None


def test_numpy_and_torch_scalars_count_as_numbers() -> None:
    steps = []
    for lr in (0.1, np.array(0.1), np.array([0.1]), torch.tensor(0.1, dtype=torch.float64), np.float64(0.1)):
        p = nn.Parameter(torch.ones(4, 8))
        p.grad = torch.arange(32.0).reshape(4, 8)
        GWTAdamW([p], lr=lr).step()
        steps.append(p.detach())
    assert all(torch.equal(step, steps[0]) for step in steps)
    assert not torch.equal(steps[0], torch.ones(4, 8))


def with_the_same_twice(optimizer: type[torch.optim.Optimizer]) -> torch.optim.Optimizer:
    (p, _) = weights()
    return optimizer([p, p])  # warns


PARAMS: dict[str, Callable[[nn.Parameter, nn.Parameter], Any]] = {
    "nothing": lambda p, q: [],
    "None": lambda p, q: None,
    "a number": lambda p, q: 3,
    "a module": lambda p, q: nn.Linear(2, 2),
    "a tensor": lambda p, q: p,
    "a dict": lambda p, q: {"params": [p]},
    "an empty dict": lambda p, q: {},
    "a string": lambda p, q: "abc",
    "bytes": lambda p, q: b"ab",
    "strings": lambda p, q: ["a"],
    "arrays": lambda p, q: [np.ones(3)],
    "Nones": lambda p, q: [None],
    "lists": lambda p, q: [[p]],
    "a tensor and a group": lambda p, q: [p, {"params": [q]}],
    "a group and a tensor": lambda p, q: [{"params": [q]}, p],
    "no params": lambda p, q: [{"lr": 0.1}],
    "params of None": lambda p, q: [{"params": None}],
    "params of a string": lambda p, q: [{"params": "abc"}],
    "a set in a group": lambda p, q: [{"params": {p, q}}],
    "the same in two groups": lambda p, q: [{"params": [p]}, {"params": [p]}],
    "no leaf": lambda p, q: [p * 2],
    "names for some": lambda p, q: [("a", p), q],
    "a set": lambda p, q: {p, q},
    "a generator": lambda p, q: (each for each in (p, q)),
    "an empty group": lambda p, q: [{"params": []}],
    "a group of one tensor": lambda p, q: [{"params": p}],
    "names": lambda p, q: [("a", p), ("b", q)],
    "the same name twice": lambda p, q: [("a", p), ("a", q)],
    "names that are no strings": lambda p, q: [(1, p), (("b", 2), q)],
    "plain tensors": lambda p, q: [torch.ones(4, 8)],
    "the same twice": lambda p, q: [p, p],
}


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
@pytest.mark.parametrize("kind", PARAMS)
def test_bad_params(kind: str) -> None:
    def step(optimizer: torch.optim.Optimizer) -> None:
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.ones_like(p)
        optimizer.step()

    p, q = weights()
    theirs = raised(lambda: step(torch.optim.AdamW(PARAMS[kind](p, q))))
    assert raised(lambda: step(GWTAdamW(PARAMS[kind](p, q), level=0))) is theirs


GROUPS: dict[str, Callable[[nn.Parameter, nn.Parameter], Any]] = {
    "a tensor": lambda p, q: q,
    "None": lambda p, q: None,
    "a list": lambda p, q: [q],
    "no params": lambda p, q: {"lr": 0.1},
    "the same": lambda p, q: {"params": [p]},
    "a set": lambda p, q: {"params": {q}},
    "strings": lambda p, q: {"params": ["a"]},
    "None in it": lambda p, q: {"params": [None]},
    "no leaf": lambda p, q: {"params": [q * 2]},
    "something of the user's": lambda p, q: {"params": [q], "note": "x"},
}


@pytest.mark.parametrize("kind", GROUPS)
def test_bad_groups_are_refused_and_not_added(kind: str) -> None:
    kinds = []
    for make in (torch.optim.AdamW, lambda params: GWTAdamW(params, level=0)):
        p, q = weights()
        optimizer = make([p])
        kinds.append(raised(lambda: optimizer.add_param_group(GROUPS[kind](p, q))))  # noqa: B023
        assert len(optimizer.param_groups) == (1 if kinds[-1] else 2)
    assert kinds[0] is kinds[1]
