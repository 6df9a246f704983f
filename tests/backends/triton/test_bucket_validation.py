"""Validation of buckets: tensors are checked before raw pointers reach a kernel, and again when replaced."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gwt_kernels import GWTAdamW
from gwt_kernels.backends import choice
from gwt_kernels.functional import Hyper, gwt_adamw_
from gwt_kernels.optim.options import check_group


def bucket(device: torch.device, **replaced: Any) -> dict[str, Any]:
    shapes = [(4, 16), (2, 8)]
    arrays = {
        "params": [torch.ones(s, device=device) for s in shapes],
        "grads": [torch.ones(s, device=device) for s in shapes],
        "exp_avgs": [torch.zeros(s[0], s[1] // 4, device=device) for s in shapes],
        "exp_avg_sqs": [torch.zeros(s[0], s[1] // 4, device=device) for s in shapes],
        "limiter_norms": [torch.zeros((), device=device) for _ in shapes],
        "steps": [1, 1],
        "hypers": [Hyper(), Hyper()],
    }
    for name, change in replaced.items():
        arrays[name][1] = change(arrays[name][1])
    return arrays


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("params", torch.Tensor.bfloat16),
        ("grads", torch.Tensor.half),
        ("exp_avgs", torch.Tensor.bfloat16),
        ("exp_avg_sqs", torch.Tensor.bfloat16),
        ("limiter_norms", torch.Tensor.half),
        ("grads", lambda x: x[:1]),
        ("exp_avgs", lambda x: x[:, :1]),
        ("exp_avg_sqs", lambda x: x.t().contiguous().t()),
    ],
)
def test_unfit_tensors_are_refused_and_nothing_changes(name: str, change: Any, device: torch.device) -> None:
    arrays = bucket(device, **{name: change})
    with pytest.raises(ValueError, match=r"dtype|shape|contiguous"):
        gwt_adamw_(**arrays, level=2, backend="triton")
    assert all(torch.equal(p, torch.ones_like(p)) for p in arrays["params"])
    gwt_adamw_(**bucket(device), level=2, backend="triton")  # control


@pytest.mark.parametrize("names", [["grads"], ["exp_avgs", "exp_avg_sqs"]])
def test_float64_gradients_or_moments_are_refused_by_name_and_taken_by_choice(names, device: torch.device) -> None:
    arrays = bucket(device)
    arrays |= {name: [x.double() for x in arrays[name]] for name in names}
    with pytest.raises(RuntimeError, match=r"float64.*backend='torch'"):
        gwt_adamw_(**arrays, level=2, backend="triton")
    assert all(torch.equal(p, torch.ones_like(p)) for p in arrays["params"])
    gwt_adamw_(**arrays, level=2)  # by default it uses the torch backend
    assert not any(torch.equal(p, torch.ones_like(p)) for p in arrays["params"])


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("limiter_norms", lambda norm: None, "limiter_norms"),
        ("hypers", lambda hyper: hyper._replace(norm_growth_limit=None), "norm_growth_limit"),
    ],
)
def test_a_limiter_for_some_tensors_only_is_refused(backend, name, change, words, device: torch.device) -> None:
    arrays = bucket(device, **{name: change})
    with pytest.raises(ValueError, match=words):
        gwt_adamw_(**arrays, level=2, backend=backend)
    assert all(torch.equal(p, torch.ones_like(p)) for p in arrays["params"])


@pytest.mark.parametrize("change", [torch.Tensor.bfloat16, lambda x: x[:1].clone()])
def test_replaced_moments_are_validated_again(change: Any, device: torch.device) -> None:
    p = torch.nn.Parameter(torch.ones(64, 32, device=device))
    optimizer = GWTAdamW([p], backend="triton")
    for _ in range(2):
        p.grad = torch.ones_like(p)
        optimizer.step()
    before = p.detach().clone()
    optimizer.state[p]["exp_avg"].data = change(optimizer.state[p]["exp_avg"])
    with pytest.raises(ValueError, match=r"dtype|shape"):
        optimizer.step()
    assert torch.equal(p, before)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_nan_in_a_gradient_spreads_through_the_limiter(backend: str, device: torch.device) -> None:
    p = torch.nn.Parameter(torch.ones(4, 16, device=device))
    q = torch.nn.Parameter(torch.ones(4, 16, device=device))
    optimizer = GWTAdamW([p, q], lr=0.1, backend=backend)
    for bad in (1.0, float("nan")):
        p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
        p.grad[2, 3] = bad
        optimizer.step()
    assert p.isnan().all()
    assert q.isfinite().all()


def test_negated_views_are_taken_with_their_sign(device: torch.device) -> None:
    weights = []
    for negated in (False, True):
        p = torch.nn.Parameter(torch.ones(4, 16, device=device))
        g = torch.randn(4, 16, generator=torch.Generator().manual_seed(0)).to(device)
        p.grad = torch._neg_view(g.neg()) if negated else g
        GWTAdamW([p], lr=0.1, level=0, backend="triton").step()
        weights.append(p.detach().clone())
    assert torch.equal(*weights)


def test_the_interpreter_refuses_device_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "interpreted", lambda: True)
    choice.triton_obstacle.cache_clear()
    try:
        cuda = torch.device("cuda")
        assert choice.resolve(None, cuda, torch.float32, 2) == "torch"
        with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
            choice.resolve("triton", cuda, torch.float32, 2)
    finally:
        choice.triton_obstacle.cache_clear()


@pytest.mark.parametrize("option", ["lr", "eps", "weight_decay", "scale", "norm_growth_limit"])
def test_numbers_beyond_float32_are_refused(option: str) -> None:
    group = dict(GWTAdamW([torch.zeros(2, 8, requires_grad=True)]).param_groups[0])
    check_group(group)
    with pytest.raises(ValueError, match=f"{option} must be finite"):
        check_group({**group, option: 1e39})
