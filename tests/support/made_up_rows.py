"""Made-up rows in the form of benchmark results, for tests of the report."""

from __future__ import annotations

from typing import Any

Row = dict[str, Any]

CPU = {
    "commit": "0123456789abcdef",
    "date": "2026-01-02T03:04:05+00:00",
    "command": "python -m bench.made_up",
    "device": "Abacus 3000",
    "driver": "none",
    "threads": 2,
    "python": "3.11.7",
    "torch": "2.13.0+cpu",
    "triton": "3.7.1",
}
GPU = CPU | {
    "own_backend": "triton",
    "device": "NVIDIA H100 80GB HBM3",
    "driver": "570.1",
    "date": "2026-02-03T04:05:06+00:00",
}


def measured(metric: str, unit: str, median: float | None, samples: int = 1, note: str = "") -> Row:
    low, high = (None, None) if median is None else (0.9 * median, 1.1 * median)
    return {
        "metric": metric,
        "unit": unit,
        "median": median,
        "p20": low,
        "p80": high,
        "samples": samples,
        "note": note,
    }


def optimizer_rows(about: Row, models: tuple[str, ...] = ("llama_60m", "llama_1b", "llama_7b")) -> list[Row]:
    """Return rows of a run of many peers, with and without clipping, one of them not installed."""
    found: list[Row] = []
    optimizers = [(f"GWTAdamW level {level}", "bfloat16", 2.0 + 16 / 2**level) for level in range(4)]
    optimizers += [(f"GWTAdamW level {level}, limiter", "bfloat16", 2.5 + 16 / 2**level) for level in range(1, 4)]
    optimizers += [("AdamW(fused=True)", "bfloat16", 7.0), ("AdamW(fused=True)", "float32", 14.0)]
    optimizers += [(name, "bfloat16", 9.0) for name in ("bitsandbytes 8-bit", "torchao 4-bit", "optimi", "GaLore")]
    optimizers += [("ptwt level 2, limiter", "bfloat16", 300.0)]
    passed = "in_place_bandwidth" if about["driver"] == "none" else "copy_bandwidth"
    for i, model in enumerate(models):
        for name, weights, cost in optimizers:
            for clipped in (False, True):
                what = {"model": model, "optimizer": name, "weights": weights, "level": 2, "limiter": True}
                what |= {"clipped": clipped, "parameters": 1000 * 10**i}
                step = cost * 10.0**i / 1e3 * (1.2 if clipped else 1.0)
                values = [
                    measured("step_time", "s", step, 50),
                    measured("wall_time", "s", 1.1 * step, 50),
                    measured("host_time", "s", 1e-4, 50),
                    measured("roofline_time", "s", 0.8 * step),
                    measured(f"{passed}_fraction", "1", 0.8, 50),
                    measured("kernel_launches", "1", 3.0),
                    measured("state_bytes", "B", cost * 1000 * 10**i),
                    measured("peak_extra_bytes", "B", 2.0**19),
                ]
                found += [what | value | about for value in values]
        missing = {"model": model, "optimizer": "APOLLO", "weights": "bfloat16", "level": None, "limiter": False}
        found.append(missing | measured("step_time", "s", None, 0, "apollo_torch is not installed") | about)
    target = {"model": models[-1], "optimizer": None, "weights": None}
    found.append(target | measured("ratio", "1", 1.75, note="llama_7b: 1.75 (target: at least 1.7, met)") | about)
    return [*found, target | measured(passed, "B/s", 3.0e12, 20) | about]


def kernel_rows(about: Row) -> list[Row]:
    found = []
    for kernel in ("step", "step_limiter", "haar_dwt", "haar_idwt"):
        for shape in ("512x512", "2048x2048", "2048x5461", "8192x28672", "64x1408x2048"):
            for level in range(7):
                for weights in ("bfloat16", "float32"):
                    moments = "float32" if kernel.startswith("step") else None
                    width = "odd" if shape == "2048x5461" and level else "flat"
                    what = {"kernel": kernel, "shape": shape, "level": level, "width": width, "source": "llama"}
                    what |= {"weights": weights, "moments": moments}
                    share = 0.95 - 0.05 * level - (0.2 if width == "odd" else 0) - 10 / len(shape) ** 2
                    found.append(what | measured("time", "s", 1e-4 * (level + 1), 40) | about)
                    found.append(what | measured("copy_bandwidth_fraction", "1", share, 40) | about)
    refused = {"kernel": "step", "shape": "65536x32768", "level": 2, "weights": "bfloat16", "moments": "float32"}
    return [*found, refused | measured("time", "s", None, 0, "does not fit: needs 20 GiB") | about]


ENDS = {"adamw": 1.50, "gwt1": 1.48, "gwt2": 1.46, "gwt3": 1.53, "galore": 1.6}


def quality_rows(about: Row, ends: dict[str, float] = ENDS) -> list[Row]:
    found = []
    for optimizer, end in ends.items():
        for seed in range(3):
            what = {"preset": "cpu", "model": "llama_cpu", "optimizer": optimizer, "steps": 400, "seed": seed}
            what |= {"lr": 0.03, "scale": 0.1, "parameters": 860_000}
            for step in range(40, 401, 40):
                loss = end + 0.01 * seed + 40 / step
                progress = {"step": step, "tokens": 1024 * step, "seconds": 0.1 * step}
                found.append(what | progress | measured("heldout_loss", "nats", loss) | about)
            found.append(
                what | measured("state_bytes", "B", 5_000_000 if optimizer == "adamw" else 1_500_000) | about
            )
            found.append(what | measured("optimizer_step", "ms", 3.3, 400) | about)
        failed = what | {"optimizer": "apollo", "step": None, "tokens": None, "seconds": None}
        found.append(failed | measured("final_loss", "nats", None, 0, "package missing: apollo_torch") | about)
    return found


def sweep_rows(about: Row) -> list[Row]:
    found = []
    for optimizer in ("adamw", "gwt1", "gwt2", "gwt3", "galore"):
        for lr in (0.01, 0.03, 0.1):
            for scale in (0.05, 0.1, 0.25):
                for seed in range(3) if (lr, scale) == (0.03, 0.1) else (0,):
                    loss = 1.5 + (lr - 0.03) ** 2 * 200 + (scale - 0.1) ** 2 * 10 + 0.01 * seed
                    what = {"model": "llama_cpu", "optimizer": optimizer, "lr": lr, "scale": scale, "seed": seed}
                    what |= {"steps": 400, "warmup": 0.3, "grad_clip": 0.0}
                    found.append(what | {"heldout_loss": None if lr * scale > 0.02 else loss} | about)
    return found


def host_rows(about: Row) -> list[Row]:
    names = ("GWTAdamW, no limiter, same gradients", "GWTAdamW, limiter, re-allocated")
    times = [measured("host_time", "s", 2.5e-4, 200), measured("host_time_least", "s", 2.25e-4, 200)]
    return [{"scenario": s, "tensors": 300} | each | about for s in names for each in times]


def gpu_rows(about: Row) -> list[Row]:
    parts = [("correctness", True, ""), ("kernels", False, "stopped after 120 s")]
    return [{"part": p, "finished": f} | measured("time", "s", 90.0, note=n) | about for p, f, n in parts]


def codegen_rows(about: Row) -> list[Row]:
    wide = {
        "loads": {"g|p": {"128": 9}, "p": {"128": 2}, "layout": {"64": 3}},
        "stores": {"p": {"64": 1, "128": 2}},
    }
    what = {"kernel": "step_kernel", "weights": "bf16", "moments": "fp32", "path": "flat", "limited": False, **wide}
    what |= {"tensor_loads": {"p": 1}, "tensor_stores": {"p": 1}, "registers": 77, "spills": 0, "stack": 0}
    what |= {"instructions": 500}
    storings = [{}, {"rule": "gwt", "rounding": "nearest"}, {"rule": "foam", "rounding": "split"}]
    return [
        what | {"target": target, "level": level, "resident_warps": 24} | storing | about
        for target in ("sm_90", "gfx942")
        for level, storing in zip((0, 2, 2), storings, strict=True)
    ]


def executed_rows(about: Row) -> list[Row]:
    classes = ("memory", "integer", "float", "conversion", "special", "shuffle", "other")
    what = {"target": "sm_90", "kernel": "step_kernel", "weights": "bf16", "moments": "fp32", "limited": False}
    what |= {
        "level": 2,
        "instructions": dict.fromkeys(classes, 4.0),
        "executed": 28.0,
        "slots": 28.5,
        "bytes": 10.0,
    }
    what |= {"sectors": {"look-ups load": 1.25, "g load": 2.0}, "distinct": 1.0, "dependent_loads": 7}
    flat = {"path": "flat", "width": 4096, "requested": 1.0, "rule": "gwt", "rounding": "nearest"}
    row = {"path": "row", "width": 5461, "requested": 1.241, "rule": "foam", "rounding": "stochastic"}
    return [
        what | own | {"issue_share": issue, "bandwidth_share": bandwidth, "machine_demand": machine} | about
        for own, issue, bandwidth, machine in (
            (flat, 0.3, 1.0, 0.35), (row, 0.8, 1.0, 1.25), (row | {"width": 1000}, 1.0, 0.58, 1.98)
        )
    ]  # fmt: skip


MAKERS = {
    "optimizers": optimizer_rows,
    "kernels": kernel_rows,
    "quality": quality_rows,
    "sweep": sweep_rows,
    "host": host_rows,
    "codegen": codegen_rows,
    "executed": executed_rows,
    "gpu": gpu_rows,
}
