"""Tests Adam-mini on block means: the published trajectories, the C oracle, and ``GWTAdamMini`` as an optimizer."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from gwt_kernels import GWTAdamMini, GWTAdamW, migrate
from gwt_kernels.functional import Hyper, gwt_adamw_
from tests.support import golden, interpreter, reference
from tests.support import reference_optimizers as oracle
from tests.support.poisoned import Poisoned, uninitialized
from tests.test_functional import on


def stepped(optimizer, p, grads, lrs=None):
    """Weights after each step."""
    found = []
    for t, grad in enumerate(grads):
        p.grad = torch.tensor(np.asarray(grad), dtype=p.dtype)
        if lrs is not None:
            optimizer.param_groups[0]["lr"] = lrs[t]
        optimizer.step()
        found.append(p.detach().to(torch.float64).numpy().copy())
    return found


@pytest.mark.parametrize("case", golden.optimizer_cases("adam_mini"), ids=lambda case: case.name)
def test_level_0_follows_the_published_trajectories(case):
    p = torch.nn.Parameter(torch.tensor(case.p0))
    rows, groups = p.numel() // p.shape[-1], case.state["exp_avg_sq"].size
    optimizer = GWTAdamMini(
        [p], level=0, weight_decay=case.weight_decay, head_rows=rows // groups, scale=0.3, **case.options
    )
    found = stepped(optimizer, p, case.grads, case.lr)
    moved = np.abs(case.params[-1] - case.p0).max()
    assert np.abs(np.array(found) - case.params).max() < 1e-11 * moved
    for key in ("exp_avg", "exp_avg_sq"):
        state, expected = optimizer.state[p][key].numpy(), case.state[key]
        assert np.abs(state.ravel() - expected.ravel()).max() < 1e-12 * np.abs(expected).max()


SHAPES = [(8, 40), (4, 37), (2, 4, 16), (33,), (4, 1)]


@pytest.mark.parametrize("head_rows", [1, 2, 4, None])
@pytest.mark.parametrize("level", [0, 1, 2, 3, "row"])
def test_steps_follow_the_oracle(level, head_rows):
    generator = np.random.default_rng(7)
    for shape in [s for s in SHAPES if level == "row" or 2**level < 2 * s[-1]]:
        p = torch.nn.Parameter(torch.tensor(generator.normal(size=shape)))
        own = 1 if len(shape) == 1 and head_rows is not None else head_rows
        optimizer = GWTAdamMini(
            [p], lr=0.02, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1, level=level, scale=0.7, head_rows=own,
            maximize=True, backend="torch",
        )  # fmt: skip
        expected, m = p.detach().numpy().copy(), np.zeros(reference.moment_shape(shape, level))
        rows = p.numel() // shape[-1]
        v = np.zeros(1 if head_rows is None else max(rows // (own or 1), 1))
        for t in range(1, 5):
            grad = generator.normal(size=shape) + 0.5
            stepped(optimizer, p, [grad])
            oracle.adam_mini_step(
                expected, grad, m, v, level=level, step=t, lr=0.02, betas=(0.8, 0.95), eps=1e-6,
                weight_decay=0.1, scale=0.7, maximize=True,
            )  # fmt: skip
            assert np.abs(p.detach().numpy() - expected).max() < 1e-12
        state, root = optimizer.state[p], np.sqrt(reference.block_width(shape, level))
        assert set(state) == {"step", "exp_avg", "exp_avg_sq"}
        assert np.abs(state["exp_avg"].numpy() - m / root).max() < 1e-13
        assert np.abs(state["exp_avg_sq"].numpy().ravel() - v).max() < 1e-13


def test_the_comparison_notices_other_heads():
    """Control."""
    case = golden.optimizer_cases("adam_mini")[0]
    p = torch.nn.Parameter(torch.tensor(case.p0))
    optimizer = GWTAdamMini([p], level=0, weight_decay=case.weight_decay, head_rows=None, **case.options)
    found = stepped(optimizer, p, case.grads, case.lr)
    assert np.abs(np.array(found) - case.params).max() > 1e-4 * np.abs(case.params[-1] - case.p0).max()


@pytest.mark.parametrize("head_rows", [1, 4, None])
def test_chunks_of_a_large_tensor_make_no_difference(head_rows, monkeypatch):
    """Of rows that share a second moment, none is cut off the others."""
    from gwt_kernels.backends.torch import step

    results = []
    for chunk in (step.CHUNK, 100):
        monkeypatch.setattr(step, "CHUNK", chunk)
        generator = torch.Generator().manual_seed(3)
        weights = [torch.randn(s, generator=generator, dtype=torch.float64) for s in ((24, 40), (3, 8, 10))]
        params = [torch.nn.Parameter(w) for w in (*weights, weights[0].T.contiguous().T)]
        optimizer = GWTAdamMini(params, head_rows=head_rows, backend="torch")
        for _ in range(3):
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            optimizer.step()
        results.append([p.detach() for p in params])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


def parameters(dtype=torch.float32, seed=0, shapes=((64, 96), (32, 70), (128,))):
    torch.manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(s).to(dtype)) for s in shapes]


def steps(optimizer, params, n, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(n):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(p.device, p.dtype)
        optimizer.step()


@pytest.mark.parametrize("state_dtype", [None, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("rounding", [None, "stochastic", "split"])
def test_narrow_states_and_weights_stay_near_wide_ones(state_dtype, rounding):
    exact, narrow = parameters(torch.bfloat16), parameters(torch.bfloat16)
    reference_ = [torch.nn.Parameter(p.detach().double()) for p in exact]
    wide = GWTAdamMini(reference_, lr=1e-2)
    small = GWTAdamMini(narrow, lr=1e-2, state_dtype=state_dtype, weight_rounding=rounding)
    steps(small, narrow, 5)
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        for p in reference_:
            p.grad = torch.randn(p.shape, generator=generator).bfloat16().double()
        wide.step()
    for p, q in zip([x.detach() for x in reference_], narrow, strict=True):
        assert float((p - q.detach().double()).norm() / p.norm()) < 0.01
        dtypes = {key: x.dtype for key, x in small.state[q].items()}
        assert dtypes["exp_avg"] == (torch.bfloat16 if state_dtype == torch.bfloat16 else torch.float32)
        assert dtypes["exp_avg_sq"] == torch.float32


@pytest.mark.parametrize("state_dtype", [None, torch.bfloat16])
def test_checkpoints_resume_bit_for_bit(state_dtype):
    params, resumed = parameters(), parameters()
    optimizer = GWTAdamMini(params, lr=1e-3, head_rows=1, state_dtype=state_dtype)
    steps(optimizer, params, 3)
    for p, q in zip(params, resumed, strict=True):
        q.data.copy_(p)
    again = GWTAdamMini(resumed, lr=1e-3, head_rows=1, state_dtype=state_dtype)
    again.load_state_dict(optimizer.state_dict())
    steps(optimizer, params, 2, seed=5)
    steps(again, resumed, 2, seed=5)
    assert all(torch.equal(p, q) for p, q in zip(params, resumed, strict=True))


def test_states_of_other_heads_are_refused_and_migrated():
    params = parameters(shapes=((8, 16), (4, 12)))
    optimizer = GWTAdamMini(params, level=1, head_rows=2)
    steps(optimizer, params, 3)
    other = GWTAdamMini(params, level=1, head_rows=4)
    with pytest.raises(ValueError, match="head_rows=2, the optimizer head_rows=4"):
        other.load_state_dict(optimizer.state_dict())
    made = migrate(optimizer.state_dict(), other)
    other.load_state_dict(made.state_dict)
    for p in params:
        own, new = optimizer.state[p], other.state[p]
        assert torch.equal(own["exp_avg"], new["exp_avg"])
        torch.testing.assert_close(own["exp_avg_sq"].view(-1, 2).mean(1), new["exp_avg_sq"].view(-1))
    assert made.is_exact


@pytest.mark.parametrize("level", [0, 2, "row"])
def test_states_of_adamw_are_taken_over_and_given_back(level):
    params = parameters()
    adamw = GWTAdamW(params, level=0)
    steps(adamw, params, 3)
    mini = GWTAdamMini(params, level=level)
    mini.load_state_dict(migrate(adamw.state_dict(), mini).state_dict)
    for p in params[:1]:
        v = adamw.state[p]["exp_avg_sq"].mean(-1, keepdim=True)
        torch.testing.assert_close(mini.state[p]["exp_avg_sq"], v)
    back = GWTAdamW(params, level=0)
    back.load_state_dict(migrate(mini.state_dict(), back).state_dict)
    for p in params:
        v = adamw.state[p]["exp_avg_sq"].mean(-1, keepdim=True)
        torch.testing.assert_close(back.state[p]["exp_avg_sq"], v.expand_as(p))


@pytest.mark.parametrize("head_rows", [1, 4, None])
def test_a_tensor_of_one_dimension_has_one_second_moment_whatever_the_heads(head_rows):
    shapes = ((8, 16), (16,), ())
    params = [nn.Parameter(torch.ones(shape)) for shape in shapes]
    groups = [{"params": params[:2]}, {"params": params[2:], "level": 0}]
    optimizer = GWTAdamMini(groups, head_rows=head_rows)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert [optimizer.state[p]["exp_avg_sq"].numel() for p in params] == [8 // (head_rows or 8), 1, 1]
    assert all((p != 1).all() for p in params)
    target = GWTAdamW([{"params": params[:2]}, {"params": params[2:], "level": 0}])
    target.load_state_dict(migrate(optimizer.state_dict(), target).state_dict)
    assert all(target.state[p]["exp_avg_sq"].isfinite().all() for p in params)
    assert target.state[params[2]]["exp_avg_sq"].shape == ()


def test_groups_of_adamw_go_along():
    params = parameters()
    optimizer = GWTAdamMini([{"params": params[:2]}, {"params": params[2:], "rule": "adamw"}], head_rows=2)
    alone = [torch.nn.Parameter(params[2].detach().clone())]
    other = GWTAdamW(alone, eps=1e-8, level=0)
    params[2].grad = alone[0].grad = torch.randn(128)
    optimizer.step()
    other.step()
    assert torch.equal(params[2], alone[0])


def test_groups_of_adamw_may_say_any_head_rows():
    def build(head_rows, params):
        groups = [{"params": params[:1], "head_rows": 2}, {"params": params[1:], "rule": "adamw"}]
        return GWTAdamMini(groups, head_rows=head_rows)

    params = parameters(shapes=((8, 16), (5, 12)))
    optimizer = build(3, params)
    steps(optimizer, params, 1)
    optimizer.param_groups[1]["head_rows"] = None
    steps(optimizer, params, 1)
    build(4, params).load_state_dict(optimizer.state_dict())
    beside = GWTAdamW(params[1:], level=0, rule="adamw")
    steps(beside, params[1:], 1)
    GWTAdamMini([{"params": params[1:], "rule": "adamw"}]).load_state_dict(beside.state_dict())


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"head_rows": 0}, ValueError, "head_rows must be at least 1, got 0"),
        ({"head_rows": 2.0}, TypeError, "head_rows must be an integer or None, got 2.0"),
        ({"head_rows": True}, TypeError, "head_rows must be an integer or None, got True"),
        ({"head_rows": 3}, ValueError, "has 64 rows, which head_rows=3 does not divide"),
        ({"level": "rows"}, TypeError, "level must be an integer or 'row', got 'rows'"),
        ({"rule": "foam"}, TypeError, "rule"),
    ],
)
def test_bad_options_are_refused_by_name(options, error, words):
    with pytest.raises(error, match=words):
        GWTAdamMini(parameters(), **options)


def test_a_function_refuses_second_moments_that_rows_do_not_keep():
    p, common = torch.zeros(4, 8), {"steps": [1], "hypers": [Hyper()], "level": 1, "rule": "adam_mini"}
    m, v = torch.zeros(4, 4, dtype=torch.bfloat16), torch.zeros(4, 1, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"second moments of rows are torch\.bfloat16: keep them in float32"):
        gwt_adamw_(params=[p], grads=[p + 1], exp_avgs=[m], exp_avg_sqs=[v], **common)
    with pytest.raises(ValueError, match="keeps exp_avg and exp_avg_sq: pass tensors for every parameter"):
        gwt_adamw_(params=[p], grads=[p + 1], exp_avgs=[m], exp_avg_sqs=None, **common)


def test_rules_of_other_optimizers_are_refused():
    with pytest.raises(ValueError, match="rule='foam' is no rule of GWTAdamMini"):
        GWTAdamMini([{"params": parameters(), "rule": "foam"}])


# On Triton ---------------------------------------------------------------------------------------------

BY_ROW = [(5, 40), (3, 37), (2, 3, 64), (33,), (0, 40), (2, 1500), (6, 8)]
BY_HEAD = [(4, 40), (6, 37), (2, 2, 64), (33,), (0, 40), (2, 1500), (8, 1), (4, 0)]
EPS = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-9}


def both_backends(level, dtype=torch.float32, layout="contiguous", head_rows=1, n=3, bad=(), **options):
    """Weights and states of some steps on Triton, and by PyTorch's operators in float64.

    Steps of ``bad`` gradients have a NaN among them.
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
    """Weights may differ by a rounding where a sum's last bit does; most are the same to the bit."""
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
    """To the bit: all rows of a head take the same numbers."""
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
    """Wherever the copies of their second moments lie: one for rows in wide accesses, and one for the moments."""
    from gwt_kernels.backends.triton.launch import Launch

    launched, update = [], Launch.update
    monkeypatch.setattr(Launch, "update", lambda self, *given: (launched.append(self.flat), update(self, *given)))
    params = [nn.Parameter(torch.ones(6, 16, device=on("triton"))) for _ in range(3)]
    optimizer = GWTAdamMini(params, level=2, head_rows=3, backend="triton")
    with interpreter.like_a_gpu():
        steps(optimizer, params, 1)
    assert launched == [True, True]
