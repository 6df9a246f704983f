"""Tests ``level="row"``, one block per row: every backend against the C oracle, and the optimizer."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gwt_kernels import GWTAdamW, GWTLion
from tests.support import interpreter
from tests.support.poisoned import LAYOUTS
from tests.support.steps import Bucket
from tests.test_functional import COMBINATIONS, HYPER, OPTIONS, backends, combinations, on, rules

# Rows of one element, of few, of odd and large widths, of many tiles; many dimensions; an empty tensor.
SHAPES = [(4, 32), (3, 37), (33,), (2, 3, 64), (2, 1, 2, 35), (0, 40), (5, 1), (2, 3000), (3, 1025), (1, 1024)]


@rules
@combinations
def test_steps_of_rows_follow_the_oracle(backend, dtype, rule):
    """Compare from the first step on, with new gradients each time, and a spike at step 3 for the limiter."""
    bucket = Bucket(SHAPES, "row", dtype=dtype, rule=rule, limited=rule == "gwt", first=True, device=on(backend))
    workspace = {}
    for t, size in enumerate((1.0, 0.5, 30.0), start=1):
        bucket.renew_gradients(size)
        bucket.check_step(HYPER, t, backend=backend, workspace=workspace)


@pytest.mark.parametrize("layout", LAYOUTS)
@rules
@combinations
def test_layouts_of_rows(backend, dtype, rule, layout):
    bucket = Bucket(
        [(4, 32), (3, 37), (5, 2, 16)], "row", dtype=dtype, layouts=[layout], rule=rule, limited=rule == "gwt",
        device=on(backend),
    )  # fmt: skip
    for t in (3, 4):
        bucket.check_step(HYPER, t, backend=backend)


@pytest.mark.parametrize(
    ("rule", "option"),
    [(rule, option) for rule in ("gwt", "foam") for option in OPTIONS if rule == "gwt" or "growth" not in option],
)
@backends
def test_options_of_rows(backend, rule, option):
    limited = rule == "gwt"
    bucket = Bucket([(3, 40), (3, 37)], "row", rule=rule, limited=limited, device=on(backend))
    for t, size in enumerate((1.0, 8.0), start=5):
        bucket.renew_gradients(size)
        bucket.check_step(OPTIONS[option], t, backend=backend)


@backends
def test_details_of_rows_are_scaled(backend):
    bucket = Bucket([(3, 40), (3, 37)], "row", rule="foam", device=on(backend))
    bucket.check_step(HYPER._replace(detail_scale=0.3), 4, backend=backend)


@pytest.mark.parametrize("moment_dtype", [torch.bfloat16, torch.float16])
@rules
@backends
def test_narrow_moments_of_rows(backend, rule, moment_dtype):
    bucket = Bucket(
        [(4, 32), (3, 37)], "row", rule=rule, moment_dtype=moment_dtype, limited=rule == "gwt", device=on(backend)
    )
    for t in (1, 2):
        bucket.check_step(HYPER, t, backend=backend)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    shapes=st.lists(
        st.tuples(st.lists(st.integers(1, 4), max_size=2), st.integers(1, 300)).map(lambda x: (*x[0], x[1])),
        min_size=1,
        max_size=4,
    ),
    combination=st.sampled_from(COMBINATIONS),
    grad_dtype=st.sampled_from((None, torch.float32, torch.bfloat16)),
    layouts=st.lists(st.sampled_from(LAYOUTS), min_size=1, max_size=3),
    rule=st.sampled_from(("gwt", "foam")),
    detail_scale=st.floats(0, 2),
    step=st.integers(1, 10_000),
    seed=st.integers(0, 2**16),
)
def test_any_rows(shapes, combination, grad_dtype, layouts, rule, detail_scale, step, seed):
    backend, dtype = combination
    bucket = Bucket(
        shapes, "row", dtype=dtype, grad_dtype=grad_dtype, layouts=layouts, rule=rule, limited=rule == "gwt",
        device=on(backend), seed=seed,
    )  # fmt: skip
    bucket.check_step(HYPER._replace(detail_scale=detail_scale), step, backend=backend)


@backends
def test_the_comparison_notices_another_rule(backend):
    """Check as a control that a step with another rule differs from the oracle's."""
    bucket = Bucket([(4, 32)], "row", device=on(backend))
    with pytest.raises(AssertionError, match=r"params of tensor 0, .*: [0-9]+ of 128 elements are wrong"):
        bucket.check_step(HYPER, 3, backend=backend, rule="foam")


def parameters(shapes, generator, dtype=torch.float32, place=None):
    place = place or on("triton")
    return [torch.nn.Parameter(torch.randn(s, generator=generator).to(place, dtype)) for s in shapes]


@pytest.mark.parametrize("state_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("rounding", ["stochastic", "split"])
def test_weights_and_moments_are_rounded_by_the_same_bits_on_every_backend(rounding, state_dtype):
    """Check that most weights are equal bit for bit; others differ by a rounding, where a sum's last bit does."""
    found = []
    for backend in ("triton", "compiled", "torch"):
        generator = torch.Generator().manual_seed(0)
        shapes = ((6, 40), (5, 37), (2, 1501), (3, 1024))
        params = [
            torch.nn.Parameter(torch.randn(s, generator=generator).bfloat16().to(on("triton"))) for s in shapes
        ]
        optimizer = GWTAdamW(
            params, lr=1e-2, level="row", rule="foam", state_dtype=state_dtype, weight_rounding=rounding, seed=3,
            backend=backend,
        )  # fmt: skip
        for _ in range(2):
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator).to(p.device, p.dtype)
            with interpreter.like_a_gpu():
                optimizer.step()
        states = [optimizer.state[p] for p in params]
        found.append([p.detach() for p in params] + [x[key] for x in states for key in ("exp_avg", "exp_avg_sq")])
    for own in found[:2]:
        for i, (a, b) in enumerate(zip(own, found[2], strict=True)):
            if a.dtype == torch.bfloat16:
                assert float((a != b.to(a.device)).double().mean()) <= 0.02 + (i >= 4) * 0.18
            else:
                torch.testing.assert_close(a, b.to(a.device), rtol=1e-5, atol=1e-7)


def test_telemetry_of_rows_is_the_same_on_every_backend():
    rows = []
    for backend in ("triton", "compiled", "torch"):
        generator = torch.Generator().manual_seed(0)
        params = [
            torch.nn.Parameter(torch.randn(s, generator=generator).to(on("triton"))) for s in ((5, 40), (3, 37))
        ]
        optimizer = GWTAdamW(params, level="row", telemetry=True, backend=backend)
        for _ in range(3):
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator).to(p.device)
            with interpreter.like_a_gpu():
                optimizer.step()
        rows.append(optimizer.telemetry())
    for found in rows[:2]:
        for name, own in found.items():
            for key, value in own.items():
                assert value == pytest.approx(rows[2][name][key], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("rule", ["gwt", "foam"])
def test_bad_batches_are_skipped_and_gradients_clipped_with_rows(rule):
    """Check skipping and clipping, for which the limiter's pass over rows also collects gradient statistics."""
    found = []
    for backend in ("triton", "torch"):
        generator = torch.Generator().manual_seed(0)
        params = [
            torch.nn.Parameter(torch.randn(s, generator=generator).to(on("triton"))) for s in ((5, 40), (3, 37))
        ]
        optimizer = GWTAdamW(
            params, lr=0.1, level="row", rule=rule, max_grad_norm=1.0, skip_nonfinite=True, backend=backend
        )
        for t in range(4):
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator).to(p.device)
            if t == 1:
                params[1].grad[2, 36] = torch.inf
            with interpreter.like_a_gpu():
                optimizer.step()
        assert float(optimizer.skipped_steps) == 1
        found.append([*params, optimizer.grad_norm])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a.detach(), b.detach().to(a.dtype), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("rule", ["gwt", "foam"])
def test_one_launch_takes_all_rows_of_a_bucket(rule, monkeypatch):
    """Check for one launch for all rows, and with the limiter one for its sums and one for its divisors."""
    from gwt_kernels.backends.triton import launch

    seen = []
    original = launch.Launch._compile if hasattr(launch.Launch, "_compile") else launch.Launch._start

    def counted(self, kernel, *arguments, **constants):
        name = kernel[0] if isinstance(kernel, tuple) else kernel
        seen.append(name.fn.__name__)
        return original(self, kernel, *arguments, **constants)

    monkeypatch.setattr(launch.Launch, original.__name__, counted)
    bucket = Bucket([(4, 32), (7, 64), (2, 8, 16)], "row", rule=rule, limited=rule == "gwt", device=on("triton"))
    bucket.check_step(HYPER, 2, backend="triton")
    assert seen == (["row_norm_kernel", "limiter_kernel"] if rule == "gwt" else []) + ["row_step_kernel"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lion_on_rows_is_the_same_on_every_backend(dtype):
    found = []
    for backend in ("triton", "torch"):
        generator = torch.Generator().manual_seed(0)
        params = parameters(((5, 40), (3, 37), (2, 1100)), generator, dtype)
        optimizer = GWTLion(params, lr=0.1, level="row", backend=backend)
        for _ in range(3):
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator).to(p.device, p.dtype)
            with interpreter.like_a_gpu():
                optimizer.step()
        assert all(optimizer.state[p]["exp_avg"].shape == (*p.shape[:-1], 1) for p in params)
        found.append([p.detach() for p in params])
    for a, b in zip(*found, strict=True):
        assert float(((a - b).abs() > 1e-6).double().mean()) < 0.002, (
            "signs differ where a sum is 0 but for rounding"
        )


@pytest.mark.parametrize("rule", ["gwt", "foam"])
@pytest.mark.parametrize("threads", [1, 2])
def test_rows_of_any_width_are_stepped_in_c_the_same_by_any_threads(rule, threads, monkeypatch):
    from gwt_kernels.backends.cpu import step

    seen = []
    original = step.Packed.step
    monkeypatch.setattr(step.Packed, "step", lambda self: (seen.append(len(self._params)), original(self))[1])
    before = torch.get_num_threads()
    results = []
    for n in (1, threads):
        torch.set_num_threads(n)
        generator = torch.Generator().manual_seed(0)
        params = parameters(((300, 401), (3, 8), (70000,), (5, 5)), generator, place=torch.device("cpu"))
        res_scale = 0.5 if rule == "foam" else 1.0
        optimizer = GWTAdamW(params, level="row", rule=rule, res_scale=res_scale, backend="compiled")
        for _ in range(2):
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator)
            optimizer.step()
        results.append(params)
    torch.set_num_threads(before)
    assert seen == [4] * 4
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
