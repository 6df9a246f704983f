"""Python interface of the C oracle's Lion, Muon, Adafactor and Adam-mini, on numpy arrays.

Every array is float64 and C-contiguous; weights and state change in place, unless the call raises `OracleError` or
`ValueError`. States begin as zeros, and are moments of approximation coefficients: first moments divided by
`sqrt(reference.block_width(...))` are those of block means. In every function:

    level: 0 is the optimizer without a transform; "row" is one block per row.
    lr: learning rate.
    weight_decay: decoupled, applied before the update.
    scale: factor on the update; ignored at level 0, but not by Muon.
    maximize: ascend the gradient.
    wavelet, boundary: PyWavelets' names; the defaults for "row".
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np

from tests.support.reference import Level, Wavelet, call, level_code, moment_shape, rows_and_width, wavelet_of

Adjustment = Literal["original", "match_rms_adamw", "spectral_unclamped"]
ADJUSTMENTS: tuple[Adjustment, ...] = get_args(Adjustment)  # in the order of the oracle's GWT_ADJUST_...
COEFFICIENTS = (3.4445, -4.7750, 2.0315)


class Common(ctypes.Structure):
    """`gwt_common_options` of `gwt_reference_optimizers.h`, field by field; below are its other structures."""

    _fields_ = (
        ("level", ctypes.c_int32),
        ("maximize", ctypes.c_int32),
        ("lr", ctypes.c_double),
        ("weight_decay", ctypes.c_double),
        ("scale", ctypes.c_double),
        ("wavelet", ctypes.POINTER(Wavelet)),
    )


class LionOptions(ctypes.Structure):
    _fields_ = (("common", Common), *((name, ctypes.c_double) for name in ("beta1", "beta2", "detail_scale")))


class NewtonSchulzOptions(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_double) for name in ("a", "b", "c", "eps")),
        ("steps", ctypes.c_int32),
        ("add_eps", ctypes.c_int32),
    )


class MuonOptions(ctypes.Structure):
    _fields_ = (
        ("common", Common),
        ("momentum", ctypes.c_double),
        ("detail_scale", ctypes.c_double),
        ("newton_schulz", NewtonSchulzOptions),
        *((name, ctypes.c_int32) for name in ("nesterov", "adjust", "summed")),
    )


class AdafactorOptions(ctypes.Structure):
    _fields_ = (
        ("common", Common),
        ("step", ctypes.c_int64),
        *((name, ctypes.c_double) for name in ("beta1", "eps1", "eps2", "clip_threshold", "decay_rate")),
        *((name, ctypes.c_int32) for name in ("scale_parameter", "relative_step", "warmup_init", "divided")),
    )


class AdamMiniOptions(ctypes.Structure):
    _fields_ = (
        ("common", Common),
        ("step", ctypes.c_int64),
        *((name, ctypes.c_double) for name in ("beta1", "beta2", "eps")),
        ("rows_per_group", ctypes.c_int64),
    )


def common(
    level: Level,
    lr: float,
    weight_decay: float,
    scale: float,
    maximize: bool,
    wavelet: str = "haar",
    boundary: str = "zero",
) -> Common:
    """Return the options that all optimizers have."""
    options = Common(level_code(level), maximize, lr, weight_decay, scale)
    filters = wavelet_of(wavelet, boundary)
    if filters is not None:
        options.wavelet = ctypes.pointer(filters)
    return options


def run(name: str, arrays: Sequence[np.ndarray | None], sizes: Sequence[int], options: ctypes.Structure) -> None:
    """Call the oracle's function; None stands for NULL."""
    if any(a is not None and (a.dtype != np.float64 or not a.flags.c_contiguous) for a in arrays):
        raise ValueError("the arrays have to be C-contiguous and of float64")
    pointers = [ctypes.c_void_p(None if a is None else a.ctypes.data) for a in arrays]
    call(name, np.float64, *pointers, *map(ctypes.c_int64, sizes), ctypes.byref(options))


def matrices(shape: Sequence[int]) -> tuple[int, int, int]:
    """Return an N-D shape as a batch of matrices: the product of all but the last two dimensions, and these."""
    return math.prod(shape[:-2]), shape[-2] if len(shape) > 1 else 1, shape[-1] if shape else 1


def _require(arrays: dict[str, np.ndarray | None], shapes: dict[str, tuple[int, ...]]) -> None:
    """Raise ValueError unless the arrays have these shapes. A shape with -1 passes: the oracle refuses it."""
    found = {name: a.shape for name, a in arrays.items() if a is not None}
    if found != {name: found.get(name) if -1 in shape else shape for name, shape in shapes.items()}:
        raise ValueError(f"shapes {found} have to be {shapes}")


def lion_step(
    p: np.ndarray,
    g: np.ndarray,
    exp_avg: np.ndarray,
    *,
    level: Level,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.99),
    weight_decay: float = 0.0,
    scale: float = 1.0,
    detail_scale: float = 1.0,
    maximize: bool = False,
    wavelet: str = "haar",
    boundary: str = "zero",
) -> None:
    """Take one step of GWT-Lion on `[..., N]`.

    Args:
        p: weights.
        g: gradient.
        exp_avg: first moment, of shape `moment_shape(p.shape, level, wavelet)`.
        level: as in the docstring of the module.
        lr: learning rate.
        betas: share of the moment in the update; decay of the moment.
        weight_decay: decoupled.
        scale: factor on the update.
        detail_scale: factor on the details, `rho`.
        maximize: ascend the gradient.
        wavelet: PyWavelets' name.
        boundary: PyWavelets' name of the mode.
    """
    moments = moment_shape(p.shape, level, wavelet)
    _require({"g": g, "exp_avg": exp_avg}, {"g": p.shape, "exp_avg": moments})
    shared = common(level, lr, weight_decay, scale, maximize, wavelet, boundary)
    run("gwt_lion_step", (p, g, exp_avg), rows_and_width(p.shape), LionOptions(shared, *betas, detail_scale))


def newton_schulz(
    x: np.ndarray,
    *,
    ns_coefficients: tuple[float, float, float] = COEFFICIENTS,
    ns_steps: int = 5,
    eps: float = 1e-7,
    added_eps: bool = False,
) -> np.ndarray:
    """Orthogonalize `[..., rows, columns]` by Newton-Schulz; divide by `max(norm, eps)`, or by `norm + eps`."""
    if x.ndim < 2:
        raise ValueError(f"x has the shape {x.shape}: it has to have two dimensions or more")
    o = np.full_like(x, np.nan)
    run(
        "gwt_newton_schulz",
        (x, o),
        matrices(x.shape),
        NewtonSchulzOptions(*ns_coefficients, eps, ns_steps, added_eps),
    )
    return o


def muon_step(
    p: np.ndarray,
    g: np.ndarray,
    momentum_buffer: np.ndarray,
    *,
    level: Level,
    lr: float,
    weight_decay: float = 0.1,
    momentum: float = 0.95,
    nesterov: bool = True,
    ns_coefficients: tuple[float, float, float] = COEFFICIENTS,
    eps: float = 1e-7,
    ns_steps: int = 5,
    adjust_lr_fn: Adjustment | None = None,
    scale: float = 1.0,
    detail_scale: float = 1.0,
    maximize: bool = False,
    wavelet: str = "haar",
    boundary: str = "zero",
    summed: bool = False,
    added_eps: bool = False,
) -> None:
    """Take one step of GWT-Muon on matrices `[..., rows, columns]`; names are those of `torch.optim.Muon`.

    Args:
        p: weights.
        g: gradient.
        momentum_buffer: momentum, of shape `moment_shape(p.shape, level, wavelet)`.
        level: as in the docstring of the module.
        lr: learning rate.
        weight_decay: decoupled, times `lr` before its adjustment.
        momentum: decay of the momentum.
        nesterov: whether the gradient's approximation enters the update in addition to the momentum.
        ns_coefficients: coefficients of `x`, `x**3` and `x**5` in the Newton-Schulz iteration.
        eps: the smallest norm that the iteration divides by.
        ns_steps: steps of the iteration.
        adjust_lr_fn: "original" (None) is `sqrt(max(1, rows/columns))`, "match_rms_adamw" is
            `0.2*sqrt(max(rows, columns))`, "spectral_unclamped" is `sqrt(rows/columns)`.
        scale: factor on the update, at level 0 too.
        detail_scale: factor on the details, `rho`.
        maximize: ascend the gradient.
        wavelet: PyWavelets' name.
        boundary: PyWavelets' name of the mode.
        summed: `m = momentum*m + A`, as in the golden vectors; else `m = momentum*m + (1-momentum)*A`, as in torch.
        added_eps: divide by `norm + eps`, as in the golden vectors; else by `max(norm, eps)`, as in torch.
    """
    if p.ndim < 2:
        raise ValueError(f"p has the shape {p.shape}: Muon takes two dimensions or more")
    if adjust_lr_fn not in (None, *ADJUSTMENTS):
        raise ValueError(f"unknown adjust_lr_fn {adjust_lr_fn!r}: use one of {ADJUSTMENTS}")
    _require(
        {"g": g, "momentum_buffer": momentum_buffer},
        {"g": p.shape, "momentum_buffer": moment_shape(p.shape, level, wavelet)},
    )
    options = MuonOptions(
        common=common(level, lr, weight_decay, scale, maximize, wavelet, boundary),
        momentum=momentum,
        detail_scale=detail_scale,
        newton_schulz=NewtonSchulzOptions(*ns_coefficients, eps, ns_steps, added_eps),
        nesterov=nesterov,
        adjust=ADJUSTMENTS.index(adjust_lr_fn or "original"),
        summed=summed,
    )
    run("gwt_muon_step", (p, g, momentum_buffer), matrices(p.shape), options)


def adafactor_shapes(
    shape: Sequence[int], level: Level, beta1: float | None = 0.9, wavelet: str = "haar"
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of Adafactor's state: factors in two dimensions or more, else a full second moment."""
    moments = moment_shape(shape, level, wavelet)
    first = {} if beta1 is None else {"exp_avg": moments}
    if len(shape) < 2:
        return first | {"exp_avg_sq": moments}
    return first | {"exp_avg_sq_row": moments[:-1], "exp_avg_sq_col": (*moments[:-2], moments[-1])}


def adafactor_state(
    shape: Sequence[int], level: Level, beta1: float | None = 0.9, wavelet: str = "haar"
) -> dict[str, np.ndarray]:
    """Return Adafactor's state before the first step."""
    return {name: np.zeros(s) for name, s in adafactor_shapes(shape, level, beta1, wavelet).items()}


def adafactor_step(
    p: np.ndarray,
    g: np.ndarray,
    state: dict[str, np.ndarray],
    *,
    level: Level,
    step: int,
    lr: float | None,
    beta1: float | None = 0.9,
    eps: tuple[float, float] = (1e-30, 1e-3),
    clip_threshold: float = 1.0,
    decay_rate: float = -0.8,
    weight_decay: float = 0.0,
    scale: float = 0.25,
    scale_parameter: bool = False,
    relative_step: bool = False,
    warmup_init: bool = False,
    details: Literal["divided", "published"] = "divided",
    maximize: bool = False,
    wavelet: str = "haar",
    boundary: str = "zero",
) -> None:
    """Take one step of GWT-Adafactor on `[..., rows, columns]`, or on a vector.

    Args:
        p: weights.
        g: gradient.
        state: as `adafactor_state` makes it.
        level: as in the docstring of the module.
        step: 1 for the first step.
        lr: learning rate; ignored with `relative_step`, and may be None then.
        beta1: decay of the first moment; None for no first moment.
        eps: number added to squares, and smallest RMS of the weights with `scale_parameter`.
        clip_threshold: RMS of the approximation's update above which it is clipped.
        decay_rate: the decay of second moments is `1 - step**decay_rate`.
        weight_decay: decoupled, times the learning rate after `relative_step` and `scale_parameter`.
        scale: factor on the update.
        scale_parameter: multiply the learning rate by the RMS of the weights.
        relative_step: the learning rate is `min(1e-2, 1/sqrt(step))`.
        warmup_init: with `relative_step`, `min(1e-6*step, 1/sqrt(step))`.
        details: "published" leaves details undivided; "divided" divides them as the approximation above them.
        maximize: ascend the gradient.
        wavelet: PyWavelets' name.
        boundary: PyWavelets' name of the mode.
    """
    if details not in ("divided", "published"):
        raise ValueError(f"unknown details {details!r}: use 'divided' or 'published'")
    _require({"g": g, **state}, {"g": p.shape, **adafactor_shapes(p.shape, level, beta1, wavelet)})
    options = AdafactorOptions(
        common=common(level, 0.0 if lr is None else lr, weight_decay, scale, maximize, wavelet, boundary),
        step=step,
        beta1=math.nan if beta1 is None else beta1,
        eps1=eps[0],
        eps2=eps[1],
        clip_threshold=clip_threshold,
        decay_rate=decay_rate,
        scale_parameter=scale_parameter,
        relative_step=relative_step,
        warmup_init=warmup_init,
        divided=details == "divided",
    )
    slots = [state.get(name) for name in ("exp_avg", "exp_avg_sq_row", "exp_avg_sq_col", "exp_avg_sq")]
    run("gwt_adafactor_step", (p, g, *slots), matrices(p.shape), options)


def adam_mini_step(
    p: np.ndarray,
    g: np.ndarray,
    exp_avg: np.ndarray,
    exp_avg_sq: np.ndarray,
    *,
    level: Level,
    step: int,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    scale: float = 1.0,
    maximize: bool = False,
    wavelet: str = "haar",
    boundary: str = "zero",
) -> None:
    """Take one step of GWT-Adam-mini on `[..., N]`.

    Args:
        p: weights.
        g: gradient.
        exp_avg: first moment, of shape `moment_shape(p.shape, level, wavelet)`.
        exp_avg_sq: second moments `[groups]`: one per row, one per head of equally many rows, or one in all.
        level: as in the docstring of the module.
        step: 1 for the first step.
        lr: learning rate.
        betas: decay of the first and of the second moment.
        eps: added to the root of the second moment, which is bias-corrected.
        weight_decay: decoupled.
        scale: factor on the update.
        maximize: ascend the gradient.
        wavelet: PyWavelets' name.
        boundary: PyWavelets' name of the mode.
    """
    moments = moment_shape(p.shape, level, wavelet)
    _require({"g": g, "exp_avg": exp_avg}, {"g": p.shape, "exp_avg": moments})
    rows, width = rows_and_width(p.shape)
    if exp_avg_sq.ndim != 1 or not exp_avg_sq.size or rows % exp_avg_sq.size:
        raise ValueError(f"{exp_avg_sq.shape} second moments do not divide {rows} rows evenly")
    options = AdamMiniOptions(
        common=common(level, lr, weight_decay, scale, maximize, wavelet, boundary),
        step=step,
        beta1=betas[0],
        beta2=betas[1],
        eps=eps,
        rows_per_group=max(rows // exp_avg_sq.size, 1),
    )
    run("gwt_adam_mini_step", (p, g, exp_avg, exp_avg_sq), (rows, width), options)
