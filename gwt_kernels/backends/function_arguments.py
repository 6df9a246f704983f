"""Check the arguments of ``gwt_adamw_`` on every backend, before a tensor changes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from gwt_kernels.backends.bucket import Bucket, StepInputs
from gwt_kernels.backends.bucket_validation import check_bucket, check_low_bits, check_scales
from gwt_kernels.core.hyper import Hyper
from gwt_kernels.core.level import Level, check_level_type
from gwt_kernels.core.notes import COLUMNS
from gwt_kernels.formats.moments import FORMATS

REAL = ("params", "grads")
"""Lists whose tensors hold real numbers; moments may be quantized."""


_OF_EACH = ("limiter_norms", "keys", "lows", "scales", "spans")
"""Options with an entry for each parameter."""
_DEEPEST = 62
"""Largest level, as ``2**level`` has to fit into 64 bits."""


def check_options(level: Level, options: Mapping[str, Any]) -> None:
    """Raise unless the level is within bounds and options have the types that a bucket takes."""
    check_level_type(level)
    if isinstance(level, int) and level > _DEEPEST:
        raise ValueError(f"level must be at most {_DEEPEST}, got {level}")
    for name in _OF_EACH:
        if not isinstance(entries := options.get(name), Sequence | None):
            kind = type(entries).__name__
            raise TypeError(f"{name} must be None or a list with an entry for each parameter, got {kind}")
    if not isinstance(wavelet := options.get("wavelet", "haar"), str):
        raise TypeError(f"wavelet must be the name of a wavelet, got {wavelet!r}")
    for i, span in enumerate(options.get("spans") or ()):
        of_two = isinstance(span, Sequence) and len(span) == 2
        if span is not None and not (of_two and all(map(_is_span, span))):
            raise TypeError(
                f"spans[{i}] must be None or a pair of Span, of the weights and of the moments, got {span!r}"
            )


def _is_span(value: object) -> bool:
    return isinstance(value, Sequence) and len(value) == 3 and all(isinstance(n, Integral) for n in value)


def check_lists(lists: Mapping[str, Any]) -> None:
    """Raise a TypeError unless these are lists of dense tensors; moments may be None."""
    for name, tensors in lists.items():
        if not isinstance(tensors, Sequence) and (tensors is not None or name in REAL):
            raise TypeError(f"{name} must be a list of tensors, got {type(tensors).__name__}")
        for i, x in enumerate(tensors or ()):
            kind = x.layout if isinstance(x, Tensor) else type(x).__name__
            if kind != torch.strided:
                raise TypeError(
                    f"{name}[{i}] must be a dense tensor, got {kind}: leave parameters without gradient out of all "
                    f"lists"
                )
            if name in REAL and not (x.is_floating_point() and x.dtype.itemsize > 1):
                raise TypeError(
                    f"{name}[{i}] must be a real floating-point tensor of 16 bits or more, got {x.dtype}"
                )


def check_kept(bucket: Bucket) -> None:
    """Raise unless a bucket's limiter norms, telemetry and keys are valid."""
    n, device = len(bucket), bucket.device
    for i, norm in enumerate(bucket.limiter_norms):
        is_norm = isinstance(norm, Tensor) and norm.is_floating_point() and norm.numel() == 1
        if norm is not None and not (is_norm and norm.device == device):
            raise ValueError(f"limiter_norms[{i}] must be a floating-point scalar on {device}, got {norm!r}")
    _check_numbers_of_each("telemetry", bucket.telemetry, (n, len(COLUMNS)), torch.float64, device)
    for i, key in enumerate(bucket.keys):
        if isinstance(key, bool) or not isinstance(key, Integral) or not 0 <= key < 2**63:
            raise ValueError(f"keys[{i}] must be what gwt_kernels.core.hyper.key_of returns, got {key!r}")


def check_tensors(bucket: Bucket, grads: Sequence[Tensor]) -> None:
    """Raise unless the tensors form one bucket: one device, one dtype per list, the shapes of a step, each once."""
    arrays: dict[str, Any] = {"params": bucket.params, "grads": grads}
    arrays |= zip(("exp_avgs", "exp_avg_sqs"), bucket.moments, strict=False)
    if bucket.stated.row_slots:
        _check_row_moments(bucket.params, arrays.pop("exp_avg_sqs"))
    for name, tensors in arrays.items():
        dtype = tensors[0].dtype
        if not dtype.is_floating_point and not any(dtype in known.dtypes for known in FORMATS.values()):
            raise ValueError(f"{name} are {dtype}: moments are floating-point numbers, or int8 codes with scales")
    check_bucket(arrays, bucket.level, wavelet=bucket.wavelet if bucket.level else "haar")
    if bucket.rounding == "split":
        check_low_bits(bucket.params, bucket.lows)  # type: ignore[arg-type]  # the bucket has them
    if bucket.is_quantized:
        check_scales(bucket.exp_avgs, bucket.scales, bucket.level)  # type: ignore[arg-type]
    for i, p in enumerate(bucket.params):
        if any(n > 1 and stride == 0 for n, stride in zip(p.shape, p.stride(), strict=True)):
            raise ValueError(f"params[{i}] has strides {p.stride()}, so elements share memory: clone() it")
    known: dict[int, str] = {}
    for name in ("params", "exp_avgs", "exp_avg_sqs", "limiter_norms", "lows"):
        for i, x in enumerate(getattr(bucket, name)):
            if x is not None and known.setdefault(id(x), f"{name}[{i}]") != f"{name}[{i}]":
                raise ValueError(f"{name}[{i}] is {known[id(x)]} once more: a step writes each tensor once")


def _check_row_moments(params: Sequence[Tensor], moments: Sequence[Tensor]) -> None:
    """Raise a ValueError unless second moments of rows fit parameters; the bucket has checked their number."""
    for i, (p, v) in enumerate(zip(params, moments, strict=True)):
        rows = (*p.shape[:-2], *v.shape[-2:-1], 1) if p.dim() > 1 else (1,) * p.dim()
        fits = tuple(v.shape) in (rows, (1,) * p.dim()) and v.is_contiguous()
        if not fits or (v.dtype, v.device) != (moments[0].dtype, p.device):
            raise ValueError(
                f"exp_avg_sqs[{i}] must be a contiguous {str(moments[0].dtype).removeprefix('torch.')} tensor on "
                f"{p.device}, of a number for n rows of {tuple(p.shape)}, (..., rows / n, 1), or for all of them, "
                f"got {v.dtype} of shape {tuple(v.shape)} and strides {v.stride()} on {v.device}"
            )


def check_numbers(steps: Any, hypers: Any) -> None:
    """Raise unless steps are counts from 1 on, or a tensor, and the options of every ``Hyper`` are in range."""
    if not isinstance(steps, (Sequence, Tensor)) or not isinstance(hypers, Sequence):
        wrong = "hypers" if isinstance(steps, (Sequence, Tensor)) else "steps"
        raise TypeError(f"{wrong} must be a list of one for each parameter")
    for i, step in enumerate(steps if isinstance(steps, Sequence) else ()):
        if isinstance(step, bool) or not isinstance(step, Integral):
            raise TypeError(f"steps[{i}] must be an integer, 1 for the first step, got {step!r}")
        if step < 1:
            raise ValueError(f"steps[{i}] must be at least 1, which is the first step, got {step}")
    for hyper in {id(hyper): hyper for hyper in hypers}.values():
        _check_hyper(hyper)


def check_step(bucket: Bucket, inputs: StepInputs, control: Tensor | None, limits: Tensor | None) -> None:
    """Raise unless ``steps`` and ``limits`` have a number per parameter, ``control`` 3, and they go together."""
    n, device = len(bucket), bucket.device
    if isinstance(inputs.steps, Tensor):
        _check_numbers_of_each("steps", inputs.steps, (n,), torch.float64, device)
    elif control is not None:
        raise ValueError("control goes with steps that the device counts: pass them as a float64 tensor")
    if limits is not None and bucket.limiter_norms[0] is not None:
        raise ValueError("limits take the place of limiter_norms: pass None in these for every parameter")
    _check_numbers_of_each("control", control, (3,), torch.float64, device)
    _check_numbers_of_each("limits", limits, (n,), torch.float32, device)


def _check_numbers_of_each(
    name: str, x: Any, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    """Raise unless the argument is None, or a contiguous tensor of this shape, dtype and device."""
    if x is None:
        return
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor or None, got {type(x).__name__}")
    if (x.shape, x.dtype, x.device, x.is_contiguous()) != (shape, dtype, device, True):
        raise ValueError(
            f"{name} must be a contiguous {str(dtype).removeprefix('torch.')} tensor of shape {shape} on {device}, "
            f"got {x.dtype} of shape {tuple(x.shape)} on {x.device}"
        )


def _check_hyper(hyper: Any) -> None:
    if not isinstance(hyper, Hyper):
        raise TypeError(f"hypers must be gwt_kernels.functional.Hyper, got {type(hyper).__name__}")
    limit = hyper.norm_growth_limit
    for name, value, lowest, highest in (
        ("lr", hyper.lr, 0.0, math.inf),
        ("beta1", hyper.beta1, 0.0, 1.0),
        ("beta2", hyper.beta2, 0.0, 1.0),
        ("eps", hyper.eps, 0.0, math.inf),
        ("weight_decay", hyper.weight_decay, 0.0, math.inf),
        ("scale", hyper.scale, 0.0, math.inf),
        ("norm_growth_limit", 1.0 if limit is None else limit, 1.0, math.inf),
        ("grad_factor", hyper.grad_factor, 0.0, math.inf),
        ("detail_scale", hyper.detail_scale, 0.0, math.inf),
    ):
        if isinstance(value, Tensor) and name in ("lr", "grad_factor"):
            continue
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"{name} must be a real number, got {value!r}")
        if not lowest <= value < highest:
            below = "finite" if highest == math.inf else f"below {highest:g}"
            raise ValueError(f"{name} must be at least {lowest:g} and {below}, got {value}")
