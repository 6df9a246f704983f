"""Tests GWT-Muon's formula: against the C oracle, golden trajectories and ``torch.optim.Muon``, and each stage."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from gwt_kernels import GWTMuon
from gwt_kernels.functional import Hyper
from gwt_kernels.rules import rule_of
from tests.support import golden, interpreter, poisoned, steps, torch_muon
from tests.support import reference_optimizers as oracle
from tests.support.poisoned import Poisoned
from tests.support.reference import block_width, moment_shape
from tests.test_functional import BACKENDS, backends, on

SHAPES = [(6, 40), (17, 5), (5, 37), (9, 9), (3, 4, 16), (2, 3, 7, 11)]
EXACT = {"ns_dtype": torch.float64, "backend": "torch"}

# Against the oracle, which states the transform literally and each matrix on its own -----------------------


def parameters(shapes, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype)) for s in shapes]


def noise(shape, generator):
    return torch.randn(shape, generator=generator, dtype=torch.float64) + 0.3


def follow(params, optimizer, expected, n=4):
    """Compare steps with ``expected(i, g)``, which changes and returns weights and moment in float64."""
    generator = torch.Generator().manual_seed(7)
    for t in range(n):
        for p in params:
            p.grad = noise(p.shape, generator)
        wanted = [expected(i, p.grad.numpy()) for i, p in enumerate(params)]
        before = [p.detach().clone() for p in params]
        optimizer.step()
        for p, old, (new_p, new_m) in zip(params, before, wanted, strict=True):
            movement = float((torch.from_numpy(new_p) - old).abs().max())
            np.testing.assert_allclose(p.detach(), new_p, rtol=0, atol=1e-12 * movement, err_msg=f"step {t}")
            np.testing.assert_allclose(optimizer.state[p]["exp_avg"], new_m, rtol=1e-13, atol=1e-14)


def compare(shapes, *, level, oracle_options=None, n=4, **options):
    params = parameters(shapes)
    optimizer = GWTMuon(params, lr=0.02, level=level, **{**EXACT, **options})
    kept = [(p.detach().numpy().copy(), np.zeros(moment_shape(p.shape, level))) for p in params]

    def expected(i, g):
        p, m = kept[i]
        oracle.muon_step(p, g, m, level=level, lr=0.02, **(oracle_options or options))
        return p, m / math.sqrt(block_width(p.shape, level))  # the oracle's moments are of coefficients

    follow(params, optimizer, expected, n)


@pytest.mark.parametrize("level", [0, 1, 2, 3, 4, "row"])
@pytest.mark.parametrize("adjust_lr_fn", [None, *oracle.ADJUSTMENTS])
def test_steps_follow_the_oracle(level, adjust_lr_fn):
    shapes = [s for s in SHAPES if level == "row" or 2**level < 2 * s[-1]]
    compare(shapes, level=level, adjust_lr_fn=adjust_lr_fn)


@pytest.mark.parametrize(
    "options",
    [
        {"nesterov": False},
        {"momentum": 0.0},
        {"momentum": 0.6, "weight_decay": 0.0},
        {"scale": 0.6},
        {"detail_scale": 0.3},
        {"detail_scale": 0.0, "nesterov": False},
        {"maximize": True},
        {"ns_steps": 0},
        {"ns_steps": 4},
        {"ns_steps": 7, "ns_coefficients": (1.875, -1.25, 0.375)},
        {"eps": 30.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("level", [0, 2])
def test_each_option_is_the_oracles(options, level):
    compare(SHAPES, level=level, **options)
    with pytest.raises(AssertionError):  # control: the oracle with default options and another decay
        compare(SHAPES, level=level, oracle_options={"weight_decay": 0.2}, **options)


def test_a_flattened_tensor_is_one_matrix_whose_blocks_are_those_of_its_own_rows():
    params = parameters([(6, 3, 2, 10)])
    optimizer = GWTMuon(params, lr=0.02, level=2, flatten=True, **EXACT)
    (p,) = params
    weights, moment = p.detach().numpy().copy(), np.zeros((6, 3, 2, 3))

    def expected(i, g):
        # Blocks end where a row of 10 ends, as its state's shape says; the matrix is [6, 60].
        own = moment.reshape(36, 3)
        mean = np.pad(g.reshape(36, 10), ((0, 0), (0, 2))).reshape(36, 3, 4).mean(-1)
        own[:] = 0.95 * own + 0.05 * mean
        direction = np.repeat(0.95 * own + 0.05 * mean - mean, 4, axis=1)[:, :10] + g.reshape(36, 10)
        o = oracle.newton_schulz(np.ascontiguousarray(direction.reshape(6, 60)))
        weights[:] = weights * (1 - 0.02 * 0.1) - 0.02 * o.reshape(weights.shape)
        return weights, moment

    follow(params, optimizer, expected)


@pytest.mark.parametrize("adjust_lr_fn", oracle.ADJUSTMENTS)
@pytest.mark.parametrize("shape", [(12, 8), (3, 12, 8)])
def test_splits_of_rows_are_matrices_of_their_own(shape, adjust_lr_fn):
    splits = (9, 2, 1)
    params = parameters([shape])
    optimizer = GWTMuon(params, lr=0.02, level=1, row_splits=splits, adjust_lr_fn=adjust_lr_fn, **EXACT)
    weights, moment = params[0].detach().numpy().copy(), np.zeros((*shape[:-1], 4))

    def expected(i, g):
        ends = np.cumsum(splits)[:-1]
        arrays = [list(map(np.ascontiguousarray, np.split(x, ends, axis=-2))) for x in (weights, g, moment)]
        for p, grad, m in zip(*arrays, strict=True):
            oracle.muon_step(p, grad, m, level=1, lr=0.02, adjust_lr_fn=adjust_lr_fn)
        weights[:], moment[:] = (np.concatenate(arrays[k], axis=-2) for k in (0, 2))
        return weights, moment / math.sqrt(2)

    follow(params, optimizer, expected)


def test_a_matrix_of_zeros_moves_by_its_weight_decay_alone():
    params = parameters([(4, 8)])
    before = params[0].detach().clone()
    params[0].grad = torch.zeros(4, 8, dtype=torch.float64)
    GWTMuon(params, lr=0.02, **EXACT).step()
    assert torch.equal(params[0].detach(), before * (1 - 0.02 * 0.1))


# The golden trajectories -----------------------------------------------------------------------------------

GOLDEN = pytest.mark.parametrize("case", golden.optimizer_cases("muon"), ids=lambda case: case.name)


def replay(case, eps):
    """Return the weights after each step, and the last momentum; ``eps(g, m)`` is a step's eps of Newton-Schulz."""
    p = torch.nn.Parameter(torch.from_numpy(case.p0.copy()))
    optimizer = GWTMuon([p], weight_decay=case.weight_decay, level=case.level, **case.options, **EXACT)
    params = np.full_like(case.params, np.nan)
    for t, (g, lr) in enumerate(zip(case.grads, case.lr, strict=True)):
        m = optimizer.state[p]["exp_avg"].numpy() if t else np.zeros(p.shape)
        optimizer.param_groups[0].update(lr=lr, eps=eps(g, m))
        p.grad = torch.from_numpy(g.copy())
        optimizer.step()
        params[t] = p.detach().numpy()
    return params, optimizer.state[p]["exp_avg"].numpy()


@GOLDEN
def test_golden_vectors_are_met_to_what_their_eps_is_worth(case):
    """Compare with golden vectors, which divide a summed buffer by ``norm + eps``, not by ``max(norm, eps)``."""
    params, moment = replay(case, lambda g, m: 1e-7)
    movement = case.params - case.p0
    np.testing.assert_allclose(params - case.p0, movement, rtol=0, atol=1e-8 * np.abs(movement).max())
    rest = 1 - case.options["momentum"]
    np.testing.assert_allclose(moment, rest * case.state["momentum_buffer"], rtol=1e-12, atol=1e-15)


@GOLDEN
def test_golden_vectors_are_met_exactly_where_each_steps_eps_is_the_number_that_they_divide_by(case):
    mu = case.options["momentum"]

    def divisor(g, m):
        m = mu * m + (1 - mu) * g
        direction = mu * m + (1 - mu) * g if case.options["nesterov"] else m
        return float(np.linalg.norm(direction)) + (1 - mu) * 1e-7

    params, _ = replay(case, divisor)
    movement = case.params - case.p0
    np.testing.assert_allclose(params - case.p0, movement, rtol=0, atol=1e-12 * np.abs(movement).max())


# torch.optim.Muon ------------------------------------------------------------------------------------------

SHARED = [
    {},
    {"nesterov": False},
    {"momentum": 0.0},
    {"momentum": 0.6, "weight_decay": 0.0},
    *({"adjust_lr_fn": name} for name in torch_muon.ADJUSTMENTS),
    {"ns_steps": 0},
    {"ns_steps": 7, "ns_coefficients": (1.875, -1.25, 0.375)},
    {"eps": 30.0},
    {"lr": torch.tensor(0.01, dtype=torch.float64)},
]
shared = pytest.mark.parametrize("options", SHARED, ids=str)
MATRICES = [(9, 4), (4, 9), (5, 5), (1, 6), (6, 1), (16, 32)]


@shared
def test_level_0_is_torchs_in_float64(options, monkeypatch):
    """Run torch's own code without its one rounding to bfloat16."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    own, other = parameters(MATRICES), parameters(MATRICES)
    optimizer = GWTMuon(own, **{"lr": 0.02, **options}, level=0, **EXACT)
    torchs = torch.optim.Muon(other, **{"lr": 0.02, **options})
    generator = torch.Generator().manual_seed(3)
    for _ in range(5):
        for p, q in zip(own, other, strict=True):
            p.grad = noise(p.shape, generator)
            q.grad = p.grad.clone()
        optimizer.step()
        torchs.step()
    for p, q in zip(own, other, strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=0, atol=1e-12)
        m = torchs.state[q]["momentum_buffer"]
        torch.testing.assert_close(optimizer.state[p]["exp_avg"], m, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize(
    "options",
    [{}, {"nesterov": False}, {"momentum": 0.0}, {"ns_steps": 4}, {"adjust_lr_fn": "match_rms_adamw"}], ids=str,
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_level_0_has_torchs_bits_where_momentum_and_rate_are_exact(options, dtype):
    """Compare with torch for gradients of eighths and momentum 1/2, exact in any order of operations.

    torch rounds bfloat16 weights after their decay, and their update times the rate, which this package does not;
    and without Nesterov's momentum it divides a bfloat16 buffer itself by its norm, so there one step is compared.
    """
    options = {"momentum": 0.5, "lr": 2.0**-6, "weight_decay": 0.1, **options}
    if dtype == torch.bfloat16:
        options |= {"weight_decay": 0.0}
        if "adjust_lr_fn" in options:
            options |= {"lr": 2.0**-6 / 0.2}
    shapes = [(16, 4), (4, 16), (1, 4), (4, 1), (16, 16)]  # whose factors are powers of 2
    own, other = parameters(shapes, dtype=dtype), parameters(shapes, dtype=dtype)
    optimizer = GWTMuon(own, **options, level=0, backend="torch")
    torchs = torch.optim.Muon(other, **options)
    generator = torch.Generator().manual_seed(3)
    spoilt = dtype == torch.bfloat16 and not options.get("nesterov", True)
    for _ in range(1 if spoilt else 2):
        for p, q in zip(own, other, strict=True):
            p.grad = torch.randint(-4, 5, p.shape, generator=generator).to(dtype) / 8
            q.grad = p.grad.clone()
        optimizer.step()
        torchs.step()
    for p, q in zip(own, other, strict=True):
        assert torch.equal(p, q)
        if not spoilt:
            assert torch.equal(optimizer.state[p]["exp_avg"], torchs.state[q]["momentum_buffer"].float())


# Both element-wise stages, on every backend ----------------------------------------------------------------

EPS = {torch.float64: 2e-16, torch.float32: 2**-23, torch.bfloat16: 2**-8, torch.float16: 2**-10}
STAGE_SHAPES = [(6, 40), (5, 37), (3, 4, 16), (0, 8), (2, 64)]
HYPER = Hyper(lr=0.01, beta1=0.9, beta2=0.9, weight_decay=0.1, scale=0.7, detail_scale=0.8)


def directions(g, m, hyper, level):
    """Return ``M`` and the new momentum, in float64."""
    width, n = 2**level, g.shape[-1]
    blocks = *g.shape[:-1], -(-n // width), width
    g = torch.nn.functional.pad(g * hyper.signed_factor, (0, -n % width)).reshape(blocks)
    mean = g.mean(-1)
    m = hyper.beta1 * m + (1 - hyper.beta1) * mean
    direction = (hyper.beta2 * m + (1 - hyper.beta2) * mean).unsqueeze(-1)
    direction = direction + (hyper.detail_scale if level else 0.0) * (g - mean.unsqueeze(-1))
    return direction.flatten(-2)[..., :n], m


def placed(shape, generator, dtype, backend, layout="contiguous"):
    return Poisoned(noise(shape, generator).to(on(backend), dtype), layout)


def double(x):
    return x.tensor.detach().to("cpu", torch.float64, copy=True)


def check_first_stage(
    level, backend, *, values=torch.bfloat16, grads=torch.float32, hyper=HYPER, formula=None, layout="contiguous"
):
    generator = torch.Generator().manual_seed(level)
    shapes = [s for s in STAGE_SHAPES if 2**level < 2 * s[-1]]
    wide = torch.promote_types(grads, torch.float32)
    out = [Poisoned(torch.full(s, math.nan, dtype=values, device=on(backend))) for s in shapes]
    given = [placed(s, generator, grads, backend, layout) for s in shapes]
    moments = [placed((*s[:-1], -(-s[-1] // 2**level)), generator, wide, backend) for s in shapes]
    wanted = [
        directions(double(g), double(m), formula or hyper, level) for g, m in zip(given, moments, strict=True)
    ]
    with interpreter.like_a_gpu(), poisoned.uninitialized(), torch.no_grad():
        runner, inputs = steps.prepared(
            params=[x.tensor for x in out], grads=[x.tensor for x in given],
            exp_avgs=[x.tensor for x in moments], exp_avg_sqs=None, steps=[3] * len(shapes),
            hypers=[hyper] * len(shapes), level=level, rule="muon", backend=backend,
        )  # fmt: skip
        runner.apply(inputs)
    for x, m, (direction, moment) in zip(out, moments, wanted, strict=True):
        x.check()
        m.check()
        if x.tensor.numel():
            size = float(direction.abs().max()) + float(moment.abs().max())
            torch.testing.assert_close(double(x), direction, rtol=EPS[values], atol=16 * EPS[wide] * size)
            torch.testing.assert_close(double(m), moment, rtol=0, atol=8 * EPS[wide] * size)


@pytest.mark.parametrize("level", [0, 1, 2, 3, 5])
@backends
def test_the_first_stage_makes_momentum_and_matrices(backend, level):
    check_first_stage(level, backend)
    check_first_stage(level, backend, values=torch.float32)


@pytest.mark.parametrize("layout", ["misaligned", "transposed", "gaps"])
@pytest.mark.parametrize("grads", [torch.float32, torch.bfloat16, torch.float16])
@backends
def test_the_first_stage_takes_gradients_of_any_layout_and_dtype(backend, grads, layout):
    check_first_stage(2, backend, grads=grads, layout=layout)


@pytest.mark.parametrize(
    "hyper",
    [
        HYPER._replace(beta2=1.0),
        HYPER._replace(detail_scale=0.0),
        HYPER._replace(detail_scale=1.0),
        HYPER._replace(maximize=True),
        HYPER._replace(grad_factor=0.3),
        HYPER._replace(beta1=0.0, beta2=0.0),
    ],
    ids=["plain", "no details", "details", "maximize", "factor", "no momentum"],
)
@backends
def test_the_first_stage_takes_every_option(backend, hyper):
    check_first_stage(2, backend, hyper=hyper)
    with pytest.raises(AssertionError):  # control
        check_first_stage(2, backend, hyper=hyper, formula=HYPER._replace(detail_scale=0.9, beta2=0.89))


def check_last_stage(level, backend, *, dtype=torch.float32, values=torch.bfloat16, layout="contiguous"):
    generator = torch.Generator().manual_seed(level)
    weights = [placed(s, generator, dtype, backend, layout) for s in STAGE_SHAPES]
    updates = [placed(s, generator, values, backend) for s in STAGE_SHAPES]
    wanted = [
        double(p) * (1 - HYPER.lr * HYPER.weight_decay) - HYPER.lr * HYPER.scale * double(o)
        for p, o in zip(weights, updates, strict=True)
    ]
    with interpreter.like_a_gpu(), poisoned.uninitialized(), torch.no_grad():
        runner, inputs = steps.prepared(
            params=[x.tensor for x in weights], grads=[x.tensor for x in updates], exp_avgs=None,
            exp_avg_sqs=None, steps=[3] * len(weights), hypers=[HYPER] * len(weights), level=level,
            rule=rule_of("muon", level).last_stage.name, backend=backend,
        )  # fmt: skip
        runner.apply(inputs)
    for p, want in zip(weights, wanted, strict=True):
        p.check()
        torch.testing.assert_close(double(p), want, rtol=EPS[dtype], atol=1e-6)


@pytest.mark.parametrize("layout", ["contiguous", "misaligned", "transposed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@backends
def test_the_last_stage_applies_what_became_of_matrices(backend, dtype, layout):
    for level in (0, 2):
        check_last_stage(level, backend, dtype=dtype, layout=layout)
        check_last_stage(level, backend, dtype=dtype, values=torch.float32, layout=layout)


def test_backends_are_those_of_the_other_rules():
    assert set(BACKENDS) == {"torch", "compiled", "triton"}
