"""The library's own launch of a kernel variant, on tensors of any shapes and of any device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bench.codegen.variant import Variant
from gwt_kernels.backends.bucket import Bucket, StepInputs
from gwt_kernels.backends.triton import haar_launch, launch
from gwt_kernels.backends.triton.runner import TritonRunner
from gwt_kernels.core.hyper import Hyper
from gwt_kernels.formats.int8 import block_size

Arrays = dict[str, list[Tensor]]
"""Tensors by the name that a kernel has for them, one for each tensor of the bucket."""

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
MOMENTS = {**DTYPES, "int8": torch.int8}
STEP, NORM, LIMITER, OBSERVE = "step_kernel", "norm_kernel", "limiter_kernel", "observe_kernel"
SUM, DWT, IDWT = "sum_kernel", "dwt_kernel", "idwt_kernel"
LAUNCHED_FROM = dict.fromkeys((STEP, NORM, LIMITER, SUM, OBSERVE), launch) | {DWT: haar_launch, IDWT: haar_launch}
KERNELS = tuple(LAUNCHED_FROM)


def arrays_of(variant: Variant, shapes: Sequence[tuple[int, int]], device: torch.device) -> Arrays:
    """Make what the launch of a variant reads and writes in place: random, and moments as in mid-training.

    Args:
        variant: Which kernel, and its dtypes, level and rounding.
        shapes: Of the weights, or of what is transformed.
        device: Where tensors are made; ``meta`` for none that have memory.
    """
    generator = None if device.type == "meta" else torch.Generator(device).manual_seed(0)

    def normal(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        x = torch.empty(tuple(shape), dtype=dtype, device=device)
        return x if generator is None else x.normal_(generator=generator)

    def integers(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        x = torch.empty(tuple(shape), dtype=dtype, device=device)
        return x if generator is None else x.random_(generator=generator)

    data = DTYPES[variant.weights or "bf16"]
    if variant.kernel in (DWT, IDWT):
        level = variant.level or 0
        bands = [level, *range(level, 0, -1)] if variant.kernel == IDWT else [0]
        return {
            "x" if variant.kernel == DWT else "coefficients": [
                normal((rows, -(-width // 2**band)), data) for rows, width in shapes for band in bands
            ]
        }
    level = 2 if variant.level is None else variant.level
    moments = MOMENTS[variant.moments or "fp32"]
    coded = moments == torch.int8
    arrays: Arrays = {
        "p": [normal(shape, data) for shape in shapes],
        "g": [normal(shape, data) for shape in shapes],
    }
    bands = [(rows, -(-width // 2**level)) for rows, width in shapes]
    if coded:
        arrays["m"] = [integers(shape, torch.int8) for shape in bands]
        arrays["v"] = [integers(shape, torch.uint8) for shape in bands]
        for name in ("m_scale", "v_scale"):
            arrays[name] = [normal((-(-rows * n // block_size(level)),), torch.float32).abs() for rows, n in bands]
    else:
        arrays["m"] = [normal(shape, moments) for shape in bands]
        arrays["v"] = [normal(shape, moments).square() for shape in bands]
    if variant.rounding == "split":
        arrays["low"] = [integers(shape, torch.int16) for shape in shapes]
    return arrays


def launch_variant(variant: Variant, arrays: Arrays, width: int) -> None:
    """Run the launch that reaches a variant's kernel.

    Args:
        variant: Which kernel, and its options.
        arrays: As :func:`arrays_of` makes them.
        width: Of what a transform's coefficients are of.
    """
    if variant.kernel == DWT:
        for x in arrays["x"]:
            haar_launch.haar_dwt(x, variant.level or 0)
        return
    if variant.kernel == IDWT:
        n = 1 + (variant.level or 0)
        for i in range(0, len(arrays["coefficients"]), n):
            haar_launch.haar_idwt(arrays["coefficients"][i : i + n], width)
        return
    _launch_step(variant, arrays)


def _launch_step(variant: Variant, arrays: Arrays) -> None:
    level = 2 if variant.level is None else variant.level
    p = arrays["p"]
    n, device = len(p), p[0].device
    scales: list[Any] = [None] * n
    if "m_scale" in arrays:
        scales = list(zip(arrays["m_scale"], arrays["v_scale"], strict=True))
    rounding: Any = variant.rounding or "nearest"
    rule: Any = variant.rule or "gwt"
    limited = variant.limited or variant.kernel in (NORM, LIMITER)
    observed = variant.kernel == OBSERVE
    bucket = Bucket(
        p,
        arrays["m"],
        arrays["v"],
        level=level,
        grad_dtype=arrays["g"][0].dtype,
        limiter_norms=[torch.ones((), device=device) for _ in p] if limited else None,
        rule=rule,
        rounding=rounding,
        keys=list(range(n)),
        lows=arrays.get("low"),
        scales=scales,
        telemetry=torch.zeros(n, 6, dtype=torch.float64, device=device) if observed else None,
    )
    inputs = StepInputs(arrays["g"], [10] * n, [Hyper()] * n)
    runner = TritonRunner(bucket)
    with torch.no_grad():
        if variant.kernel == SUM:
            runner.reduce(inputs, update_sums=True)
        else:
            runner.apply(inputs)
