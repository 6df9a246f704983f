"""The fingerprint of a step plan: every change is detected, except new gradients of the same kind."""

from __future__ import annotations

import gc
import weakref
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.utils.flop_counter import FlopCounterMode

from gwt_kernels.backends.triton.native import compiled
from gwt_kernels.core import survey
from gwt_kernels.core.survey import PYTHON, Survey
from gwt_kernels.optim.fingerprint import Fingerprint, Sources
from tests.support.native import needs_compiler


class Held:
    """Parameters with gradients and states, and their fingerprint."""

    def __init__(self, survey: Survey) -> None:
        self.survey = survey
        self.params: list[Tensor] = [torch.nn.Parameter(torch.randn(4, 8)) for _ in range(3)]
        self.state: Any = defaultdict(dict)
        self.options: Any = [(2, "gwt", 3)]
        for p in self.params:
            p.grad = torch.randn(4, 8)
            self.state[p] = {"step": torch.zeros(()), "exp_avg": torch.zeros(4, 2)}
        self.params[2].grad = None
        # Without any processes: only the local part of a shard is compared.
        spec = DTensorSpec(None, (Shard(0),), tensor_meta=TensorMeta(torch.Size((8, 2)), (2, 1), torch.float32))
        self.state[self.params[0]]["exp_avg_sq"] = DTensor(torch.zeros(4, 2), spec, requires_grad=False)
        self.remember()

    def remember(self) -> None:
        self.snapshot = Fingerprint(self.sources(), self.survey)

    def sources(self) -> Sources:
        params = list(self.params)
        return Sources([], self.state, params, params, self.grads(), list(self.options))

    def grads(self) -> list[Tensor | None]:
        return [p.grad for p in self.params]

    def holds(self) -> bool:
        return self.snapshot.holds(self.sources())


@pytest.fixture(params=["guards", "no guards", pytest.param("C", marks=needs_compiler)])
def ways(request, monkeypatch) -> Survey:
    """Return the fingerprint with PyTorch's functions to compare tensors, without them, or in C."""
    assert survey.TensorGuards is not None
    if request.param == "no guards":
        monkeypatch.setattr(survey, "TensorGuards", None)
    return compiled() if request.param == "C" else PYTHON


def test_values_may_change(ways):
    held = Held(ways)
    held.holds()
    with torch.no_grad():
        held.params[0].add_(1)
        held.params[0].grad.mul_(2)
        held.state[held.params[0]]["exp_avg"].add_(1)
    assert held.holds()


def test_other_gradients_of_the_same_kind_are_no_change(ways):
    held = Held(ways)
    for _ in range(3):
        for p in held.params[:2]:
            p.grad = torch.randn(4, 8)
        assert held.holds()


def test_requires_grad_and_strides_of_single_elements_are_no_change(ways):
    held = Held(ways)
    held.params[0].grad = torch.randn(4, 8)
    p = torch.nn.Parameter(torch.randn(1, 8))
    p.grad = torch.randn(1, 8)
    held.params.append(p)
    held.remember()
    p.grad = torch.randn(3, 8)[:1].as_strided((1, 8), (24, 1))
    assert held.holds()
    with torch.autocast("cpu"):
        assert held.holds()
    with FlopCounterMode(display=False):
        assert held.holds()
    assert held.holds()


def test_a_parameter_listed_twice_is_no_change(ways):
    held = Held(ways)
    held.params = [held.params[0]] * 2
    held.remember()
    assert held.holds()
    held.params[0].grad = torch.randn(4, 8).to(torch.float64).float()
    assert held.holds()
    held.params[0].grad = torch.randn(8, 4).t()
    assert not held.holds()


def test_gradients_are_not_kept_alive(ways):
    held = Held(ways)
    assert held.holds()
    ref = weakref.ref(held.params[0].grad)
    held.params[0].grad = None
    gc.collect()
    assert ref() is None


def _set(index: int, make: Callable[[Tensor], Tensor | None]) -> Callable[[Held], None]:
    def change(held: Held) -> None:
        held.params[index].grad = make(held.params[index])

    return change


def _swap(make: Callable[[Tensor], Tensor]) -> Callable[[Held], None]:
    def change(held: Held) -> None:
        held.params[1].data = make(held.params[1].data)

    return change


def _half(held: Held) -> None:
    held.params[0].data = held.params[0].data.half()
    held.params[0].grad = torch.randn(4, 8).half()


def _narrow(held: Held) -> None:
    held.params[0].data = held.params[0].data[:2]  # the same address
    held.params[0].grad = torch.randn(2, 8)


def _rename(own: dict[str, Any], old: str, new: str) -> None:
    own[new] = own.pop(old)


def _move(x: Tensor) -> None:
    x.data = x.data.clone()


def _replace_local(x: DTensor) -> None:
    x._local_tensor = x._local_tensor.clone()


def _exchange(held: Held) -> None:
    states = [held.state.pop(p) for p in held.params]
    p, q, *others = held.params
    held.state.update(zip((q, p, *others), states, strict=True))  # the order of states is unchanged


CHANGES: dict[str, Callable[[Held], object]] = {
    "gradient gone": _set(0, lambda p: None),
    "gradient come": _set(2, torch.randn_like),
    "gradient sparse": _set(0, lambda p: torch.randn(4, 8).to_sparse()),
    "gradient of other strides": _set(0, lambda p: torch.randn(8, 4).t()),
    "gradient that means its negative": _set(0, lambda p: torch._neg_view(torch.randn(4, 8))),
    "parameter moved": _swap(torch.clone),
    "parameter of another dtype": _half,
    "parameter cut short": _narrow,
    "parameter transposed": _swap(lambda data: data.t()),
    "parameter of another shape": _swap(lambda data: data.view(8, 4)),
    "moment replaced": lambda held: held.state[held.params[0]].update(exp_avg=torch.zeros(4, 2)),
    "moment moved": lambda held: _move(held.state[held.params[1]]["exp_avg"]),
    "count moved": lambda held: _move(held.state[held.params[2]]["step"]),
    "shard moved": lambda held: _move(held.state[held.params[0]]["exp_avg_sq"]._local_tensor),
    "shard replaced": lambda held: _replace_local(held.state[held.params[0]]["exp_avg_sq"]),
    "state entry added": lambda held: held.state[held.params[0]].update(limiter_norm=torch.zeros(())),
    "state entry removed": lambda held: held.state[held.params[0]].pop("exp_avg"),
    "state entry renamed": lambda held: _rename(held.state[held.params[0]], "exp_avg", "m"),
    "states of each other": _exchange,
    "state of another": lambda held: held.state.__setitem__(held.params[0].clone(), held.state.pop(held.params[2])),
    "state gone": lambda held: held.state.pop(held.params[1]),
    "option": lambda held: held.options.__setitem__(0, (3, "gwt", 3)),
    "parameter replaced": lambda held: held.params.__setitem__(2, torch.nn.Parameter(torch.randn(4, 8))),
    "parameter added": lambda held: held.params.append(torch.nn.Parameter(torch.randn(4, 8))),
    "order": lambda held: held.params.reverse(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_other_change_is_detected(change, ways):
    held = Held(ways)
    assert held.holds()
    CHANGES[change](held)
    assert not held.holds()
