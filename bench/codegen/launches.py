"""The library's own launch of a kernel variant, on tensors of any shapes and on any device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bench.codegen.variant import Variant
from gwt_kernels.backends.bucket import Bucket, StepInputs
from gwt_kernels.backends.factored_bucket import FactoredBucket
from gwt_kernels.backends.triton import factored_launch, haar_launch, launch
from gwt_kernels.backends.triton.adafactor import TritonAdafactorRunner
from gwt_kernels.backends.triton.runner import TritonRunner
from gwt_kernels.core.hyper import Hyper
from gwt_kernels.core.level import ROW, Level, blocks_of
from gwt_kernels.formats.int8 import block_size
from gwt_kernels.rules import RULES, Rule, rule_of
from gwt_kernels.rules.adafactor import AdafactorNumbers

Arrays = dict[str, list[Tensor]]
"""Lists of tensors by their name in the kernel, with an entry for each tensor of the bucket."""

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
MOMENTS = {**DTYPES, "int8": torch.int8}
STEP, NORM, LIMITER, OBSERVE = "step_kernel", "norm_kernel", "limiter_kernel", "observe_kernel"
ROW_STEP, ROW_NORM, SHARED_STEP = "row_step_kernel", "row_norm_kernel", "shared_step_kernel"
PANEL, JOIN, MEAN, FACTOR = "panel_kernel", "join_kernel", "mean_kernel", "factor_kernel"
RATE, CLIP = "rate_kernel", "clip_kernel"
SUM, DWT, IDWT = "sum_kernel", "dwt_kernel", "idwt_kernel"
FACTORED, FACTORED_KERNELS = "adafactor", (PANEL, JOIN, MEAN, FACTOR, RATE, CLIP)
"""The rule whose second moment is factored, and the kernels that only it has."""
LAUNCHED_FROM = {
    **dict.fromkeys((STEP, NORM, ROW_STEP, ROW_NORM, SHARED_STEP, LIMITER, SUM, OBSERVE), launch),
    **dict.fromkeys(FACTORED_KERNELS, factored_launch),
    **dict.fromkeys((DWT, IDWT), haar_launch),
}
KERNELS = tuple(LAUNCHED_FROM)
STEPS, NORMS = (STEP, ROW_STEP, SHARED_STEP), (NORM, ROW_NORM)
"""Kernels that update weights, and those that compute norms for the limiter or for Adafactor's clip."""
OF_NUMBERS = (LIMITER, SUM, OBSERVE, JOIN, MEAN, FACTOR, RATE, CLIP)
"""Kernels that pass over one number per tile, row or tensor."""
MATRICES = torch.bfloat16
"""dtype of the matrices between the two stages of a rule with a matrix stage."""


def rule_names() -> list[str]:
    """Return the names of the registered rules and of the last stages that some have."""
    return [
        name
        for rule in RULES.values()
        for name in (rule.name, *([rule.last_stage.name] if rule.last_stage else []))
    ]


def kernel_of(rule: str, level: Level) -> str | None:
    """Return the kernel that takes a rule's step at a level; None if the rule has no step of its own there."""
    stated = rule_of(rule, level)
    names = rule_names()
    if level and any(rule_of(name, level).plain is stated for name in names):
        return None  # it is what other rules become at level 0
    if level == ROW:
        return None if stated.is_factored else ROW_STEP
    if not level and next(name for name in names if rule_of(name, level) is stated) != rule:
        return None
    return SHARED_STEP if stated.row_slots else STEP


def rule_of_variant(variant: Variant) -> Rule:
    """Return the rule whose statements a variant of a step or norm runs."""
    return rule_of(variant.rule or "gwt", 2 if variant.level is None else variant.level)


def data_of(variant: Variant) -> dict[str, torch.dtype]:
    """Return the dtypes of the tensors that a variant updates and of the gradients that it reads."""
    stated, data = rule_of_variant(variant), DTYPES[variant.weights or "bf16"]
    after_matrices = any(rule.last_stage is stated for rule in RULES.values())
    return {"p": data if stated.reads_weights else MATRICES, "g": MATRICES if after_matrices else data}


def arrays_of(variant: Variant, shapes: Sequence[tuple[int, int]], device: torch.device) -> Arrays:
    """Make the tensors that a variant's launch reads and writes in place: random, moments as in mid-training.

    Args:
        variant: The kernel, and its dtypes, level and rounding.
        shapes: Shapes of the weights, or of the tensors to transform.
        device: Device of the tensors; ``meta`` for tensors without memory.
    """
    generator = None if device.type == "meta" else torch.Generator(device).manual_seed(0)

    def normal(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        x = torch.empty(tuple(shape), dtype=dtype, device=device)
        return x if generator is None else x.normal_(generator=generator)

    def integers(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        x = torch.empty(tuple(shape), dtype=dtype, device=device)
        return x if generator is None else x.random_(generator=generator)

    if variant.kernel in (DWT, IDWT):
        data, level = DTYPES[variant.weights or "bf16"], _depth(variant)
        bands = [level, *range(level, 0, -1)] if variant.kernel == IDWT else [0]
        return {
            "x" if variant.kernel == DWT else "coefficients": [
                normal((rows, -(-width // 2**band)), data) for rows, width in shapes for band in bands
            ]
        }
    level = 2 if variant.level is None else variant.level
    stated = rule_of_variant(variant)
    arrays: Arrays = {name: [normal(shape, dtype) for shape in shapes] for name, dtype in data_of(variant).items()}
    bands = [(rows, blocks_of(level, width)) for rows, width in shapes]
    stored = MOMENTS[variant.moments or "fp32"]
    for name, slot in zip("mv", stated.slots, strict=False):
        own = [(rows, 1) for rows, _ in bands] if slot in stated.row_slots else bands
        dtype = torch.float32 if slot in stated.row_slots else stored
        if dtype == torch.int8:
            arrays[name] = [integers(shape, torch.int8 if name == "m" else torch.uint8) for shape in own]
            arrays[f"{name}_scale"] = [
                normal((-(-rows * n // block_size(_depth(variant))),), torch.float32).abs() for rows, n in own
            ]
        else:
            arrays[name] = [normal(shape, dtype) for shape in own]
            if name == "v":
                arrays[name] = [x.square() for x in arrays[name]]
    if stated.is_factored:
        arrays["rows"] = [normal((rows,), torch.float32).square() for rows, _ in bands]
        arrays["columns"] = [normal((n,), torch.float32).square() for _, n in bands]
    if variant.rounding == "split":
        arrays["low"] = [integers(shape, torch.int16) for shape in shapes]
    return arrays


def _depth(variant: Variant) -> int:
    """Return the number of levels; 0 for None and for rows, which ignore it."""
    return variant.level if isinstance(variant.level, int) else 0


def launch_variant(variant: Variant, arrays: Arrays, width: int) -> None:
    """Run the launch that reaches a variant's kernel.

    Args:
        variant: The kernel and its options.
        arrays: Tensors as made by :func:`arrays_of`.
        width: Row width of the tensor that a transform's coefficients belong to.
    """
    if variant.kernel == DWT:
        for x in arrays["x"]:
            haar_launch.haar_dwt(x, _depth(variant))
        return
    if variant.kernel == IDWT:
        n = 1 + _depth(variant)
        for i in range(0, len(arrays["coefficients"]), n):
            haar_launch.haar_idwt(arrays["coefficients"][i : i + n], width)
        return
    _launch_step(variant, arrays)


def _launch_step(variant: Variant, arrays: Arrays) -> None:
    p = arrays["p"]
    n, device = len(p), p[0].device
    scaled = [arrays[name] for name in ("m_scale", "v_scale") if name in arrays]
    stated = rule_of_variant(variant)
    limited = variant.limited or variant.kernel in (*NORMS, LIMITER)
    options: dict[str, Any] = {
        "level": 2 if variant.level is None else variant.level,
        "grad_dtype": arrays["g"][0].dtype,
        "limiter_norms": [torch.ones((), device=device) for _ in p] if limited and stated.direction else None,
        "rule": variant.rule or "gwt",
        "rounding": variant.rounding or "nearest",
        "keys": list(range(n)),
        "lows": arrays.get("low"),
        "scales": list(zip(*scaled, strict=True)) if scaled else None,
    }
    if variant.kernel == OBSERVE:
        options["telemetry"] = torch.zeros(n, 6, dtype=torch.float64, device=device)
    inputs = StepInputs(arrays["g"], [10] * n, [Hyper()] * n)
    with torch.no_grad():
        if stated.is_factored:
            factors = list(zip(arrays["rows"], arrays["columns"], strict=True))
            wholes = [((len(rows), len(columns)), x.numel()) for (rows, columns), x in zip(factors, p, strict=True)]
            bucket = FactoredBucket(p, arrays["m"], None, factors=factors, wholes=wholes, **options)
            inputs = inputs._replace(hypers=[Hyper(rule_options=AdafactorNumbers())] * n)
            if variant.kernel == RATE:
                inputs = inputs._replace(steps=torch.full((n,), 9.0, dtype=torch.float64, device=device))
            TritonAdafactorRunner(bucket).apply(inputs)
            return
        runner = TritonRunner(Bucket(p, arrays.get("m"), arrays.get("v"), **options))
        if variant.kernel == SUM:
            runner.reduce(inputs, update_sums=True)
        else:
            runner.apply(inputs)
