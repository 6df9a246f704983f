"""Tests gradient release: bit for bit the ordinary run, with schedulers, accumulation, resume; and refusals."""

from __future__ import annotations

import copy

import pytest
import torch

from gwt_kernels import GWTAdamW, gwt_param_groups, release_gradients
from gwt_kernels.release import GradientRelease
from tests import interpreter
from tests.runs import assert_same_bits, backends, parameters, place, refused, results


class Tied(torch.nn.Module):
    """Embedding and head share their weight, one bias is frozen, one layer is used only now and then."""

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


@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize(
    "options",
    [{}, {"rule": "foam", "state_dtype": "bfloat16", "weight_decay": 0.1}, {"correct_bias": False}],
    ids=["gwt", "foam", "no bias correction"],
)
@backends
def test_released_gradients_give_the_ordinary_run(backend, device, options, micro_batches):
    model, optimizer = build(backend, device, **options)
    train(model, optimizer, range(5), micro_batches=micro_batches)
    released, own = build(backend, device, **options)
    release = release_gradients(released, own)
    train(released, own, range(5), release, micro_batches)
    assert_same_bits(results(own), results(optimizer))


@pytest.mark.parametrize("options", [{"wavelet": "bior2.2"}, {"boundary": "symmetric"}], ids=str)
def test_so_do_those_that_the_literal_algorithm_takes(device, options):
    model, optimizer = build(None, device, **options)
    train(model, optimizer, range(4))
    released, own = build(None, device, **options)
    train(released, own, range(4), release_gradients(released, own))
    assert_same_bits(results(own), results(optimizer))


@backends
def test_every_gradient_is_gone_before_the_next_but_one_comes(backend, device):
    model, optimizer = build(backend, device)
    release_gradients(model, optimizer)
    alive = []
    for p in {id(p): p for p in model.parameters() if p.requires_grad}.values():
        p.register_post_accumulate_grad_hook(
            lambda _: alive.append(sum(p.grad is not None for p in model.parameters()))
        )
    backward(model, 0)
    assert len(alive) == 4  # the tied weight once, the seldom layer not at all
    assert max(alive) == 0
    assert optimizer.state[model.head.weight]["step"] == 1


def test_a_run_may_stop_and_go_on(device):
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


def test_what_else_is_refused():
    model, optimizer = build("torch", torch.device("cpu"))
    with pytest.raises(TypeError, match="released to a GWTAdamW, got SGD"):
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
