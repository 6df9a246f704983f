"""The folded rule alone: options, narrow moments, golden vectors and its bound."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gwt_kernels.functional import Hyper, gwt_adamw_
from tests.csrc_reference.test_foam import largest_update, worst_gradients
from tests.support import golden, interpreter
from tests.support.steps import Bucket
from tests.test_functional import HYPER, OPTIONS, backends, on


@pytest.mark.parametrize("option", [x for x in OPTIONS if "growth" not in x])
@backends
def test_options_of_the_folded_rule(backend, option):
    bucket = Bucket([(3, 40), (3, 37)], 2, rule="foam", device=on(backend))
    for t, size in enumerate((1.0, 8.0), start=5):
        bucket.renew_gradients(size)
        bucket.check_step(OPTIONS[option], t, backend=backend)


@pytest.mark.parametrize("moment_dtype", [torch.bfloat16, torch.float16])
@backends
def test_narrow_moments_of_the_folded_rule(backend, moment_dtype):
    bucket = Bucket([(4, 32), (3, 37)], 2, rule="foam", moment_dtype=moment_dtype, device=on(backend))
    for t in (1, 2):
        bucket.check_step(HYPER, t, backend=backend)


@pytest.mark.parametrize("level", [4, 7, 10])  # blocks in several lanes of a warp, in a whole one, and in several
@backends
def test_blocks_of_several_lanes(backend, level):
    bucket = Bucket([(5, 2**level), (3, 2**level - 1)], level, rule="foam", device=on(backend))
    for t in (1, 2):
        bucket.check_step(HYPER, t, backend=backend)


@backends
def test_the_comparison_notices_the_other_rule(backend):
    """Control, above level 0, at which both rules are equal."""
    for level in (1, 2):
        bucket = Bucket([(4, 32)], level, rule="foam", device=on(backend))
        with pytest.raises(AssertionError, match=r"params of tensor 0, .*: [0-9]+ of 128 elements are wrong"):
            bucket.check_step(HYPER, 3, backend=backend, rule="gwt")
    Bucket([(4, 32)], 0, rule="foam", device=on(backend)).check_step(HYPER, 3, backend=backend, rule="gwt")


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e9])
@pytest.mark.parametrize("t", [1, 2, 7])
@backends
def test_the_bound_of_the_folded_update_is_reached_and_not_exceeded(backend, t, size):
    """Gradients that reach the upper bound on any element of bias-corrected ``u``; the other rule has no bound."""
    betas, width, last = (0.9, 0.999), 4, {}
    bound = largest_update(t, betas, width)
    hyper = Hyper(1.0, *betas, eps=1e-30, scale=1.0)
    for rule in ("foam", "gwt"):
        bucket = Bucket([(2, 32), (3, 37)], 2, rule=rule, first=True, device=on(backend))
        for step, row in enumerate(size * worst_gradients(t, betas, width), start=1):
            for p, g in zip(bucket.tensors("params"), bucket.tensors("grads"), strict=True):
                p.zero_()  # then the last update can be read off exactly
                g.copy_(torch.from_numpy(np.resize(row, g.shape[-1])))
                g[1:] *= torch.tensor((-1.0) ** np.arange(g.shape[-1]))  # blocks with a mean of nearly 0
            bucket.step(hyper, step, backend=backend)
        last[rule] = max(float(p.abs().max()) for p in bucket.tensors("params"))
    assert last["foam"] == pytest.approx(bound, rel=1e-5)
    assert last["gwt"] > 1.3 * bound


CASES = (*golden.foam_cases(), *(case for case in golden.variant_cases(res_scaled=True) if case.rule == "foam"))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@backends
def test_golden_vectors_of_the_folded_rule_in_float32(backend, case):
    """Check a whole run without any float64: the bound keeps errors from growing."""
    p = torch.tensor(case.p0, dtype=torch.float32, device=on(backend))
    m, v = torch.zeros(2, *case.exp_avg.shape, device=p.device)
    for t, (lr, grad) in enumerate(zip(case.lr, case.grads, strict=True), start=1):
        hyper = Hyper(
            lr, *case.betas, case.eps, 0.0, case.scale, None, correct_bias=case.correct_bias,
            detail_scale=case.res_scale,
        )  # fmt: skip
        with interpreter.like_a_gpu():
            gwt_adamw_(
                params=[p],
                grads=[torch.tensor(grad, dtype=torch.float32, device=p.device)],
                exp_avgs=[m],
                exp_avg_sqs=[v],
                limiter_norms=[None],
                steps=[t],
                hypers=[hyper],
                level=case.level,
                rule="foam",
                backend=backend,
            )
        p = case.decayed(p, lr)
    for got, expected in ((p, case.params[-1]), (m, case.exp_avg), (v, case.exp_avg_sq)):
        error = np.abs(got.cpu().numpy() - expected)
        assert error.max() < 2**-21 * np.abs(expected).max()
