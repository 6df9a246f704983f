"""Tests the literal algorithm: its transforms against PyWavelets, its step against the folded one."""

from __future__ import annotations

import sys
import warnings

import numpy as np
import pytest
import torch

from gwt_kernels.functional import Hyper
from gwt_kernels.torch_backend import literal
from tests import steps
from tests.poisoned import LAYOUTS
from tests.steps import Bucket

pywt = pytest.importorskip("pywt", reason="needs PyWavelets: pip install -e '.[test]'")

WAVELETS = ("haar", "db2", "db5", "sym4", "coif2")


@pytest.mark.parametrize("wavelet", WAVELETS)
@pytest.mark.parametrize("shape", [(1,), (2, 2), (3, 7), (2, 3, 33), (2, 100), (0, 5)])
def test_transforms_are_those_of_pywavelets(wavelet, shape):
    """Deeper than is sensible too, where a band is all boundary."""
    x = torch.from_numpy(np.random.default_rng(0).standard_normal(shape))
    bank = literal.filter_bank(wavelet)
    for level in (1, 2, 4):
        coeffs = literal.wavedec(x, bank, level)
        assert coeffs[0].shape[-1] == literal.approximation_width(shape[-1], level, wavelet)
        if 0 in shape:
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyWavelets warns of the boundary at small widths
            expected = pywt.wavedec(x.numpy(), wavelet, mode="zero", level=level, axis=-1)
        for got, values in zip(coeffs, expected, strict=True):
            np.testing.assert_allclose(got.numpy(), values, rtol=0, atol=1e-14 * 2**level)
        back = literal.waverec(coeffs, bank)
        np.testing.assert_allclose(
            back.numpy(), pywt.waverec(expected, wavelet, mode="zero", axis=-1), rtol=0, atol=1e-14 * 2**level
        )
        # PyWavelets' tables of symlets hold some 12 digits, which bounds how well a transform inverts.
        np.testing.assert_allclose(back[..., : shape[-1]].numpy(), x.numpy(), rtol=0, atol=1e-10)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_step_follows_the_oracle(monkeypatch, dtype, layout):
    """With Haar filters, from float64 down, within the error bounds of the folded step."""

    def literally(*, level, **arguments):
        assert arguments.pop("rule") == "gwt"
        literal.gwt_adamw_(*arguments.values(), level=level, wavelet="haar")

    monkeypatch.setattr(steps, "gwt_adamw_", literally)
    bucket = Bucket([(4, 32), (3, 37), (2, 3, 10)], 2, dtype=dtype, layouts=[layout], limited=True)
    for t in (1, 2):
        bucket.renew_gradients(t)
        bucket.check_step(Hyper(lr=0.01, weight_decay=0.1), t)


@pytest.mark.parametrize("level", [1, 2, 3, 5])
@pytest.mark.parametrize("limited", [False, True])
def test_the_folding_identity(level, limited):
    """Literal and folded, from the same start in float64: every coefficient of a block shares one denominator."""
    shapes = [(4, 64), (3, 37), (2, 3, 50), (33,)]
    hypers = [Hyper(lr=0.1, eps=eps, weight_decay=0.1, maximize=eps == 1e-3) for eps in (1e-6, 1e-3, 0.0, 1e-8)]
    one, other = (Bucket(shapes, level, dtype=torch.float64, limited=limited, first=True) for _ in range(2))
    for t, size in enumerate((1.0, 0.3, 50.0, 1.0), start=1):
        for bucket in (one, other):
            bucket.renew_gradients(size)
        arrays = [one.tensors(name) for name in ("params", "grads", "exp_avgs", "exp_avg_sqs")]
        norms = one.tensors("norms") if limited else [None] * len(shapes)
        literal.gwt_adamw_(*arrays, norms, [t] * len(shapes), hypers, level=level, wavelet="haar")
        other.step(hypers, t, backend="torch")
        for got, folded in zip(one.results(), other.results(), strict=True):
            torch.testing.assert_close(got, folded, rtol=1e-12, atol=1e-12 * float(folded.abs().max()))


def test_wavelets_differ():
    """Control: another wavelet is another update."""
    bucket = Bucket([(4, 32)], 2, dtype=torch.float64)
    start = bucket.tensors("params")[0].clone()
    updates = []
    for wavelet in WAVELETS:
        width = literal.approximation_width(32, 2, wavelet)
        p, moments = start.clone(), torch.zeros(2, 4, width, dtype=torch.float64)
        literal.gwt_adamw_(
            [p], bucket.tensors("grads"), *moments.split(1), [None], [1], [Hyper()], level=2, wavelet=wavelet
        )
        updates.append(p)
    for i, p in enumerate(updates):
        for q in updates[:i]:
            assert (p - q).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("wavelet", "message"),
    [
        ("nonsense", r"unknown wavelet 'nonsense': use 'haar', or a name of pywt.wavelist\(kind='discrete'\)"),
        ("morl", "unknown wavelet 'morl'"),
        ("bior2.2", "'bior2.2' is not orthogonal: use 'haar', 'dbN', 'symN' or 'coifN'"),
    ],
)
def test_unfit_wavelets_are_refused(wavelet, message):
    with pytest.raises(ValueError, match=message):
        literal.filter_bank(wavelet)


def test_without_pywavelets_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pywt", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'gwt-kernels\[wavelets\]', or use wavelet='haar'"):
        literal.filter_bank("db7")  # not asked for elsewhere: what was found before is kept
