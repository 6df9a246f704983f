"""Python interface of the C oracle in `csrc_reference/`, on numpy arrays.

The library is built on first use, and again when a source is newer; this needs only `make` and a C compiler. Every
function accepts float64 and float32 and calls the build of that precision.
"""

from __future__ import annotations

import ctypes
import functools
import math
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

SOURCES = Path(__file__).resolve().parents[2] / "csrc_reference"
LIBRARY = SOURCES / "build" / "libgwt_reference.so"

RULES = ("gwt", "foam")  # in the order of GWT_RULE_GWT and GWT_RULE_FOAM
BOUNDARIES = ("zero", "constant", "symmetric", "reflect", "periodic")  # in the order of the GWT_BOUNDARY_ values
LEVEL_ROW = 1000  # GWT_LEVEL_ROW
Level = int | Literal["row"]
OK, BAD_SHAPE, BAD_LEVEL, BAD_OPTION, NULL_POINTER, OUT_OF_MEMORY = range(6)
_NAMES = ("OK", "BAD_SHAPE", "BAD_LEVEL", "BAD_OPTION", "NULL_POINTER", "OUT_OF_MEMORY")
_SUFFIX = {np.dtype(np.float32): "f", np.dtype(np.float64): "d"}


class OracleError(ValueError):
    """The oracle refused its arguments; `code` is documented in `gwt_reference.h`."""

    def __init__(self, code: int) -> None:
        super().__init__(f"the C oracle returned {code} (GWT_{_NAMES[code]})")
        self.code = code


class Wavelet(ctypes.Structure):
    """`gwt_wavelet` of `gwt_reference.h`, field by field."""

    _fields_ = (
        ("taps", ctypes.c_int64),
        *((name, ctypes.POINTER(ctypes.c_double)) for name in ("dec_lo", "dec_hi", "rec_lo", "rec_hi")),
        ("boundary", ctypes.c_int32),
    )


class Options(ctypes.Structure):
    """`gwt_adamw_options` of `gwt_reference.h`, field by field."""

    _fields_ = (
        ("step", ctypes.c_int64),
        ("lr", ctypes.c_double),
        ("beta1", ctypes.c_double),
        ("beta2", ctypes.c_double),
        ("eps", ctypes.c_double),
        ("weight_decay", ctypes.c_double),
        ("scale", ctypes.c_double),
        ("norm_growth_limit", ctypes.c_double),
        ("level", ctypes.c_int32),
        ("maximize", ctypes.c_int32),
        ("rule", ctypes.c_int32),
        ("correct_bias", ctypes.c_int32),
        ("res_scale", ctypes.c_double),
        ("wavelet", ctypes.POINTER(Wavelet)),
    )


def make(*targets: str) -> subprocess.CompletedProcess[str]:
    """Run `make` on the oracle's own Makefile; raise RuntimeError with the compiler's output if it fails."""
    # Inside `make test` these would tie the inner make to the outer one's options and job slots.
    environment = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")}
    done = subprocess.run(
        ["make", "-C", str(SOURCES), *targets], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(f"make -C {SOURCES.name} {' '.join(targets)} failed:\n{done.stdout}{done.stderr}")
    return done


@functools.cache
def library() -> ctypes.CDLL:
    """Return the shared library, built if necessary. Concurrent builds are safe: each renames its result."""
    sources = [SOURCES / "Makefile", *SOURCES.glob("gwt_reference*")]
    newest = max(path.stat().st_mtime_ns for path in sources)
    if not LIBRARY.exists() or LIBRARY.stat().st_mtime_ns < newest:
        make("all")
    lib = ctypes.CDLL(str(LIBRARY))
    pointer, int64, level, wavelet = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.POINTER(Wavelet)
    for name, arguments in {
        "gwt_haar_length": (int64, level),
        "gwt_length": (int64, level, wavelet),
        "gwt_coefficient_count": (int64, int64, level, wavelet),
    }.items():
        getattr(lib, name).restype, getattr(lib, name).argtypes = int64, arguments
    for suffix in _SUFFIX.values():
        for way in ("dwt", "idwt"):
            getattr(lib, f"gwt_{way}_{suffix}").argtypes = (pointer, pointer, int64, int64, level, wavelet)
        getattr(lib, f"gwt_adamw_step_{suffix}").argtypes = (
            *(pointer,) * 4,
            ctypes.POINTER(ctypes.c_double),
            int64,
            int64,
            ctypes.POINTER(Options),
        )
    return lib


def call(name: str, dtype: np.dtype, *arguments: object) -> None:
    """Call `NAME_f` or `NAME_d`; raise OracleError unless it returns GWT_OK."""
    code = getattr(library(), f"{name}_{_SUFFIX[np.dtype(dtype)]}")(*arguments)
    if code != OK:
        raise OracleError(code)


def rows_and_width(shape: Sequence[int]) -> tuple[int, int]:
    """Return the product of all dimensions but the last, and the last, as the oracle takes them."""
    return math.prod(shape[:-1]), shape[-1] if shape else 1


def level_code(level: Level) -> int:
    """Return the level as the oracle takes it: `GWT_LEVEL_ROW` for "row"."""
    return LEVEL_ROW if level == "row" else level


@functools.cache
def wavelet_of(name: str, boundary: str = "zero") -> Wavelet | None:
    """Return the filters of a wavelet by PyWavelets' names; None for Haar with zeros beyond the ends.

    Raises:
        ValueError: there is no such wavelet, or no such boundary.
    """
    if boundary not in BOUNDARIES:
        raise ValueError(f"unknown boundary {boundary!r}: use one of {BOUNDARIES}")
    if (name, boundary) == ("haar", "zero"):
        return None
    import pywt

    filters = pywt.Wavelet(name).filter_bank
    taps = len(filters[0])
    arrays = [(ctypes.c_double * taps)(*taken) for taken in filters]
    pointers = [ctypes.cast(array, ctypes.POINTER(ctypes.c_double)) for array in arrays]
    return Wavelet(taps, *pointers, BOUNDARIES.index(boundary))


def moment_shape(shape: Sequence[int], level: Level, wavelet: str = "haar") -> tuple[int, ...]:
    """Return the shape of a tensor's approximation, and so of its moments; with -1 if there is none."""
    if not shape:
        return ()
    if level != "row" and wavelet == "haar":
        return *shape[:-1], library().gwt_haar_length(shape[-1], level)
    return *shape[:-1], library().gwt_length(shape[-1], level_code(level), wavelet_of(wavelet))


def block_width(shape: Sequence[int], level: Level) -> int:
    """Return the elements `W` of a block: Haar's approximation coefficient is `sqrt(W)` times the block's mean."""
    return rows_and_width(shape)[1] if level == "row" else 2**level


def _band_shapes(shape: Sequence[int], level: Level, wavelet: str) -> list[tuple[int, ...]]:
    """Return the shapes of `[A, D_L, ..., D_1]`."""
    if level == "row":
        return [moment_shape(shape, level), tuple(shape)]
    return [moment_shape(shape, depth, wavelet) for depth in (level, *range(level, 0, -1))]


def dwt(x: np.ndarray, level: Level, wavelet: str = "haar", boundary: str = "zero") -> list[np.ndarray]:
    """Return the wavelet coefficients of the last axis.

    Args:
        x: `[..., N]`, float64 or float32.
        level: 0 (the result is `[x]`) or more; or "row".
        wavelet: PyWavelets' name.
        boundary: PyWavelets' name of the mode.

    Returns:
        `[A, D_L, ..., D_1]` in PyWavelets' order and sign; for Haar `D_l` is `[..., ceil(N / 2**l)]`. For "row"
        `[A, D]`, `[..., 1]` and `[..., N]`: the sum over `sqrt(N)`, and the row less its mean.
    """
    x = np.ascontiguousarray(x)
    rows, width = rows_and_width(x.shape)
    code, filters = level_code(level), wavelet_of(wavelet, boundary)
    packed = np.full(max(library().gwt_coefficient_count(rows, width, code, filters), 0), np.nan, x.dtype)
    call("gwt_dwt", x.dtype, x.ctypes.data, packed.ctypes.data, rows, width, code, filters)
    shapes = _band_shapes(x.shape, level, wavelet)
    ends = np.cumsum([math.prod(shape) for shape in shapes])
    return [band.reshape(shape) for band, shape in zip(np.split(packed, ends[:-1]), shapes, strict=True)]


def idwt(coeffs: Sequence[np.ndarray], length: int, level: Level, wavelet: str = "haar") -> np.ndarray:
    """Return the inverse of `dwt`, cut to `length` columns.

    Args:
        coeffs: `[A, D_L, ..., D_1]` as `dwt` returns them for rows of `length` elements.
        length: `N`, the columns of the result.
        level: the level of the coefficients.
        wavelet: PyWavelets' name.

    Returns:
        `[..., N]`, in the coefficients' dtype.
    """
    shape = (*coeffs[0].shape[:-1], length)
    if [c.shape for c in coeffs] != _band_shapes(shape, level, wavelet):
        raise ValueError(f"shapes {[c.shape for c in coeffs]} are not those of rows of {length} elements")
    packed = np.concatenate([c.ravel() for c in coeffs])
    x = np.full(shape, np.nan, packed.dtype)
    sizes = *rows_and_width(shape), level_code(level)
    call("gwt_idwt", x.dtype, packed.ctypes.data, x.ctypes.data, *sizes, wavelet_of(wavelet))
    return x


def haar_dwt(x: np.ndarray, level: int) -> list[np.ndarray]:
    """Return the Haar coefficients of the last axis, zero-padded: `dwt` with its defaults."""
    return dwt(x, level)


def haar_idwt(coeffs: Sequence[np.ndarray], length: int) -> np.ndarray:
    """Return the inverse of `haar_dwt`, cut to `length` columns."""
    return idwt(coeffs, length, len(coeffs) - 1)


def adamw_step(
    p: np.ndarray,
    g: np.ndarray,
    exp_avg: np.ndarray,
    exp_avg_sq: np.ndarray,
    limiter_norm: float = 0.0,
    *,
    level: Level,
    step: int,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-6,
    weight_decay: float = 0.0,
    scale: float = 0.25,
    norm_growth_limit: float | None = 1.01,
    maximize: bool = False,
    rule: str = "gwt",
    correct_bias: bool = True,
    res_scale: float = 1.0,
    wavelet: str = "haar",
    boundary: str = "zero",
) -> float:
    """Take one step of GWT-Adam or FOAM; changes `p`, `exp_avg` and `exp_avg_sq` in place, unless it raises.

    Args:
        p: weights `[..., N]`, float64 or float32, C-contiguous like all arrays here.
        g: gradient `[..., N]`.
        exp_avg: first moment, of shape `moment_shape(p.shape, level, wavelet)`; zeros before the first step.
        exp_avg_sq: second moment, of the same shape; zeros before the first step.
        limiter_norm: the norm that the previous step returned; 0 before the first step.
        level: 0 is plain AdamW, whatever the rule: no transform, no scale, no limiter. "row" is one block per row.
        step: 1 for the first step.
        lr: learning rate.
        betas: decay of the first and of the second moment.
        eps: added to the root of the second moment, which is not bias-corrected.
        weight_decay: decoupled, applied before the update.
        scale: factor on the update.
        norm_growth_limit: the limiter's gamma; None for no limiter, required by "foam" at every level.
        maximize: ascend the gradient.
        rule: one of `RULES`: "gwt", or "foam", the folded rule.
        correct_bias: multiply the update by `sqrt(1-b2**t) / (1-b1**t)`.
        res_scale: factor on the residuals of "foam".
        wavelet: PyWavelets' name; "haar" for "foam" and "row".
        boundary: PyWavelets' name of the mode; "zero" for "foam" and "row".

    Returns:
        The new `limiter_norm`; the old one if the limiter is off.

    Raises:
        OracleError: the oracle refused the arguments; nothing was changed.
        ValueError: the arrays do not fit together, or the rule is unknown; nothing was changed.
    """
    arrays = (p, g, exp_avg, exp_avg_sq)
    if any(a.dtype != p.dtype or not a.flags.c_contiguous for a in arrays):
        raise ValueError("the arrays have to be C-contiguous and of one dtype")
    moments = moment_shape(p.shape, level, wavelet)
    if moments and moments[-1] < 0:
        moments = exp_avg.shape  # the oracle says what is wrong
    if g.shape != p.shape or exp_avg.shape != moments or exp_avg_sq.shape != moments:
        raise ValueError(f"shapes {[a.shape for a in arrays]} do not fit together at level {level}")
    if rule not in RULES:
        raise ValueError(f"unknown rule {rule!r}: use one of {RULES}")
    options = Options(
        step=step,
        lr=lr,
        beta1=betas[0],
        beta2=betas[1],
        eps=eps,
        weight_decay=weight_decay,
        scale=scale,
        norm_growth_limit=math.nan if norm_growth_limit is None else norm_growth_limit,
        level=level_code(level),
        maximize=maximize,
        rule=RULES.index(rule),
        correct_bias=correct_bias,
        res_scale=res_scale,
    )
    filters = wavelet_of(wavelet, boundary)
    if filters is not None:
        options.wavelet = ctypes.pointer(filters)
    norm = ctypes.c_double(limiter_norm)
    pointers = [a.ctypes.data for a in arrays]
    call("gwt_adamw_step", p.dtype, *pointers, norm, *rows_and_width(p.shape), options)
    return norm.value
