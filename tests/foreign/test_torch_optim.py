"""Ideas of PyTorch's test suite of optimizers, applied to GWTAdamW through the OptimizerInfo that torch ships."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import optimizer as torch_optimizer
from torch.profiler import profile

from gwt_kernels import GWTAdamW
from tests.foreign.optim_info import INFO, INPUTS, SHAPES, common, each_input, error_inputs, make
from tests.support.runs import (
    assert_differ,
    assert_same_bits,
    give_gradients,
    parameters,
    parameters_of,
    results,
    train,
)


def regression(weight: Tensor, bias: Tensor) -> Tensor:
    x = torch.arange(5.0) / 5
    return (weight @ x + bias).square().sum()


def closure_of(optimizer: GWTAdamW, params: list[Parameter]) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = regression(*params)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    return closure


def assert_goes_the_right_way(optimizer: GWTAdamW, params: list[Parameter], schedulers: Any = ()) -> None:
    made = [schedule(optimizer) for schedule in schedulers]
    closure = closure_of(optimizer, params)
    before = float(closure().detach())
    for _ in range(20):
        loss = optimizer.step(closure).detach()
        for schedule in made:
            schedule.step(*([loss] if isinstance(schedule, torch.optim.lr_scheduler.ReduceLROnPlateau) else []))
    after = float(closure().detach())
    assert (after > before) if optimizer.param_groups[0]["maximize"] else (after < before)


ERRORS = error_inputs("cpu", torch.float32)


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: e.optimizer_error_input.desc)
def test_shared_errors(error: Any) -> None:
    sample = error.optimizer_error_input
    expect = pytest.warns if issubclass(error.error_type, Warning) else pytest.raises
    with expect(error.error_type, match=error.error_regex):
        make(sample, sample.params)


def test_all_shared_errors_are_tested() -> None:
    assert len(common.get_error_inputs_for_all_optims("cpu", torch.float32)) >= 6


def test_sparse_and_complex_are_refused() -> None:
    with pytest.raises(TypeError, match="real floating-point"):
        GWTAdamW([Parameter(torch.ones(10, 5, dtype=torch.complex64))])
    (p,) = params = parameters(SHAPES[:1])
    optimizer = GWTAdamW(params)
    p.grad = torch.ones(10, 5).to_sparse()
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        optimizer.step()


@each_input
@pytest.mark.parametrize("contiguous", [True, False], ids=["contiguous", "strided"])
def test_loss_decreases(sample: Any, contiguous: bool) -> None:
    for schedulers in ((), *INFO.scheduler_inputs):
        params = parameters(SHAPES)
        if not contiguous:
            params = [Parameter(torch.stack([p.detach(), torch.zeros_like(p)], -1)[..., 0]) for p in params]
            assert not any(p.is_contiguous() for p in params)
        assert_goes_the_right_way(make(sample, params), params, schedulers)


@each_input
def test_loss_decreases_with_a_rate_per_group(sample: Any) -> None:
    for schedulers in INFO.scheduler_inputs:
        weight, bias = params = parameters(SHAPES)
        groups = [{"params": [weight]}, {"params": [bias], "lr": 0.01}]
        assert_goes_the_right_way(make(sample, groups), params, schedulers)


@each_input
@pytest.mark.parametrize("dimensions", [0, 1])
def test_a_tensor_as_rate_is_that_rate(sample: Any, dimensions: int) -> None:
    for schedulers in ((), *INFO.scheduler_inputs):
        as_tensor, as_float = (
            make(sample, lr=lr) for lr in (torch.tensor(0.0625).reshape([1] * dimensions), 0.0625)
        )
        schedules = [[schedule(o) for schedule in schedulers] for o in (as_tensor, as_float)]
        for t in range(5):
            for optimizer, made in zip((as_tensor, as_float), schedules, strict=True):
                train(optimizer, [t])
                for schedule in made:
                    plateau = isinstance(schedule, torch.optim.lr_scheduler.ReduceLROnPlateau)
                    schedule.step(*([1.0] if plateau else []))
            # Schedulers compute in the rate's own dtype, here float32.
            assert float(as_tensor.param_groups[0]["lr"]) == pytest.approx(as_float.param_groups[0]["lr"], rel=1e-6)
        assert isinstance(as_tensor.param_groups[0]["lr"], Tensor)
        if schedulers:
            for a, b in zip(parameters_of(as_tensor), parameters_of(as_float), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        else:
            assert_same_bits(results(as_tensor), results(as_float))


@each_input
def test_weight_decay_per_group(sample: Any) -> None:
    decayed, plain = params = parameters([(10, 5), (10, 5)])
    before = [p.detach().clone() for p in params]
    groups = [{"params": [decayed], "weight_decay": 0.5}, {"params": [plain], "weight_decay": 0.0}]
    optimizer = make(sample, groups)
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    lr = float(optimizer.param_groups[0]["lr"])
    torch.testing.assert_close(decayed.detach(), before[0] * (1 - lr * 0.5))
    assert_differ(decayed.detach(), before[0])
    assert_same_bits(plain.detach(), before[1])


@each_input
def test_rate_per_group(sample: Any) -> None:
    still, moving, by_default = params = parameters([(10, 5)] * 3)
    before = [p.detach().clone() for p in params]
    groups = [{"params": [still], "lr": 0.0}, {"params": [moving], "lr": 0.5}, {"params": [by_default]}]
    train(make(sample, groups, lr=0.0), range(3))
    assert_same_bits([still.detach(), by_default.detach()], [before[0], before[2]])
    assert (moving != before[1]).all()


@each_input
def test_no_change_without_gradients(sample: Any) -> None:
    params = parameters([*SHAPES, (0, 5), (4, 0)])
    optimizer = make(sample, params[:2])
    before = results(optimizer)
    optimizer.step()
    assert optimizer.step(lambda: 3.0) == 3.0
    assert_same_bits(results(optimizer), before)

    empty = make(sample, params[2:], level=0)
    for p in params[2:]:
        p.grad = torch.zeros_like(p)
    empty.step()
    assert [tuple(p.shape) for p in params[2:]] == [(0, 5), (4, 0)]


@each_input
def test_zero_gradients_change_nothing_and_later_steps_work(sample: Any) -> None:
    optimizer = make(sample, weight_decay=0.0)
    params = parameters_of(optimizer)
    before = [p.detach().clone() for p in params]
    for _ in range(2):
        for p in params:
            p.grad = torch.zeros_like(p)
        optimizer.step()
    assert_same_bits([p.detach() for p in params], before)
    train(optimizer, range(2))
    assert all(torch.isfinite(p).all() and (p != q).any() for p, q in zip(params, before, strict=True))


@each_input
def test_repr(sample: Any) -> None:
    text = repr(make(sample))
    assert text.startswith("GWTAdamW (\nParameter Group 0\n")
    assert all(f"    {name}: " in text for name in ("lr", "betas", "level", "scale", "rule", "wavelet"))


@each_input
@pytest.mark.parametrize("named", [False, True], ids=["unnamed", "named"])
def test_a_loaded_state_continues_its_run(sample: Any, named: bool) -> None:
    def start() -> GWTAdamW:
        params = parameters(SHAPES)
        return make(sample, list(zip(("weight", "bias"), params, strict=True)) if named else params)

    first, second = start(), start()
    train(first, range(3))
    saved = io.BytesIO()
    torch.save(first.state_dict(), saved)
    saved.seek(0)
    loaded = torch.load(saved, weights_only=True)
    assert_same_bits(loaded, first.state_dict())
    second.load_state_dict(loaded)
    with torch.no_grad():
        for p, q in zip(parameters_of(second), parameters_of(first), strict=True):
            p.copy_(q)
    assert_same_bits(second.state_dict(), first.state_dict())
    for optimizer in (first, second):
        train(optimizer, range(3, 6))
    assert_same_bits(results(second), results(first))


@each_input
def test_a_state_of_an_older_version_is_loaded(sample: Any) -> None:
    first = make(sample)
    second = make(sample, copy.deepcopy(parameters_of(first)))
    train(first, range(2))
    older = copy.deepcopy(first.state_dict())
    for group in older["param_groups"]:
        for flag in INFO.not_og_supported_flags:
            if flag not in sample.kwargs or flag == "backend":
                del group[flag]
    train(second, range(2))
    second.load_state_dict(older)
    for optimizer in (first, second):
        train(optimizer, range(2, 4))
    assert_same_bits(results(second), results(first))


@each_input
@pytest.mark.parametrize("kind", [int, float, torch.tensor, lambda t: torch.tensor(t, dtype=torch.int64)])
def test_step_counts_of_other_types(sample: Any, kind: Callable[[int], Any]) -> None:
    optimizer = make(sample)
    expected = make(sample)
    for each in (optimizer, expected):
        train(each, range(3))
    state = copy.deepcopy(optimizer.state_dict())
    for own in state["state"].values():
        own["step"] = kind(int(own["step"]))
    optimizer.load_state_dict(state)
    for each in (optimizer, expected):
        train(each, [3])
    assert_same_bits(results(optimizer), results(expected))
    assert {int(own["step"]) for own in optimizer.state.values()} == {4}


def public(optimizer: GWTAdamW) -> dict[str, Any]:
    own = {
        k: v for k, v in optimizer.__dict__.items() if not k.startswith("_") and k not in ("state", "param_groups")
    }
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    return dict(sorted({**own, "groups": groups}.items()))


@each_input
@pytest.mark.parametrize(
    "way", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"]
)
def test_a_copy_has_every_public_attribute_and_continues(sample: Any, way: Callable[[GWTAdamW], GWTAdamW]) -> None:
    optimizer = make(sample)
    train(optimizer, range(2))
    other = way(optimizer)
    assert_same_bits(public(other), public(optimizer))
    assert {"max_grad_norm", "skip_nonfinite", "capturable", "defaults"} <= public(optimizer).keys()
    for each in (optimizer, other):
        train(each, range(2, 4))
    assert_same_bits(results(other), results(optimizer))
    assert not any(p is q for p, q in zip(parameters_of(other), parameters_of(optimizer), strict=True))


@pytest.fixture
def calls() -> Iterator[list[str]]:
    """Yield a list to which the step hooks of all optimizers append."""
    record: list[str] = []
    handles = [
        torch_optimizer.register_optimizer_step_pre_hook(lambda *_: record.append("all before")),
        torch_optimizer.register_optimizer_step_post_hook(lambda *_: record.append("all after")),
    ]
    yield record
    for handle in handles:
        handle.remove()


def test_step_hooks(calls: list[str]) -> None:
    optimizer = make(INPUTS[0])
    own = [
        optimizer.register_step_pre_hook(lambda *_: calls.append("before")),
        optimizer.register_step_post_hook(lambda *_: calls.append("after")),
    ]
    around = ["all before", "before", "after", "all after"]
    train(optimizer, [0])
    assert sorted(calls) == sorted(around)
    assert calls.index("before") < calls.index("after")
    assert calls[0] == "all before"
    own[0].remove()
    own[1].remove()
    calls.clear()
    train(optimizer, [1])
    assert calls == ["all before", "all after"]


def test_a_step_hook_may_replace_the_arguments() -> None:
    optimizer = make(INPUTS[0])
    optimizer.register_step_pre_hook(lambda o, args, kwargs: ((o, lambda: 5.0), {}))
    assert optimizer.step() == 5.0


def test_hooks_of_saving_and_loading() -> None:
    order: list[str] = []
    optimizer = make(INPUTS[0])
    train(optimizer, range(2))
    optimizer.register_state_dict_pre_hook(lambda o: order.append("before saving"))
    optimizer.register_state_dict_post_hook(lambda o, state: {**state, "note": "kept"})
    state = optimizer.state_dict()
    assert state["note"] == "kept"

    def halve(o: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        order.append("halve")
        groups = [{**g, "lr": g["lr"] / 2} for g in state["param_groups"]]
        return {**state, "param_groups": groups}

    optimizer.register_load_state_dict_pre_hook(halve)
    optimizer.register_load_state_dict_pre_hook(lambda *_: order.append("first"), prepend=True)
    optimizer.register_load_state_dict_post_hook(lambda o: order.append("last"))
    optimizer.register_load_state_dict_post_hook(lambda o: order.append("last but one"), prepend=True)
    optimizer.load_state_dict(state)
    assert order == ["before saving", "first", "halve", "last but one", "last"]
    assert optimizer.param_groups[0]["lr"] == 0.5e-3
    assert state["param_groups"][0]["lr"] == 1e-3


@pytest.mark.parametrize("sample", [x for x in INPUTS if "max_grad_norm" not in x.kwargs], ids=lambda x: x.desc)
def test_mixed_dtypes(sample: Any) -> None:
    """Check that each tensor is updated as if alone; without clipping, which uses the norm of all tensors."""
    dtypes = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
    together = [p for dtype in dtypes for p in parameters(SHAPES, dtype=dtype)]
    optimizer = make(sample, together)
    for t in range(3):
        alone = copy.deepcopy(optimizer)
        give_gradients(together, seed=t)
        optimizer.step()
        for p, q in zip(together, parameters_of(alone), strict=True):  # one tensor per step
            q.grad = p.grad.clone()
            alone.step()
            q.grad = None
        assert_same_bits(results(alone), results(optimizer))


@each_input
def test_state_is_not_empty(sample: Any) -> None:
    optimizer = make(sample)
    assert not optimizer.state
    train(optimizer, [0])
    assert set(optimizer.state) == set(parameters_of(optimizer))
    for own in optimizer.state.values():
        assert {"step", "exp_avg", "exp_avg_sq"} <= own.keys()
        assert all(isinstance(value, Tensor) for value in own.values())
        assert own["step"] == 1


@each_input
def test_scaled_gradients_are_unscaled_and_overflows_skipped_in_the_step(sample: Any) -> None:
    plain, scaled = make(sample), make(sample)
    for t in range(4):
        overflow = t == 2
        if not overflow:
            train(plain, [t])
        give_gradients(parameters_of(scaled), seed=t, factor=2.0**14)
        scaled.grad_scale = torch.tensor(2.0**14)
        scaled.found_inf = torch.tensor(float(overflow))
        scaled.step()
        del scaled.grad_scale, scaled.found_inf
        assert_same_bits(results(scaled), results(plain))
    assert scaled.skipped_steps == 1


def test_gradients_that_require_grad() -> None:
    params = parameters(SHAPES)
    optimizer = make(INPUTS[0], params)
    grads = torch.autograd.grad(regression(*params), params, create_graph=True)
    for p, g in zip(params, grads, strict=True):
        p.grad = g
    before = [p.detach().clone() for p in params]
    optimizer.step()
    assert all(p.is_leaf and p.requires_grad and (p != q).any() for p, q in zip(params, before, strict=True))
    assert not any(value.requires_grad for own in optimizer.state.values() for value in own.values())


@pytest.mark.parametrize("saved", [False, True], ids=["from unnamed", "from named"])
@pytest.mark.parametrize("loading", [False, True], ids=["to unnamed", "to named"])
def test_names_after_loading_are_those_of_torch(saved: bool, loading: bool) -> None:
    names = []
    for kind in (GWTAdamW, torch.optim.AdamW):
        made = []
        for named in (saved, loading):
            params = parameters(SHAPES)
            made.append(kind(list(zip("ab", params, strict=True)) if named else params))
            train(made[-1], [0])
        made[1].load_state_dict(made[0].state_dict())
        train(made[1], [1])
        names.append([group.get("param_names") for group in made[1].param_groups])
    assert names[0] == names[1] == [["a", "b"] if saved or loading else None]


def allocated(call: Callable[[], object]) -> int:
    """Return the peak bytes that a call allocates above those held before."""
    with profile(profile_memory=True) as measured:
        call()
    sizes, events = [], list(measured.profiler.kineto_results.experimental_event_tree())
    while events:
        event = events.pop()
        events += event.children
        if event.tag == torch._C._profiler._EventType.Allocation:
            sizes.append((event.start_time_ns, event.extra_fields.alloc_size))
    return max([0, *itertools.accumulate(size for _, size in sorted(sizes))])


MADE: dict[str, tuple[Callable[[Any], torch.optim.Optimizer], float]] = {
    "compiled": (partial(GWTAdamW, level=1, backend="compiled"), 0.1),
    "torch": (partial(GWTAdamW, level=1, backend="torch"), 2.5),
    "foreach": (partial(torch.optim.AdamW, foreach=True), 9.0),  # control: it holds a copy of all tensors
}


@pytest.mark.parametrize("kind", MADE)
def test_temporary_memory_is_below_that_of_all_tensors(kind: str) -> None:
    """Check that it is at most a few times the size of one of the eight tensors."""
    build, bound = MADE[kind]
    params = parameters([(256, 256)] * 8)
    optimizer = build(params)
    train(optimizer, range(2))
    give_gradients(params, seed=2)
    peak = allocated(optimizer.step) / (256 * 256 * 4)
    assert peak < bound
    if kind == "foreach":
        assert peak >= 8
