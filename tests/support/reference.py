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

import numpy as np

SOURCES = Path(__file__).resolve().parents[2] / "csrc_reference"
LIBRARY = SOURCES / "build" / "libgwt_reference.so"

RULES = ("gwt", "foam")  # in the order of GWT_RULE_GWT and GWT_RULE_FOAM
OK, BAD_SHAPE, BAD_LEVEL, BAD_OPTION, NULL_POINTER, OUT_OF_MEMORY = range(6)
_NAMES = ("OK", "BAD_SHAPE", "BAD_LEVEL", "BAD_OPTION", "NULL_POINTER", "OUT_OF_MEMORY")
_SUFFIX = {np.dtype(np.float32): "f", np.dtype(np.float64): "d"}


class OracleError(ValueError):
    """The oracle refused its arguments; `code` is documented in `gwt_reference.h`."""

    def __init__(self, code: int) -> None:
        super().__init__(f"the C oracle returned {code} (GWT_{_NAMES[code]})")
        self.code = code


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
    pointer, int64, level = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    lib.gwt_haar_length.restype = lib.gwt_haar_coefficient_count.restype = int64
    lib.gwt_haar_length.argtypes = (int64, level)
    lib.gwt_haar_coefficient_count.argtypes = (int64, int64, level)
    for suffix in _SUFFIX.values():
        for transform in ("dwt", "idwt"):
            getattr(lib, f"gwt_haar_{transform}_{suffix}").argtypes = (pointer, pointer, int64, int64, level)
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
    """Return the last dimension of a shape, and the product of the others, as the oracle takes them."""
    return math.prod(shape[:-1]), shape[-1] if shape else 1


def moment_shape(shape: Sequence[int], level: int) -> tuple[int, ...]:
    """Return the shape of `exp_avg` and `exp_avg_sq` for a tensor of this shape."""
    return (*shape[:-1], library().gwt_haar_length(shape[-1], level)) if shape else ()


def haar_dwt(x: np.ndarray, level: int) -> list[np.ndarray]:
    """Compute the Haar coefficients of the last axis, zero-padded.

    Args:
        x: `[..., N]`, float64 or float32.
        level: 0 (the result is `[x]`) or more.

    Returns:
        `[A, D_L, ..., D_1]` in PyWavelets' order and sign, `D_l` of shape `[..., ceil(N / 2**l)]`.
    """
    x = np.ascontiguousarray(x)
    rows, width = rows_and_width(x.shape)
    count = library().gwt_haar_coefficient_count(rows, width, level)
    packed = np.full(max(count, 0), np.nan, x.dtype)
    call("gwt_haar_dwt", x.dtype, x.ctypes.data, packed.ctypes.data, rows, width, level)
    shapes = [moment_shape(x.shape, depth) for depth in (level, *range(level, 0, -1))]
    ends = np.cumsum([math.prod(shape) for shape in shapes])
    return [band.reshape(shape) for band, shape in zip(np.split(packed, ends[:-1]), shapes, strict=True)]


def haar_idwt(coeffs: Sequence[np.ndarray], length: int) -> np.ndarray:
    """Invert `haar_dwt`, and cut the result to `length` columns.

    Args:
        coeffs: `[A, D_L, ..., D_1]` as `haar_dwt` returns them for rows of `length` elements.
        length: `N`, the columns of the result.

    Returns:
        `[..., N]`, in the coefficients' dtype.
    """
    level, shape = len(coeffs) - 1, (*coeffs[0].shape[:-1], length)
    depths = (level, *range(level, 0, -1))
    if [c.shape for c in coeffs] != [moment_shape(shape, depth) for depth in depths]:
        raise ValueError(f"shapes {[c.shape for c in coeffs]} are not those of rows of {length} elements")
    packed = np.concatenate([c.ravel() for c in coeffs])
    x = np.full(shape, np.nan, packed.dtype)
    rows, width = rows_and_width(shape)
    call("gwt_haar_idwt", x.dtype, packed.ctypes.data, x.ctypes.data, rows, width, level)
    return x


def adamw_step(
    p: np.ndarray,
    g: np.ndarray,
    exp_avg: np.ndarray,
    exp_avg_sq: np.ndarray,
    limiter_norm: float = 0.0,
    *,
    level: int,
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
) -> float:
    """Take one step of GWT-Adam or FOAM; changes `p`, `exp_avg` and `exp_avg_sq` in place, unless it raises.

    Args:
        p: weights `[..., N]`, float64 or float32, C-contiguous like all arrays here.
        g: gradient `[..., N]`.
        exp_avg: first moment, of shape `moment_shape(p.shape, level)`; zeros before the first step.
        exp_avg_sq: second moment, of the same shape; zeros before the first step.
        limiter_norm: return value of the previous step; 0 before the first step.
        level: 0 is plain AdamW, whatever the rule: no transform, no scale, no limiter.
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

    Returns:
        The new `limiter_norm`; the old one where the limiter is off.

    Raises:
        OracleError: the oracle refused the arguments; nothing was changed.
        ValueError: the arrays do not fit together, or the rule is unknown; nothing was changed.
    """
    arrays = (p, g, exp_avg, exp_avg_sq)
    if any(a.dtype != p.dtype or not a.flags.c_contiguous for a in arrays):
        raise ValueError("the arrays have to be C-contiguous and of one dtype")
    valid_level = p.ndim == 0 or library().gwt_haar_length(p.shape[-1], level) >= 0
    moments = moment_shape(p.shape, level) if valid_level else exp_avg.shape
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
        level=level,
        maximize=maximize,
        rule=RULES.index(rule),
        correct_bias=correct_bias,
    )
    norm = ctypes.c_double(limiter_norm)
    pointers = [a.ctypes.data for a in arrays]
    call("gwt_adamw_step", p.dtype, *pointers, norm, *rows_and_width(p.shape), options)
    return norm.value
