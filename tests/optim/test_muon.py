"""Tests ``GWTMuon`` as an optimizer: groups, clipping, telemetry, checkpoints, copies, and what it refuses."""

from __future__ import annotations

import copy
import io
import math
import pickle

import pytest
import torch
from torch import nn

from gwt_kernels import GWTAdamW, GWTLion, GWTMuon, gwt_param_groups, release_gradients
from tests.support import interpreter
from tests.support.runs import assert_differ, assert_same_bits, give_gradients, parameters, refused, results, train

SHAPES = [(64, 96), (33, 70), (2, 24, 18), (16, 64)]


def build(params=None, dtype=torch.float32, **options):
    return GWTMuon(parameters(SHAPES, dtype=dtype) if params is None else params, lr=0.01, **options)


def own_of(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


# Groups ------------------------------------------------------------------------------------------------


def model(seed=0):
    torch.manual_seed(seed)
    made = nn.Module()
    made.embed_tokens = nn.Embedding(32, 16)
    made.layers = nn.ModuleList(
        nn.Sequential(nn.Linear(16, 48), nn.GELU(), nn.Linear(48, 16), nn.LayerNorm(16)) for _ in range(2)
    )
    made.lm_head = nn.Linear(16, 32, bias=False)
    return made


@pytest.mark.parametrize("level", [0, 2])
def test_groups_of_the_recipe_are_muons_and_adamws_with_its_own_rate_and_betas(level):
    groups = gwt_param_groups(model(), level=level, scale=1.0, rule="muon", adamw_lr=3e-4)
    optimizer = GWTMuon(groups, lr=0.02, adamw_betas=(0.8, 0.95), adamw_eps=1e-9)
    told = [(g["rule"], g["level"], g["lr"], len(g["params"])) for g in optimizer.param_groups]
    assert told == [("muon", level, 0.02, 4), ("adamw", 0, 3e-4, 2), ("adamw", 0, 3e-4, 8)]
    assert all((g["betas"], g["eps"]) == ((0.8, 0.95), 1e-9) for g in optimizer.param_groups[1:])
    alone = copy.deepcopy(optimizer.param_groups[1]["params"])
    adamw = GWTAdamW(alone, lr=3e-4, betas=(0.8, 0.95), eps=1e-9, level=0)
    for t in range(3):
        give_gradients(own_of(optimizer), seed=t)
        for p, q in zip(alone, optimizer.param_groups[1]["params"], strict=True):
            p.grad = q.grad.clone()
        optimizer.step()
        adamw.step()
    assert_same_bits([p.data for p in alone], [p.data for p in optimizer.param_groups[1]["params"]])
    states = [set(optimizer.state[p]) for p in (own_of(optimizer)[0], own_of(optimizer)[4])]
    assert states == [{"step", "exp_avg"}, {"step", "exp_avg", "exp_avg_sq"}]


def test_what_is_added_without_a_level_and_no_matrix_is_adamws_at_level_0_too():
    for level in (0, 2):
        optimizer = build(level=level)
        added = [nn.Parameter(torch.ones(16, 8)), nn.Parameter(torch.ones(16))]
        with pytest.warns(UserWarning, match="1 of the parameters added without a level"):
            optimizer.add_param_group({"params": added})
        assert [(g["rule"], g["level"]) for g in optimizer.param_groups[1:]] == [("muon", level), ("adamw", 0)]
        train(optimizer, range(2))


def test_two_groups_of_other_options_and_dtypes_are_stepped_as_each_would_be_alone():
    def groups(which):
        wide, narrow = parameters(SHAPES), parameters(SHAPES, dtype=torch.bfloat16, seed=1)
        both = [
            {"params": wide[:2], "level": 3, "ns_steps": 3},
            {"params": wide[2:], "lr": 0.03, "row_splits": [8, 8] if which == 3 else None, "momentum": 0.8},
            {"params": narrow, "weight_rounding": "stochastic", "state_dtype": torch.bfloat16},
        ]
        return both if which is None else [both[which]]

    # Random bits depend on the positions of parameters without names: give them names.
    def named(groups):
        for group in groups:
            group["param_names"] = [f"{p.dtype}.{tuple(p.shape)}" for p in group["params"]]
        return groups

    together = build(named(groups(None)))
    train(together, range(3))
    for which, group in enumerate(together.param_groups):
        alone = build(named(groups(which)))
        for t in range(3):
            give_gradients(own_of(together), seed=t)
            for p, q in zip(own_of(alone), group["params"], strict=True):
                p.grad = q.grad
            alone.step()
        assert_same_bits([p.data for p in own_of(alone)], [p.data for p in group["params"]])


def test_rates_and_momentum_may_change_from_step_to_step_as_schedulers_change_them():
    optimizer, torchs = (kind(parameters(SHAPES[:2]), lr=0.01) for kind in (GWTMuon, torch.optim.Muon))
    momenta = []
    for each in (optimizer, torchs):
        schedule = torch.optim.lr_scheduler.OneCycleLR(each, max_lr=0.1, total_steps=8)
        told, plans = [], set()
        for t in range(6):
            give_gradients(own_of(each), seed=t)
            each.step()
            schedule.step()
            plans.add(getattr(each, "_plan", None))
            told.append((each.param_groups[0]["lr"], each.param_groups[0]["momentum"]))
        momenta.append(told)
        assert len(plans) == 1  # numbers that change in every step need no new plan
    assert momenta[0] == momenta[1]
    assert len(set(momenta[0])) == 6
    fixed = build(parameters(SHAPES[:2]))
    train(fixed, range(6))
    assert_differ(results(fixed), results(optimizer))


# Clipping, skipping, scaling -----------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_clipping_in_the_step_is_the_frameworks(backend):
    options = {"level": 2, "backend": backend, "ns_dtype": torch.float32}
    dtype = torch.float32 if backend == "triton" else torch.float64
    clipped, plain = build(dtype=dtype, max_grad_norm=0.5, **options), build(dtype=dtype, **options)
    with interpreter.like_a_gpu():
        for t in range(3):
            for each in (clipped, plain):
                give_gradients(own_of(each), seed=t, factor=3.0)
            norm = torch.nn.utils.clip_grad_norm_(own_of(plain), 0.5)
            clipped.step()
            plain.step()
            torch.testing.assert_close(float(clipped.grad_norm), float(norm), rtol=1e-6, atol=0)
    for p, q in zip(own_of(clipped), own_of(plain), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
        moments = [each.state[x]["exp_avg"] for each, x in ((clipped, p), (plain, q))]
        torch.testing.assert_close(*moments, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("backend", ["torch", "compiled", "triton"])
def test_a_bad_batch_changes_nothing_and_is_counted(backend, value):
    optimizer = build(skip_nonfinite=True, telemetry=True, backend=backend)
    with interpreter.like_a_gpu():
        train(optimizer, range(2))
        before = results(optimizer)
        give_gradients(own_of(optimizer), seed=2)
        own_of(optimizer)[1].grad[3, 4] = value
        optimizer.step()
        assert_same_bits(results(optimizer), before)
        assert float(optimizer.skipped_steps) == 1
        told = optimizer.telemetry()["0.0"]
        assert told["nonfinite"] == pytest.approx(1 / 3)
        assert told["update_rms"] > 0
        train(optimizer, [3])
    assert_differ(results(optimizer), before)
    assert [float(optimizer.state[p]["step"]) for p in own_of(optimizer)] == [3.0] * 4


def test_without_skipping_a_bad_batch_spoils_its_own_matrix_alone():
    optimizer = build()
    give_gradients(own_of(optimizer), seed=0)
    own_of(optimizer)[2].grad[0, 3, 4] = math.nan
    optimizer.step()
    spoilt = [bool(p.isnan().any()) for p in own_of(optimizer)]
    assert spoilt == [False, False, True, False]
    assert own_of(optimizer)[2][0].isnan().all()
    assert own_of(optimizer)[2][1].isfinite().all()


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_grad_scaler_scales_and_skips_in_the_step(backend):
    scaled, plain = build(backend=backend), build(backend=backend)
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0, growth_interval=100)
    with interpreter.like_a_gpu():
        for t in range(4):
            for each in (scaled, plain):
                give_gradients(own_of(each), seed=t)
            for p in own_of(scaled):
                p.grad *= scaler.scale(torch.ones(()))
            if t == 2:
                own_of(scaled)[0].grad[0, 0] = math.inf
            scaler.step(scaled)
            scaler.update()
            if t != 2:
                plain.step()
    assert float(scaled.skipped_steps) == 1
    assert scaler.get_scale() == 8.0
    assert_same_bits([p.data for p in own_of(scaled)], [p.data for p in own_of(plain)])  # scales are powers of 2


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_telemetry_tells_the_updates_rms_and_the_share_of_its_details(backend):
    optimizer = build(telemetry=True, backend=backend, level=2, weight_decay=0.0, ns_dtype=torch.float32)
    with interpreter.like_a_gpu():
        for t in range(2):
            before = [p.detach().clone() for p in own_of(optimizer)]
            train(optimizer, [t])
        for i, told in enumerate(optimizer.telemetry().values()):
            update = (before[i] - own_of(optimizer)[i].detach()).double()
            n = update.shape[-1]
            padded = nn.functional.pad(update, (0, -n % 4)).unflatten(-1, (-1, 4))
            approximation = float(4 * padded.mean(-1).square().sum())
            total = float(update.square().sum())
            assert told["detail_energy"] == pytest.approx(1 - approximation / total, rel=1e-3)
            assert told["update_rms"] == pytest.approx(math.sqrt(total / update.numel()), rel=1e-3)
            assert (told["limiter"], told["nonfinite"]) == (1.0, 0.0)


# Captured, compiled, released ----------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_counts_on_the_device_and_its_rate_give_the_same_steps(backend):
    lr = torch.tensor(0.01)
    options = {"weight_rounding": "stochastic", "state_dtype": torch.bfloat16, "backend": backend}
    captured = GWTMuon(parameters(SHAPES, dtype=torch.bfloat16), lr=lr, capturable=True, **options)
    plain = GWTMuon(parameters(SHAPES, dtype=torch.bfloat16), lr=0.01, **options)
    with interpreter.like_a_gpu():
        for t in range(4):
            rate = 0.01 * 2.0**-t
            lr.fill_(rate)
            plain.param_groups[0]["lr"] = float(lr)
            train(captured, [t])
            train(plain, [t])
    assert_same_bits(results(captured), results(plain))


def test_a_compiled_step_is_the_step():
    compiled, plain = build(), build()
    step = torch.compile(lambda: compiled.step(), backend="eager")
    for t in range(2):
        give_gradients(own_of(compiled), seed=t)
        step()
        train(plain, [t])
    assert_same_bits(results(compiled), results(plain))


def test_released_gradients_give_the_same_steps_a_whole_matrix_at_a_time():
    models = [model(), model()]
    optimizers = [GWTMuon(gwt_param_groups(m, scale=1.0), lr=0.01) for m in models]
    release_gradients(models[0], optimizers[0])
    for t in range(3):
        for m, optimizer in zip(models, optimizers, strict=True):
            torch.manual_seed(t)
            tokens = torch.randint(32, (3, 7))
            x = m.embed_tokens(tokens)
            for layer in m.layers:
                x = layer(x)
            m.lm_head(x).logsumexp(-1).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert_same_bits(results(optimizers[0]), results(optimizers[1]))


def test_a_parameter_may_be_updated_alone():
    alone, together = build(), build()
    for t in range(2):
        give_gradients(own_of(alone), seed=t)
        for p in own_of(alone):
            alone.step_parameter(p)
        train(together, [t])
    assert_same_bits(results(alone), results(together))


# States --------------------------------------------------------------------------------------------------

FORMATS = [
    {},
    {"level": 0},
    {"state_dtype": torch.bfloat16, "weight_rounding": "stochastic", "seed": 5},
    {"state_dtype": torch.int8, "weight_rounding": "split", "level": 1},
    {"row_splits": (16, 17), "adjust_lr_fn": "match_rms_adamw", "ns_dtype": torch.float32},
    {"skip_nonfinite": True, "telemetry": True},
]


def of_format(options, seed=0):
    low = "weight_rounding" in options
    shapes = [(33, 70)] if "row_splits" in options else [*SHAPES, (64, 256)]
    return build(parameters(shapes, dtype=torch.bfloat16 if low else torch.float32, seed=seed), **options)


def stored(state):
    """Return a state as loaded from a checkpoint file."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("options", FORMATS, ids=str)
def test_a_run_resumes_from_a_file_bit_for_bit(options):
    straight = of_format(options)
    train(straight, range(3))
    resumed = of_format(options, seed=1)
    with torch.no_grad():
        for p, q in zip(own_of(resumed), own_of(straight), strict=True):
            p.copy_(q)
    resumed.load_state_dict(stored(straight.state_dict()))
    for each in (straight, resumed):
        train(each, range(3, 5))
    assert_same_bits(results(resumed), results(straight))


@pytest.mark.parametrize("options", FORMATS, ids=str)
def test_copies_and_pickles_go_on_alike(options):
    optimizer = of_format(options)
    train(optimizer, range(2))
    for make in (copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))):
        other, again = make(optimizer), make(optimizer)
        for each in (other, again):
            train(each, range(2, 4))
        assert_same_bits(results(other), results(again))
        assert_differ(results(other), results(optimizer))
    assert set(own_of(other)).isdisjoint(own_of(optimizer))


@pytest.mark.parametrize(
    ("saved", "words"),
    [
        ({"level": 3}, "level=3, the optimizer level=2"),
        ({"state_dtype": torch.bfloat16}, "state_dtype='bfloat16', the optimizer state_dtype=None"),
    ],
)
def test_states_of_other_options_are_refused(saved, words):
    other, optimizer = build(**saved), build()
    train(other, range(2))
    train(optimizer, range(2))
    with refused(optimizer, ValueError, words, "gwt_kernels.migrate"):
        optimizer.load_state_dict(other.state_dict())


def test_states_of_other_optimizers_are_refused():
    optimizer = build(parameters(SHAPES[:2]))
    train(optimizer, range(2))
    for kind, words in (
        (GWTLion, "rule='lion', the optimizer rule='muon'"),
        (GWTAdamW, "rule='gwt', the optimizer rule='muon'"),
        (torch.optim.Muon, "no 'level'"),
    ):
        other = kind(parameters(SHAPES[:2]), lr=0.01)
        train(other, range(1), params=other.param_groups[0]["params"])
        with refused(optimizer, ValueError, words, "migrate"):
            optimizer.load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match="rule='muon', the optimizer rule='gwt'"):
        GWTAdamW(parameters(SHAPES[:2])).load_state_dict(optimizer.state_dict())


def test_options_of_the_matrix_stage_are_the_states():
    """Check that a loaded state sets them, like a group's other options except ``backend``."""
    saved = build(ns_steps=3, ns_dtype=torch.float32, workspace_bytes=1 << 20, detail_scale=0.5, momentum=0.8)
    train(saved, range(1))
    loaded = build()
    loaded.load_state_dict(stored(saved.state_dict()))
    group = loaded.param_groups[0]
    names = ("ns_steps", "ns_dtype", "workspace_bytes", "detail_scale", "momentum")
    assert [group[name] for name in names] == [3, "float32", 1 << 20, 0.5, 0.8]


# What is supported and what is not -----------------------------------------------------------------------


def test_parameters_without_gradient_are_left_alone():
    optimizer = build()
    train(optimizer, range(2))
    before = results(optimizer)
    give_gradients(own_of(optimizer), seed=3)
    own_of(optimizer)[1].grad = None
    optimizer.step()
    after = results(optimizer)
    assert_same_bits(after["params"][1], before["params"][1])
    assert float(optimizer.state[own_of(optimizer)[1]]["step"]) == 2
    assert_differ(after["params"][0], before["params"][0])
    optimizer.zero_grad()
    optimizer.step()
    assert_same_bits(results(optimizer), after)


@pytest.mark.parametrize("backend", ["torch", "compiled", "triton"])
@pytest.mark.parametrize(
    "options", [{}, {"capturable": True}, {"skip_nonfinite": True, "telemetry": True}], ids=str
)
def test_empty_tensors_are_counted(backend, options):
    optimizer = build(parameters([(0, 8), (4, 8), (0, 4, 8), (2, 0, 8)]), backend=backend, **options)
    with interpreter.like_a_gpu():
        train(optimizer, range(2))
    assert [float(optimizer.state[p]["step"]) for p in own_of(optimizer)] == [2.0] * 4
    only = build(parameters([(0, 8)]), backend=backend, **options)
    with interpreter.like_a_gpu():
        train(only, range(2))
    assert float(only.state[own_of(only)[0]]["step"]) == 2.0


def test_closures_hooks_and_meta_tensors():
    optimizer = build(parameters([(8, 16)]))
    called = []
    optimizer.register_step_post_hook(lambda *_: called.append(True))
    (p,) = own_of(optimizer)

    def closure():
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    losses = [float(optimizer.step(closure)) for _ in range(3)]
    assert losses == sorted(losses, reverse=True)
    assert len(called) == 3
    there = [nn.Parameter(torch.empty(8, 16, device="meta"))]
    there[0].grad = torch.empty(8, 16, device="meta")
    nowhere = build(there)
    nowhere.step()
    assert nowhere.state[there[0]]["exp_avg"].shape == (8, 4)
