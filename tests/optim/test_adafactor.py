"""Tests ``GWTAdafactor`` as an optimizer: checkpoints, plan, groups, gradient release, scalers and bad options."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from gwt_kernels import GWTAdafactor, GWTAdamW, gwt_param_groups, release_gradients
from gwt_kernels.functional import Hyper, gwt_adamw_
from gwt_kernels.planner.planning import predicted_state_bytes
from tests.rules.test_adafactor import parameters, steps
from tests.support import runs
from tests.test_functional import on


def test_checkpoints_resume_bit_for_bit_and_are_refused_where_they_do_not_fit(tmp_path):
    for options in ({}, {"beta1": None}, {"state_dtype": torch.bfloat16, "weight_decay": 0.1}):
        params, resumed = parameters(), parameters()
        optimizer = GWTAdafactor(params, **options)
        steps(optimizer, params, range(3))
        torch.save(optimizer.state_dict(), tmp_path / "state")
        for p, q in zip(params, resumed, strict=True):
            q.data.copy_(p)
        again = GWTAdafactor(resumed, state_dtype=options.get("state_dtype"))
        again.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
        for own, of in ((optimizer, params), (again, resumed)):
            steps(own, of, range(3, 6))
        runs.assert_same_bits(runs.results(again), runs.results(optimizer))
    saved = optimizer.state_dict()
    with pytest.raises(ValueError, match="rule='adafactor', the optimizer rule='gwt'"):
        GWTAdamW(parameters()).load_state_dict(saved)
    with pytest.raises(ValueError, match="level=2, the optimizer level=3"):
        GWTAdafactor(parameters(), level=3, state_dtype=torch.bfloat16).load_state_dict(saved)
    broken = copy.deepcopy(saved)
    broken["state"][0]["exp_avg_sq_row"] = torch.zeros(63)
    with pytest.raises(ValueError, match=r"exp_avg_sq_row of parameter 0 .* has shape \(63,\)"):
        GWTAdafactor(parameters(), state_dtype=torch.bfloat16).load_state_dict(broken)
    del broken["state"][0]["exp_avg_sq_row"]
    with pytest.raises(ValueError, match="lacks exp_avg_sq_row"):
        GWTAdafactor(parameters(), state_dtype=torch.bfloat16).load_state_dict(broken)
    broken = copy.deepcopy(saved)
    broken["state"][0]["exp_avg_sq"] = torch.zeros(64, 24)
    with pytest.raises(ValueError, match="has exp_avg_sq, which rule='adafactor' does not keep"):
        GWTAdafactor(parameters(), state_dtype=torch.bfloat16).load_state_dict(broken)


def test_the_state_is_small_and_float32():
    params = parameters(torch.bfloat16, shapes=[(64, 96), (3, 8, 24), (128,), ()])
    optimizer = GWTAdafactor(params[:-1])
    optimizer.add_param_group({"params": params[-1:], "level": 0})
    steps(optimizer, params, range(1))
    shapes = [{k: (tuple(x.shape), x.dtype) for k, x in optimizer.state[p].items() if k != "step"} for p in params]
    f32 = torch.float32
    assert shapes == [
        {"exp_avg": ((64, 24), f32), "exp_avg_sq_row": ((64,), f32), "exp_avg_sq_col": ((24,), f32)},
        {"exp_avg": ((3, 8, 6), f32), "exp_avg_sq_row": ((3, 8), f32), "exp_avg_sq_col": ((3, 6), f32)},
        {"exp_avg": ((32,), f32), "exp_avg_sq": ((32,), f32)},
        {"exp_avg": ((), f32), "exp_avg_sq": ((), f32)},
    ]


def test_the_plan_knows_its_bytes():
    for options in ({}, {"beta1": None}, {"state_dtype": torch.int8, "level": 1}):
        params = parameters(shapes=[(128, 96), (3, 8, 24), (128,)])
        optimizer = GWTAdafactor(params, **options)
        predicted = predicted_state_bytes(optimizer)
        steps(optimizer, params, range(1))
        held = [x for p in params for x in optimizer.state[p].values()]
        assert predicted == sum(x.numel() * x.element_size() for x in held)


def test_empty_tensors_take_steps():
    params = parameters(shapes=[(0, 8), (4, 8), (4, 0)])
    for backend in ("torch", "triton"):
        own = [torch.nn.Parameter(p.detach().to(on(backend)).clone()) for p in params]
        optimizer = GWTAdafactor(own, backend=backend, scale_parameter=True, level=1)
        steps(optimizer, own, range(2))
        assert all(float(optimizer.state[p]["step"]) == 2 for p in own)
        assert own[1].isfinite().all()


def test_groups_left_alone_are_adamw_with_a_rate_of_their_own():
    torch.manual_seed(0)
    model = torch.nn.Sequential()
    model.layers = torch.nn.ModuleList(torch.nn.Sequential(torch.nn.Linear(16, 16)) for _ in range(2))
    groups = gwt_param_groups(model, include=["weight"], adamw_lr=5e-4)
    optimizer = GWTAdafactor(groups, lr=None, relative_step=True, adamw_betas=(0.8, 0.95))
    rules = [(group["rule"], group["level"], group["lr"], group.get("betas")) for group in optimizer.param_groups]
    assert rules == [("adafactor", 2, None, None), ("adamw", 0, 5e-4, (0.8, 0.95))]
    runs.assert_left_to_adamw(optimizer, lr=5e-4, betas=(0.8, 0.95), eps=1e-8)
    assert set(optimizer.state[optimizer.param_groups[1]["params"][0]]) == {"step", "exp_avg", "exp_avg_sq"}
    with pytest.raises((TypeError, ValueError), match="lr must be a real number, got None"):
        GWTAdafactor(gwt_param_groups(model, include=["weight"]), lr=None, relative_step=True)


def test_gradient_release_is_the_same_to_the_bit():
    results = []
    for released in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(32, 48), torch.nn.ReLU(), torch.nn.Linear(48, 8))
        optimizer = GWTAdafactor(model.parameters(), level=1, scale_parameter=True)
        if released:
            release_gradients(model, optimizer)
        for _ in range(3):
            model(torch.randn(4, 32)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append(runs.results(optimizer))
    runs.assert_same_bits(*results)


def test_a_scaler_unscales_and_skips():
    results = []
    for scaled in (False, True):
        params = parameters()
        optimizer = GWTAdafactor(params)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
        for t in range(3):
            runs.give_gradients(params, t)
            if scaled:
                scaler.scale(torch.ones(()))
                for p in params:
                    p.grad *= 1024
                if t == 1:
                    params[0].grad[0, 0] = math.nan
                scaler.step(optimizer)
                scaler.update(1024.0)
            elif t != 1:
                optimizer.step()
        results.append([x for p in params for x in (p.detach(), *optimizer.state[p].values())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"rule": "foam"}, ValueError, "rule='foam' is no rule of GWTAdafactor"),
        ({"rule": "adamw", "level": 2}, ValueError, "rule='adamw' transforms nothing"),
        ({"beta1": 1.0}, ValueError, "beta1 must be at least 0 and below 1, or None"),
        ({"beta1": -0.1}, ValueError, "beta1 must be at least 0 and below 1"),
        ({"beta1": "x"}, TypeError, "beta1 must be a real number"),
        ({"eps": 1e-8}, TypeError, "eps must be a pair of numbers"),
        ({"eps": (1e-30,)}, TypeError, "eps must be a pair of numbers"),
        ({"eps": (-1.0, 1e-3)}, ValueError, r"eps\[0\] must be finite and at least 0"),
        ({"eps": (1e-30, math.inf)}, ValueError, r"eps\[1\] must be finite and at least 0"),
        ({"clip_threshold": 0.0}, ValueError, "clip_threshold must be finite and above 0, got 0.0"),
        ({"clip_threshold": math.nan}, ValueError, "clip_threshold must be finite and above 0, got nan"),
        ({"decay_rate": 0.8}, ValueError, "decay_rate must be finite and not above 0, got 0.8"),
        ({"details": "both"}, ValueError, "unknown details 'both': use one of 'published', 'divided'"),
        ({"details": ["divided"]}, ValueError, "unknown details"),
        ({"warmup_init": True}, ValueError, "warmup_init=True is of the learning rates of relative_step=True"),
        ({"relative_step": 1}, TypeError, "relative_step must be True or False, got 1"),
        ({"scale_parameter": None}, TypeError, "scale_parameter must be True or False"),
        ({"lr": None}, ValueError, "lr is None, which relative_step=True alone does without"),
        ({"lr": -1.0}, ValueError, "lr must be finite and at least 0"),
        ({"scale": 0.0}, ValueError, "scale must be finite and above 0"),
        ({"weight_decay": -1.0}, ValueError, "weight_decay must be finite and at least 0"),
        ({"norm_growth_limit": 1.01}, ValueError, "rule='adafactor' has no limiter"),
        ({"detail_scale": 0.5}, ValueError, "rule='adafactor' takes none"),
        ({"level": 12}, ValueError, "level 12 is too deep"),
        ({"boundary": "mirror"}, ValueError, "unknown boundary 'mirror'"),
    ],
)
def test_bad_options_are_refused_by_name(options, error, words):
    params = parameters()[:2]
    with pytest.raises(error, match=words):
        GWTAdafactor([{"params": params, **options}])
    if "rule" not in options and "detail_scale" not in options and "norm_growth_limit" not in options:
        with pytest.raises(error, match=words):
            GWTAdafactor(params, **options)
    if "detail_scale" in options:
        return
    optimizer = GWTAdafactor(params)
    steps(optimizer, params, range(1))
    optimizer.param_groups[0].update(options)
    runs.give_gradients(params, 1)
    with runs.refused(optimizer, error):
        optimizer.step()


@pytest.mark.parametrize(
    ("option", "value"),
    [("scale_parameter", 0), ("relative_step", 0), ("warmup_init", 0.0), ("maximize", 0), ("clip_threshold", True)],
)
def test_types_are_looked_at_whatever_was_built_before(option, value):
    """Check that a bad value that equals a valid one of another type is refused, whatever was built before."""
    GWTAdafactor(parameters()[:2])
    with pytest.raises(TypeError, match=f"{option} must be"):
        GWTAdafactor(parameters()[:2], **{option: value})


def test_other_optimizers_refuse_what_is_adafactors():
    with pytest.raises(ValueError, match="rule='adafactor' is no rule of GWTAdamW"):
        GWTAdamW(parameters(), rule="adafactor")


def test_the_step_without_an_optimizer_refuses_it():
    p, g, m = torch.ones(2, 8), torch.ones(2, 8), torch.zeros(2, 2)
    with pytest.raises(ValueError, match="rule='adafactor' keeps factors"):
        gwt_adamw_(
            params=[p], grads=[g], exp_avgs=[m], exp_avg_sqs=None, steps=[1], hypers=[Hyper()], level=2,
            rule="adafactor",
        )  # fmt: skip


def test_options_that_change_on_the_way_act_at_once():
    """Check also options that are sent to a device only when they change."""
    results = []
    for backend in ("torch", "triton"):
        params = parameters(device=on(backend))
        optimizer = GWTAdafactor(params, backend=backend)
        changes = (
            {"clip_threshold": 0.2},
            {"details": "published"},
            {"eps": (1e-3, 0.1)},
            {"scale_parameter": True},
        )
        for t, change in enumerate(changes):
            optimizer.param_groups[0].update(change)
            steps(optimizer, params, [t])
        results.append([x.cpu() for p in params for x in (p.detach(), *optimizer.state[p].values())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("gradients", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_first_moments_of_every_dtype_go_with_weights_of_every_dtype(dtype, gradients):
    """Check that the wider the moments, the closer the weights are to those of float64 moments."""
    for options in ({}, {"level": 0}, {"details": "published"}, {"wavelet": "db2"}, {"beta1": None}):
        made = {}
        for kept in (torch.float64, None, torch.float32, torch.bfloat16, torch.int8):
            if kept in (torch.bfloat16, torch.int8) and "wavelet" in options:
                continue  # not with other wavelets
            torch.manual_seed(0)
            p = torch.nn.Parameter(torch.randn(16, 256).to(dtype))
            p.grad_dtype = None  # allow any dtype
            optimizer = GWTAdafactor([p], lr=1e-2, state_dtype=kept, backend="torch", **options)
            for _ in range(3):
                p.grad = torch.randn(16, 256).to(gradients)
                optimizer.step()
            state = optimizer.state[p]
            assert state["exp_avg_sq_row"].dtype == torch.promote_types(dtype, torch.float32)
            if "exp_avg" in state and kept not in (None, torch.int8):
                assert state["exp_avg"].dtype == kept
            made[kept] = p.detach().double()
        for kept, p in made.items():
            rough = 2e-2 if kept in (torch.bfloat16, torch.int8) or dtype.itemsize == 2 else 1e-3
            torch.testing.assert_close(p, made[torch.float64], rtol=rough, atol=rough)
