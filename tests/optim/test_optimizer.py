"""GWTAdamW's steps are right for all shapes, dtypes, layouts and uses of torch.optim."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from gwt_kernels import GWTAdamW
from gwt_kernels.plan import predicted_state_bytes
from tests.support import golden
from tests.support.runs import (
    CPU,
    assert_differ,
    assert_same_bits,
    backends,
    checked_step,
    give_gradients,
    parameters,
    parameters_of,
    place,
    results,
    train,
)

SHAPES = ((), (1,), (7,), (1, 1), (3, 5), (4, 16), (2, 3, 9), (2, 1, 3, 10), (0,), (3, 0), (0, 5))
LOW = (torch.float32, torch.bfloat16, torch.float16)


def fits(shape, level):
    return 0 in shape or 2**level < 2 * (shape[-1] if shape else 1)


# Against published and PyTorch results --------------------------------------------------------------------


def run_golden(case, **changed):
    """Return weights and limiter norm after each step of a golden case, with the published weight decay order."""
    p = nn.Parameter(torch.tensor(case.p0))
    options = {"betas": case.betas, "eps": case.eps, "level": case.level}
    options |= {"scale": case.scale, "norm_growth_limit": case.norm_growth_limit, "wavelet": case.wavelet}
    options |= {"rule": case.rule, "boundary": case.boundary, "correct_bias": case.correct_bias}
    options |= {"res_scale": case.res_scale}
    optimizer = GWTAdamW([p], lr=123.0, **(options | changed))
    params, norms = [], []
    for lr, g in zip(case.lr, case.grads, strict=True):
        optimizer.param_groups[0]["lr"] = lr
        p.grad = torch.tensor(g)
        optimizer.step()
        p.detach().copy_(case.decayed(p.detach(), lr))
        params.append(p.detach().numpy().copy())
        norms.append(float(optimizer.state[p].get("limiter_norm", np.nan)))
    return np.stack(params), np.array(norms), optimizer.state[p]


@pytest.mark.parametrize("case", golden.adamw_cases(), ids=lambda case: case.name)
def test_golden_vectors(case):
    params, norms, state = run_golden(case)
    # A weight whose updates cancel keeps the rounding errors of its earlier, larger values: some ulps of 1.
    np.testing.assert_allclose(params, case.params, rtol=1e-12, atol=1e-14 * np.abs(case.params).max())
    np.testing.assert_allclose(norms, case.limiter_norm, rtol=1e-12, atol=0)
    for name in ("exp_avg", "exp_avg_sq"):
        assert state[name].dtype == torch.float64
        np.testing.assert_allclose(state[name].numpy(), getattr(case, name), rtol=1e-12, atol=1e-300, err_msg=name)


def test_golden_vectors_are_complete_and_can_fail():
    assert len(golden.adamw_cases()) == 20
    case = next(c for c in golden.adamw_cases() if c.name == "haar2_limiter_spikes")
    for changed in ({"norm_growth_limit": None}, {"scale": 0.2500001}, {"level": 1}, {"wavelet": "db2"}):
        assert not np.allclose(run_golden(case, **changed)[0], case.params, rtol=1e-9, atol=0), changed


@backends
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_level_0_equals_torchs_adamw(backend, device, weight_decay, maximize):
    on = place(backend, device)
    dtype, tolerance = (torch.float64, 1e-12) if backend != "triton" else (torch.float32, 3e-6)
    shapes = [(), (5,), (3, 8), (2, 2, 7)]
    params, expected = parameters(shapes, on, dtype), parameters(shapes, on, dtype)
    common = {"lr": 1e-2, "betas": (0.8, 0.95), "weight_decay": weight_decay, "maximize": maximize}
    adamw = torch.optim.AdamW(expected, eps=1e-4, foreach=False, **common)
    ours = GWTAdamW(params, level=0, backend=backend, **common)
    for t in range(1, 7):
        for group in (params, expected):
            give_gradients(group, seed=t)
        ours.param_groups[0]["eps"] = 1e-4 * (1 - 0.95**t) ** 0.5
        ours.step()
        adamw.step()
        for p, q in zip(params, expected, strict=True):
            torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance / 10)
            assert "limiter_norm" not in ours.state[p]


# Every shape, dtype and layout, against the oracle --------------------------------------------------------


@backends
def test_mixed_dtypes_levels_shapes_and_options_in_one_optimizer(backend, device):
    on = place(backend, device)
    groups = []
    for level in range(4):
        shapes = [s for s in SHAPES if fits(s, level)]
        dtypes = LOW if backend == "triton" else (*LOW, torch.float64)
        params = [p for i, d in enumerate(dtypes) for p in parameters(shapes, on, d, seed=10 * level + i)]
        groups.append({"params": params, "level": level, "weight_decay": 0.1 * level, "maximize": level == 3})
    groups[1]["norm_growth_limit"] = None
    groups[2] |= {"betas": (0.5, 0.7), "eps": 1e-3, "scale": 1.5}
    optimizer = GWTAdamW(groups, lr=0.05, backend=backend)
    for t in range(3):
        give_gradients(parameters_of(optimizer), seed=t)
        assert checked_step(optimizer) == len(parameters_of(optimizer))


@pytest.mark.parametrize("what", ["weights", "exp_avg", "exp_avg_sq", "limiter_norm"])
def test_the_oracle_notices_an_error_of_one_in_ten_thousand(what):
    params = parameters([(4, 16)])
    optimizer = GWTAdamW(params, lr=0.1)
    train(optimizer, range(2))
    give_gradients(params, seed=2)
    checked_step(optimizer)
    spoil = {"weights": params[0].data, **optimizer.state[params[0]]}[what]
    optimizer.register_step_post_hook(lambda *_: spoil.mul_(1.0001))
    with pytest.raises(AssertionError, match=what.replace("limiter_", "")):
        checked_step(optimizer)


@pytest.mark.parametrize("level", [2, 5, 8])
@pytest.mark.parametrize("width", [129, 256, 300])
def test_wide_rows(level, width):
    params = parameters([(2, width), (width,)], dtype=torch.float32)
    optimizer = GWTAdamW(params, lr=0.05, level=level, weight_decay=0.1)
    for t in range(2):
        give_gradients(params, seed=t, factor=3.0**t)
        checked_step(optimizer)


LAYOUTS = {
    "transposed": lambda x: x.t().contiguous().t(),
    "columns": lambda x: x.repeat_interleave(2, dim=1)[:, ::2],
    "slice": lambda x: torch.cat([x[:, :3], x], dim=1)[:, 3:],
    "rows": lambda x: x.repeat_interleave(3, dim=0)[::3],
    "flipped 3-D": lambda x: x.reshape(2, 3, 10).permute(2, 0, 1).contiguous().permute(1, 2, 0),
    "channels last": lambda x: x.reshape(1, 2, 3, 10).to(memory_format=torch.channels_last),
}


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides_of_parameters_and_gradients(backend, device, dtype):
    on = place(backend, device)
    generator = torch.Generator().manual_seed(0)

    def tensor(layout):
        return LAYOUTS[layout](torch.randn(6, 10, generator=generator).to(on, dtype))

    pairs = [(a, b) for a in LAYOUTS for b in (a, None)] + [(None, "transposed"), ("transposed", "columns")]
    plain = {"flipped 3-D": (2, 3, 10), "channels last": (1, 2, 3, 10)}
    params, gradients = [], []
    for of_param, of_grad in pairs:
        shape = plain.get(of_param, (6, 10))
        params.append(nn.Parameter(tensor(of_param) if of_param else torch.ones(shape, device=on, dtype=dtype)))
        gradients.append(tensor(of_grad) if of_grad else torch.randn(shape, generator=generator).to(on, dtype))
    expanded = parameters([(6, 10), (6, 10), (7,)], on, dtype)
    assert not all(p.is_contiguous() for p in params)
    optimizer = GWTAdamW([*params, *expanded], lr=0.1, level=2, weight_decay=0.1, backend=backend)
    strides = [p.stride() for p in params]
    for t in range(2):
        for p, g in zip(params, gradients, strict=True):
            p.grad = g * 2**t
        expanded[0].grad = torch.full((1, 1), 0.5, device=on, dtype=dtype).expand(6, 10)
        expanded[1].grad = torch.arange(10, device=on).to(dtype).expand(6, 10)
        expanded[2].grad = torch.ones((), device=on, dtype=dtype).expand(7)
        kept = [(p.grad, p.grad.clone()) for p in parameters_of(optimizer)]
        checked_step(optimizer)
        assert all(torch.equal(a, b) for a, b in kept), "a gradient was changed"
    assert [p.stride() for p in params] == strides


@backends
def test_gradients_of_another_dtype_than_their_parameters(backend, device):
    params = [p for d in LOW for p in parameters([(4, 16), (3, 5)], place(backend, device), d)]
    optimizer = GWTAdamW(params, lr=0.1, level=2, backend=backend)
    for p in params:
        p.grad_dtype = None
    for t, grad_dtype in enumerate((torch.float32, torch.bfloat16, torch.float32)):
        give_gradients(params, seed=t)
        for p in params:
            p.grad = p.grad.to(grad_dtype)
        assert checked_step(optimizer) == len(params)


@pytest.mark.parametrize("chunk", [1, 7, 24])
def test_large_tensors_in_chunks_of_the_torch_backend(monkeypatch, chunk):
    monkeypatch.setattr("gwt_kernels.backends.torch.step.CHUNK", chunk)
    test_strides_of_parameters_and_gradients("torch", CPU, torch.float32)
    test_strides_of_parameters_and_gradients("torch", CPU, torch.bfloat16)
    test_mixed_dtypes_levels_shapes_and_options_in_one_optimizer("torch", CPU)


@backends
@pytest.mark.parametrize("dtype", LOW)
def test_memory_around_strided_parameters_is_unchanged(backend, device, dtype):
    on = place(backend, device)
    memory = torch.full((8, 32), 7.0, device=on, dtype=dtype)
    p = nn.Parameter(memory[1:7:2, 3:19:3])
    optimizer = GWTAdamW([p], lr=1.0, level=1, backend=backend)
    train(optimizer, range(2))
    inside = torch.zeros_like(memory, dtype=torch.bool)
    inside[1:7:2, 3:19:3] = True
    assert (memory[~inside] == 7).all()
    assert (memory[inside] != 7).all()


# Independence of tensors ----------------------------------------------------------------------------------


@backends
def test_tensors_do_not_influence_each_other(backend, device):
    on = place(backend, device)
    shapes = [(4, 16), (3, 5), (9,), (2, 3, 8), (4, 16)]
    together = GWTAdamW(parameters(shapes, on), lr=0.1, backend=backend)
    train(together, range(3))
    alone = [GWTAdamW([p], lr=0.1, backend=backend) for p in parameters(shapes, on)]
    for t in range(3):
        give_gradients([p for o in alone for p in parameters_of(o)], seed=t)
        for o in alone:
            o.step()
    assert_same_bits([results(o) for o in alone], split(together))
    assert_differ(split(together)[0]["params"], split(together)[4]["params"])


def split(optimizer):
    """Return the results as one optimizer per parameter would have them."""
    r = results(optimizer)
    return [{"params": [p], "state": [s]} for p, s in zip(r["params"], r["state"], strict=True)]


@backends
def test_parameters_without_gradient_are_unchanged_and_their_steps_not_counted(backend, device):
    params = parameters([(4, 8), (5,), (3, 6)], place(backend, device))
    optimizer = GWTAdamW(params, lr=0.1, weight_decay=0.1, level=1, backend=backend)
    optimizer.step()
    assert not optimizer.state
    present = [(1, 1, 0), (1, 0, 0), (0, 0, 1), (1, 1, 1), (0, 0, 0), (0, 1, 1), (1, 1, 1)]
    for t, mask in enumerate(present):
        give_gradients(params, seed=t)
        for p, there in zip(params, mask, strict=True):
            p.requires_grad_(bool(there))  # frozen in between
            if not there:
                p.grad = None
        assert checked_step(optimizer) == sum(mask)
    assert [int(optimizer.state[p]["step"]) for p in params] == np.sum(present, axis=0).tolist()


@backends
def test_duplicates_in_a_group_are_updated_once(backend, device):
    on = place(backend, device)
    once, twice = parameters([(4, 8), (5,)], on), parameters([(4, 8), (5,)], on)
    a = GWTAdamW(once, lr=0.1, level=1, backend=backend)
    with pytest.warns(UserWarning, match="duplicate"):
        b = GWTAdamW([twice[0], twice[1], twice[0]], lr=0.1, level=1, backend=backend)
    for _ in range(3):
        for params in (once, twice):
            give_gradients(params, seed=1)
        a.step()
        b.step()
        assert_same_bits([p.detach() for p in once], [p.detach() for p in twice])
    with pytest.warns(UserWarning, match="duplicate"):
        c = GWTAdamW([twice[0], twice[1], twice[0]], lr=0.1, level=1, backend=backend)
    c.load_state_dict(b.state_dict())
    assert_same_bits(results(b)["state"], results(c)["state"])
    with pytest.raises(ValueError, match="more than one parameter group"):
        b.add_param_group({"params": [twice[1]]})


def test_tied_weights_are_updated_once():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(12, 8), nn.Linear(8, 12, bias=False))
    model[1].weight = model[0].weight
    optimizer = GWTAdamW(model.parameters(), lr=0.1)
    assert len(parameters_of(optimizer)) == 1
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.arange(12)).square().sum().backward()
        assert checked_step(optimizer) == 1
    assert model[1].weight is model[0].weight


@backends
def test_add_param_group_in_mid_run_equals_an_optimizer_of_its_own(backend, device):
    on = place(backend, device)
    first, second = parameters([(4, 8), (3, 5)], on), parameters([(2, 16), (4, 8)], on, seed=1)
    options = {"lr": 0.1, "level": 1, "backend": backend}
    optimizer = GWTAdamW(first, **options)
    train(optimizer, range(2))
    optimizer.add_param_group({"params": second, "lr": 0.2, "weight_decay": 0.1})
    assert optimizer.param_groups[1]["level"] == 1
    alone = GWTAdamW(parameters([(4, 8), (3, 5)], on), **options)
    own = GWTAdamW(parameters([(2, 16), (4, 8)], on, seed=1), **(options | {"lr": 0.2}), weight_decay=0.1)
    train(alone, range(2))
    for t in range(2, 5):
        for params in (first, second, parameters_of(alone), parameters_of(own)):
            give_gradients(params, seed=t)
        for o in (optimizer, alone, own):
            o.step()
    assert_same_bits(split(optimizer), split(alone) + split(own))
    assert [int(optimizer.state[p]["step"]) for p in (first[0], second[0])] == [5, 3]


# The options ----------------------------------------------------------------------------------------------

OVERRIDES = {
    "lr": 0.3, "betas": (0.5, 0.6), "eps": 0.1, "weight_decay": 0.2, "level": 1, "scale": 0.7,
    "norm_growth_limit": 1.5, "wavelet": "db2", "state_dtype": torch.float64, "maximize": True, "backend": "torch",
}  # fmt: skip


@pytest.mark.parametrize("option", [o for o in OVERRIDES if o != "backend"])
def test_an_option_of_a_group_equals_that_of_the_constructor(option):
    shapes = [(4, 16), (3, 9)]
    common = {"lr": 0.1, "level": 2}
    by_group = GWTAdamW([{"params": parameters(shapes), option: OVERRIDES[option]}], **common)
    by_constructor = GWTAdamW(parameters(shapes), **(common | {option: OVERRIDES[option]}))
    default = GWTAdamW(parameters(shapes), **common)
    for optimizer in (by_group, by_constructor, default):
        # A growing gradient, so that the limiter acts.
        train(optimizer, range(4), before=lambda t, o=optimizer: [p.grad.mul_(4**t) for p in parameters_of(o)])
    assert_same_bits(results(by_group), results(by_constructor))
    assert_differ(results(by_group), results(default))


@backends
def test_maximize_ascends(backend, device):
    on = place(backend, device)
    up = GWTAdamW(parameters([(4, 8), (3, 5)], on), lr=0.1, maximize=True, backend=backend)
    down = GWTAdamW(parameters([(4, 8), (3, 5)], on), lr=0.1, backend=backend)
    train(up, range(3))
    train(down, range(3), before=lambda t: [p.grad.neg_() for p in parameters_of(down)])
    assert_same_bits(results(up), results(down))


@backends
def test_a_zero_first_gradient_leaves_the_limiter_off(backend, device):
    """Check that after a zero gradient the norm, 0, counts as none, and that after a small one the limiter acts."""
    norms = {}
    for first in (0.0, 1e-3):
        params = parameters([(4, 8)], place(backend, device))
        optimizer = GWTAdamW(params, lr=0.1, eps=1.0, backend=backend)
        norm = []
        for t, factor in enumerate((first, 100.0, 1000.0)):
            give_gradients(params, seed=t, factor=factor)
            checked_step(optimizer)
            norm.append(float(optimizer.state[params[0]]["limiter_norm"]))
        norms[first] = norm
    assert norms[0.0][0] == 0
    assert norms[0.0][1] > 1
    assert norms[1e-3][1] == pytest.approx(1.01 * (norms[1e-3][0] + 1e-8), rel=1e-5)
    assert norms[0.0][2] == pytest.approx(1.01 * norms[0.0][1], rel=1e-5)


@backends
def test_the_limiter_can_be_turned_on_and_off_in_mid_run(backend, device):
    params = parameters([(4, 8), (3, 5)], place(backend, device))
    optimizer = GWTAdamW(params, lr=0.1, norm_growth_limit=None, backend=backend)
    for t, gamma in enumerate((None, 1.01, 1.01, None, 2.0)):
        optimizer.param_groups[0]["norm_growth_limit"] = gamma
        give_gradients(params, seed=t, factor=10.0**t)
        assert checked_step(optimizer) == 2


@pytest.mark.filterwarnings("ignore:Level value of")
@pytest.mark.parametrize(
    ("level", "wavelet"),
    [*((k, "haar") for k in range(4)), (2, "db2"), (1, "sym4"), (2, "bior2.2"), (1, "rbio3.9")],
)
@pytest.mark.parametrize("boundary", ["zero", "reflect"])
@pytest.mark.parametrize("dtype", [*LOW, torch.float64])
def test_bytes_of_state(level, wavelet, boundary, dtype):
    import pywt

    shapes = [(6, 16), (3, 13), (2, 3, 9)]
    params = parameters(shapes, dtype=dtype)
    optimizer = GWTAdamW(params, lr=0.1, level=level, wavelet=wavelet, boundary=boundary)
    predicted = predicted_state_bytes(optimizer)
    train(optimizer, range(2))
    assert predicted == sum(x.numel() * x.element_size() for s in optimizer.state.values() for x in s.values())
    size = 8 if dtype == torch.float64 else 4
    for p in params:
        row = np.zeros(p.shape[-1])
        nb = pywt.wavedec(row, wavelet, mode=boundary, level=level)[0].size if level else row.size
        rows = p.numel() // p.shape[-1]
        state = copy.copy(optimizer.state[p])
        moments = [state.pop("exp_avg"), state.pop("exp_avg_sq")]
        assert sum(x.untyped_storage().nbytes() for x in moments) == 2 * nb * rows * size
        assert {k: (x.shape, x.dtype) for k, x in state.items()} == {"step": ((), torch.float64)} | (
            {"limiter_norm": ((), torch.float64 if size == 8 else torch.float32)} if level else {}
        )


# On a GPU -------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("set_to_none", [False, True])
def test_a_step_never_waits_for_the_gpu(device, set_to_none):
    shapes = [(64, 128), (33, 65), (40,)]
    groups = [{"params": parameters(shapes, device, d), "level": k} for k in (0, 2) for d in LOW]
    optimizer = GWTAdamW(groups, lr=0.1, weight_decay=0.1)
    train(optimizer, range(2))
    torch.cuda.synchronize()
    for t in range(3):
        optimizer.zero_grad(set_to_none=set_to_none)
        for p in parameters_of(optimizer):
            p.grad = torch.ones_like(p) * t
        torch.cuda.set_sync_debug_mode("error")
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_a_step_on_a_gpu_equals_one_on_the_cpu(device):
    shapes = [(16, 64), (5, 33), (40,)]
    on_gpu = GWTAdamW(parameters(shapes, device), lr=0.1, weight_decay=0.1)
    for t in range(3):
        give_gradients(parameters_of(on_gpu), seed=t)
        assert checked_step(on_gpu) == 3
    assert all(s["exp_avg"].is_cuda and s["limiter_norm"].is_cuda for s in on_gpu.state.values())
    assert not any(s["step"].is_cuda for s in on_gpu.state.values())
