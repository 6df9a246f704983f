"""The step as a function, on every backend, against the C oracle, tensor by tensor and step by step."""

from __future__ import annotations

import itertools
import math

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


# Arguments ---------------------------------------------------------------------------------------------


def arguments(**changed) -> dict:
    own = {
        "params": [torch.ones(2, 8)],
        "grads": [torch.ones(2, 8)],
        "exp_avgs": [torch.zeros(2, 2)],
        "exp_avg_sqs": [torch.zeros(2, 2)],
        "limiter_norms": [None],
        "steps": [1],
        "hypers": [Hyper()],
        "level": 2,
    }
    return own | changed


def test_empty_lists_are_accepted():
    nothing = {name: [] for name in arguments() if name != "level"}
    gwt_adamw_(**nothing, level=2)


@pytest.mark.parametrize("name", ["grads", "exp_avgs", "exp_avg_sqs", "limiter_norms", "steps", "hypers"])
def test_lists_of_different_lengths_are_refused(name):
    before = arguments()
    with pytest.raises(ValueError, match="1 params need as many of all else"):
        gwt_adamw_(**(before | {name: before[name] * 2}))
    assert torch.equal(before["params"][0], torch.ones(2, 8))


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"backend": "cuda"}, ValueError, "unknown backend 'cuda'"),
        ({"backend": "triton", "wavelet": "db2"}, RuntimeError, "know the Haar wavelet only, not 'db2'"),
        ({"wavelet": "nonsense"}, ValueError, "unknown wavelet 'nonsense'"),
        ({"boundary": "edge"}, ValueError, "unknown boundary 'edge': use one of 'zero', 'constant', 'symmetric'"),
        ({"boundary": ["zero"]}, ValueError, "unknown boundary"),
        ({"backend": "triton", "boundary": "reflect"}, RuntimeError, "know boundary='zero' only, not 'reflect'"),
        ({"rule": "foam", "boundary": "reflect"}, ValueError, "knows no boundary 'reflect': use wavelet='haar'"),
        ({"params": [torch.ones(2, 8).double()], "backend": "triton"}, RuntimeError, "torch.float64 would lose"),
        ({"rule": "nonsense"}, ValueError, "unknown rule 'nonsense': use one of"),
        ({"rule": ["gwt"]}, ValueError, r"unknown rule \['gwt'\]"),
        ({"levels": 2}, TypeError, "gwt_adamw_ has no option 'levels': it has limiter_norms"),
        ({"level": -1}, ValueError, "level must not be negative, got -1"),
        ({"level": 2.0}, TypeError, "level must be an integer or 'row', got 2.0"),
        ({"level": 10**30}, ValueError, "level must be at most 62, got 10"),
        ({"workspace": []}, TypeError, "workspace must be a dict or None, got list"),
        ({"grads": None}, TypeError, "grads must be a list of tensors, got NoneType"),
        ({"wavelet": ["haar"]}, TypeError, r"wavelet must be the name of a wavelet, got \['haar'\]"),
        ({"lows": 5}, TypeError, "lows must be None or a list with an entry for each parameter, got int"),
        ({"spans": 5}, TypeError, "spans must be None or a list with an entry for each parameter, got int"),
        ({"spans": ["x"]}, TypeError, r"spans\[0\] must be None or a pair of Span, .* got 'x'"),
        ({"spans": [(1, 2)]}, TypeError, r"spans\[0\] must be None or a pair of Span, .* got \(1, 2\)"),
        ({"exp_avgs": None}, ValueError, "rule='gwt' keeps exp_avg and exp_avg_sq"),
    ],
)
def test_unsupported_arguments_are_refused(changed, error, message):
    if changed.get("wavelet") == "nonsense":
        pytest.importorskip("pywt", reason="needs PyWavelets: pip install -e '.[test]'")
    before = arguments(**changed)
    with pytest.raises(error, match=message):
        gwt_adamw_(**before)
    assert torch.equal(before["params"][0], torch.ones_like(before["params"][0]))


def wrong(name: str, x: object) -> dict:
    """Return arguments of two tensors, the second of which is wrong in one list."""
    two = {key: [torch.ones_like(own[0]) if torch.is_tensor(own[0]) else own[0] for _ in range(2)]
           for key, own in arguments().items() if key != "level"}  # fmt: skip
    two |= {"limiter_norms": [torch.zeros(()) for _ in range(2)]}
    return two | {"level": 2, name: [two[name][0], x]}


@backends
@pytest.mark.parametrize(
    ("name", "x", "error", "message"),
    [
        ("grads", None, TypeError, r"grads\[1\] must be a dense tensor, got NoneType: leave parameters without"),
        (
            "grads",
            torch.eye(8)[:2].to_sparse(),
            TypeError,
            r"grads\[1\] must be a dense tensor, got torch.sparse_coo",
        ),
        (
            "grads",
            torch.ones(2, 8, dtype=torch.int64),
            TypeError,
            r"grads\[1\] must be a real floating-point tensor",
        ),
        ("grads", torch.ones(2, 8) + 0j, TypeError, r"grads\[1\] must be a real .* got torch.complex64"),
        ("grads", torch.ones(1, 8), ValueError, r"needs a gradient of its shape .*, got \(1, 8\)"),
        ("params", torch.ones(2, 8, dtype=torch.int32), TypeError, r"params\[1\] must be a real floating-point"),
        ("grads", torch.ones(2, 8).to(torch.float8_e5m2), TypeError, r"grads\[1\] must be .* of 16 bits or more"),
        ("params", torch.ones(2, 8).double(), ValueError, "a bucket has one device, and one dtype each"),
        (
            "params",
            torch.ones(1, 8).expand(2, 8),
            ValueError,
            r"params\[1\] has strides \(0, 1\), so elements share",
        ),
        ("exp_avgs", torch.zeros(2, 3), ValueError, r"needs .* moments of shape \(2, 2\), got"),
        ("exp_avgs", torch.zeros(2, 2).t(), ValueError, "must be contiguous"),
        ("limiter_norms", torch.zeros(3), ValueError, r"limiter_norms\[1\] must be a floating-point scalar on"),
        ("limiter_norms", 0.0, ValueError, r"limiter_norms\[1\] must be a floating-point scalar on"),
        ("steps", 0, ValueError, r"steps\[1\] must be at least 1, which is the first step, got 0"),
        ("steps", 1.0, TypeError, r"steps\[1\] must be an integer, 1 for the first step, got 1.0"),
        ("hypers", {"lr": 0.1}, TypeError, "hypers must be gwt_kernels.functional.Hyper, got dict"),
        ("hypers", Hyper(lr=math.nan), ValueError, "lr must be at least 0 and finite, got nan"),
        ("hypers", Hyper(lr="0.1"), TypeError, "lr must be a real number, got '0.1'"),
        ("hypers", Hyper(beta2=1.0), ValueError, "beta2 must be at least 0 and below 1, got 1.0"),
        ("hypers", Hyper(scale=-1.0), ValueError, "scale must be at least 0 and finite, got -1.0"),
        ("hypers", Hyper(detail_scale=math.inf), ValueError, "detail_scale must be at least 0 and finite, got inf"),
        ("hypers", Hyper(grad_factor=math.nan), ValueError, "grad_factor must be at least 0 and finite, got nan"),
    ],
)
def test_wrong_arguments_change_nothing(backend, name, x, error, message):
    """Check that a valid first tensor is unchanged if the second is wrong, on every backend."""
    given = wrong(name, x)
    first = [given[key][0] for key in ("params", "exp_avgs", "exp_avg_sqs", "limiter_norms")]
    before = [tensor.clone() for tensor in first]
    with pytest.raises(error, match=message):
        gwt_adamw_(**given, backend=backend)
    assert all(map(torch.equal, first, before))


@pytest.mark.parametrize("backend", ["torch", "compiled"])  # Triton has checks of its own
@pytest.mark.parametrize(
    "second",
    [
        torch.zeros(2, 1, device="meta"),
        torch.zeros(2, 1, dtype=torch.float64),
        torch.zeros(1, 1).expand(2, 1),
        torch.zeros(2, 3)[:, :1],
        torch.zeros(1, 2),
        torch.zeros(2),
    ],
    ids=["elsewhere", "float64", "expanded", "strided", "transposed", "flat"],
)
def test_wrong_second_moments_of_rows_change_nothing(backend, second):
    given = wrong("limiter_norms", torch.zeros(())) | {"limiter_norms": None, "rule": "adam_mini"}
    with pytest.raises(ValueError, match=r"exp_avg_sqs\[1\] must be a contiguous float32 tensor on cpu"):
        gwt_adamw_(**given | {"exp_avg_sqs": [torch.zeros(2, 1), second]}, backend=backend)
    assert torch.equal(given["params"][0], torch.ones(2, 8))
    for fitting in (torch.zeros(2, 1), torch.zeros(1, 1)):
        gwt_adamw_(**given | {"exp_avg_sqs": [torch.zeros(2, 1), fitting]}, backend=backend)


@pytest.mark.parametrize(("rule", "optimizer"), [("adafactor", "GWTAdafactor"), ("muon", "GWTMuon")])
def test_rules_that_are_no_step_of_elements_name_their_optimizer(rule, optimizer):
    with pytest.raises(ValueError, match=f"rule={rule!r} .*: use gwt_kernels.{optimizer}"):
        gwt_adamw_(**wrong("steps", 1), rule=rule)


@backends
@pytest.mark.parametrize(
    ("option", "x", "message"),
    [
        ("telemetry", torch.zeros(2, 6), "telemetry must be a contiguous float64 tensor of shape"),
        ("telemetry", torch.zeros(2, 5).double(), "telemetry must be a contiguous float64 tensor of shape"),
        ("limits", torch.ones(2), "limits take the place of limiter_norms: pass None"),
        ("control", torch.ones(3).double(), "control goes with steps that the device counts"),
        ("keys", [0, -1], r"keys\[1\] must be what gwt_kernels.core.hyper.key_of returns, got -1"),
        ("steps", torch.zeros(2, 1).double(), r"steps must be a contiguous float64 tensor of shape \(2,\)"),
    ],
)
def test_wrong_numbers_of_a_step_change_nothing(backend, option, x, message):
    given = wrong("hypers", Hyper()) | {option: x}
    with pytest.raises(ValueError, match=message):
        gwt_adamw_(**given, backend=backend)
    assert torch.equal(given["params"][0], torch.ones(2, 8))


@backends
def test_a_tensor_is_written_once(backend):
    """Check refusals of one tensor as two arguments, such as both moments."""
    given = wrong("hypers", Hyper())
    with pytest.raises(ValueError, match=r"exp_avg_sqs\[0\] is exp_avgs\[0\] once more: a step writes each"):
        gwt_adamw_(**given | {"exp_avg_sqs": given["exp_avgs"]}, backend=backend)
    with pytest.raises(ValueError, match=r"params\[1\] is params\[0\] once more"):
        gwt_adamw_(**given | {"params": given["params"][:1] * 2}, backend=backend)


def test_autograd_does_not_record_the_step():
    p = torch.ones(2, 8, requires_grad=True)
    gwt_adamw_(**arguments(params=[p]))
    assert p.grad_fn is None
    assert not torch.equal(p.detach(), torch.ones(2, 8))
