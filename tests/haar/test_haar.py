"""The public Haar transform on both backends, against PyWavelets, the C oracle, MATLAB and a worked example."""

from __future__ import annotations

import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gwt_kernels import haar_dwt, haar_idwt
from tests.support import interpreter, reference, rounding
from tests.support.poisoned import LAYOUTS, Poisoned, uninitialized
from tests.support.steps import assert_within

BACKENDS = ("torch", "triton")
DTYPES = {"torch": (torch.float64, torch.float32, torch.bfloat16, torch.float16)}
DTYPES["triton"] = DTYPES["torch"][1:]
COMBINATIONS = [(backend, dtype) for backend in BACKENDS for dtype in DTYPES[backend]]
combinations = pytest.mark.parametrize(("backend", "dtype"), COMBINATIONS, ids=lambda x: str(x).split(".")[-1])
SHAPES = [(1,), (2,), (7,), (64,), (3, 5), (4, 16), (2, 3, 33), (2, 1, 2, 9), (0, 8), (2, 0, 5)]


def deepest(width: int) -> int:
    return max(width - 1, 0).bit_length()


def random(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)


def as_float64(x: torch.Tensor) -> np.ndarray:
    return x.detach().to("cpu", torch.float64).numpy()


def on(backend: str, device: torch.device) -> torch.device:
    return device if backend == "triton" else torch.device("cpu")


def check_forward(x: torch.Tensor, level: int, backend: str) -> list[torch.Tensor]:
    """Compare ``haar_dwt`` with the C oracle in float64, band by band."""
    with interpreter.like_a_gpu(), uninitialized():
        got = haar_dwt(x, level, backend=backend)
    exact = as_float64(x)
    bands, bounds = reference.haar_dwt(exact, level), rounding.dwt_bounds(exact, level, x.dtype)
    assert len(got) == level + 1
    for i, (band, expected, bound) in enumerate(zip(got, bands, bounds, strict=True)):
        assert band.dtype == x.dtype
        assert band.device == x.device
        assert band.is_contiguous()
        assert_within(as_float64(band), expected, bound, f"band {i} of {tuple(x.shape)} at level {level}")
    return got


def check_inverse(coeffs: list[torch.Tensor], length: int, backend: str) -> torch.Tensor:
    """Compare ``haar_idwt`` with the C oracle in float64."""
    with interpreter.like_a_gpu(), uninitialized():
        got = haar_idwt(coeffs, length, backend=backend)
    exact = list(map(as_float64, coeffs))
    bound = rounding.idwt_bound(exact, length, got.dtype)
    assert got.dtype == coeffs[0].dtype
    assert got.is_contiguous()
    assert_within(as_float64(got), reference.haar_idwt(exact, length), bound, f"length {length}")
    return got


@combinations
def test_worked_by_hand(backend, dtype, device):
    """Check sums and differences of neighbours; at level 2 the roots of two cancel.

    [4 0 2 2 | 6 2 8 0]: sums of 4 are 8 and 16, halved (1 / sqrt(2)**2): 4 and 8; their sum and difference over
    sqrt(2) are A = 12 / sqrt(2) and D_3 = -4 / sqrt(2). D_2 = ((4+0) - (2+2)) / 2 = 0 and ((6+2) - (8+0)) / 2 = 0.
    D_1 = (4 0 4 8) / sqrt(2).
    """
    x = torch.tensor([4, 0, 2, 2, 6, 2, 8, 0], dtype=dtype, device=on(backend, device))
    root2 = math.sqrt(2)
    expected = [[12 / root2], [-4 / root2], [0, 0], [4 / root2, 0, 4 / root2, 8 / root2]]
    coeffs = check_forward(x, 3, backend)
    for band, values in zip(coeffs, expected, strict=True):
        np.testing.assert_allclose(as_float64(band), values, rtol=torch.finfo(dtype).eps, atol=1e-6)
    a, d2, _ = check_forward(x, 2, backend)
    torch.testing.assert_close(a.cpu(), torch.tensor([4, 8], dtype=dtype), rtol=2e-7, atol=0)
    assert d2.abs().max() == 0
    assert (check_inverse(coeffs, 8, backend) - x).abs().max() <= 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("shape", SHAPES)
@combinations
def test_forward_and_inverse_against_the_oracle(backend, dtype, shape, device):
    depths = {"torch": range(deepest(shape[-1]) + 1), "triton": (0, 1, deepest(shape[-1]))}[backend]
    for level in sorted({depth for depth in depths if depth <= deepest(shape[-1])}):
        x = random(shape, dtype, on(backend, device))
        coeffs = check_forward(x, level, backend)
        check_inverse(coeffs, shape[-1], backend)
        if level and x.numel() > 1:
            swapped = [coeffs[0], *(-c for c in coeffs[1:])]
            assert not torch.equal(haar_idwt(swapped, shape[-1], backend=backend), x)


@pytest.mark.parametrize("backend", BACKENDS)
def test_coefficients_are_those_of_pywavelets(backend, device):
    pywt = pytest.importorskip("pywt", reason="needs PyWavelets: pip install -e '.[test]'")
    dtype = DTYPES[backend][0]
    for width in (*range(1, 10), 33, 100) if backend == "torch" else (2, 7, 33):
        x = random((3, width), dtype, on(backend, device), seed=width)
        exact = as_float64(x)
        for level in range(1, deepest(width) + 1) if backend == "torch" else (deepest(width),):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # PyWavelets warns of the boundary at small widths
                expected = pywt.wavedec(exact, "haar", mode="zero", level=level, axis=-1)
            got = haar_dwt(x, level, backend=backend)
            bounds = rounding.dwt_bounds(exact, level, dtype)
            for band, values, bound in zip(got, expected, bounds, strict=True):
                assert_within(as_float64(band), values, 2 * bound, f"width {width}, level {level}")
            back = pywt.waverec([as_float64(c) for c in got], "haar", mode="zero", axis=-1)[..., :width]
            bound = rounding.idwt_bound([as_float64(c) for c in got], width, dtype)
            assert_within(as_float64(haar_idwt(got, width, backend=backend)), back, 2 * bound, f"width {width}")


def test_coefficients_are_those_of_matlab():
    """Compare with MATLAB's Haar results in PyWavelets' wheel, for signals from the seed of its test suite."""
    pywt = pytest.importorskip("pywt", reason="needs PyWavelets: pip install -e '.[test]'")
    random_state = np.random.RandomState(1234)
    compared = 0
    with np.load(Path(pywt.__file__).parent / "tests" / "data" / "dwt_matlabR2012a_result.npz") as matlab:
        for family in ("db", "sym", "coif", "bior", "rbio"):
            for name in pywt.wavelist(family):
                taps = pywt.Wavelet(name).dec_len
                for width in (taps, taps + 1):
                    x = random_state.randn(width)
                    if name != "db1":
                        continue
                    bands = haar_dwt(torch.from_numpy(x), 1)
                    for kind, band in zip(("ma", "md"), bands, strict=True):
                        expected = matlab[f"zpd_{name}_{width}_{kind}"].ravel()
                        np.testing.assert_allclose(band.numpy(), expected, rtol=1e-14, atol=1e-15)
                        compared += 1
    assert compared == 4


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("level", [1, 3, 6])
def test_the_transform_is_orthonormal(backend, level, device):
    """Check the matrix Q of the unit vectors' images: Q Q^T = Q^T Q = 1, and energy is preserved."""
    dtype = DTYPES[backend][0]
    n = 64
    q = torch.cat(haar_dwt(torch.eye(n, dtype=dtype, device=on(backend, device)), level, backend=backend), -1)
    identity = torch.eye(n, dtype=torch.float64)
    q = q.cpu().double()
    tolerance = 4 * (level + 1) * torch.finfo(dtype).eps
    assert (q @ q.T - identity).abs().max() < tolerance
    assert (q.T @ q - identity).abs().max() < tolerance
    x = random((5, n), dtype, on(backend, device))
    energy = sum(c.double().square().sum() for c in haar_dwt(x, level, backend=backend))
    assert energy.item() == pytest.approx(x.double().square().sum().item(), rel=tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
def test_reconstruction_is_perfect(backend, device):
    dtype = DTYPES[backend][0]
    for width in (1, 2, 3, 31, 64):
        x = random((3, width), dtype, on(backend, device))
        for level in range(0, deepest(width) + 1, 2):
            coeffs = haar_dwt(x, level, backend=backend)
            back = haar_idwt(coeffs, width, backend=backend)
            tolerance = 6 * level * torch.finfo(dtype).eps * float(x.abs().max()) * 2 ** (level / 2)
            assert (back - x).abs().max() <= tolerance, (width, level)
            if level and width % 2 == 0:
                assert torch.equal(haar_idwt(coeffs, backend=backend), back)  # without length: twice D_1


@pytest.mark.parametrize("layout", [*LAYOUTS, "expanded"])
@combinations
def test_layouts_and_surrounding_memory(backend, dtype, layout, device):
    values = random((6, 16), dtype, on(backend, device))
    if layout == "expanded":
        x, guarded = values[:1].expand(6, 16), []
    else:
        place = Poisoned(values, layout)
        x, guarded = place.tensor, [place]
    kept = x.clone()
    coeffs = check_forward(x, 2, backend)
    if layout != "expanded":
        guarded += (places := [Poisoned(c, layout) for c in coeffs])
        coeffs = [place.tensor for place in places]
    check_inverse(coeffs, 16, backend)
    assert torch.equal(x, kept)
    for place in guarded:
        place.check()


@pytest.mark.parametrize("backend", BACKENDS)
def test_level_0_is_a_copy(backend, device):
    x = random((3, 4), torch.float32, on(backend, device))
    (a,) = haar_dwt(x, 0, backend=backend)
    back = haar_idwt([a], backend=backend)
    assert torch.equal(a, x)
    assert torch.equal(back, x)
    assert len({x.data_ptr(), a.data_ptr(), back.data_ptr()}) == 3


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    shape=st.lists(st.integers(1, 5), max_size=2),
    width=st.integers(1, 70),
    level=st.integers(0, 7),
    combination=st.sampled_from(COMBINATIONS),
    layout=st.sampled_from(LAYOUTS),
    seed=st.integers(0, 2**16),
)
def test_any_shape_level_stride_and_dtype(shape, width, level, combination, layout, seed):
    backend, dtype = combination
    device = torch.device("cuda" if backend == "triton" and torch.cuda.is_available() else "cpu")
    x = Poisoned(random((*shape, width), dtype, device, seed), layout)
    coeffs = check_forward(x.tensor, min(level, deepest(width)), backend)
    check_inverse(coeffs, width, backend)
    x.check()


# Gradients ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "level"), [((8,), 3), ((2, 7), 2), ((3, 5), 3), ((1,), 0)])
def test_gradients_are_those_of_finite_differences(shape, level):
    x = random(shape, torch.float64).requires_grad_()
    coeffs = [c.detach().requires_grad_() for c in haar_dwt(x, level)]
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(lambda x: tuple(haar_dwt(x, level)), (x,))
        assert check(lambda *c: haar_idwt(c, shape[-1]), tuple(coeffs))


@pytest.mark.parametrize(("shape", "level"), [((8,), 3), ((2, 7), 2), ((4, 16), 2), ((3, 4), 0)])
def test_gradients_of_the_kernels_are_those_of_torch(shape, level, device):
    def gradients(backend: str) -> list[torch.Tensor]:
        x = random(shape, torch.float32, device).requires_grad_()
        coeffs = haar_dwt(x, level, backend=backend)
        cotangents = [random(tuple(c.shape), torch.float32, device, seed=i + 1) for i, c in enumerate(coeffs)]
        (dx,) = torch.autograd.grad(coeffs, x, cotangents)
        coeffs = [c.detach().requires_grad_() for c in coeffs]
        back = haar_idwt(coeffs, shape[-1], backend=backend)
        return [dx, *torch.autograd.grad(back, coeffs, random(shape, torch.float32, device, seed=99))]

    for got, expected in zip(gradients("triton"), gradients("torch"), strict=True):
        torch.testing.assert_close(got, expected, rtol=3 * (level + 1) * 1.2e-7, atol=1e-6)


def test_a_gradient_flows_through_one_band_alone(device):
    x = random((2, 8), torch.float32, device).requires_grad_()
    haar_dwt(x, 2, backend="triton")[1].sum().backward()
    expected = torch.tensor([0.5, 0.5, -0.5, -0.5] * 2).expand(2, 8)  # D_2 = (x0 + x1 - x2 - x3) / 2
    torch.testing.assert_close(x.grad.cpu(), expected, rtol=3e-7, atol=0)


# Bad input ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "level", "error", "message"),
    [
        (torch.zeros(8, dtype=torch.int64), 1, TypeError, "must be a real floating-point tensor, got torch.int64"),
        (torch.zeros(8, dtype=torch.complex64), 1, TypeError, "floating-point tensor, got torch.complex64"),
        ([1.0, 2.0], 1, TypeError, "x must be a real floating-point tensor, got <class 'list'>"),
        (torch.eye(8).to_sparse(), 1, TypeError, "x must be a dense tensor, got one of layout torch.sparse_coo"),
        (
            torch.ones(8).to(torch.float8_e4m3fn),
            1,
            TypeError,
            "x is torch.float8_e4m3fn, in which PyTorch computes",
        ),
        (torch.tensor(1.0), 1, ValueError, r"at least one dimension, got a scalar: give it one with reshape\(1\)"),
        (torch.zeros(8), -1, ValueError, "level must not be negative, got -1"),
        (torch.zeros(8), 1.0, TypeError, "level must be an integer, got 1.0"),
        (torch.zeros(8), True, TypeError, "level must be an integer, got True"),
        (torch.zeros(8), 4, ValueError, "level 4 is too deep for x, whose last dimension is 8.*use level 3"),
        (torch.zeros(3, 0), 1, ValueError, "level 1 is too deep for x, whose last dimension is 0.*use level 0"),
    ],
)
def test_forward_refuses(x, level, error, message):
    with pytest.raises(error, match=message):
        haar_dwt(x, level)


@pytest.mark.filterwarnings("ignore:.*(beta|prototype)")
def test_tensors_without_strides_are_refused():
    ragged = [torch.ones(8)]
    for make in (
        lambda: torch.eye(8).to_sparse_csr(),
        lambda: torch.nested.nested_tensor(ragged),
        lambda: torch.nested.nested_tensor(ragged, layout=torch.jagged),
    ):
        with pytest.raises(TypeError, match=r"x must be a dense tensor, got one of layout .*: convert it"):
            haar_dwt(make(), 1)


F32, F64 = torch.float32, torch.float64


@pytest.mark.parametrize(
    ("coeffs", "length", "error", "message"),
    [
        ([], None, ValueError, "at least the approximation, got an empty sequence"),
        ([torch.zeros(2), torch.zeros(2).int()], None, TypeError, r"coeffs\[1\] must be a real floating"),
        ([torch.zeros(2), torch.zeros(2).to_sparse()], None, TypeError, r"coeffs\[1\] must be a dense tensor"),
        ([torch.zeros(2, dtype=F32), torch.zeros(2, dtype=F64)], None, TypeError, r"coeffs\[1\] is torch.float64"),
        ([torch.zeros(3, 2), torch.zeros(4, 2)], None, ValueError, r"coeffs\[1\] has shape \(4, 2\), but"),
        ([torch.zeros(2), torch.zeros(2)], 5, ValueError, r"widths \[2, 2\] do not belong to length 5"),
        ([torch.zeros(2), torch.zeros(2), torch.zeros(2)], None, ValueError, r"which has \[1, 1, 2\]"),
        ([torch.zeros(2)], 3, ValueError, r"widths \[2\] do not belong to length 3"),
    ],
)
def test_inverse_refuses(coeffs, length, error, message):
    with pytest.raises(error, match=message):
        haar_idwt(coeffs, length)


def test_error_of_a_backend_that_cannot_run(device):
    with pytest.raises(ValueError, match="unknown backend 'cuda': use one of 'triton', 'torch', 'compiled', or"):
        haar_dwt(torch.zeros(8), 1, backend="cuda")
    with pytest.raises(RuntimeError, match=r"torch.float64 would lose precision; use backend='torch'"):
        haar_dwt(torch.zeros(8, dtype=torch.float64, device=device), 1, backend="triton")
    with pytest.raises(RuntimeError, match="level 11 is above 10"):
        haar_dwt(torch.zeros(2048, device=device), 11, backend="triton")


def test_the_kernels_need_a_gpu_or_the_interpreter(monkeypatch):
    from triton.runtime import driver

    from gwt_kernels.backends import choice

    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(driver, "_active", None)  # but Triton's own driver
    choice.triton_obstacle.cache_clear()
    try:
        with pytest.raises(RuntimeError, match="the tensors are on cpu, and Triton runs on CUDA devices"):
            haar_dwt(torch.zeros(8), 1, backend="triton")
    finally:
        monkeypatch.undo()
        choice.triton_obstacle.cache_clear()
