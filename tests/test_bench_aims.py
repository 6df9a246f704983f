"""The aims of the optimizer benchmark, from made-up medians."""

from __future__ import annotations

from bench.aims import aims


def found(**times: float) -> dict[str, float]:
    return {"copy_bandwidth_fraction": 0.9, "peak_extra_bytes": 2.0**20, **times}


def test_the_aims_of_cuda() -> None:
    half, single = "bfloat16", "float32"
    results = {
        ("GWTAdamW level 2", half): found(step_time=1.0, wall_time=1.0),
        ("GWTAdamW level 2, limiter", half): found(step_time=1.5, wall_time=1.5, peak_extra_bytes=2.0**21),
        ("AdamW(fused=True)", half): found(step_time=1.7, wall_time=1.6),
        ("AdamW(fused=True)", single): found(step_time=2.9),
        ("bitsandbytes AdamW8bit", half): found(step_time=1.3),
        ("torchao AdamW8bit", half): found(step_time=2.0),
        ("torchao AdamW4bit", half): found(step_time=0.5),
        ("flashoptim FlashAdamW()", half): found(step_time=1.0),
        ("ptwt level 2, limiter", half): found(step_time=75.0),
    }
    assert [str(aim) for aim in aims("llama_7b", results, "cuda", 0.5)] == [
        "llama_7b: level 2, times as fast as fused AdamW in bfloat16: 1.70 (aim: at least 1.7, met)",
        "llama_7b: level 2, times as fast as fused AdamW in float32: 2.90 (aim: at least 3, NOT met)",
        "llama_7b: level 2, times as fast as bitsandbytes: 1.30 (aim: at least 1.25, met)",
        "llama_7b: level 2, time with over without limiter: 1.50 (aim: at most 1.4, NOT met)",
        "llama_7b: times as fast as the ptwt step: 50.00 (aim: at least 50, met)",
        "llama_7b: level 2, peak extra MiB: 1.00 (aim: at most 1, met)",
        "llama_7b: level 2, limiter, peak extra MiB: 2.00 (aim: at most 1, NOT met)",
        "llama_7b: level 2, fraction of the copy bandwidth: 0.90 (aim: at least 0.9, met)",
        "llama_7b: level 2, times as fast as the fastest setting of torchao (torchao AdamW4bit, bfloat16): "
        "0.50 (aim: at least 1, NOT met)",
        "llama_7b: level 2, times as fast as the fastest setting of flashoptim (flashoptim FlashAdamW(), "
        "bfloat16): 1.00 (aim: at least 1, met)",
    ]
    easier = "llama_60m: level 2, wall time over one kernel's launch latency: 1.25 (aim: at most 1.3, met)"
    never = "llama_60m: level 2, never slower than fused AdamW, times as fast: 1.60 (aim: at least 1, met)"
    assert [str(aim) for aim in aims("llama_60m", results, "cuda", 0.8)][-2:] == [easier, never]
    harder = "llama_60m: level 2, times as fast as fused AdamW: 1.60 (aim: at least 2, NOT met)"
    assert [str(aim) for aim in aims("llama_60m", results, "cuda", 0.1)][-2:] == [harder, never]
    del results["GWTAdamW level 2", half], results["GWTAdamW level 2, limiter", half]
    assert aims("llama_7b", results, "cuda", 0.5) == []
