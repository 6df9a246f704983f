"""The step as a function, on every backend, against the C oracle, tensor by tensor and step by step."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gwt_kernels.functional import Hyper, gwt_adamw_
from tests.support import golden, steps
from tests.support.poisoned import LAYOUTS
from tests.support.steps import Bucket

BACKENDS = ("torch", "compiled", "triton")
DTYPES: dict[str, tuple[torch.dtype, ...]] = {
    "torch": (torch.float64, torch.float32, torch.bfloat16, torch.float16)
}
DTYPES |= {"compiled": DTYPES["torch"], "triton": DTYPES["torch"][1:]}
COMBINATIONS = [(backend, dtype) for backend in BACKENDS for dtype in DTYPES[backend]]
combinations = pytest.mark.parametrize(("backend", "dtype"), COMBINATIONS, ids=lambda x: str(x).split(".")[-1])
backends = pytest.mark.parametrize("backend", BACKENDS)
rules = pytest.mark.parametrize("rule", ["gwt", "foam"])  # the limiter requires the first

# Whole blocks (the flat path), short last blocks, one block, one element, many dimensions, an empty tensor.
SHAPES = [(4, 32), (3, 37), (33,), (2, 3, 64), (2, 1, 2, 35), (0, 40), (64,)]
HYPER = Hyper(lr=0.01, weight_decay=0.1)


def on(backend: str) -> torch.device:
    return torch.device("cuda" if backend == "triton" and torch.cuda.is_available() else "cpu")


# Against the oracle ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backend", "dtype", "rule", "level"),  # C has code for every dtype, rule and level; else one of two rules
    [(backend, dtype, rule, level)
     for i, (backend, dtype) in enumerate(COMBINATIONS)
     for j, rule in enumerate(("gwt", "foam"))
     for level in range(7)
     if backend == "compiled" or (i + j + level) % 2 == 0],
    ids=str,
)  # fmt: skip
def test_steps_follow_the_oracle(backend, dtype, rule, level):
    """Compare from the first step on, with new gradients each time, and a spike at step 3 for the limiter."""
    shapes = [s for s in SHAPES if 2**level < 2 * s[-1]]
    limited = rule == "gwt" and level > 0
    bucket = Bucket(
        shapes, level, dtype=dtype, rule=rule, limited=limited, first=True, device=on(backend), seed=level
    )
    workspace = {}
    for t, size in enumerate((1.0, 0.5, 30.0), start=1):
        bucket.renew_gradients(size)
        bucket.check_step(HYPER, t, backend=backend, workspace=workspace)


@pytest.mark.parametrize("layout", LAYOUTS)
@rules
@combinations
def test_layouts_of_weights_and_gradients(backend, dtype, rule, layout):
    shapes, limited = [(4, 32), (3, 37), (5, 2, 16)], rule == "gwt"
    bucket = Bucket(shapes, 2, dtype=dtype, layouts=[layout], rule=rule, limited=limited, device=on(backend))
    bucket.check_step(HYPER, 7, backend=backend)


@backends
def test_transposed_and_expanded_gradients(backend):
    bucket = Bucket([(4, 32), (6, 10)], 2, device=on(backend))
    for t, layout in enumerate(("transposed", "gaps", "misaligned"), start=1):
        bucket.renew_gradients(layouts=[layout])
        bucket.check_step(HYPER, t, backend=backend)
    for g in bucket.grads:
        g.tensor = g.tensor[:1].expand(g.tensor.shape)  # made by sum().backward()
    bucket.check_step(HYPER, 4, backend=backend)


@pytest.mark.parametrize(
    ("dtype", "grad_dtype"),
    [
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float16),
        (torch.float16, torch.bfloat16),
    ],
)
@pytest.mark.parametrize("level", [0, 2])
@backends
def test_gradients_of_another_dtype(backend, level, dtype, grad_dtype):
    bucket = Bucket(
        [(4, 32), (3, 37)], level, dtype=dtype, grad_dtype=grad_dtype, limited=level > 0, device=on(backend)
    )
    bucket.check_step(HYPER, 3, backend=backend)


@pytest.mark.parametrize("moment_dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("level", [0, 1, 3])
@combinations
def test_moments_of_a_narrow_dtype(backend, dtype, level, moment_dtype):
    """Check that moments are rounded when stored, in bfloat16 stochastically; the update uses them unrounded."""
    bucket = Bucket(
        [(4, 32), (3, 37)], level, dtype=dtype, moment_dtype=moment_dtype, limited=level > 0, device=on(backend)
    )
    for t in (1, 2):
        bucket.check_step(HYPER, t, backend=backend)


@pytest.mark.parametrize(
    ("backend", "level"), [(b, n) for b in BACKENDS for n in (7, 8, 9, 10, *(() if b == "triton" else (11, 13)))]
)
@rules
def test_deep_levels(backend, rule, level):
    shapes = [(2, 2048), (3, 1000), (2**level,), (2 ** (level - 1) + 1,)]
    shapes = [s for s in shapes if 2**level < 2 * s[-1]]
    bucket = Bucket(shapes, level, rule=rule, limited=rule == "gwt", device=on(backend))
    bucket.check_step(HYPER, 2, backend=backend)


OPTIONS = {
    "no decay": Hyper(lr=0.01),
    "strong decay": Hyper(lr=0.5, weight_decay=0.9),
    "maximize": Hyper(lr=0.01, weight_decay=0.1, maximize=True),
    "no eps": Hyper(lr=0.01, eps=0.0),
    "large eps": Hyper(lr=0.01, eps=10.0),
    "no momentum": Hyper(lr=0.01, beta1=0.0),
    "no memory": Hyper(lr=0.01, beta1=0.0, beta2=0.0),
    "long memory": Hyper(lr=0.01, beta1=0.999, beta2=0.99999),
    "scale": Hyper(lr=0.01, scale=3.0),
    "no growth at all": Hyper(lr=0.01, norm_growth_limit=1.0),
    "much growth": Hyper(lr=0.01, norm_growth_limit=5.0),
    "no rate": Hyper(lr=0.0, weight_decay=0.1),
    "no bias correction": Hyper(lr=0.01, weight_decay=0.1, correct_bias=False),
}


@pytest.mark.parametrize("level", [0, 2])
@pytest.mark.parametrize("option", OPTIONS)
@backends
def test_options(backend, option, level):
    """Compare with a last tile that is not full: without eps, elements outside it divide by 0."""
    bucket = Bucket([(3, 40), (3, 37)], level, limited=level > 0, device=on(backend))
    for t, size in enumerate((1.0, 8.0), start=5):
        bucket.renew_gradients(size)
        bucket.check_step(OPTIONS[option], t, backend=backend)


@backends
@pytest.mark.parametrize("level", [0, 2])
def test_options_per_tensor(backend, level):
    hypers, at = list(OPTIONS.values()), [1, 2, 3, 10, 100, 1000]
    shapes = [s for _, s in zip(hypers, itertools.cycle([(3, 40), (2, 37), (8, 8)]), strict=False)]
    bucket = Bucket(shapes, level, limited=level > 0, device=on(backend))
    bucket.check_step(hypers, [t for _, t in zip(hypers, itertools.cycle(at), strict=False)], backend=backend)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    shapes=st.lists(
        st.tuples(st.lists(st.integers(1, 4), max_size=2), st.integers(1, 70)).map(lambda x: (*x[0], x[1])),
        min_size=1,
        max_size=4,
    ),
    level=st.integers(0, 6),
    combination=st.sampled_from(COMBINATIONS),
    grad_dtype=st.sampled_from((None, torch.float32, torch.bfloat16)),
    layouts=st.lists(st.sampled_from(LAYOUTS), min_size=1, max_size=3),
    limited=st.booleans(),
    hyper=st.builds(
        Hyper,
        lr=st.floats(0, 1),
        beta1=st.floats(0, 0.99),
        beta2=st.floats(0, 0.9999),
        eps=st.sampled_from((1e-6, 1e-3)),
        weight_decay=st.floats(0, 1),
        scale=st.floats(0, 2),
        norm_growth_limit=st.floats(1, 2),
        maximize=st.booleans(),
        correct_bias=st.booleans(),
        grad_factor=st.sampled_from((2.0**-10, 0.3, 1.0)),
        detail_scale=st.floats(0, 2),
        rule_options=st.none(),
    ),
    step=st.integers(1, 10_000),
    seed=st.integers(0, 2**16),
)
def test_any_bucket(shapes, level, combination, grad_dtype, layouts, limited, hyper, step, seed):
    backend, dtype = combination
    narrowest = min(s[-1] for s in shapes)
    bucket = Bucket(
        shapes,
        min(level, (narrowest - 1).bit_length()),
        dtype=dtype,
        grad_dtype=grad_dtype,
        layouts=layouts,
        limited=limited and level > 0 and narrowest > 1,
        device=on(backend),
        seed=seed,
    )
    bucket.check_step(hyper, step, backend=backend)


# The limiter -------------------------------------------------------------------------------------------


@backends
def test_the_limiter_holds_growth_to_gamma(backend):
    """Check that the norm never grows by more than gamma per step, and by exactly gamma after a spike."""
    bucket = Bucket([(4, 32), (3, 37)], 2, limited=True, first=True, device=on(backend))
    norms = []
    for t, size in enumerate((1, 1, 1000, 1000, 1000), start=1):
        bucket.renew_gradients(size)
        bucket.check_step(HYPER, t, backend=backend)
        norms.append([float(x) for x in bucket.tensors("norms")])
    growth = np.array(norms)[1:] / np.array(norms)[:-1]
    assert np.all(growth <= 1.01 * (1 + 1e-6))
    assert np.any(np.isclose(growth, 1.01, rtol=1e-6, atol=0), axis=0).all()


@backends
def test_no_previous_norm_does_not_limit(backend):
    """Check that a norm of 0 counts as none, at the first step and later; a tiny one, as control, does limit."""
    results = {}
    for name, norm in (("none", 0.0), ("tiny", 1e-6)):
        limited = Bucket([(4, 32), (3, 37)], 2, limited=True, device=on(backend))
        for x in limited.tensors("norms"):
            x.fill_(norm)
        limited.check_step(HYPER, 9, backend=backend)
        results[name] = limited.tensors("params")
    free = Bucket([(4, 32), (3, 37)], 2, device=on(backend))
    free.check_step(HYPER, 9, backend=backend)
    for p, none, tiny in zip(free.tensors("params"), results["none"], results["tiny"], strict=True):
        torch.testing.assert_close(p, none, rtol=2e-7, atol=1e-8)
        assert (p - tiny).abs().max() > 1e-4


@backends
def test_a_gradient_of_zeros_leaves_no_norm(backend):
    """Check zeros first, then real gradients: the limiter acts as without the zeros."""
    bucket = Bucket([(4, 32), (3, 37)], 2, limited=True, first=True, device=on(backend))
    bucket.renew_gradients(0.0)
    before = [p.clone() for p in bucket.tensors("params")]
    bucket.step(Hyper(lr=0.1), 1, backend=backend)
    assert all(map(torch.equal, before, bucket.tensors("params")))
    assert [float(x) for x in bucket.tensors("norms")] == [0.0, 0.0]
    bucket.renew_gradients(1.0)
    bucket.check_step(HYPER, 2, backend=backend)
    assert min(float(x) for x in bucket.tensors("norms")) > 1


@backends
def test_level_0_has_no_limiter(backend):
    """Check that norms passed at level 0 are unchanged."""
    plain, limited = (Bucket([(4, 32)], 0, limited=x, device=on(backend)) for x in (False, True))
    limited.norms[0].tensor.fill_(1e-3)
    for bucket in (plain, limited):
        bucket.step(HYPER, 3, backend=backend)
    assert torch.equal(plain.tensors("params")[0], limited.tensors("params")[0])
    assert float(limited.norms[0].tensor) == pytest.approx(1e-3)


# Equal results, and controls --------------------------------------------------------------------------------


@combinations
def test_results_are_deterministic(backend, dtype):
    def run() -> list[torch.Tensor]:
        bucket = Bucket(SHAPES, 2, dtype=dtype, limited=True, device=on(backend))
        for t in (1, 2):
            bucket.renew_gradients(t)
            bucket.step(HYPER, t, backend=backend)
        return bucket.results()

    assert all(map(torch.equal, run(), run()))


@backends
def test_a_tensor_does_not_depend_on_its_neighbours(backend):
    """Check that each tensor of a bucket alone gives the same bits as with the others."""
    together = Bucket(SHAPES, 2, limited=True, device=on(backend))
    alone = Bucket(SHAPES, 2, limited=True, device=on(backend))
    together.step(HYPER, 3, backend=backend)
    names = ("params", "grads", "exp_avgs", "exp_avg_sqs")
    for i in range(len(SHAPES)):
        arrays = {name: [alone.tensors(name)[i]] for name in names}
        norms = [alone.tensors("norms")[i]]
        with steps.interpreter.like_a_gpu():
            gwt_adamw_(**arrays, limiter_norms=norms, steps=[3], hypers=[HYPER], level=2, backend=backend)
    assert all(map(torch.equal, together.results(), alone.results()))


CHANGES = {
    "limiter": HYPER._replace(norm_growth_limit=100.0),
    "sign": HYPER._replace(maximize=True),
    "decay": HYPER._replace(weight_decay=0.2),
    "eps": HYPER._replace(eps=1e-2),
    "scale": HYPER._replace(scale=0.26),
    "rate": HYPER._replace(lr=0.011),
}


@pytest.mark.parametrize("change", [*CHANGES, "step", "level"])
@backends
def test_the_comparison_notices(backend, change):
    """Control: a bucket stepped with one changed argument differs from the oracle."""
    bucket = Bucket([(4, 32)], 2, limited=True, device=on(backend))
    bucket.norms[0].tensor.fill_(1.0)
    if change == "level":  # equivalent moments of level 1
        moments = {name: [x.repeat_interleave(2, -1) for x in bucket.tensors(name)] for name in steps.ARRAYS[2:]}
        changed = {"level": 1} | moments
    elif change == "step":
        changed = {"steps": [4]}
    else:
        changed = {"hypers": [CHANGES[change]]}
    with pytest.raises(AssertionError, match=r"params of tensor 0, .*: [0-9]+ of 128 elements are wrong"):
        bucket.check_step(HYPER, 3, backend=backend, **changed)


@backends
def test_swapped_tensors_are_noticed(backend):
    """Control: the same gradients in another order give other weights, in every tensor."""
    first, second = (Bucket([(4, 32)] * 3, 2, device=on(backend)) for _ in range(2))
    second.grads = second.grads[1:] + second.grads[:1]
    for bucket in (first, second):
        bucket.check_step(HYPER, 3, backend=backend)
    for p, q in zip(first.tensors("params"), second.tensors("params"), strict=True):
        assert (p - q).abs().max() > 1e-3


@backends
def test_narrow_weights_lose_small_updates(backend):
    """Control: float32 weights change where bfloat16 ones cannot."""
    hyper = Hyper(lr=1e-6)
    moved = {}
    for dtype in (torch.float32, torch.bfloat16):
        bucket = Bucket([(4, 32)], 2, dtype=dtype, device=on(backend))
        bucket.params[0].tensor.fill_(1.0)
        bucket.check_step(hyper, 50, backend=backend)
        moved[dtype] = (bucket.tensors("params")[0] != 1).float().mean()
    assert moved[torch.float32] > 0.5
    assert moved[torch.bfloat16] == 0


# The authors' published optimizers ----------------------------------------------------------------------


CASES = (*golden.adamw_cases(), *golden.foam_cases(), *golden.variant_cases(res_scaled=True))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_golden_vectors(case):
    """Compare the torch backend in float64 over a whole run: 1e-12 relative to the largest value."""
    if case.wavelet != "haar":
        pytest.importorskip("pywt", reason="needs PyWavelets: pip install -e '.[test]'")
    p, grads = torch.from_numpy(case.p0.copy()), torch.from_numpy(case.grads.copy())
    m, v = torch.zeros(2, *case.exp_avg.shape, dtype=torch.float64)
    norm = torch.zeros((), dtype=torch.float64) if case.level and case.rule == "gwt" else None
    got = {"params": [], "limiter_norm": []}
    for t, lr in enumerate(case.lr, start=1):
        hyper = Hyper(
            lr, *case.betas, case.eps, 0.0, case.scale, case.norm_growth_limit, correct_bias=case.correct_bias,
            detail_scale=case.res_scale,
        )  # fmt: skip
        gwt_adamw_(
            params=[p],
            grads=[grads[t - 1]],
            exp_avgs=[m],
            exp_avg_sqs=[v],
            limiter_norms=[norm],
            steps=[t],
            hypers=[hyper],
            level=case.level,
            rule=case.rule,
            wavelet=case.wavelet,
            boundary=case.boundary,
        )
        p = case.decayed(p, lr)
        got["params"].append(p.clone())
        got["limiter_norm"].append(torch.tensor(float("nan")) if norm is None else norm.clone())
    got = {name: torch.stack(values) for name, values in got.items()} | {"exp_avg": m, "exp_avg_sq": v}
    for name, values in got.items():
        expected = getattr(case, name)
        largest = np.nanmax(np.abs(expected), initial=0)
        np.testing.assert_allclose(values.numpy(), expected, rtol=1e-12, atol=1e-12 * largest, err_msg=name)
