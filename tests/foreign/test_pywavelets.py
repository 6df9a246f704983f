"""PyWavelets' own installed tests, with its Haar transforms replaced by haar_dwt and haar_idwt."""

from __future__ import annotations

import importlib
import inspect
from collections import Counter
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from gwt_kernels import haar_dwt, haar_idwt

pywt = pytest.importorskip("pywt", reason="needs PyWavelets: pip install -e '.[test]'")
pytest.importorskip("pywt.tests.test_multilevel", reason="needs the tests that PyWavelets' wheels install")
_dwt, _multidim, _multilevel, _wavelet_packets = pywt._dwt, pywt._multidim, pywt._multilevel, pywt._wavelet_packets

HAAR = pywt.Wavelet("haar").filter_bank
NAMES = ["haar", "db1", "bior1.1"]  # all have those filters
DTYPES = {"f2": np.float32, "f4": np.float32, "f8": np.float64, "i1": np.float64, "i8": np.float64}
"""Dtypes in which PyWavelets computes; complex numbers are two real ones, and other dtypes are left to it."""
THEIRS = {
    "dwt": _dwt.dwt,
    "idwt": _dwt.idwt,
    "wavedec": _multilevel.wavedec,
    "waverec": _multilevel.waverec,
    "dwt_axis": _multidim.dwt_axis,  # multi-dimensional transforms are composed of these
    "idwt_axis": _multidim.idwt_axis,
}
ARGUMENTS = {name: inspect.signature(THEIRS[name.removesuffix("_axis")]) for name in THEIRS}
MODULES = (pywt, _dwt, _multilevel, _multidim, _wavelet_packets)


class Redirected:
    """A stand-in for PyWavelets' functions: Haar calls go to this package, and are counted."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, backend: str, factor: float = 1.0) -> None:
        self.backend: Any = backend
        self.factor = factor  # 1; any other gives a wrong transform
        self.calls: Counter[str] = Counter()
        for module in MODULES:
            for name in THEIRS:
                if hasattr(module, name):
                    monkeypatch.setattr(module, name, partial(self.call, name))

    def call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        bound = ARGUMENTS[name].bind(*args, **kwargs)
        bound.apply_defaults()
        wavelet, mode, axis = map(bound.arguments.pop, ("wavelet", "mode", "axis"))
        result = None
        if is_haar(wavelet) and is_mode(mode):
            if "data" in bound.arguments:
                result = self._forward(mode, axis, **bound.arguments)
            else:
                result = self._inverse(axis, *bound.arguments.values())
        if result is None:
            return THEIRS[name](*args, **kwargs)
        self.calls[name] += 1
        if name == "wavedec":
            return result
        return result[0] if len(result) == 1 else tuple(result)

    def _forward(self, mode: Any, axis: int, data: Any, level: int | None = 1) -> list[Any] | None:
        x = np.asarray(data)
        if not (x.ndim and -x.ndim <= axis < x.ndim):
            return None
        length = x.shape[axis]
        level = pywt.dwt_max_level(length, 2) if level is None else level
        if length < 2 or not 1 <= level <= pywt.dwt_max_level(length, 2):
            return None
        if length % 2**level and pywt.Modes.from_object(mode) != pywt.Modes.zero:
            return None  # without overlap no filter reaches beyond the ends
        return self._along(axis, lambda t: haar_dwt(t, level, backend=self.backend), [x])

    def _inverse(self, axis: int, coeffs: Any, *more: Any) -> list[Any] | None:
        coeffs = [coeffs, *more] if more else coeffs
        if not isinstance(coeffs, (list, tuple)) or len(coeffs) < 2:
            return None
        if not all(isinstance(c, np.ndarray) and -c.ndim <= axis < c.ndim for c in coeffs):
            return None
        if len({(c.dtype, *np.delete(c.shape, axis)) for c in coeffs}) > 1:
            return None
        widths = [c.shape[axis] for c in coeffs]
        if not widths[0] == widths[1] > 0:  # no transform has these shapes: PyWavelets raises
            return None
        if any(a != -(-b // 2) for a, b in pairwise(widths[1:])):
            return None
        return self._along(axis, lambda *t: [haar_idwt(t, backend=self.backend)], list(coeffs))

    def _along(self, axis: int, call: Callable[..., list[torch.Tensor]], arrays: list[Any]) -> list[Any] | None:
        if np.iscomplexobj(arrays[0]):
            halves = [self._along(axis, call, [getattr(a, part) for a in arrays]) for part in ("real", "imag")]
            return [a + 1j * b for a, b in zip(*halves, strict=True)] if None not in halves else None  # type: ignore[arg-type]
        kind: Any = DTYPES.get(arrays[0].dtype.str[1:])
        if kind is None:
            return None
        rows = [np.moveaxis(np.array(a, kind, order="K"), axis, -1) for a in arrays]
        made = call(*map(torch.from_numpy, rows))
        return [np.moveaxis(c.numpy() * kind(self.factor), -1, axis) for c in made]


def is_haar(wavelet: Any) -> bool:
    try:
        return (wavelet if isinstance(wavelet, pywt.Wavelet) else pywt.Wavelet(wavelet)).filter_bank == HAAR
    except (TypeError, ValueError, AttributeError):
        return False


def is_mode(mode: Any) -> bool:
    try:
        pywt.Modes.from_object(mode)
    except (TypeError, ValueError):
        return False
    return True


OF_NUMBERS = {
    "test__pywt": "compare_downcoef_coeffs",
    "test_dwt_idwt": "dwt_idwt_partial_complex",
    "test_multidim": """
        3D_reconstruct dwdtn_idwtn_allwavelets 3D_reconstruct_complex idwtn_axes idwt2_none_coeffs
        idwtn_none_coeffs idwt2_axes idwt2_axes_subsets idwtn_axes_subsets per_axis_wavelets_and_modes
    """,
    "test_multilevel": """
        wavedec waverec_accuracies waverec_odd_length waverec_complex waverec_all_wavelets_modes
        waverec2_accuracies waverec2_all_wavelets_modes wavedec2_complex waverec2_odd_length waverecn
        wavedecn_many_levels waverecn_accuracies wavedecn_complex waverecn_dtypes waverecn_all_wavelets_modes
        wavedecn_coeff_reshape_even waverecn_coeff_reshape_odd wavedecn_coeff_ravel waverecn_coeff_ravel_odd
        ravel_wavedec2_with_lists waverec_axes_subsets waverec2_axes_subsets waverecn_axes_subsets
        waverecn_int_axis per_axis_wavelets_and_modes fswavedecn_fswaverecn_roundtrip
        fswavedecn_fswaverecn_variable_levels fswavedecn_fswaverecn_variable_wavelets_and_modes
        fswavedecn_fswaverecn_axes_subsets waverec_mixed_precision
    """,
    "test_perfect_reconstruction": "perfect_reconstruction",
    "test_matlab_compatibility": "accuracy_precomputed",
    "test_wp": """
        traversing_wp_tree access_node_attributes reconstructing_data removing_nodes wavelet_packet_dtypes
        wavelet_packet_axis
    """,
    "test_wp2d": """
        traversing_tree_2d accessing_node_attributes_2d data_reconstruction_2d
        data_reconstruction_delete_nodes_2d lazy_evaluation_2D wavelet_packet_dtypes wavelet_packet_axes
    """,
    "test_wpnd": """
        traversing_tree_nd accessing_node_attributes_nd data_reconstruction_delete_nodes_nd wavelet_packet_dtypes
        wavelet_packet_axes
    """,
}
"""Tests that fail if the transform is wrong by a thousandth, by module; names without the prefix ``test_``."""

OF_KINDS = {
    "test_concurrent": "concurrent_wavedec concurrent_dwt",
    "test_dwt_idwt": "dwt_idwt_dtypes error_on_continuous_wavelet",
    "test_multidim": """
        dwtn_input stride byte_offset idwtn_idwt2 idwtn_idwt2_complex idwtn_missing error_on_invalid_keys
        error_mismatched_size dwt2_idwt2_dtypes dwtn_axes negative_axes dwtn_idwtn_dtypes
        error_on_continuous_wavelet
    """,
    "test_multilevel": """
        waverec_invalid_inputs waverec_none multilevel_dtypes_1d multilevel_dtypes_2d waverec2_invalid_inputs
        waverec2_coeff_shape_mismatch waverec2_none_coeffs waverecn_empty_coeff waverecn_invalid_inputs
        waverecn_lists multilevel_dtypes_nd coeffs_to_array_padding array_to_coeffs_invalid_inputs
        ravel_invalid_input unravel_invalid_inputs waverec_axis_error waverec_shape_mismatch_error
        waverec2_axes_errors waverecn_axes_errors error_on_continuous_wavelet default_level
    """,
    "test_wp": "wavelet_packet_structure acess_path collecting_nodes",
    "test_wp2d": "collecting_nodes_2d",
    "test_wpnd": "collecting_nodes_nd",
}
"""Tests of shapes, dtypes, structures and errors."""


def listed(tests: dict[str, str]) -> list[tuple[str, str]]:
    return [(module, f"test_{name}") for module, names in tests.items() for name in names.split()]


def run(test: tuple[str, str], monkeypatch: pytest.MonkeyPatch, backend: str, factor: float = 1.0) -> Redirected:
    module = importlib.import_module(f"pywt.tests.{test[0]}")
    redirected = Redirected(monkeypatch, backend, factor)
    monkeypatch.setattr(pywt, "wavelist", lambda *args, **kwargs: list(NAMES))  # wavelets to loop over
    for name in ("wavelist", "wavelets"):
        if hasattr(module, name):  # MATLAB's results use random numbers that continue from wavelet to wavelet
            monkeypatch.setattr(module, name, ["db1"] if "matlab" in test[0] else NAMES)
    getattr(module, test[1])()
    return redirected


@pytest.mark.filterwarnings("ignore:NumPy warning suppression:DeprecationWarning")
@pytest.mark.parametrize("test", listed(OF_NUMBERS) + listed(OF_KINDS), ids=".".join)
def test_pywavelets_test_passes(test: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(test, monkeypatch, "torch").calls.total() > 0


@pytest.mark.parametrize("test", listed(OF_NUMBERS), ids=".".join)
def test_a_wrong_transform_is_found(test: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AssertionError):
        run(test, monkeypatch, "torch", factor=1.001)
