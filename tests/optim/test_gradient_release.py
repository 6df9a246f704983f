"""Gradient release: bit for bit the ordinary run, with schedulers, accumulation and resume; and refused options."""

from __future__ import annotations

import contextlib
import copy
import gc
import pickle

import pytest
import torch

from gwt_kernels import GWTAdamMini, GWTAdamW, gwt_param_groups, release_gradients
from gwt_kernels.optim.gradient_release import GradientRelease
from tests.support import interpreter
from tests.support.runs import assert_same_bits, backends, parameters, place, refused, results


class Tied(torch.nn.Module):
    """Embedding and head share their weight, one bias is frozen, one layer is used rarely."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(16, 12)
        self.hidden = torch.nn.Linear(12, 37)
        self.back = torch.nn.Linear(37, 12)
        self.seldom = torch.nn.Linear(12, 12)
        self.head = torch.nn.Linear(12, 16, bias=False)
        self.head.weight = self.embedding.weight
        self.back.bias.requires_grad_(False)

    def forward(self, x, seldom=False):
        h = self.back(torch.tanh(self.hidden(self.embedding(x))))
        return self.head(self.seldom(h) if seldom else h)


def build(backend, device, **options):
    torch.manual_seed(0)
    model = Tied().to(place(backend, device))
    groups = gwt_param_groups(model, level=2, include=["hidden", "back", "seldom"])
    return model, GWTAdamW(groups, lr=0.01, backend=backend, **options)


def backward(model, t, factor=1.0):
    generator = torch.Generator().manual_seed(t)
    x, y = (torch.randint(16, (4, 6), generator=generator).to(model.head.weight.device) for _ in range(2))
    loss = torch.nn.functional.cross_entropy(model(x, seldom=t % 3 == 1).flatten(0, 1), y.flatten()) * factor
    with interpreter.like_a_gpu():
        loss.backward()


def train(model, optimizer, steps, release=None, micro_batches=1):
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 / (1 + t))
    for t in steps:
        for k in range(micro_batches):
            if release is not None and k + 1 < micro_batches:
                with release.accumulate():
                    backward(model, 10 * t + k)
            else:
                backward(model, 10 * t + k)
        with interpreter.like_a_gpu():
            optimizer.step()
        optimizer.zero_grad()
        schedule.step()


@pytest.mark.parametrize(
    ("micro_batches", "options"),
    [(1, {}), (3, {}), (3, {"rule": "foam", "state_dtype": "bfloat16", "weight_decay": 0.1}),
     (1, {"correct_bias": False})],
    ids=["gwt", "gwt, accumulated", "foam, accumulated", "no bias correction"],
)  # fmt: skip
@backends
def test_released_gradients_equal_the_ordinary_run(backend, device, options, micro_batches):
    model, optimizer = build(backend, device, **options)
    train(model, optimizer, range(4), micro_batches=micro_batches)
    released, own = build(backend, device, **options)
    release = release_gradients(released, own)
    train(released, own, range(4), release, micro_batches)
    assert_same_bits(results(own), results(optimizer))


@pytest.mark.parametrize("options", [{"wavelet": "bior2.2"}, {"boundary": "symmetric"}], ids=str)
def test_released_gradients_of_the_literal_algorithm_equal_the_ordinary_run(device, options):
    model, optimizer = build(None, device, **options)
    train(model, optimizer, range(4))
    released, own = build(None, device, **options)
    train(released, own, range(4), release_gradients(released, own))
    assert_same_bits(results(own), results(optimizer))


@pytest.mark.parametrize(
    "options", [{}, {"rule": "foam", "state_dtype": "bfloat16", "weight_decay": 0.1}], ids=["gwt", "foam"]
)
@backends
def test_a_loop_may_step_and_reset_after_every_micro_batch(backend, device, options):
    """Check such a loop, as in optimi's runner: a step inside the block must not use partial sums."""
    model, optimizer = build(backend, device, **options)
    train(model, optimizer, range(4), micro_batches=3)
    released, own = build(backend, device, **options)
    release = release_gradients(released, own)
    schedule = torch.optim.lr_scheduler.LambdaLR(own, lambda t: 1 / (1 + t))
    for t in range(4):
        for k in range(3):
            with release.accumulate() if k < 2 else contextlib.nullcontext():
                backward(released, 10 * t + k)
                with interpreter.like_a_gpu():
                    own.step()
                own.zero_grad()
        schedule.step()
    assert_same_bits(results(own), results(optimizer))
    assert {int(own.state[p]["step"]) for p in (released.head.weight, released.hidden.weight)} == {4}


@backends
def test_accumulated_gradients_without_a_release_go_into_the_next_step(backend, device):
    """Check a block around all micro-batches: the step outside updates, and no gradient is used twice."""
    model, optimizer = build(backend, device)
    train(model, optimizer, range(5), micro_batches=2)
    released, own = build(backend, device)
    release = release_gradients(released, own)
    schedule = torch.optim.lr_scheduler.LambdaLR(own, lambda t: 1 / (1 + t))
    for t in range(5):
        with release.accumulate():
            backward(released, 10 * t)
            if t % 2:
                backward(released, 10 * t + 1)
        if t % 2 == 0:
            backward(released, 10 * t + 1)
        with interpreter.like_a_gpu():
            own.step()  # no reset follows
        assert all(p.grad is None for p in released.parameters())
        schedule.step()
    assert_same_bits(results(own), results(optimizer))


def test_a_closure_in_the_block_accumulates_its_gradients(device):
    model, optimizer = build("torch", device)
    ordinary, other = build("torch", device)
    release = release_gradients(model, optimizer)

    def closure():
        optimizer.zero_grad()
        backward(model, 0)
        return 7.0

    before = [p.detach().clone() for p in model.parameters()]
    with release.accumulate():
        assert optimizer.step(closure) == 7.0
        assert optimizer.step(closure) == 7.0
    assert_same_bits([p.detach() for p in model.parameters()], before)
    assert not optimizer.state
    assert optimizer.step(closure) == 7.0  # outside, zero_grad drops the sum, and backward updates
    backward(ordinary, 0)
    other.step()
    assert_same_bits(results(optimizer), results(other))


@pytest.mark.filterwarnings("error")
def test_schedules_know_of_released_steps(device):
    """Check that schedules warn only if no step was taken before their own."""
    model, optimizer = build("torch", device)
    release_gradients(model, optimizer)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.5, 4)
    backward(model, 0)
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.875 * schedule.base_lrs[0])
    model, optimizer = build("torch", device)
    release = release_gradients(model, optimizer)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.5, 4)
    with release.accumulate():
        backward(model, 0)
    with pytest.warns(UserWarning, match="before `optimizer.step"):
        schedule.step()


def test_blocks_nest_and_end_with_an_error(device):
    model, optimizer = build("torch", device)
    release = release_gradients(model, optimizer)
    with release.accumulate():
        with release.accumulate():
            backward(model, 0)
        backward(model, 0)
        assert not optimizer.state  # the inner block ended, not the outer one
        with pytest.raises(KeyError), release.accumulate():
            raise KeyError
        assert release.accumulating
        optimizer.step()
        assert not optimizer.state
    with pytest.raises(KeyError), release.accumulate():
        raise KeyError
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())
    backward(model, 0)
    assert optimizer.state[model.head.weight]["step"] == 1


def test_hooks_removed_in_the_block_leave_ordinary_steps(device):
    model, optimizer = build("torch", device)
    ordinary, other = build("torch", device)
    release = release_gradients(model, optimizer)
    with release.accumulate():
        backward(model, 0)
        release.remove()
        optimizer.step()
        assert optimizer.state[model.head.weight]["step"] == 1
        assert model.head.weight.grad is not None  # as usual, until zero_grad
        optimizer.zero_grad()
        assert model.head.weight.grad is None
    train(ordinary, other, range(1))
    assert_same_bits(results(optimizer), results(other))
    later = release_gradients(model, optimizer)
    release.remove()  # removing twice does not affect the later handle
    with later.accumulate():
        backward(model, 0)
        optimizer.step()
    assert optimizer.state[model.head.weight]["step"] == 1


def test_a_copied_or_pickled_optimizer_steps_for_itself(device):
    model, optimizer = build("torch", device)
    release = release_gradients(model, optimizer)
    with release.accumulate():
        for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
            for group in other.param_groups:
                for p in group["params"]:
                    p.grad = torch.ones_like(p)
            other.step()
            assert all(other.state[p]["step"] == 1 for group in other.param_groups for p in group["params"])


@backends
def test_every_gradient_is_freed_before_the_next_but_one_is_computed(backend, device):
    model, optimizer = build(backend, device)
    release_gradients(model, optimizer)
    alive = []
    for p in {id(p): p for p in model.parameters() if p.requires_grad}.values():
        p.register_post_accumulate_grad_hook(
            lambda _: alive.append(sum(p.grad is not None for p in model.parameters()))
        )
    backward(model, 0)
    assert len(alive) == 4  # the tied weight once, the rare layer not
    assert max(alive) == 0
    assert optimizer.state[model.head.weight]["step"] == 1


def test_a_run_can_be_resumed(device):
    model, optimizer = build("torch", device)
    release_gradients(model, optimizer)
    train(model, optimizer, range(3))
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(model, optimizer, range(3, 6))

    fresh, own = build("torch", device)
    release_gradients(fresh, own)
    fresh.load_state_dict(saved[0])
    own.load_state_dict(saved[1])
    train(fresh, own, range(3, 6))
    assert_same_bits(results(own), results(optimizer))


def test_removed_hooks_leave_ordinary_steps(device):
    model, optimizer = build("torch", device)
    ordinary, other = build("torch", device)
    release = release_gradients(model, optimizer)
    train(model, optimizer, range(2))
    release.remove()
    train(model, optimizer, range(2, 4))
    release = release_gradients(model, optimizer)
    train(model, optimizer, range(4, 6))
    for steps in (range(2), range(2, 4), range(4, 6)):
        train(ordinary, other, steps)
    assert_same_bits(results(optimizer), results(other))


def test_parameters_that_change_groups_take_the_new_group_s_options():
    params = parameters([(4, 8), (4, 8)])
    optimizer = GWTAdamW([{"params": params[:1], "lr": 0.1}, {"params": params[1:], "lr": 0.0}])
    release_gradients(torch.nn.ParameterList(params), optimizer)
    for moving in (0, 1):
        before = [p.detach().clone() for p in params]
        sum(p.square().sum() for p in params).backward()
        assert [not torch.equal(p, old) for p, old in zip(params, before, strict=True)] == [
            moving == 0,
            moving == 1,
        ]
        first, second = optimizer.param_groups
        first["params"], second["params"] = second["params"], first["params"]


def test_parameters_that_change_places_take_random_bits_of_the_new_place():
    results_ = []
    for is_released in (False, True):
        params = parameters([(4, 8), (4, 8)], dtype=torch.bfloat16)
        optimizer = GWTAdamW([{"params": params[:1]}, {"params": params[1:]}], weight_rounding="stochastic")
        if is_released:
            release_gradients(torch.nn.ParameterList(params), optimizer)
        for _ in range(2):
            sum(p.square().sum() for p in params[-len(optimizer.param_groups) :]).backward()
            optimizer.step()
            optimizer.zero_grad()
            del optimizer.param_groups[:-1]
        results_.append(params)
    assert_same_bits(*results_)


def test_parameters_that_are_unfrozen_or_added_later_are_updated_in_the_backward_pass():
    """Check layers as a finetuning callback unfreezes them, in a loop that calls no step()."""
    results_ = []
    for is_released in (False, True):
        first, frozen, added, still = params = parameters([(4, 8)] * 4)
        frozen.requires_grad_(False)
        still.requires_grad_(False)
        optimizer = GWTAdamW([first, frozen, still], lr=0.1)
        if is_released:
            release_gradients(torch.nn.ParameterList([first, frozen, still]), optimizer)
        for t in range(3):
            if t == 1:
                frozen.requires_grad_(True)
                optimizer.add_param_group({"params": [added]})
            sum(p.square().sum() for p in params[: 3 if t else 1]).backward()
            assert all(p.grad is None for p in params) or not is_released
            if not is_released:
                optimizer.step()
                optimizer.zero_grad()
        assert not still.requires_grad
        results_.append(results(optimizer))
    assert_same_bits(*results_)


def test_a_parameter_without_a_gradient_is_left_alone_where_it_is_updated_alone():
    p, other = parameters([(4, 8), (4, 8)])
    optimizer = GWTAdamMini([p], head_rows=2)
    before = p.detach().clone()
    optimizer.step_parameter(p)
    assert_same_bits((p.detach(), dict(optimizer.state)), (before, {}))
    p.grad = torch.ones_like(p).to_sparse()
    with refused(optimizer, RuntimeError, "sparse"):
        optimizer.step_parameter(p)
    assert not optimizer.state
    p.grad = torch.ones_like(p)
    optimizer.step_parameter(p)
    p.grad, before = None, results(optimizer)
    optimizer.step_parameter(p)
    assert_same_bits(results(optimizer), before)
    other.grad = torch.ones_like(other)
    with refused(optimizer, ValueError, "of shape (4, 8)", "not the optimizer's", "add_param_group"):
        optimizer.step_parameter(other)


def test_a_bad_gradient_is_refused_in_the_backward_pass():
    model, optimizer = build("torch", torch.device("cpu"))
    release_gradients(model, optimizer)
    optimizer.param_groups[0]["eps"] = -1.0
    with pytest.raises(ValueError, match="eps must be finite and at least 0"):
        backward(model, 0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_grad_norm": 1.0}, "max_grad_norm=1.0 needs all gradients before the first update"),
        ({"skip_nonfinite": True}, "skip_nonfinite=True needs all gradients"),
        ({"capturable": True}, "capturable=True is for a step in a CUDA graph"),
    ],
)
def test_options_that_need_all_gradients_are_refused(options, words):
    model, optimizer = build("torch", torch.device("cpu"), **options)
    with refused(optimizer, RuntimeError, words):
        release_gradients(model, optimizer)


def test_a_scaler_is_refused_at_set_up_and_before_the_first_update():
    model, optimizer = build("torch", torch.device("cpu"))
    scaler = torch.amp.GradScaler("cpu")
    with refused(optimizer, RuntimeError, "GradScaler", "bfloat16"):
        release_gradients(model, optimizer)
    del scaler
    kept = torch.amp.GradScaler("cpu", enabled=False)
    release_gradients(model, optimizer)
    scaler = torch.amp.GradScaler("cpu")
    with refused(optimizer, RuntimeError, "GradScaler"):
        backward(model, 0, 1024.0)
    del scaler, kept


def test_a_deleted_scaler_is_not_refused_though_it_refers_to_itself():
    model, optimizer = build("torch", torch.device("cpu"))
    scaler = torch.amp.GradScaler("cpu")
    scaler.itself = scaler
    gc.disable()
    try:
        del scaler
        release_gradients(model, optimizer)
    finally:
        gc.enable()


def test_other_unsupported_uses_are_refused():
    model, optimizer = build("torch", torch.device("cpu"))
    with pytest.raises(TypeError, match="released to this package's optimizers, got SGD"):
        release_gradients(model, torch.optim.SGD(model.parameters()))
    with refused(optimizer, RuntimeError, "'0.weight' is not the optimizer's", "freeze"):
        release_gradients(torch.nn.Sequential(torch.nn.Linear(2, 2)), optimizer)
    backward(model, 0)
    with refused(optimizer, RuntimeError, "has a gradient already", "zero_grad()"):
        release_gradients(model, optimizer)
    optimizer.zero_grad()
    assert isinstance(release_gradients(model, optimizer), GradientRelease)
    with refused(optimizer, RuntimeError, "released to this optimizer already", "remove()"):
        release_gradients(model, optimizer)


def test_ddp_is_refused(tmp_path):
    model, optimizer = build("torch", torch.device("cpu"))
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
        with refused(optimizer, RuntimeError, "DDP", "fully_shard"):
            release_gradients(wrapped, optimizer)
    finally:
        torch.distributed.destroy_process_group()


def test_options_set_after_the_release_are_refused_in_the_backward_pass():
    model, optimizer = build("torch", torch.device("cpu"))
    release_gradients(model, optimizer)
    for name, value in (("max_grad_norm", 1.0), ("skip_nonfinite", True)):
        setattr(optimizer, name, value)
        with refused(optimizer, RuntimeError, "need all gradients before the first update"):
            backward(model, 0)
        setattr(optimizer, name, type(value)() or None if name == "max_grad_norm" else False)
