"""Count what a step with random bits executes on shards of columns; test_executed.py runs it in a process."""

from __future__ import annotations

import json

import torch

from bench.codegen.launches import arrays_of
from bench.codegen.variant import Variant
from gwt_kernels.backends.bucket import Bucket, StepInputs
from gwt_kernels.backends.triton.runner import TritonRunner
from gwt_kernels.core.hyper import Hyper, Span
from tests.ptx.counts import ExecutionCounter
from tests.ptx.driver import Driver, Options

SHAPES = [(4, 4096)] * 8
VARIANT = Variant("sm_90", "step_kernel", "bf16", "bf16", 2, "flat", False, "foam", "stochastic")


def count(spans: tuple[Span, Span] | None) -> float:
    """Return executed instructions per element of shards with these spans, or of whole tensors."""
    arrays = arrays_of(VARIANT, SHAPES, torch.device("cpu"))
    counter = ExecutionCounter(arrays, "g")
    n = len(SHAPES)
    own = {"level": 2, "grad_dtype": torch.bfloat16, "rule": "foam", "rounding": "stochastic"}
    with Driver(VARIANT.target, Options(races=False, counter=counter)), torch.no_grad():
        bucket = Bucket(
            *(arrays[name] for name in "pmv"),
            keys=list(range(n)),
            spans=None if spans is None else [spans] * n,
            **own,
        )
        TritonRunner(bucket).apply(StepInputs(arrays["g"], [10] * n, [Hyper()] * n))
    return float(counter.of(VARIANT.kernel).threads.sum() / sum(rows * width for rows, width in SHAPES))


if __name__ == "__main__":
    half = Span(4096, 4096, 8192), Span(1024, 1024, 2048)
    print(json.dumps([count(None), count(half)]))
