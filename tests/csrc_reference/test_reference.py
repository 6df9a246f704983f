"""Tests the C oracle against results from outside this project.

These are the authors' published optimizers (golden vectors), PyWavelets, MATLAB, torch.optim.AdamW, and two
examples worked by hand. It also has to refuse bad arguments, and sanitizers must find nothing in it.
"""

from __future__ import annotations

import ctypes
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support import golden, reference

pywt = pytest.importorskip("pywt", reason="needs PyWavelets: pip install -e '.[test]'")

GOLDEN = golden.adamw_cases()
FOAM = golden.foam_cases()
VARIANTS = golden.variant_cases(res_scaled=True)
SETTINGS = (
    *("rule", "level", "betas", "eps", "scale", "correct_bias", "norm_growth_limit"),
    *("res_scale", "wavelet", "boundary"),
)
DTYPES = (np.float64, np.float32)
WIDTHS = (*range(1, 34), 61, 64, 100, 127, 128, 129, 255, 1000)
ROOT2, ROOT8 = math.sqrt(2), math.sqrt(8)


def levels(width: int) -> range:
    """Return every level that is allowed: 2**level stays below 2 * width."""
    return range(next(level for level in range(64) if 2**level >= 2 * width))


def band_tolerance(x: np.ndarray, level: int) -> float:
    """Return four roundings per level of the largest coefficient that rows like `x` can have."""
    return 4 * (level + 1) * np.finfo(x.dtype).eps * math.sqrt(2**level) * np.abs(x).max()


def run_golden(case: golden.Case, **changed: object) -> dict[str, np.ndarray]:
    """Return the results of a case, with some settings changed, and decay in the published order."""
    settings = {name: getattr(case, name) for name in SETTINGS} | changed
    p = case.p0.copy()
    m, v = np.zeros((2, *reference.moment_shape(p.shape, settings["level"], settings["wavelet"])))
    params, norms = np.full_like(case.params, np.nan), np.full(len(case.lr), np.nan)
    norm = 0.0
    for i, (g, lr) in enumerate(zip(case.grads, case.lr, strict=True)):
        norm = reference.adamw_step(p, g, m, v, norm, step=i + 1, lr=lr, **settings)
        p[...] = case.decayed(p, lr)
        params[i], norms[i] = p, norm
    return {"params": params, "exp_avg": m, "exp_avg_sq": v, "limiter_norm": norms}


# The published optimizers -------------------------------------------------------------------------------


@pytest.mark.parametrize("case", GOLDEN + FOAM + VARIANTS, ids=lambda case: case.name)
def test_golden_vectors(case):
    got = run_golden(case)
    for name in ("params", "exp_avg", "exp_avg_sq"):
        np.testing.assert_allclose(got[name], getattr(case, name), rtol=1e-12, atol=0, err_msg=name)
    if case.level == 0 or case.rule == "foam":
        assert not got["limiter_norm"].any()
    else:
        np.testing.assert_allclose(got["limiter_norm"], case.limiter_norm, rtol=1e-12, atol=0)


def test_golden_vectors_hold_what_the_tests_rely_on():
    assert len(GOLDEN) == 20
    assert {case.level for case in GOLDEN} == {0, 1, 2, 3, 4, 5}
    assert any(case.p0.shape[-1] % 2 for case in GOLDEN)
    assert sum(case.limiter_active.sum() for case in GOLDEN) >= 20
    assert len(FOAM) == 6
    assert {case.level for case in FOAM} == {1, 2, 3, 5}
    assert {case.p0.ndim for case in FOAM} == {1, 2}
    assert sum(case.p0.shape[-1] % 2**case.level > 0 for case in FOAM) == 2  # a last block that is padded
    assert [sum(case.rule == rule for case in VARIANTS) for rule in reference.RULES] == [10, 8]
    assert {case.boundary for case in VARIANTS} == set(reference.BOUNDARIES)
    assert {case.wavelet for case in GOLDEN + VARIANTS} == {"haar", "db2", "sym4", "bior2.2"}
    assert {case.res_scale for case in VARIANTS} == {0, 0.5, 1, 1.5}
    assert {(case.rule, case.level > 0) for case in VARIANTS if not case.correct_bias} == {
        ("gwt", False), ("gwt", True), ("foam", True)
    }  # fmt: skip
    assert all((case.params[-1] != case.p0).all() for case in GOLDEN + FOAM + VARIANTS)


@pytest.mark.parametrize(
    "changed",
    [
        {"norm_growth_limit": None},
        {"norm_growth_limit": 1.02},
        {"scale": 0.26},
        {"level": 1},
        {"level": 3},
        {"eps": 1e-5},
        {"betas": (0.9, 0.998)},
        {"betas": (0.89, 0.999)},
        {"weight_decay": 0.1},
        {"maximize": True},
        {"correct_bias": False},
    ],
    ids=str,
)
def test_golden_vectors_notice_a_changed_setting(changed):
    case = next(case for case in GOLDEN if case.name == "haar2_limiter_spikes")
    worst = np.abs(run_golden(case, **changed)["params"][-1] / case.params[-1] - 1).max()
    assert worst > 1e-6  # a million times what test_golden_vectors allows


# The transform ------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Level value of:UserWarning")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_transform_is_that_of_pywavelets(width, dtype):
    rng = np.random.default_rng(width)
    x = rng.standard_normal((3, width)).astype(dtype)
    for level in levels(width):
        tolerance = band_tolerance(x, level)
        expected = pywt.wavedec(x, "haar", mode="zero", level=level, axis=-1)
        got = reference.haar_dwt(x, level)
        assert [band.shape for band in got] == [band.shape for band in expected]
        assert all(band.dtype == dtype for band in got)
        for ours, theirs in zip(got, expected, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance)
        if level > 0 and np.abs(got[1]).max() > 0.01:
            assert np.abs(-got[1] - expected[1]).max() > 1000 * tolerance  # the sign of a detail matters

        # Coefficients of no signal: on odd lengths their inverse is nonzero in the column that is cut off.
        free = [rng.standard_normal(band.shape).astype(dtype) for band in got]
        expected_x = pywt.waverec(free, "haar", mode="zero", axis=-1)[..., :width]
        tolerance = 4 * (level + 1) * np.finfo(dtype).eps * sum(np.abs(band).max() for band in free)
        np.testing.assert_allclose(reference.haar_idwt(free, width), expected_x, rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_transform_inverts_and_keeps_the_energy(width, dtype):
    x = np.random.default_rng(width).standard_normal((2, 3, width)).astype(dtype)
    energy = np.sum(np.square(x, dtype=np.float64))
    for level in levels(width):
        bands = reference.haar_dwt(x, level)
        rounding = 4 * (level + 1) * np.finfo(dtype).eps
        np.testing.assert_allclose(
            sum(np.sum(np.square(band, dtype=np.float64)) for band in bands), energy, rtol=rounding
        )
        back = reference.haar_idwt(bands, width)
        np.testing.assert_allclose(back, x, rtol=0, atol=band_tolerance(x, level))
        if level > 0:
            mirrored = reference.haar_idwt([bands[0], *(-band for band in bands[1:])], width)
            assert np.abs(mirrored - x).max() > 0.01


def test_transform_is_that_of_matlab():
    """Compare with MATLAB's Haar results in PyWavelets' wheel: db1, bior1.1 and rbio1.1, "zpd".

    The signals are not stored. PyWavelets' test_matlab_compatibility.py draws them one after the other from
    one seed, over all wavelets of five families and two sizes each, and so does this.
    """
    haar = pywt.Wavelet("haar")
    archive = Path(pywt.__file__).parent / "tests" / "data" / "dwt_matlabR2012a_result.npz"
    random = np.random.RandomState(1234)
    compared = set()
    with np.load(archive) as matlab:
        for family in ("db", "sym", "coif", "bior", "rbio"):
            for name in pywt.wavelist(family):
                wavelet = pywt.Wavelet(name)
                for width in (wavelet.dec_len, wavelet.dec_len + 1):
                    x = random.randn(width)
                    if (wavelet.dec_lo, wavelet.dec_hi) != (haar.dec_lo, haar.dec_hi):
                        continue
                    approximation, detail = reference.haar_dwt(x, 1)
                    for kind, band in (("ma", approximation), ("md", detail)):
                        expected = matlab[f"zpd_{name}_{width}_{kind}"].ravel()
                        np.testing.assert_allclose(band, expected, rtol=0, atol=band_tolerance(x, 1))
                    compared.add((name, width))
    assert compared == {(name, width) for name in ("db1", "bior1.1", "rbio1.1") for width in (2, 3)}


def test_transform_by_hand():
    # Pairs of (9 1)(-3 1)(2 -2)(0 0): sums 10 -2 0 0, differences 8 -4 4 0, each over sqrt(2).
    # Pairs of (10 -2)(0 0):           sums 8 0,       differences 12 0,     each over 2.
    # Pair (8 0):                      sum 8,          difference 8,         each over sqrt(8).
    x = np.array([9.0, 1, -3, 1, 2, -2, 0, 0])
    expected = [[8 / ROOT8], [8 / ROOT8], [12 / 2, 0], [8 / ROOT2, -4 / ROOT2, 4 / ROOT2, 0]]
    bands = reference.haar_dwt(x, 3)
    for got, band in zip(bands, expected, strict=True):
        np.testing.assert_allclose(got, band, rtol=1e-15, atol=0)
    np.testing.assert_allclose(reference.haar_idwt(bands, 8), x, rtol=1e-15, atol=4e-15)


def test_transform_by_hand_with_padding():
    # (4 2)(1 -3)(8 [0]): sums 6 -2 8, differences 2 4 8, each over sqrt(2).
    # (6 -2)(8 [0]):      sums 4 8,    differences 8 8,   each over 2.
    # (4 8):              sum 12,      difference -4,     each over sqrt(8).
    x = np.array([4.0, 2, 1, -3, 8])
    expected = [[12 / ROOT8], [-4 / ROOT8], [8 / 2, 8 / 2], [2 / ROOT2, 4 / ROOT2, 8 / ROOT2]]
    bands = reference.haar_dwt(x, 3)
    for got, band in zip(bands, expected, strict=True):
        np.testing.assert_allclose(got, band, rtol=1e-15, atol=0)
    np.testing.assert_allclose(reference.haar_idwt(bands, 5), x, rtol=1e-15, atol=0)


# The step -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limited", [False, True])
def test_step_by_hand(limited):
    """Check three levels, in which the square roots cancel and every number is a fraction of powers of two.

    The gradient is that of test_transform_by_hand, so A = 8/sqrt(8). With beta1 = 3/4 and beta2 = 7/16:

        m = 3/4 * 0 + 1/4 * 8/sqrt(8) = 1/sqrt(2)       v = 7/16 * 136 + 9/16 * 8 = 64       d = 8
        A' = 1/(8 sqrt(2)) = (1/4)/sqrt(8)              D_3' = 1/sqrt(8)
        D_2' = (3/2, 0)/2                               D_1' = (1, -1/2, 1/2, 0)/sqrt(2)

    The way back adds and subtracts in pairs and halves, one root less at every level:

        (1/4 + 1)/2, (1/4 - 1)/2                    =  5/8  -3/8                    over 2
        (5/8 + 3/2)/2, (5/8 - 3/2)/2, -3/16 twice   =  17/16  -7/16  -3/16  -3/16   over sqrt(2)
        (17/16 + 1)/2, (17/16 - 1)/2, ...           =  33 1 -15 1 5 -11 -3 -3       over 32

    The limiter: |A'| = sqrt(2)/16 is four times the previous norm (with its 1e-8), gamma is 2, so the update
    is halved and the norm with it. Bias correction at t = 1: sqrt(9/16) / (1/4) = 3. Decay: 8 * 3/4 = 6.
    """
    p = np.full(8, 8.0)
    g = np.array([9.0, 1, -3, 1, 2, -2, 0, 0])
    m, v = np.zeros(1), np.full(1, 136.0)
    norm = reference.adamw_step(
        p,
        g,
        m,
        v,
        ROOT2 / 64 - 1e-8,
        level=3,
        step=1,
        lr=0.5,
        betas=(3 / 4, 7 / 16),
        eps=0.0,
        weight_decay=0.5,
        scale=0.25,
        norm_growth_limit=2.0 if limited else None,
    )
    update = np.array([33, 1, -15, 1, 5, -11, -3, -3]) / 32 / (2 if limited else 1)
    np.testing.assert_allclose(p, 6 - 0.5 * 3 * 0.25 * update, rtol=1e-15, atol=0)
    np.testing.assert_allclose(m, 1 / ROOT2, rtol=1e-15, atol=0)
    np.testing.assert_allclose(v, 64, rtol=1e-15, atol=0)
    np.testing.assert_allclose(norm, ROOT2 / 32 if limited else ROOT2 / 64 - 1e-8, rtol=1e-14, atol=0)


def test_previous_norm_of_zero_counts_as_none():
    """Check that a zero first gradient leaves norm 0, and that the next update is as large as without a limiter."""
    g = np.random.default_rng(0).standard_normal((2, 8))

    def second_update(previous: float, gamma: float | None) -> np.ndarray:
        p, (m, v) = np.zeros((2, 8)), np.zeros((2, 2, 2))
        reference.adamw_step(p, g, m, v, previous, level=2, step=2, lr=0.1, norm_growth_limit=gamma)
        return p

    m, v = np.zeros((2, 2, 2))
    left = reference.adamw_step(np.ones((2, 8)), np.zeros((2, 8)), m, v, level=2, step=1, lr=0.1)
    assert left == 0
    assert not m.any()
    assert not v.any()
    np.testing.assert_array_equal(second_update(left, 1.01), second_update(0.0, None))
    assert np.abs(second_update(1e-3, 1.01)).max() < 0.01 * np.abs(second_update(left, 1.01)).max()


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("maximize", [False, True])
def test_level_0_is_torch_adamw(weight_decay, maximize):
    """Compare with torch, which adds eps to the bias-corrected root, and so gets eps / sqrt(1 - beta2**t)."""
    rng = np.random.default_rng(1)
    beta2, eps = 0.97, 1e-3
    p = rng.standard_normal((4, 9))
    tensor = torch.nn.Parameter(torch.tensor(p))
    theirs = torch.optim.AdamW(
        [tensor], betas=(0.8, beta2), weight_decay=weight_decay, maximize=maximize, foreach=False
    )
    m, v = np.zeros((2, *p.shape))
    for t in range(1, 8):
        lr, g = 0.1 / t, rng.standard_normal(p.shape)
        theirs.param_groups[0].update(lr=lr, eps=eps / math.sqrt(1 - beta2**t))
        tensor.grad = torch.tensor(g)
        theirs.step()
        norm = reference.adamw_step(
            p,
            g,
            m,
            v,
            level=0,
            step=t,
            lr=lr,
            betas=(0.8, beta2),
            eps=eps,
            weight_decay=weight_decay,
            scale=99.0,  # ignored at level 0, as is the limiter
            maximize=maximize,
        )
        assert norm == 0
        np.testing.assert_allclose(p, tensor.detach().numpy(), rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(m, theirs.state[tensor]["exp_avg"].numpy(), rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(v, theirs.state[tensor]["exp_avg_sq"].numpy(), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("rule", reference.RULES)
@pytest.mark.parametrize("width", [1, 2, 5, 13, 64, 127])
def test_float_build_is_the_double_build_rounded(width, rule):
    """Compare from a state in mid-run, where v is not near 0, so that nothing magnifies a rounding error."""
    for level in levels(width):
        rng = np.random.default_rng(width)
        shape = (6, width)
        start = {
            "p": rng.standard_normal(shape),
            "g": rng.standard_normal(shape),
            "exp_avg": rng.standard_normal(reference.moment_shape(shape, level)),
            "exp_avg_sq": rng.uniform(0.5, 2.0, reference.moment_shape(shape, level)),
        }
        results = []
        for dtype in DTYPES:
            arrays = {name: a.astype(np.float32).astype(dtype) for name, a in start.items()}
            settings = {"level": level, "step": 7, "lr": 16.0, "weight_decay": 0.03, "scale": 1.0, "rule": rule}
            settings["norm_growth_limit"] = None if rule == "foam" else 1.01
            norm = reference.adamw_step(**arrays, limiter_norm=1.0, **settings)
            results.append((arrays, norm))
        (double, double_norm), (single, single_norm) = results
        for name in ("p", "exp_avg", "exp_avg_sq"):
            error = np.abs(single[name] - double[name]).max()
            assert 0 < error < 4 * np.finfo(np.float32).eps * np.abs(double[name]).max(), name
            assert single[name].dtype == np.float32
        np.testing.assert_allclose(single_norm, double_norm, rtol=1e-6)


@pytest.mark.parametrize("options", [{}, {"rule": "foam", "norm_growth_limit": None}], ids=reference.RULES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 8), (2, 0, 8)])
def test_empty_tensors_are_accepted_and_change_nothing(shape, dtype, options):
    p = np.zeros(shape, dtype)
    moments = reference.moment_shape(shape, 2)
    m, v = np.zeros(moments, dtype), np.zeros(moments, dtype)
    assert reference.adamw_step(p, p.copy(), m, v, 0.5, level=2, step=1, lr=0.1, **options) == 0.5
    bands = reference.haar_dwt(p, 2)
    assert [band.size for band in bands] == [0, 0, 0]
    assert reference.haar_idwt(bands, shape[-1]).shape == shape


# Refusals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("changed", "code"),
    [
        *[({"level": level}, reference.BAD_LEVEL) for level in (-1, 4, 62, 63, 2**31 - 1)],
        *[({"step": step}, reference.BAD_OPTION) for step in (0, -1)],
        *[
            ({name: value}, reference.BAD_OPTION)
            for name in ("lr", "eps", "weight_decay", "scale")
            for value in (-1e-300, math.nan, math.inf, -math.inf)
        ],
        *[
            ({"betas": betas}, reference.BAD_OPTION)
            for bad in (-1e-300, 1.0, math.nan, math.inf)
            for betas in ((bad, 0.999), (0.9, bad))
        ],
        *[({"norm_growth_limit": gamma}, reference.BAD_OPTION) for gamma in (1e-300, 0.999, math.inf)],
        ({"limiter_norm": -1.0}, reference.BAD_OPTION),
        *[({"rule": "foam", "level": level}, reference.BAD_OPTION) for level in (0, 1, 2)],  # with a limiter
        *[({"rule": "foam", "norm_growth_limit": bad}, reference.BAD_OPTION) for bad in (1e-300, 1.0, math.inf)],
        ({"rule": "foam", "norm_growth_limit": None, "eps": -1.0}, reference.BAD_OPTION),
        ({"rule": "foam", "norm_growth_limit": None, "level": 4}, reference.BAD_LEVEL),
    ],
    ids=str,
)
def test_step_refuses_and_changes_nothing(changed, code, dtype):
    settings = {"level": 2, "step": 1, "lr": 0.1} | changed
    level = settings["level"]
    moments = reference.moment_shape((3, 8), level if 0 <= level <= 62 else 2)
    arrays = [np.full(shape, 2, dtype) for shape in ((3, 8), (3, 8), moments, moments)]
    with pytest.raises(reference.OracleError) as refusal:
        reference.adamw_step(*arrays, **settings)
    assert refusal.value.code == code
    assert all((a == 2).all() for a in arrays)


@pytest.mark.parametrize("gamma", [None, 0.0, -1.0, math.nan])
def test_these_mean_no_limiter(gamma):
    case = next(case for case in GOLDEN if case.name == "haar2_limiter_spikes")
    got = run_golden(case, norm_growth_limit=gamma)
    np.testing.assert_array_equal(got["params"], run_golden(case, norm_growth_limit=1e300)["params"])
    assert not got["limiter_norm"].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_sizes_and_pointers_are_refused_and_nothing_is_changed(dtype):
    """Call through ctypes, as no numpy array can have these sizes. 2**57 elements are more than an address
    space of 2**48 bytes can hold, though they can be counted in bytes; 2**62 cannot."""
    arrays = [np.full(8, 2, dtype) for _ in range(4)]
    p, g, m, v = (a.ctypes.data for a in arrays)
    norm = ctypes.c_double(3)
    options = reference.Options(1, 0.1, 0.9, 0.999, 1e-6, 0.0, 0.25, 1.01, 1, 0, 0)
    folded = reference.Options(1, 0.1, 0.9, 0.999, 1e-6, 0.0, 0.25, 0.0, 1, 0, 1)

    def refused(code: int, name: str, *arguments: object) -> None:
        with pytest.raises(reference.OracleError) as refusal:
            reference.call(name, dtype, *arguments)
        assert refusal.value.code == code, (name, arguments)

    for rows, width in ((-1, 8), (1, -8), (2**62, 8), (1, 2**62), (2**32, 2**32), (2**63 - 1, 2**63 - 1)):
        refused(reference.BAD_SHAPE, "gwt_dwt", g, p, rows, width, 1, None)
        refused(reference.BAD_SHAPE, "gwt_idwt", g, p, rows, width, 1, None)
        refused(reference.BAD_SHAPE, "gwt_adamw_step", p, g, m, v, norm, rows, width, options)
    refused(reference.OUT_OF_MEMORY, "gwt_dwt", g, p, 1, 2**57, 1, None)
    refused(reference.OUT_OF_MEMORY, "gwt_adamw_step", p, g, m, v, norm, 2**54, 8, options)
    refused(reference.OUT_OF_MEMORY, "gwt_adamw_step", p, g, m, v, norm, 1, 2**57, options)
    refused(reference.OUT_OF_MEMORY, "gwt_adamw_step", p, g, m, v, norm, 1, 2**57, folded)
    for rule in (-1, 2, 2**31 - 1):
        unknown = reference.Options(1, 0.1, 0.9, 0.999, 1e-6, 0.0, 0.25, 0.0, 1, 0, rule)
        refused(reference.BAD_OPTION, "gwt_adamw_step", p, g, m, v, norm, 1, 8, unknown)
    for pair in ((None, p), (g, None)):
        refused(reference.NULL_POINTER, "gwt_dwt", *pair, 1, 8, 1, None)
        refused(reference.NULL_POINTER, "gwt_idwt", *pair, 1, 8, 1, None)
    whole = [p, g, m, v, norm, 1, 8, options]
    for missing in (0, 1, 2, 3, 4, 7):
        arguments = [None if i == missing else a for i, a in enumerate(whole)]
        refused(reference.NULL_POINTER, "gwt_adamw_step", *arguments)
        if missing < 4:
            arguments[4], arguments[7] = None, folded
            refused(reference.NULL_POINTER, "gwt_adamw_step", *arguments)
    assert all((a == 2).all() for a in arrays)
    assert norm.value == 3
    reference.call("gwt_adamw_step", dtype, *whole)  # control: valid arguments do run
    assert (arrays[0] != 2).all()


def test_sanitizers_find_nothing():
    done = reference.make("sanitize")
    widths = (*range(1, 41), 64, 65, 100, 127, 128, 129, 257, 1000)
    every_level = 2 + sum(len(levels(width)) + 1 for width in widths)  # width 0 has level 0; all have "row"
    rows, precisions = 4, 2
    assert f"{every_level * rows * precisions} configurations passed" in done.stdout
    assert "3066 of the other optimizers passed" in done.stdout
    assert "runtime error" not in done.stderr
