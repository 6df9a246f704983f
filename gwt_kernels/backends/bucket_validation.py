"""Check a bucket's tensors before kernels get their addresses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from gwt_kernels.backends.torch.literal import approximation_width
from gwt_kernels.core.level import Level
from gwt_kernels.formats.moments import stored_as


def check_bucket(
    arrays: Mapping[str, Sequence[Tensor]], level: Level, of_rows: bool = False, wavelet: str = "haar"
) -> None:
    """Raise a ValueError unless the tensors have one device, one dtype per array, and the shapes of a step.

    Args:
        arrays: ``params``, ``grads``, ``exp_avgs`` and, where there are any, ``exp_avg_sqs`` and ``limiter_norms``.
        level: Levels of the transform.
        of_rows: Whether second moments are one number per row, in float32.
        wavelet: Name of the wavelet.
    """
    params = arrays["params"]
    for name, tensors in arrays.items():
        kinds = {(x.dtype, x.device) for x in tensors}
        if len(kinds) > 1 or tensors[0].device != params[0].device:
            raise ValueError(
                f"{name} are of {sorted(map(str, kinds))}, params on {params[0].device}: a bucket has one device, "
                f"and one dtype each of parameters, gradients and moments"
            )
    moments = [arrays[name] for name in ("exp_avgs", "exp_avg_sqs") if name in arrays]
    found = tuple(tensors[0].dtype for tensors in moments)
    expected = stored_as(found[0]).dtypes[: len(moments)] if moments else ()
    if of_rows:
        expected = expected[0], torch.float32
    norms = arrays.get("limiter_norms")
    if found != expected or (norms and norms[0].dtype != torch.float32):
        raise ValueError(
            f"exp_avgs and exp_avg_sqs must have one dtype, or be {' and '.join(map(str, expected))}, and "
            f"limiter_norms must be float32, got {' and '.join(map(str, found))}"
        )
    for p, g, *kept in zip(params, arrays["grads"], *moments, strict=True):
        shape = (*p.shape[:-1], approximation_width(p.shape[-1], level, wavelet)) if p.dim() else ()
        shapes = [shape, (*p.shape[:-1], 1) if of_rows and p.dim() else shape][: len(kept)]
        if g.shape != p.shape or [tuple(x.shape) for x in kept] != shapes:
            raise ValueError(
                f"a parameter of shape {tuple(p.shape)} at level {level} needs a gradient of its shape and moments "
                f"of shape {' and '.join(sorted({*map(str, shapes)}))}, got {tuple(g.shape)}, "
                f"{' and '.join(str(tuple(x.shape)) for x in kept)}"
            )
        if not all(x.is_contiguous() for x in kept):
            raise ValueError(f"the moments of a parameter of shape {tuple(p.shape)} must be contiguous")


def check_scales(exp_avgs: Sequence[Tensor], scales: Sequence[Sequence[Tensor]], level: Level) -> None:
    """Raise a ValueError unless every quantized moment has a scale for each of its quantization blocks."""
    for m, pair in zip(exp_avgs, scales, strict=True):
        shape = (stored_as(m.dtype).n_scales(m.shape, level),)
        for x in pair:
            if (x.dtype, tuple(x.shape), x.device, x.is_contiguous()) != (torch.float32, shape, m.device, True):
                raise ValueError(
                    f"{str(m.dtype).removeprefix('torch.')} moments of shape {tuple(m.shape)} at level {level} "
                    f"need contiguous float32 scales of shape {shape} on {m.device}, got {x.dtype} of shape "
                    f"{tuple(x.shape)} on {x.device}"
                )


def check_low_bits(params: Sequence[Tensor], lows: Sequence[Tensor]) -> None:
    """Raise a ValueError unless weights are bfloat16 and have int16 low bits of their shapes."""
    for p, low in zip(params, lows, strict=True):
        if (p.dtype, low.dtype, low.shape, low.device) != (torch.bfloat16, torch.int16, p.shape, p.device):
            raise ValueError(
                f"rounding='split' needs bfloat16 parameters, and an int16 low half of each one's shape beside it, "
                f"got {p.dtype} and {low.dtype}, shapes {tuple(p.shape)} and {tuple(low.shape)}, on {low.device}"
            )
        if not low.is_contiguous():
            raise ValueError(f"the low half of a parameter of shape {tuple(p.shape)} must be contiguous")
