"""Prints the machine code's needs of kernels that take rows, and what they execute, for test_row_code.py."""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from typing import Any
from unittest.mock import patch

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from gwt_kernels.backends.bucket import Bucket, StepInputs
from gwt_kernels.backends.triton import launch
from gwt_kernels.backends.triton.runner import TritonRunner
from gwt_kernels.functional import Hyper
from tests.ptx.counts import LOOK_UPS, SECTOR, ExecutionCounter
from tests.ptx.driver import Driver, Options

FP32, BF16 = torch.float32, torch.bfloat16
# Kernel, rule, level, weights, moments, rounding, width.
VARIANTS = [
    ("row_step_kernel", "gwt", "row", BF16, FP32, "nearest", 4096),
    ("row_norm_kernel", "gwt", "row", BF16, FP32, "nearest", 4096),
    ("row_step_kernel", "foam", "row", BF16, FP32, "nearest", 4096),
    ("row_step_kernel", "foam", "row", FP32, FP32, "nearest", 4096),
    ("row_step_kernel", "foam", "row", BF16, BF16, "stochastic", 4096),
    ("row_step_kernel", "foam", "row", BF16, FP32, "nearest", 5461),
    ("shared_step_kernel", "adam_mini", 2, BF16, FP32, "nearest", 4096),
    ("shared_step_kernel", "adam_mini", 2, BF16, FP32, "nearest", 5461),
]


class Ahead:
    """What Triton asks of a driver before it compiles, answered for an H100 that is not there."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> str:
        return "ahead of time for sm_90"

    def get_current_stream(self, device: str) -> int:
        return 0


def runner_of(variant: Any, tensors: int, rows: int, device: str) -> tuple[TritonRunner, StepInputs]:
    """A bucket of a variant, and a step of it."""
    _, rule, level, weights, moments, rounding, width = variant
    blocks = 1 if level == "row" else -(-width // 2**level)
    shared = rule == "adam_mini"

    def made(columns: int, dtype: torch.dtype) -> list[torch.Tensor]:
        return [torch.zeros(rows, columns, dtype=dtype, device=device) for _ in range(tensors)]

    norms = [torch.ones((), device=device) for _ in range(tensors)] if rule == "gwt" else None
    bucket = Bucket(
        made(width, weights), made(blocks, moments), made(1 if shared else blocks, FP32 if shared else moments),
        level=level, grad_dtype=weights, rule=rule, rounding=rounding, limiter_norms=norms,
    )  # fmt: skip
    return TritonRunner(bucket), StepInputs(made(width, weights), [3] * tensors, [Hyper()] * tensors)


def compiled(variant: Any) -> dict[str, Any]:
    """Registers, stack and wide loads of a kernel that a launch would compile for an H100."""
    name = variant[0]
    calls: list[tuple[Any, Any]] = []

    class Recorder:
        def __init__(self, kernel: str) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: object) -> Any:
            return lambda *args, **kwargs: calls.append((args, kwargs)) if self.kernel == name else None

    kernel = getattr(launch, name)
    names = ("row_step_kernel", "row_norm_kernel", "shared_step_kernel", "limiter_kernel")
    with patch.multiple(launch, **{each: Recorder(each) for each in names}), torch.no_grad():
        runner, inputs = runner_of(variant, 1, 8, "meta")
        runner.apply(inputs)
    [(args, kwargs)] = calls
    with patch.object(driver, "_active", Ahead()):
        code = kernel.warmup(*args, grid=(1,), **kwargs).asm
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code["cubin"])
        file.flush()
        tool = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        said = subprocess.run(tool, capture_output=True, text=True, check=True).stdout
    registers, stack = map(int, re.findall(r"REG:(\d+) STACK:(\d+)", said)[0])
    return {
        "registers": registers,
        "stack": stack,
        "wide": bool(re.search(r"ld\.global[.\w:]*\.v4\.b32", code["ptx"])),
    }


def executed(variant: Any) -> dict[str, Any]:
    """Instructions an element, bytes of distinct sectors over those that must move, and programs a row."""
    name, _, _, weights, _, _, width = variant
    tensors, rows = 8, 4
    runner, inputs = runner_of(variant, tensors, rows, "cpu")
    bucket = runner.bucket
    arrays = {"p": bucket.params, "g": inputs.grads, "m": bucket.exp_avgs, "v": bucket.exp_avg_sqs}
    counter = ExecutionCounter(arrays, "g", LOOK_UPS)
    with Driver("sm_90", Options(races=False, counter=counter)), torch.no_grad():
        runner.apply(inputs)
    tally = counter.of(name)
    elements = tensors * rows * width
    moved = elements * weights.itemsize * (1 if name == "row_norm_kernel" else 3)
    moved += 2 * sum(x.numel() * x.element_size() for x in (*bucket.exp_avgs, *bucket.exp_avg_sqs))
    return {
        "instructions": int(tally.threads.sum()) / elements,
        "distinct": SECTOR * tally.sectors(distinct=True) / moved,
        "programs": tally.programs / (tensors * rows),
    }


if __name__ == "__main__":
    own = ({"kernel": v[0], "width": v[-1]} for v in VARIANTS)
    print(json.dumps([name | compiled(v) | executed(v) for name, v in zip(own, VARIANTS, strict=True)]))
