"""What kernels trust of a bucket's tensors, checked before they get the addresses."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gwt_kernels.core.hyper import quantum

__all__ = ["check_bucket", "check_low_bits", "check_scales"]


def check_bucket(arrays: Sequence[Sequence[Tensor]], level: int) -> None:
    """Raise unless the kernels may trust the tensors: one device, one dtype an array, the shapes of a step."""
    params, grads, exp_avgs, exp_avg_sqs, *norms = arrays
    for name, tensors in zip(("params", "grads", "exp_avgs", "exp_avg_sqs", "limiter_norms"), arrays, strict=False):
        kinds = {(x.dtype, x.device) for x in tensors}
        if len(kinds) > 1 or tensors[0].device != params[0].device:
            raise ValueError(
                f"{name} are of {sorted(map(str, kinds))}, params on {params[0].device}: a bucket has one device, "
                f"and one dtype each of parameters, gradients and moments"
            )
    second = torch.uint8 if exp_avgs[0].dtype == torch.int8 else exp_avgs[0].dtype
    if exp_avg_sqs[0].dtype != second or (norms and norms[0][0].dtype != torch.float32):
        raise ValueError(
            "exp_avgs and exp_avg_sqs must have one dtype, or int8 and uint8, and limiter_norms must be float32"
        )
    for p, g, m, v in zip(params, grads, exp_avgs, exp_avg_sqs, strict=True):
        expected = (*p.shape[:-1], -(-p.shape[-1] // 2**level)) if p.dim() else ()
        if g.shape != p.shape or m.shape != expected or v.shape != expected:
            raise ValueError(
                f"a parameter of shape {tuple(p.shape)} at level {level} needs a gradient of its shape and moments "
                f"of shape {expected}, got {tuple(g.shape)}, {tuple(m.shape)} and {tuple(v.shape)}"
            )
        if not (m.is_contiguous() and v.is_contiguous()):
            raise ValueError(f"the moments of a parameter of shape {tuple(p.shape)} must be contiguous")


def check_scales(exp_avgs: Sequence[Tensor], scales: Sequence[Sequence[Tensor]], level: int) -> None:
    """Raise unless each tensor of codes has scales for all of its quanta beside it."""
    for m, *both in zip(exp_avgs, *scales, strict=True):
        expected = (-(-m.numel() // quantum(level)),)
        for x in both:
            if (x.dtype, tuple(x.shape), x.device, x.is_contiguous()) != (torch.float32, expected, m.device, True):
                raise ValueError(
                    f"int8 moments of shape {tuple(m.shape)} at level {level} need contiguous float32 scales of "
                    f"shape {expected} on {m.device}, got {x.dtype} of shape {tuple(x.shape)} on {x.device}"
                )


def check_low_bits(params: Sequence[Tensor], lows: Sequence[Tensor]) -> None:
    """Raise unless each weight in bfloat16 has a low half beside it."""
    for p, low in zip(params, lows, strict=True):
        if (p.dtype, low.dtype, low.shape, low.device) != (torch.bfloat16, torch.int16, p.shape, p.device):
            raise ValueError(
                f"rounding='split' needs bfloat16 parameters, and an int16 low half of each one's shape beside it, "
                f"got {p.dtype} and {low.dtype}, shapes {tuple(p.shape)} and {tuple(low.shape)}, on {low.device}"
            )
        if not low.is_contiguous():
            raise ValueError(f"the low half of a parameter of shape {tuple(p.shape)} must be contiguous")
