"""Runs of GWTAdamW for tests: models, steps judged by the C oracle, and comparisons bit for bit."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gwt_kernels import GWTAdamW
from gwt_kernels.formats.split import join_low
from gwt_kernels.optim.options import hyper_of
from gwt_kernels.optim.state import low_bits_of
from tests.support import interpreter, reference, rounding
from tests.support.steps import assert_within

BACKENDS = ("torch", "compiled", "triton")
CPU = torch.device("cpu")
backends = pytest.mark.parametrize("backend", BACKENDS)


def place(backend: str, device: torch.device) -> torch.device:
    """Return the device on which a backend needs its tensors; ``device`` is the fixture."""
    return device if backend == "triton" else CPU


def parameters(
    shapes: Iterable[Sequence[int]], on: torch.device = CPU, dtype: torch.dtype = torch.float32, seed: int = 0
) -> list[torch.nn.Parameter]:
    """Return normally distributed random parameters."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(tuple(s), generator=generator).to(on, dtype)) for s in shapes]


def give_gradients(params: Iterable[Tensor], seed: int, factor: float = 1.0) -> None:
    """Allocate new gradients, with an offset so that the mean of a block is not near 0."""
    generator = torch.Generator().manual_seed(1000 + seed)
    for p in params:
        g = factor * (torch.randn(tuple(p.shape), generator=generator, dtype=torch.float64) + 0.5)
        p.grad = g.to(p.device, p.dtype)


def train(
    optimizer: GWTAdamW,
    steps: Iterable[int],
    before: Callable[[int], object] = lambda t: None,
    params: Sequence[Tensor] | None = None,
) -> None:
    """Take steps with gradients that depend only on the step ``t``."""
    for t in steps:
        give_gradients(params or parameters_of(optimizer), seed=t)
        before(t)
        optimizer.step()


def parameters_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Return all parameters, group by group."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def snapshot(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Copy everything that a step or a refused call might change; parameters without state have an empty one."""
    params = parameters_of(optimizer)
    return {
        "params": [p.detach().clone() for p in params],
        "state": [copy.deepcopy(dict(optimizer.state.get(p, {}))) for p in params],
        "n_states": sum(map(bool, optimizer.state.values())),
        "groups": [{k: copy.deepcopy(v) for k, v in g.items() if k != "params"} for g in optimizer.param_groups],
        "sizes": [len(g["params"]) for g in optimizer.param_groups],
    }


def results(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return only parameters and state."""
    return {k: v for k, v in snapshot(optimizer).items() if k in ("params", "state")}


def assert_same_bits(a: Any, b: Any, where: str = "") -> None:
    """Raise AssertionError unless two nests of dicts, sequences and tensors are equal in bits and dtypes."""
    assert type(a) is type(b), f"{where}: {type(a)} and {type(b)}"
    if isinstance(a, Tensor):
        assert (a.dtype, a.shape, a.device) == (b.dtype, b.shape, b.device), where
        if a.is_meta:
            return
        bits = [x.detach().contiguous().reshape(-1).view(torch.uint8) for x in (a, b)]
        assert torch.equal(*bits), f"{where}: {a} and {b}"
    elif isinstance(a, dict):
        assert list(a) == list(b), f"{where}: keys {list(a)} and {list(b)}"
        for key in a:
            assert_same_bits(a[key], b[key], f"{where}[{key!r}]")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, pair in enumerate(zip(a, b, strict=True)):
            assert_same_bits(*pair, f"{where}[{i}]")
    else:
        assert a == b or (a != a and b != b), f"{where}: {a!r} and {b!r}"


def assert_differ(a: Any, b: Any) -> None:
    """Raise AssertionError if two nests are equal bit for bit: the control of a comparison."""
    with pytest.raises(AssertionError):
        assert_same_bits(a, b)


def assert_left_to_adamw(optimizer: torch.optim.Optimizer, **options: Any) -> None:
    """Assert that a step updates the second group, which is not transformed, as AdamW with these options."""
    own = optimizer.param_groups[1]["params"]
    alone = copy.deepcopy(own)
    other = GWTAdamW(alone, level=0, **options)
    for p, q in zip(own, alone, strict=True):
        p.grad = q.grad = torch.randn(p.shape)
    optimizer.step()
    other.step()
    assert all(torch.equal(p, q) for p, q in zip(own, alone, strict=True))


@contextlib.contextmanager
def refused(optimizer: torch.optim.Optimizer, error: type[Exception], *words: str) -> Iterator[None]:
    """Check that the block raises ``error`` with all the words in its message, and changes nothing."""
    before = snapshot(optimizer)
    with pytest.raises(error) as caught:
        yield
    assert type(caught.value) is error
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in {str(caught.value)!r}"
    assert_same_bits(snapshot(optimizer), before)


def checked_step(optimizer: GWTAdamW, factor: float = 1.0) -> int:
    """Take a step of Haar groups, and compare every parameter and state with the C oracle in float64.

    Split weights are compared as the float32 numbers that they represent; ``factor`` is the clip factor of the
    gradients.

    Returns:
        Number of parameters compared with the oracle; those without gradient have to be unchanged.
    """
    before = []
    for group in optimizer.param_groups:
        for p in group["params"]:
            state = {k: v.clone() for k, v in optimizer.state.get(p, {}).items()}
            before.append((group, p, _whole(p, state), None if p.grad is None else _numpy(p.grad), state))
    with interpreter.like_a_gpu():
        optimizer.step()
    compared = 0
    for i, (group, p, p_old, g, state) in enumerate(before):
        if g is None:
            new = dict(optimizer.state.get(p, {}))
            assert_same_bits([_whole(p, new), new], [p_old, state], f"parameter {i}")
        else:
            _compare(f"parameter {i}", group, p, _numpy(p_old), np.asarray(g * factor), state, optimizer.state[p])
            compared += 1
    return compared


def _compare(
    name: str,
    group: dict[str, Any],
    p: Tensor,
    p_exact: np.ndarray,
    g: np.ndarray,
    state: dict[str, Tensor],
    new: dict[str, Tensor],
) -> None:
    level, gamma = group["level"], group["norm_growth_limit"] if group["level"] else None
    step = int(state["step"]) + 1 if state else 1
    assert new["step"].dtype == torch.float64
    assert new["step"].shape == ()
    assert new["step"].item() == step, name
    zeros = np.zeros(reference.moment_shape(g.shape, level))
    m, v = (_numpy(state[k]) if state else zeros.copy() for k in ("exp_avg", "exp_avg_sq"))
    norm = float(state.get("limiter_norm", 0.0))
    hyper = hyper_of(group)
    assert ("limiter_norm" in new) == (gamma is not None) or "limiter_norm" in state
    if g.size == 0:
        assert not state or norm == 0
        return
    u = rounding.unit(p.dtype) * (16 if p.dtype == torch.float64 else 1)  # the oracle rounds too
    rows = [np.atleast_1d(x) for x in (p_exact, g, m, v)]
    with np.errstate(invalid="ignore"):  # 0 / 0 in the relative error of a norm that is 0
        bounds = rounding.step_bounds(*rows, None if gamma is None else norm, hyper, step, level, u, group["rule"])
    options = {k: group[k] for k in ("betas", "eps", "weight_decay", "scale", "maximize", "rule", "correct_bias")}
    new_norm = reference.adamw_step(
        p_exact, g, m, v, norm, level=level, step=step, lr=hyper.lr, norm_growth_limit=gamma, **options
    )
    random_weights = group["weight_rounding"] == "stochastic"
    random_moments = new["exp_avg"].dtype == torch.bfloat16
    for what, got, exact, bound, at_random in (
        ("weights", _whole(p, new), p_exact, bounds.p, random_weights),
        ("exp_avg", new["exp_avg"], m, bounds.exp_avg, random_moments),
        ("exp_avg_sq", new["exp_avg_sq"], v, bounds.exp_avg_sq, random_moments),
    ):
        bound = rounding.widen(bound.reshape(exact.shape), exact, got.dtype, p.dtype, at_random)
        assert_within(_numpy(got), exact, bound, f"{what} of {name} at step {step}")
    if gamma is not None and new_norm == 0:
        assert new["limiter_norm"].item() == 0, name
    elif gamma is not None:
        assert_within(_numpy(new["limiter_norm"]), np.array(new_norm), np.array(bounds.norm), f"norm of {name}")


def _whole(p: Tensor, state: dict[str, Tensor]) -> Tensor:
    """Copy the weights; split weights are joined to float32."""
    return join_low(p.detach(), low_bits_of(state["weight_low"])) if "weight_low" in state else p.detach().clone()


def _numpy(x: Tensor) -> np.ndarray:
    return np.array(x.detach().to("cpu", torch.float64).numpy(), order="C")
