"""Tests the C oracle's other wavelets, boundaries and rows as blocks, and refusals of bad arguments.

The reference is PyWavelets with the same filters. Bad arguments of the optimizers are tested, too.
"""

from __future__ import annotations

import math

import numpy as np
import pytest

from tests.support import reference
from tests.support import reference_optimizers as oracle

pywt = pytest.importorskip("pywt", reason="needs PyWavelets: pip install -e '.[test]'")

WAVELETS = ("haar", "db2", "db4", "sym4", "coif1", "bior2.2", "bior1.3", "rbio3.1", "db20", "dmey")
DTYPES = (np.float64, np.float32)
WIDTHS = (1, 2, 3, 5, 8, 13, 29, 64, 65)


def levels(width: int) -> range:
    """Return every level that is allowed: 2**level stays below 2 * width."""
    return range(next(level for level in range(64) if 2**level >= 2 * width))


@pytest.mark.filterwarnings("ignore:Level value of:UserWarning")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("boundary", reference.BOUNDARIES)
@pytest.mark.parametrize("wavelet", WAVELETS)
def test_transform_is_that_of_pywavelets(wavelet, boundary, dtype):
    for width in WIDTHS:
        rng = np.random.default_rng(width)
        x = rng.standard_normal((2, width)).astype(dtype)
        for level in levels(width):
            expected = pywt.wavedec(x, wavelet, mode=boundary, level=level, axis=-1)
            got = reference.dwt(x, level, wavelet, boundary)
            assert [band.shape for band in got] == [band.shape for band in expected]
            largest = max(np.abs(band).max() for band in expected)
            rounding = 100 * (level + 1) * np.finfo(dtype).eps
            for ours, theirs in zip(got, expected, strict=True):
                np.testing.assert_allclose(ours, theirs, rtol=0, atol=rounding * largest)
            # Coefficients of no signal: their inverse is nonzero in the columns that are cut off.
            free = [rng.standard_normal(band.shape).astype(dtype) for band in got]
            expected_x = _waverec(free, wavelet, boundary)[..., :width]
            back = reference.idwt(free, width, level, wavelet)
            np.testing.assert_allclose(back, expected_x, rtol=0, atol=rounding * max(1, np.abs(expected_x).max()))


def _waverec(bands: list[np.ndarray], wavelet: str, boundary: str) -> np.ndarray:
    """Return PyWavelets' inverse, one level after the other, each cut to the length of the next band."""
    x = bands[0]
    for detail in bands[1:]:
        x = pywt.idwt(x[..., : detail.shape[-1]], detail, wavelet, boundary, axis=-1)
    return x


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 1), (2, 3, 8), (4, 13), (1, 1000), (7,)])
def test_rows_as_blocks(shape, dtype):
    """Check that the bands are the sum over sqrt(N), and the row less its mean, and keep the energy."""
    x = np.random.default_rng(0).standard_normal(shape).astype(dtype)
    eps = np.finfo(dtype).eps
    approximation, details = reference.dwt(x, "row")
    exact = x.astype(np.float64)
    mean = exact.mean(-1, keepdims=True)
    np.testing.assert_allclose(approximation, mean * math.sqrt(shape[-1]), rtol=0, atol=40 * eps)
    np.testing.assert_allclose(details, exact - mean, rtol=0, atol=10 * eps)
    np.testing.assert_allclose(np.sum(approximation**2) + np.sum(details**2), np.sum(exact**2), rtol=20 * eps)
    np.testing.assert_allclose(reference.idwt([approximation, details], shape[-1], "row"), x, rtol=0, atol=10 * eps)
    with pytest.raises(ValueError, match="are not those of rows of"):
        reference.idwt([approximation, details], shape[-1] + 1, "row")


def test_rows_as_blocks_are_haar_where_a_level_makes_one_block():
    x = np.random.default_rng(1).standard_normal((3, 16))
    row, haar = reference.dwt(x, "row"), reference.dwt(x, 4)
    np.testing.assert_allclose(row[0], haar[0], rtol=1e-14)
    zeros = [np.zeros_like(haar[0]), *haar[1:]]
    np.testing.assert_allclose(row[1], reference.idwt(zeros, 16, 4), rtol=0, atol=1e-14)


# Refusals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"wavelet": "db2"}, {"boundary": "symmetric"}])
@pytest.mark.parametrize("changed", [{"level": "row"}, {"rule": "foam", "norm_growth_limit": None}], ids=str)
def test_blocks_without_wavelets_refuse_one(options, changed):
    level = changed.get("level", 1)
    shape = (3, 1) if level == "row" else reference.moment_shape((3, 8), 1, options.get("wavelet", "haar"))
    p, g, (m, v) = np.ones((3, 8)), np.ones((3, 8)), np.ones((2, *shape))
    with pytest.raises((reference.OracleError, ValueError)):
        reference.adamw_step(p, g, m, v, **{"level": level, "step": 1, "lr": 0.1} | options | changed)
    assert all((a == 1).all() for a in (p, m, v))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf])
def test_a_bad_res_scale_is_refused(bad, dtype):
    p, g, (m, v) = np.ones(8, dtype), np.ones(8, dtype), np.ones((2, 4), dtype)
    with pytest.raises(reference.OracleError) as refusal:
        reference.adamw_step(
            p, g, m, v, level=1, step=1, lr=0.1, rule="foam", norm_growth_limit=None, res_scale=bad
        )
    assert refusal.value.code == reference.BAD_OPTION
    assert (p == 1).all()


def test_names_that_there_are_not_are_refused():
    x = np.ones((2, 8))
    with pytest.raises(ValueError, match=r"unknown boundary 'wrap'.*'zero'"):
        reference.dwt(x, 1, boundary="wrap")
    with pytest.raises(ValueError, match="db99"):
        reference.dwt(x, 1, "db99")
    with pytest.raises(ValueError, match=r"unknown details 'other'.*'divided'"):
        oracle.adafactor_step(x, x, oracle.adafactor_state((2, 8), 1), level=1, step=1, lr=0.1, details="other")
    with pytest.raises(ValueError, match=r"adjust_lr_fn.*'mean'"):
        oracle.muon_step(x, x, np.zeros((2, 4)), level=1, lr=0.1, adjust_lr_fn="mean")


def call(name: str, *arrays: np.ndarray, **options: object) -> None:
    """Take one step, with valid values for the arguments that are not given."""
    settings = {"level": 1, "lr": 0.1} | options
    if name == "adafactor":
        keys = oracle.adafactor_shapes(arrays[0].shape, 1, settings.get("beta1", 0.9))
        arrays = (*arrays[:2], dict(zip(keys, arrays[2:], strict=True)))
    if name in ("adafactor", "adam_mini"):
        settings = {"step": 1} | settings
    getattr(oracle, f"{name}_step")(*arrays, **settings)


STATES = {"lion": [(2, 4)], "muon": [(2, 4)], "adafactor": [(2, 4), (2,), (4,)], "adam_mini": [(2, 4), (2,)]}
BAD = {
    "lion": [{"betas": (1.0, 0.9)}, {"betas": (0.9, -0.1)}, {"detail_scale": -1.0}],
    "muon": [
        *({"momentum": 1.0}, {"momentum": -0.1}, {"detail_scale": math.nan}, {"eps": -1.0}, {"ns_steps": 100}),
        *({"ns_steps": -1}, {"ns_coefficients": (1.0, math.inf, 1.0)}),
    ],
    "adafactor": [
        *({"step": 0}, {"beta1": 1.0}, {"eps": (-1.0, 1.0)}, {"eps": (1.0, math.nan)}, {"clip_threshold": 0.0}),
        *({"clip_threshold": math.inf}, {"decay_rate": 0.1}, {"warmup_init": True}),
    ],
    "adam_mini": [{"step": 0}, {"betas": (0.9, 1.0)}, {"eps": math.inf}],
}
EVERY_BAD = [{"lr": math.nan}, {"lr": -1.0}, {"weight_decay": math.inf}, {"scale": -1.0}]


@pytest.mark.parametrize(("name", "options"), [(n, o) for n, bad in BAD.items() for o in EVERY_BAD + bad], ids=str)
def test_bad_options_of_optimizers_are_refused(name, options):
    arrays = [np.full(shape, 2.0) for shape in ((2, 8), (2, 8), *STATES[name])]
    with pytest.raises(reference.OracleError) as refusal:
        call(name, *arrays, **options)
    assert refusal.value.code == reference.BAD_OPTION
    assert all((a == 2).all() for a in arrays)
    call(name, *arrays)
    assert (arrays[0] != 2).all()


@pytest.mark.parametrize("name", STATES)
@pytest.mark.parametrize("level", [-1, 5, 63, 999])
def test_bad_levels_of_optimizers_are_refused(name, level):
    arrays = [np.full(shape, 2.0) for shape in ((2, 8), (2, 8), *STATES[name])]
    with pytest.raises((reference.OracleError, ValueError)) as refusal:
        call(name, *arrays, level=level)
    assert getattr(refusal.value, "code", reference.BAD_LEVEL) == reference.BAD_LEVEL
    assert all((a == 2).all() for a in arrays)


@pytest.mark.parametrize("name", STATES)
def test_arrays_that_do_not_fit_are_refused(name):
    shapes = ((2, 8), (2, 8), *STATES[name])
    for i in range(1, len(shapes)):
        arrays = [np.full((3, *shape) if k == i else shape, 2.0) for k, shape in enumerate(shapes)]
        with pytest.raises(ValueError, match=r"have to be|divide"):
            call(name, *arrays)
    for dtype, order in ((np.float32, "C"), (np.float64, "F")):
        with pytest.raises(ValueError, match="C-contiguous and of float64"):
            call(name, *[np.full(shape, 2.0, dtype, order) for shape in shapes])
    if name == "muon":
        with pytest.raises(ValueError, match=r"\(8,\): Muon takes two dimensions or more"):
            call(name, np.ones(8), np.ones(8), np.ones(4))
    if name == "adam_mini":
        with pytest.raises(ValueError, match=r"\(3,\) second moments do not divide 2 rows evenly"):
            call(name, np.ones((2, 8)), np.ones((2, 8)), np.ones((2, 4)), np.ones(3))


@pytest.mark.parametrize("name", STATES)
@pytest.mark.parametrize("shape", [(0, 8), (2, 0)])
def test_empty_tensors_are_accepted(name, shape):
    p = np.zeros(shape)
    state = (
        list(oracle.adafactor_state(shape, 1).values())
        if name == "adafactor"
        else [np.zeros((shape[0], shape[1] // 2))]
    )
    call(name, p, p.copy(), *state, *([np.full(1, 7.0)] if name == "adam_mini" else []))
