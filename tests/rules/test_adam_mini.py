"""Tests Adam-mini on block means: the published trajectories, the C oracle, and ``GWTAdamMini`` as an optimizer."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from gwt_kernels import GWTAdamMini, GWTAdamW, migrate
from gwt_kernels.functional import Hyper, gwt_adamw_
from tests.support import golden, reference
from tests.support import reference_optimizers as oracle


def stepped(optimizer, p, grads, lrs=None):
    """Return the weights after each step."""
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
    """Check as a control that one head per tensor gives other weights."""
    case = golden.optimizer_cases("adam_mini")[0]
    p = torch.nn.Parameter(torch.tensor(case.p0))
    optimizer = GWTAdamMini([p], level=0, weight_decay=case.weight_decay, head_rows=None, **case.options)
    found = stepped(optimizer, p, case.grads, case.lr)
    assert np.abs(np.array(found) - case.params).max() > 1e-4 * np.abs(case.params[-1] - case.p0).max()


@pytest.mark.parametrize("head_rows", [1, 4, None])
def test_chunks_of_a_large_tensor_make_no_difference(head_rows, monkeypatch):
    """Check chunks, which never divide rows that share a second moment."""
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
