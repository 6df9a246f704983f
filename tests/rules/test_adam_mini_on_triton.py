"""Adam-mini on Triton compared with PyTorch's operators, and second moments that rows share on Triton."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gwt_kernels import GWTAdamMini
from gwt_kernels.functional import Hyper, gwt_adamw_
from tests.rules.test_adam_mini import parameters, steps
from tests.support import interpreter
from tests.support.poisoned import Poisoned, uninitialized
from tests.test_functional import on

BY_ROW = [(5, 40), (3, 37), (2, 3, 64), (33,), (0, 40), (2, 1500), (6, 8)]
BY_HEAD = [(4, 40), (6, 37), (2, 2, 64), (33,), (0, 40), (2, 1500), (8, 1), (4, 0)]
EPS = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-9}


def both_backends(level, dtype=torch.float32, layout="contiguous", head_rows=1, n=3, bad=(), **options):
    """Return weights and states of some steps on Triton, and by PyTorch's operators in float64.

    The gradients of steps in ``bad`` have a NaN.
    """
    results = []
    place = on("triton")
    both = {
        key: options.pop(key)
        for key in ("max_grad_norm", "skip_nonfinite", "capturable", "maximize")
        if key in options
    }
    for backend in ("triton", "torch"):
        shapes = [s for s in (BY_ROW if head_rows == 1 else BY_HEAD) if level in (0, "row") or 2**level < 2 * s[-1]]
        params = [p.detach().to(place, dtype) for p in parameters(shapes=shapes)]
        params = [nn.Parameter(Poisoned(p, layout).tensor if p.numel() and p.dim() > 1 else p) for p in params]
        if backend == "torch":
            params = [nn.Parameter(p.detach().double()) for p in params]
        optimizer = GWTAdamMini(
            params, lr=1e-2, weight_decay=0.1, level=level, scale=0.7, eps=1e-3, backend=backend,
            head_rows=head_rows, **both, **(options if backend == "triton" else {}),
        )  # fmt: skip
        generator = torch.Generator().manual_seed(4)
        for t in range(n):
            for p in params:
                p.grad = (torch.randn(p.shape, generator=generator) + 0.3).to(place, dtype).to(p.dtype)
            if t in bad:
                params[0].grad[0, 0] = torch.nan
            with interpreter.like_a_gpu():
                optimizer.step()
        if bad:
            assert float(optimizer.skipped_steps) == len(bad)
        results.append((params, [optimizer.state[p] for p in params]))
    return results


def check(level, dtype=torch.float32, moment_dtype=None, **options):
    (params, states), (expected, wide) = both_backends(level, dtype, state_dtype=moment_dtype, **options)
    stored = torch.float32 if options.get("weight_rounding") == "split" else dtype
    for p, q, own, state in zip(params, expected, states, wide, strict=True):
        if not p.numel():
            continue
        if stored is not dtype:
            from gwt_kernels.formats.split import join_low

            p = join_low(p.detach(), own["weight_low"].view(torch.int16).squeeze(-1))
        error = (p.detach().double() - q.detach()).abs().max() / q.detach().abs().max()
        assert float(error) < 3 * EPS[stored] + 1e-3 * (moment_dtype is not None)
        for key, kept in (("exp_avg", moment_dtype or torch.float32), ("exp_avg_sq", torch.float32)):
            assert own[key].dtype == kept
            error = (own[key].double() - state[key]).abs().max() / state[key].abs().max()
            assert float(error) < 4 * EPS[kept], (key, p.shape)


@pytest.mark.parametrize("level", [0, 1, 2, 3, 6, "row"])
def test_triton_follows_pytorchs_operators(level):
    check(level)


@pytest.mark.parametrize("layout", ["misaligned", "transposed"])
def test_triton_takes_any_layout(layout):
    check(2, layout=layout)


@pytest.mark.parametrize(
    ("level", "options"),  # rows take another path than levels
    [(0, {"moment_dtype": torch.bfloat16}), (2, {}), (2, {"weight_rounding": "stochastic"}),
     (2, {"weight_rounding": "split"}), ("row", {"weight_rounding": "stochastic"}),
     ("row", {"weight_rounding": "split"}), ("row", {"moment_dtype": torch.bfloat16})],
    ids=str,
)  # fmt: skip
def test_triton_takes_narrow_weights_and_moments(level, options):
    check(level, torch.bfloat16, **options)


@pytest.mark.parametrize(("level", "head_rows"), [(2, 1), ("row", 1), (1, 2), ("row", None)])
def test_triton_corrects_the_bias_where_the_device_counts_steps(level, head_rows):
    check(level, capturable=True, head_rows=head_rows)


@pytest.mark.parametrize(
    ("level", "head_rows", "options"),
    [
        (0, None, {}),
        (1, 2, {"layout": "misaligned"}),
        (2, 2, {"dtype": torch.bfloat16, "weight_rounding": "stochastic", "moment_dtype": torch.bfloat16}),
        (2, None, {"dtype": torch.bfloat16, "weight_rounding": "split"}),
        (3, None, {"layout": "transposed", "dtype": torch.float16}),
        ("row", 2, {}),
        ("row", None, {"dtype": torch.bfloat16, "weight_rounding": "stochastic"}),
        (2, 2, {"max_grad_norm": 1.0, "skip_nonfinite": True, "bad": (1,)}),
        ("row", 2, {"max_grad_norm": 1.0, "skip_nonfinite": True, "bad": (0, 2), "maximize": True}),
    ],
    ids=str,
)
def test_triton_takes_rows_that_share_a_second_moment(level, head_rows, options):
    with uninitialized():
        check(level, head_rows=head_rows, **options)


@pytest.mark.parametrize("level", [2, "row"])
def test_random_bits_are_the_same_on_every_backend(level):
    """Check that most weights are equal bit for bit; others differ by a rounding, where a sum's last bit does."""
    found = []
    for backend in ("triton", "torch"):
        params = [nn.Parameter(p.detach().to(on("triton"))) for p in parameters(torch.bfloat16, shapes=BY_ROW)]
        optimizer = GWTAdamMini(
            params, lr=1e-2, level=level, state_dtype=torch.bfloat16, weight_rounding="stochastic", seed=3,
            backend=backend,
        )  # fmt: skip
        with interpreter.like_a_gpu():
            steps(optimizer, params, 2)
        found.append([x for p in params for x in (p.detach(), optimizer.state[p]["exp_avg"])])
    for a, b in zip(*found, strict=True):
        assert float((a != b).double().mean()) < 0.02 or not a.numel()


@pytest.mark.parametrize("head_rows", [1, None])
def test_telemetry_is_the_same_on_every_backend(head_rows):
    rows = []
    for backend in ("triton", "torch"):
        params = [nn.Parameter(p.detach().to(on("triton"))) for p in parameters(shapes=((5, 40), (3, 37)))]
        optimizer = GWTAdamMini(params, level=2, head_rows=head_rows, telemetry=True, backend=backend)
        with interpreter.like_a_gpu():
            steps(optimizer, params, 2)
        rows.append(optimizer.telemetry())
    for name, own in rows[0].items():
        for key, value in own.items():
            assert value == pytest.approx(rows[1][name][key], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("level", [0, 1, "row"])
@pytest.mark.parametrize("head_rows", [1, 2, None])
def test_gradients_whose_squares_overflow_are_clipped_to_nothing(head_rows, level):
    for backend in ("triton", "torch"):
        params = [nn.Parameter(p.detach().to(on("triton"))) for p in parameters(shapes=((4, 16),))]
        before = params[0].detach().clone()
        optimizer = GWTAdamMini(params, level=level, head_rows=head_rows, max_grad_norm=1.0, backend=backend)
        params[0].grad = torch.full_like(params[0], 1e25)
        with interpreter.like_a_gpu():
            optimizer.step()
        assert torch.equal(params[0], before)
        assert not optimizer.state[params[0]]["exp_avg_sq"].any()


def test_heads_of_one_row_are_rows():
    """Check bit for bit that heads of one row are rows, and that all rows of a head use equal numbers."""
    found = []
    for head_rows in (1, None):
        params = [nn.Parameter(p.detach().to(on("triton"))) for p in parameters(shapes=((1, 40), (1, 37), (33,)))]
        params += [nn.Parameter(params[0].detach().repeat(1 if head_rows else 4, 1))]
        optimizer = GWTAdamMini(params, level=2, head_rows=head_rows, backend="triton")
        for t in range(2):
            for p in params:
                p.grad = torch.linspace(-1, 1 + t, p.shape[-1], device=p.device).expand(p.shape).contiguous()
            with interpreter.like_a_gpu():
                optimizer.step()
        found.append(
            [
                x[..., :1, :] if x.dim() > 1 else x
                for p in params
                for x in (p.detach(), optimizer.state[p]["exp_avg_sq"])
            ]
        )
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", ["triton", "torch", "compiled"])
def test_the_function_takes_second_moments_of_heads(backend):
    generator, place = torch.Generator().manual_seed(5), on(backend)
    p, g = (torch.randn(6, 20, generator=generator).to(place) for _ in range(2))
    options = {"hypers": [Hyper(lr=0.1)], "level": 1, "rule": "adam_mini", "backend": backend, "workspace": {}}
    for heads in (1, 3):
        own, m, v = p.clone(), torch.zeros(6, 10, device=place), torch.zeros(heads, 1, device=place)
        with interpreter.like_a_gpu():
            for t in (1, 2):
                gwt_adamw_(params=[own], grads=[g], exp_avgs=[m], exp_avg_sqs=[v], steps=[t], **options)
        square = 2 * (g.view(6, 10, 2).mean(-1) ** 2).view(heads, -1).mean(1)
        torch.testing.assert_close(v.view(-1), (1 - 0.999**2) * square, rtol=1e-4, atol=0)
    for heads in (0, 4, 12):
        with pytest.raises(ValueError, match=f"6 rows cannot share {heads} second moments: pass one"):
            gwt_adamw_(
                params=[own], grads=[g], exp_avgs=[m], exp_avg_sqs=[v.new_zeros(heads, 1)], steps=[1], **options
            )


def test_heads_take_as_many_launches_as_paths(monkeypatch):
    """Check for one launch for rows in wide accesses and one for second moments, wherever their copies lie."""
    from gwt_kernels.backends.triton.launch import Launch

    launched, update = [], Launch.update
    monkeypatch.setattr(Launch, "update", lambda self, *given: (launched.append(self.flat), update(self, *given)))
    params = [nn.Parameter(torch.ones(6, 16, device=on("triton"))) for _ in range(3)]
    optimizer = GWTAdamMini(params, level=2, head_rows=3, backend="triton")
    with interpreter.like_a_gpu():
        steps(optimizer, params, 1)
    assert launched == [True, True]
