"""The literal algorithm: its transforms against PyWavelets, its step against the folded one."""

from __future__ import annotations

import itertools
import sys
from typing import get_args

import numpy as np
import pytest
import torch

from gwt_kernels import GWTAdamW
from gwt_kernels.backends.torch import literal
from gwt_kernels.core.tensor_step import TensorStep
from gwt_kernels.functional import Boundary, Hyper
from tests.support import steps
from tests.support.poisoned import LAYOUTS
from tests.support.steps import Bucket

pywt = pytest.importorskip("pywt", reason="needs PyWavelets: pip install -e '.[test]'")

WAVELETS = ("haar", "db2", "db5", "sym4", "coif2", "bior2.2", "rbio2.2")
BOUNDARIES = get_args(Boundary)
# Every wavelet with two boundaries, every boundary with two fifths of them, and some of every family with all.
PAIRS = [
    (wavelet, boundary)
    for i, wavelet in enumerate(pywt.wavelist(kind="discrete"))
    for k, boundary in enumerate(BOUNDARIES)
    if wavelet in WAVELETS or (i + k) % len(BOUNDARIES) < 2
]


@pytest.mark.filterwarnings("ignore:Level value of")  # PyWavelets warns of the boundary at small widths
@pytest.mark.parametrize(("wavelet", "boundary"), PAIRS)
def test_transforms_are_those_of_pywavelets(wavelet, boundary):
    """Compare also levels so deep that a band is all boundary, and rows much shorter than the filters."""
    bank = literal.filter_bank(wavelet)
    for shape in ((1,), (2, 2), (3, 7), (2, 16), (2, 3, 33), (2, 100), (0, 5)):
        x = torch.from_numpy(np.random.default_rng(0).standard_normal(shape))
        for level in (1, 2, 4):
            if boundary == "reflect" and shape[-1] < 2**level:
                continue  # PyWavelets refuses to reflect rows of one element, which 2**level < 2 * width excludes
            coeffs = literal.wavedec(x, bank, level, boundary)
            assert coeffs[0].shape[-1] == literal.approximation_width(shape[-1], level, wavelet)
            if 0 in shape:
                continue
            expected = pywt.wavedec(x.numpy(), wavelet, mode=boundary, level=level, axis=-1)
            for got, values in zip(coeffs, expected, strict=True):
                assert_close(got.numpy(), values)
            # Coefficients of no signal: on odd lengths these are nonzero in the column that is cut off.
            free = [torch.randn(c.shape, dtype=torch.float64) for c in coeffs]
            for bands in (coeffs, free):
                theirs = pywt.waverec([c.numpy() for c in bands], wavelet, mode=boundary, axis=-1)
                assert_close(literal.waverec(bands, bank).numpy(), theirs)
            if wavelet != "dmey":  # it inverts to three digits only, in PyWavelets too
                # PyWavelets' tables of symlets hold about 11 digits, which limits the accuracy of the inverse.
                back = literal.waverec(coeffs, bank)[..., : shape[-1]]
                np.testing.assert_allclose(back.numpy(), x.numpy(), rtol=0, atol=1e-9)


def assert_close(got, expected):
    """Raise AssertionError unless equal to 1e-12, relative to the largest element if that is above 1."""
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-12 * max(1.0, np.abs(expected).max()))


def test_boundaries_differ():
    """Control; the exceptions are constant and symmetric for filters of two taps, and Haar on whole blocks."""
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((3, 21)))
    for wavelet, alike in (("db2", set()), ("bior2.2", set()), ("haar", {("constant", "symmetric")})):
        bank = literal.filter_bank(wavelet)
        found = {b: literal.wavedec(x, bank, 2, b)[0] for b in BOUNDARIES}
        for a, b in itertools.combinations(BOUNDARIES, 2):
            assert torch.equal(found[a], found[b]) == ((a, b) in alike), (wavelet, a, b)
    whole = [literal.wavedec(x[:, :20], literal.filter_bank("haar"), 2, b) for b in BOUNDARIES]
    for coeffs in whole[1:]:
        assert all(map(torch.equal, coeffs, whole[0]))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_step_follows_the_oracle(monkeypatch, dtype, layout):
    """Compare with Haar filters, in float64 and narrower dtypes, within the error bounds of the folded step."""

    def literally(*, level, **arguments):
        assert arguments.pop("rule") == "gwt"
        tensor_steps = [TensorStep(*own) for own in zip(*arguments.values(), strict=True)]
        literal.gwt_adamw_(tensor_steps, level=level, wavelet="haar")

    monkeypatch.setattr(steps, "gwt_adamw_", literally)
    bucket = Bucket([(4, 32), (3, 37), (2, 3, 10)], 2, dtype=dtype, layouts=[layout], limited=True)
    for t in (1, 2):
        bucket.renew_gradients(t)
        bucket.check_step(Hyper(lr=0.01, weight_decay=0.1), t)


@pytest.mark.parametrize("level", [1, 2, 3, 5])
@pytest.mark.parametrize("limited", [False, True])
def test_the_folding_identity(level, limited):
    """Compare literal and folded step in float64: the coefficients of a block share one denominator."""
    shapes = [(4, 64), (3, 37), (2, 3, 50), (33,)]
    hypers = [Hyper(lr=0.1, eps=eps, weight_decay=0.1, maximize=eps == 1e-3) for eps in (1e-6, 1e-3, 0.0, 1e-8)]
    one, other = (Bucket(shapes, level, dtype=torch.float64, limited=limited, first=True) for _ in range(2))
    for t, size in enumerate((1.0, 0.3, 50.0, 1.0), start=1):
        for bucket in (one, other):
            bucket.renew_gradients(size)
        arrays = [one.tensors(name) for name in ("params", "grads", "exp_avgs", "exp_avg_sqs")]
        norms = one.tensors("norms") if limited else [None] * len(shapes)
        tensor_steps = [TensorStep(*own, t, hyper) for *own, hyper in zip(*arrays, norms, hypers, strict=True)]
        literal.gwt_adamw_(tensor_steps, level=level, wavelet="haar")
        other.step(hypers, t, backend="torch")
        for got, folded in zip(one.results(), other.results(), strict=True):
            torch.testing.assert_close(got, folded, rtol=1e-12, atol=1e-12 * float(folded.abs().max()))


def test_wavelets_differ():
    """Control: another wavelet gives another update."""
    bucket = Bucket([(4, 32)], 2, dtype=torch.float64)
    start = bucket.tensors("params")[0].clone()
    updates = []
    for wavelet in WAVELETS:
        width = literal.approximation_width(32, 2, wavelet)
        p, moments = start.clone(), torch.zeros(2, 4, width, dtype=torch.float64)
        one = TensorStep(p, bucket.tensors("grads")[0], *moments, None, 1, Hyper())
        literal.gwt_adamw_([one], level=2, wavelet=wavelet)
        updates.append(p)
    for i, p in enumerate(updates):
        for q in updates[:i]:
            assert (p - q).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("wavelet", "message"),
    [
        ("nonsense", r"unknown wavelet 'nonsense': use 'haar', or a name of pywt.wavelist\(kind='discrete'\)"),
        ("morl", "unknown wavelet 'morl'"),
    ],
)
def test_unfit_wavelets_are_refused(wavelet, message):
    with pytest.raises(ValueError, match=message):
        literal.filter_bank(wavelet)


def test_without_pywavelets_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pywt", None)
    with pytest.raises(ModuleNotFoundError, match="pip install PyWavelets, or use wavelet='haar'"):
        literal.filter_bank("db7")  # forget a PyWavelets that was imported before


def test_haar_needs_no_pywavelets_whatever_the_boundary(monkeypatch):
    monkeypatch.setitem(sys.modules, "pywt", None)
    literal.filter_bank.cache_clear()
    p = torch.nn.Parameter(torch.ones(2, 7))
    p.grad = torch.arange(14.0).view(2, 7)
    GWTAdamW([p], lr=0.1, boundary="symmetric").step()
    assert (p != 1).all()


def by_pywavelets(p, g, state, t, level, wavelet, boundary, correct_bias):
    """Take the steps of docs/algorithm.md with PyWavelets' transforms; ``state`` is m, v and the limiter's norm."""
    lr, b1, b2, eps, scale, gamma = 0.1, 0.9, 0.99, 1e-3, 0.25, 1.01
    m, v, previous = state
    a, *details = pywt.wavedec(g, wavelet, mode=boundary, level=level, axis=-1)
    m, v = b1 * m + (1 - b1) * a, b2 * v + (1 - b2) * a * a
    d = np.sqrt(v) + eps
    coeffs = [m / d]
    norm = np.sqrt((coeffs[0] ** 2).sum())
    limit = max(norm / (previous + 1e-8), gamma) / gamma if previous else 1.0
    for i, detail in enumerate(details):
        d = d if i == 0 else np.repeat(d, 2, axis=-1)[..., : detail.shape[-1]]
        coeffs.append(detail / d)
    u = pywt.waverec(coeffs, wavelet, mode=boundary, axis=-1)[..., : p.shape[-1]] * scale / limit
    step_size = lr * (np.sqrt(1 - b2**t) / (1 - b1**t) if correct_bias else 1.0)
    return p * (1 - lr * 0.1) - step_size * u, (m, v, norm / limit)


@pytest.mark.filterwarnings("ignore:Level value of")
@pytest.mark.parametrize("correct_bias", [True, False])
@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize("wavelet", ["haar", "bior1.1", "db3", "bior3.1", "bior6.8", "rbio2.4", "coif2"])
def test_runs_equal_those_with_pywavelets_transforms(wavelet, boundary, correct_bias):
    generator = torch.Generator().manual_seed(0)
    for shape, level in (((3, 40), 2), ((2, 29), 3), ((2, 3, 7), 1), ((5,), 2), ((2, 3), 1)):
        p = torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64))
        expected, state = p.detach().numpy().copy(), (0.0, 0.0, 0.0)
        optimizer = GWTAdamW(
            [p], lr=0.1, betas=(0.9, 0.99), eps=1e-3, weight_decay=0.1, level=level, wavelet=wavelet,
            boundary=boundary, correct_bias=correct_bias, backend="torch",
        )  # fmt: skip
        for t, size in enumerate((1.0, 0.3, 50.0, 1.0), start=1):
            p.grad = size * torch.randn(shape, generator=generator, dtype=torch.float64)
            optimizer.step()
            how = (t, level, wavelet, boundary, correct_bias)
            expected, state = by_pywavelets(expected, p.grad.numpy(), state, *how)
        assert_close(p.detach().numpy(), expected)
        for key, values in zip(("exp_avg", "exp_avg_sq", "limiter_norm"), state, strict=True):
            assert_close(optimizer.state[p][key].numpy(), values)
