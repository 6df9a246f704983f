"""Tests Adafactor on approximations: goldens, the oracle, and every backend, layout and format."""

from __future__ import annotations

import copy
import math
from unittest import mock

import numpy as np
import pytest
import torch

from gwt_kernels import GWTAdafactor
from gwt_kernels.backends.cpu.adafactor import TABLE_ROW
from gwt_kernels.backends.cpu.step import Packed
from gwt_kernels.formats.int8 import decode_first
from gwt_kernels.formats.split import join_low
from gwt_kernels.optim.state import low_bits_of
from tests.support import golden, interpreter, poisoned, runs
from tests.support import reference_optimizers as oracle
from tests.support.native import needs_step_in_c
from tests.support.poisoned import Poisoned
from tests.test_functional import BACKENDS, backends, on

SHAPES = [(6, 40), (5, 37), (3, 4, 16), (90,), (1, 64), (20, 600), (70, 3), (2, 3, 2, 9), ()]
EPS = {torch.float64: 2e-15, torch.float32: 2**-23, torch.bfloat16: 2**-8, torch.float16: 2**-10}
OPTIONS = {
    "defaults": {},
    "published": {"details": "published", "clip_threshold": 0.3},
    "without first moment": {"beta1": None, "scale_parameter": True, "weight_decay": 0.1},
    "relative step": {"relative_step": True, "lr": None},
    "warm-up": {"relative_step": True, "warmup_init": True, "scale_parameter": True, "eps": (1e-12, 0.5)},
    "decay rate": {"decay_rate": -0.5, "maximize": True, "scale": 0.7},
}
CASES = golden.optimizer_cases("adafactor")


def options_of(case):
    """Return the options of a golden case."""
    shared = {key: getattr(case, key) for key in ("level", "weight_decay", "wavelet", "boundary")}
    return shared | case.options


def replayed(case, **changed):
    """Return the weights after each step of a golden case with changed options, and the state after the last."""
    p = torch.nn.Parameter(torch.tensor(case.p0))
    optimizer = GWTAdafactor([p], **{"details": "published", "lr": case.lr[0], **options_of(case), **changed})
    params = []
    for g, lr in zip(case.grads, case.lr, strict=True):
        optimizer.param_groups[0]["lr"] = lr
        p.grad = torch.tensor(g)
        optimizer.step()
        params.append(p.detach().numpy().copy())
    return np.stack(params), optimizer.state[p]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_golden_vectors(case):
    params, state = replayed(case)
    movement = case.params - case.p0
    np.testing.assert_allclose(params - case.p0, movement, rtol=0, atol=1e-11 * np.abs(movement).max())
    assert state.keys() == {"step", *case.state}
    for name, expected in case.state.items():
        np.testing.assert_allclose(state[name].numpy(), expected, rtol=0, atol=1e-12 * np.abs(expected).max())


def test_golden_vectors_notice_other_options():
    assert len(CASES) == 26
    case = next(case for case in CASES if case.name == "adafactor2_clip")
    for changed in ({"details": "divided"}, {"clip_threshold": 0.31}, {"decay_rate": -0.79}, {"scale": 0.26}):
        assert np.abs(replayed(case, **changed)[0] - case.params).max() > 1e-9 * np.abs(case.params - case.p0).max()


def exact(x):
    """Return a tensor's numbers in float64, in new memory."""
    return np.array(x.detach().to("cpu", torch.float64).numpy(), order="C")


class Run:
    """An optimizer over poisoned tensors, whose steps are compared with the oracle's from the same state."""

    def __init__(self, device, level, *, dtype=torch.float32, layout="contiguous", shapes=SHAPES, **options):
        self.generator = torch.Generator().manual_seed(level)
        self.dtype, self.device, self.layout = dtype, device, layout
        shapes = [s for s in shapes if not level or 2**level < 2 * (s[-1] if s else 1)]
        values = [self.normal(s, 0.1).to(device, dtype) for s in shapes]
        self.held = [Poisoned(x, layout) for x in values]
        # A 1-D view into a larger buffer is refused above level 0.
        self.params = [
            torch.nn.Parameter(x if level and x.dim() == 1 else own.tensor)
            for x, own in zip(values, self.held, strict=True)
        ]
        self.level = level
        self.optimizer = GWTAdafactor(self.params, **{"lr": 0.03, "level": level, **options})

    def normal(self, shape, size=1.0):
        return size * (torch.randn(shape, generator=self.generator, dtype=torch.float64) + 0.3)

    def whole(self, p):
        state = self.optimizer.state[p]
        low = state.get("weight_low")
        return exact(p if low is None else join_low(p.detach(), low_bits_of(low)))

    def step(self, factor=1.0, slack=40.0):
        values = [self.normal(p.shape, factor).to(self.device, self.dtype) for p in self.params]
        grads = [Poisoned(x, self.layout) for x in values]
        before = []
        for p, g in zip(self.params, grads, strict=True):
            p.grad = g.tensor
            before.append((self.whole(p), {k: exact(x) for k, x in self.optimizer.state[p].items()}))
        with interpreter.like_a_gpu(), poisoned.uninitialized():
            self.optimizer.step()
        for p, g, own, (old, state) in zip(self.params, grads, self.held, before, strict=True):
            own.check()
            g.check()
            self.compare(p, exact(g.tensor), old, state, slack)

    def compare(self, p, g, old, state, slack):
        group, new = self.optimizer.param_groups[0], self.optimizer.state[p]
        names = ("lr", "beta1", "eps", "clip_threshold", "decay_rate", "weight_decay", "scale", "scale_parameter")
        names += ("relative_step", "warmup_init", "details", "maximize", "wavelet", "boundary")
        kept = oracle.adafactor_state(p.shape, self.level, group["beta1"], group["wavelet"])
        kept = {k: np.reshape(state.get(k, x), np.shape(x)).copy() for k, x in kept.items()}
        want = np.atleast_1d(old).copy()
        step = int(state.get("step", 0)) + 1
        oracle.adafactor_step(
            want, np.atleast_1d(g), {k: np.atleast_1d(x) for k, x in kept.items()} if not p.dim() else kept,
            level=self.level, step=step, **{k: group[k] for k in names},
        )  # fmt: skip
        want = want.reshape(old.shape)
        unit = EPS[torch.promote_types(self.dtype, torch.float32)]
        moved = np.abs(want - old).max()
        bound = slack * unit * (moved + np.abs(want)) + 1e-30
        if group["weight_rounding"] != "split":
            ulps = 2 if group["weight_rounding"] == "stochastic" else 1  # in halves of an ulp
            smallest = 2.0**-25 if self.dtype == torch.float16 else 0.0
            bound = bound + ulps * (EPS[self.dtype] * np.abs(want) + smallest)
        error = np.abs(self.whole(p) - want)
        assert (error <= bound).all(), (p.shape, error.max(), moved)
        assert int(new["step"]) == step
        for key, value in kept.items():
            stored = 2 * EPS[new[key].dtype] * np.abs(value)  # at random
            within = slack * unit * np.abs(value).max() + stored
            assert (np.abs(exact(new[key]) - value) <= within).all(), (p.shape, key)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("level", [0, 1, 2, 4])
def test_float64_follows_the_oracle(level, option):
    run = Run("cpu", level, dtype=torch.float64, **OPTIONS[option])
    for factor in (1.0, 3.0, 0.1):
        run.step(factor, slack=500)


@pytest.mark.parametrize(
    ("wavelet", "boundary"), [("db2", "zero"), ("bior2.2", "symmetric"), ("haar", "periodic"), ("haar", "constant")]
)
@pytest.mark.parametrize("details", ["divided", "published"])
def test_the_literal_algorithm_follows_the_oracle(wavelet, boundary, details):
    shapes = [(6, 40), (5, 37), (3, 4, 16), (90,)]
    for beta1 in (0.9, None):
        run = Run(
            "cpu", 2, dtype=torch.float64, shapes=shapes, wavelet=wavelet, boundary=boundary, details=details,
            beta1=beta1,
        )  # fmt: skip
        for factor in (1.0, 3.0):
            run.step(factor, slack=500)


@pytest.mark.parametrize("option", OPTIONS)
@backends
def test_options(backend, option):
    run = Run(on(backend), 2, backend=backend, **OPTIONS[option])
    for factor in (1.0, 4.0, 0.1):
        run.step(factor)


@pytest.mark.parametrize(
    ("backend", "level"),  # level 1 on Triton is that of many panels, 2 that of the options
    [(backend, level) for backend in BACKENDS for level in ((0, 3, 9) if backend == "triton" else (0, 1, 3, 5, 9))],
)
def test_levels(backend, level):
    shapes = [*SHAPES, (3, 1030)] if level < 9 else [(3, 1024), (2, 700), (5, 515)]
    run = Run(on(backend), level, backend=backend, shapes=shapes)
    for factor in (1.0, 2.0):
        run.step(factor, slack=100)


SCALED, NARROW = {"beta1": None, "scale_parameter": True}, {"state_dtype": torch.bfloat16}


@pytest.mark.parametrize(
    ("dtype", "rounding", "options"),  # every dtype with every option, and every rounding with two
    [(torch.bfloat16, "nearest", SCALED), (torch.bfloat16, "stochastic", {}), (torch.bfloat16, "split", SCALED),
     (torch.bfloat16, "split", NARROW), (torch.float16, "nearest", {}), (torch.float16, "stochastic", SCALED),
     (torch.float16, "nearest", NARROW)],
    ids=str,
)  # fmt: skip
@backends
def test_weights_of_16_bits(backend, dtype, rounding, options):
    run = Run(on(backend), 2, backend=backend, dtype=dtype, weight_rounding=rounding, **options)
    for factor in (1.0, 2.0):
        run.step(factor)


@pytest.mark.parametrize("layout", ["misaligned", "transposed", "strided", "gaps"])
@backends
def test_layouts(backend, layout):
    run = Run(on(backend), 2, backend=backend, layout=layout)
    for factor in (1.0, 2.0):
        run.step(factor)


@backends
def test_matrices_of_many_panels(backend):
    """Check more rows than there may be panels, panels of several loop steps, and rows of several panels."""
    run = Run(on(backend), 1, backend=backend, shapes=[(700, 1100), (2, 90, 520)], scale_parameter=True)
    run.step(slack=100)
    run.step(2.0, slack=100)


@pytest.mark.parametrize("backend", ["triton"])
def test_sums_are_the_same_to_the_bit_on_every_path(backend):
    """Compare aligned rows, misaligned rows, and a launch with other tensors."""
    shape, results = (40, 96), []
    for layout, others in (("contiguous", []), ("misaligned", []), ("contiguous", [(7, 33), (64,)])):
        run = Run(on(backend), 2, backend=backend, layout=layout, shapes=[shape, *others])
        generator = torch.Generator().manual_seed(3)
        p = run.params[0]
        with torch.no_grad():
            p.copy_(torch.randn(shape, generator=generator))
        for _ in range(3):
            for q in run.params:
                q.grad = None if q is p else torch.ones_like(q)
            g = torch.randn(shape, generator=generator).to(p)
            p.grad = Poisoned(g, layout).tensor
            with interpreter.like_a_gpu():
                run.optimizer.step()
        results.append([p.detach().clone().contiguous(), *run.optimizer.state[p].values()])
    runs.assert_same_bits(results[0], results[1])
    runs.assert_same_bits(results[0], results[2])


def parameters(dtype=torch.float32, device="cpu", shapes=((64, 96), (33, 70), (128,), (3, 8, 24))):
    return runs.parameters(shapes, torch.device(device), dtype)


def steps(optimizer, params, ts):
    for t in ts:
        runs.give_gradients(params, t, (1.0, 3.0, 0.2)[t % 3])
        with interpreter.like_a_gpu():
            optimizer.step()


@pytest.mark.parametrize("shape", [(6, 4), (2, 3, 5), (7,)])
def test_level_0_is_adafactor_of_torch(shape):
    """Compare with torch: no first moment, rates scaled by the weights and capped, nothing added to squares."""
    p, q = runs.parameters([shape], dtype=torch.float64) + runs.parameters([shape], dtype=torch.float64)
    theirs = torch.optim.Adafactor([p], lr=0.5, eps=(1e-30, 1e-3))
    ours = GWTAdafactor([q], lr=0.5, beta1=None, scale_parameter=True, level=0, scale=99.0)
    for t in range(1, 6):
        p.grad = q.grad = torch.randn(shape, dtype=torch.float64) * t**2
        ours.param_groups[0]["lr"] = min(0.5, 1 / math.sqrt(t))
        theirs.step()
        ours.step()
        torch.testing.assert_close(q, p, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("details", ["divided", "published"])
def test_int8_moments_follow_float32_ones_within_their_step(details):
    shapes = [(256, 128), (100, 50)]
    exact_, narrow = parameters(shapes=shapes), parameters(shapes=shapes)
    wide = GWTAdafactor(exact_, details=details)
    small = GWTAdafactor(narrow, details=details, state_dtype=torch.int8)
    for optimizer, params in ((wide, exact_), (small, narrow)):
        steps(optimizer, params, range(4))
    assert set(small.state[narrow[1]]) == {"step", "exp_avg", "exp_avg_sq_row", "exp_avg_sq_col"}, (
        "1300 are too few"
    )
    state = small.state[narrow[0]]
    assert set(state) == {"step", "exp_avg", "exp_avg_scale", "exp_avg_sq_row", "exp_avg_sq_col"}
    assert (state["exp_avg"].dtype, state["exp_avg_sq_row"].dtype) == (torch.int8, torch.float32)
    decoded = decode_first(state["exp_avg"], state["exp_avg_scale"], 2)
    error = (decoded - wide.state[exact_[0]]["exp_avg"]).abs().max() / decoded.abs().max()
    assert float(error) < 0.05


@pytest.mark.parametrize("other", ["triton", pytest.param("compiled", marks=needs_step_in_c)])
@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.int8])
def test_backends_round_alike(narrow, other):
    """Check that both backends round equal numbers to equal bits at random, up to float32 rounding."""
    results = []
    for backend in ("torch", other):
        params = parameters(torch.bfloat16, on(backend), shapes=[(96, 256), (33, 130)])
        optimizer = GWTAdafactor(
            params, state_dtype=narrow, weight_rounding="stochastic", backend=backend, seed=3, max_grad_norm=5.0
        )
        steps(optimizer, params, range(3))
        results.append([x.cpu() for p in params for x in (p.detach(), optimizer.state[p]["exp_avg"])])
    for a, b in zip(*results, strict=True):
        if a.dtype == torch.float32:  # of too few coefficients for int8
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        else:
            assert (a != b).float().mean() < 0.01


@needs_step_in_c
def test_what_c_takes_of_a_step(monkeypatch):
    """Check that C takes all tensors of a bucket at once, except with telemetry, float64 or other wavelets."""
    seen = []
    original = Packed.step_factored

    def watch(self, factors):
        seen.append(len(factors) // TABLE_ROW.size)
        original(self, factors)

    monkeypatch.setattr(Packed, "step_factored", watch)
    shapes = [(24, 64), (3, 10, 37), (50,), (0, 8)]
    for options in ({}, {"level": 0}, {"beta1": None}, {"state_dtype": torch.bfloat16}, {"relative_step": True}):
        params = parameters(shapes=shapes)
        optimizer = GWTAdafactor(params, **{"lr": None if "relative_step" in options else 0.01, **options})
        steps(optimizer, params, range(2))
        assert seen == [3, 3], options
        seen.clear()
    for dtype, options in (
        (torch.float64, {}), (torch.float32, {"telemetry": True}), (torch.float32, {"wavelet": "db2"}),
        (torch.float32, {"level": 11}), (torch.float32, {"backend": "torch"}),
    ):  # fmt: skip
        params = parameters(dtype, shapes=[(24, 4096)])
        steps(GWTAdafactor(params, **options), params, range(1))
        assert not seen, options


@backends
def test_a_zero_gradient_moves_nothing_and_infinite_ones_are_skipped(backend):
    params = parameters(device=on(backend))
    optimizer = GWTAdafactor(params, skip_nonfinite=True, telemetry=True, backend=backend)
    before = [p.detach().clone() for p in params]
    for p in params:
        p.grad = torch.zeros_like(p)
    with interpreter.like_a_gpu():
        optimizer.step()
    runs.assert_same_bits([p.detach() for p in params], before)
    assert all(x.isfinite().all() for p in params for x in optimizer.state[p].values())
    steps(optimizer, params, range(2))
    before = copy.deepcopy(runs.results(optimizer))
    runs.give_gradients(params, 5)
    params[1].grad[0, 0] = math.inf
    with interpreter.like_a_gpu():
        optimizer.step()
    runs.assert_same_bits(runs.results(optimizer), before)
    assert float(optimizer.skipped_steps) == 1
    told = optimizer.telemetry()
    for own in told.values():
        assert 0 <= own["detail_energy"] <= 1
        assert own["limiter"] >= 1
        assert own["nonfinite"] > 0
    assert max(own["limiter"] for own in told.values()) > 1, "nothing was clipped"


@pytest.mark.parametrize("options", [{}, {"details": "published"}, {"beta1": None, "eps": (1e-30, 1e-3)}])
@pytest.mark.parametrize(("level", "size"), [(0, 1.0), (2, 1.0), (2, 3e4), (0, 1e8), (2, 1e8)])
@backends
def test_rows_and_columns_without_gradient_move_nothing_beside_large_ones(backend, size, level, options):
    p = torch.nn.Parameter(torch.ones(24, 64, device=on(backend)))
    optimizer = GWTAdafactor([p], level=level, backend=backend, **options)
    grad = torch.randn(24, 64, generator=torch.Generator().manual_seed(0)) * size
    grad[3:7], grad[:, 8:16] = 0.0, 0.0
    with interpreter.like_a_gpu():
        for _ in range(2):
            p.grad = grad.to(p.device)
            optimizer.step()
    moved = (p.detach() != 1.0).cpu()
    assert p.isfinite().all()
    assert not moved[3:7].any()
    assert not moved[:, 8:16].any()
    assert moved[8:, 16:].float().mean() > 0.9


def test_telemetry_is_the_same_on_either_backend():
    told = []
    for backend in ("torch", "triton"):
        params = parameters(device=on(backend))
        optimizer = GWTAdafactor(params, telemetry=True, backend=backend)
        steps(optimizer, params, range(2))
        told.append(optimizer.telemetry())
    for name, own in told[0].items():
        assert own == pytest.approx(told[1][name], rel=1e-4)


@backends
def test_steps_that_the_device_counts_are_those_of_the_host(backend):
    results = []
    for options in ({}, {"max_grad_norm": math.inf}):
        params = parameters(device=on(backend))
        optimizer = GWTAdafactor(
            params, relative_step=True, warmup_init=True, scale_parameter=True, weight_decay=0.1, backend=backend,
            **options,
        )  # fmt: skip
        steps(optimizer, params, range(4))
        results.append([x for p in params for x in (p.detach(), *optimizer.state[p].values())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("backend", ["triton"])
def test_launches_do_not_grow_with_tensors(backend):
    from gwt_kernels.backends.triton.factored_launch import FactoredLaunch

    counts = []
    for n in (1, 9):
        params = parameters(device=on(backend), shapes=[(16, 64)] * n)
        optimizer = GWTAdafactor(params, backend=backend, scale_parameter=True)
        steps(optimizer, params, range(1))
        with mock.patch.object(FactoredLaunch, "_run", autospec=True, side_effect=FactoredLaunch._run) as own:
            steps(optimizer, params, range(1))
        counts.append(own.call_count)
    assert counts == [6, 6], "and two of every step: the sums of squares, and the step itself"
