"""Targets of the benchmarks, computed from made-up medians."""

from __future__ import annotations

import pytest
import torch

from bench.kernels.cases import Case, bytes_moved, bytes_read_twice
from bench.kernels.targets import kernel_targets, targets


def found(**times: float) -> dict[str, float]:
    return {"copy_bandwidth_fraction": 0.9, "peak_extra_bytes": 2.0**20, **times}


def test_targets_on_cuda() -> None:
    half, single = "bfloat16", "float32"
    results = {
        ("GWTAdamW level 2", half): found(step_time=1.0, wall_time=1.0),
        ("GWTAdamW level 2, limiter", half): found(step_time=1.5, wall_time=1.5, peak_extra_bytes=2.0**21),
        ("GWTAdamW level 2, clips in the step", half): found(step_time=1.25),
        ("GWTAdamW level 2, limiter, skips bad batches", half): found(step_time=1.56),
        ("GWTAdamW level 2, telemetry", half): found(step_time=1.04),
        ("AdamW(fused=True)", half): found(step_time=1.7, wall_time=1.6),
        ("AdamW(fused=True)", single): found(step_time=2.9),
        ("bitsandbytes AdamW8bit", half): found(step_time=1.3),
        ("torchao AdamW8bit", half): found(step_time=2.0),
        ("torchao AdamW4bit", half): found(step_time=0.5),
        ("flashoptim FlashAdamW()", half): found(step_time=1.0),
        ("ptwt level 2, limiter", half): found(step_time=75.0),
    }
    assert [str(target) for target in targets("llama_7b", results, "cuda", 0.5)] == [
        "llama_7b: level 2, times as fast as fused AdamW in bfloat16: 1.70 (target: at least 1.7, met)",
        "llama_7b: level 2, times as fast as fused AdamW in float32: 2.90 (target: at least 3, NOT met)",
        "llama_7b: level 2, times as fast as bitsandbytes: 1.30 (target: at least 1.25, met)",
        "llama_7b: level 2, time with over without limiter: 1.50 (target: at most 1.4, NOT met)",
        "llama_7b: level 2, time with over without clipping: 1.25 (target: at most 1.35, met)",
        "llama_7b: level 2, limiter, time with over without skipping: 1.04 (target: at most 1.03, NOT met)",
        "llama_7b: level 2, time with over without telemetry: 1.04 (target: at most 1.05, met)",
        "llama_7b: times as fast as the ptwt step: 50.00 (target: at least 50, met)",
        "llama_7b: level 2, peak extra MiB: 1.00 (target: at most 1, met)",
        "llama_7b: level 2, limiter, peak extra MiB: 2.00 (target: at most 1, NOT met)",
        "llama_7b: level 2, fraction of the copy bandwidth: 0.90 (target: at least 0.9, met)",
        "llama_7b: level 2, times as fast as the fastest setting of torchao (torchao AdamW4bit, bfloat16): "
        "0.50 (target: at least 1, NOT met)",
        "llama_7b: level 2, times as fast as the fastest setting of flashoptim (flashoptim FlashAdamW(), "
        "bfloat16): 1.00 (target: at least 1, met)",
    ]
    easier = "llama_60m: level 2, wall time over one kernel's launch latency: 1.25 (target: at most 1.3, met)"
    never = "llama_60m: level 2, never slower than fused AdamW, times as fast: 1.60 (target: at least 1, met)"
    assert [str(target) for target in targets("llama_60m", results, "cuda", 0.8)][-2:] == [easier, never]
    harder = "llama_60m: level 2, times as fast as fused AdamW: 1.60 (target: at least 2, NOT met)"
    assert [str(target) for target in targets("llama_60m", results, "cuda", 0.1)][-2:] == [harder, never]
    del results["GWTAdamW level 2", half], results["GWTAdamW level 2, limiter", half]
    assert targets("llama_7b", results, "cuda", 0.5) == []


def step(shape: tuple[int, ...], **other: object) -> Case:
    return Case("step", shape, 2, torch.bfloat16, torch.float32)._replace(**other)


def test_bytes_read_twice_by_the_limiter() -> None:
    limited = step((8, 10), kernel="step_limiter")  # 80 gradients of 2 bytes, 24 blocks with two moments of 4
    assert bytes_read_twice(limited) == 80 * 2 + 24 * 8
    assert bytes_moved(limited) - bytes_moved(step((8, 10))) == bytes_read_twice(limited)
    assert bytes_read_twice(step((8, 10))) == 0


def test_targets_of_kernels() -> None:
    large, larger, row, small = step((4096, 4096)), step((8192, 8192)), step((2048, 5461)), step((512, 512))
    shares = {large: 0.95, larger: 0.9, row: 0.71, small: 0.1}
    seconds = {case: bytes_moved(case) / 1e12 / share for case, share in shares.items()}
    for case, ratio in ((large, 1.5), (larger, 1.3), (row, 9.0), (small, 1.14)):
        seconds[case._replace(kernel="step_limiter")] = ratio * seconds[case]
    int8 = step((4096, 8192), moments=torch.int8)  # none of the other targets is about int8
    seconds |= {int8: bytes_moved(int8) / 1e12 / 0.89, int8._replace(kernel="step_limiter"): 1.0}
    others = [step((8192, 4096), level=3), step((8192, 4096), data=torch.float32)]
    others.append(Case("haar_dwt", (8192, 4096), 2, torch.bfloat16, None))
    cache = 2 * 2**20  # twice the size of `small`
    found = kernel_targets(seconds | dict.fromkeys(others, 1.0), 1e12, cache)
    assert [str(target) for target in found] == [
        f"{larger}: 16M elements or more, share of the copy bandwidth: 0.90 (target: at least 0.92, NOT met)",
        f"{int8}: 16M elements or more, int8 moments, share of the copy bandwidth: 0.89 "
        "(target: at least 0.88, met)",
        f"{row}: row path, share of the copy bandwidth: 0.71 (target: at least 0.7, met)",
        f"{large}: 16M elements or more, time with over without limiter: 1.50 (target: at most 1.4, NOT met)",
        f"{small}: in half of the L2 cache, time with over without limiter: 1.14 (target: at most 1.15, met)",
    ]
    assert [target.bound for target in kernel_targets(seconds, 1e12, 2 * 2**20 - 1)] == [0.92, 0.88, 0.7, 1.4]
    assert kernel_targets({}, 1e12, 2**20) == []


def test_stages_of_muon_have_targets_of_their_own() -> None:
    shape = 4096, 4096
    first, last = step(shape, kernel="step_muon"), step(shape, kernel="step_orthogonal", moments=None)
    assert (bytes_moved(first), bytes_moved(last)) == (2**24 * (2 + 2 + 2), 2**24 * 6)
    seconds = {first: 2**24 * 6 / 0.91e12, last: 2**24 * 6 / 0.5e12, step((64, 64), kernel="step_muon"): 1.0}
    assert [str(target) for target in kernel_targets(seconds, 1e12, 0)] == [
        f"{first}: step_muon, 16M elements or more, share of the copy bandwidth: 0.91 (target: at least 0.9, met)",
        f"{last}: step_orthogonal, 16M elements or more, share of the copy bandwidth: 0.50 "
        "(target: at least 0.9, NOT met)",
    ]


def test_a_target_names_its_tensor() -> None:
    (target,) = kernel_targets({step((4096, 4096)): 1.0}, 1e12, 0)
    assert target.model == "step 4096x4096 level 2 bfloat16/float32"
    assert target.value == pytest.approx(bytes_moved(step((4096, 4096))) / 1e12)
