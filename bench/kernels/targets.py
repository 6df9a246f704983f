"""Target ratios of the project, computed from the measurements of one run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import torch

from bench.kernels.cases import Case, bytes_moved, bytes_read_twice

Key = tuple[str, str]
"""Name of an optimizer, and dtype of its weights."""

Found = Mapping[str, float]
"""Medians by metric."""

FREE, LIMITED = "GWTAdamW level 2", "GWTAdamW level 2, limiter"
CLIPS, SKIPS = f"{FREE}, clips in the step", f"{LIMITED}, skips bad batches"
TELEMETRY = f"{FREE}, telemetry"
FREE_HALF = "GWTAdamW level 2, bfloat16 moments"  # AdamW's moments are bfloat16 as well


# On a CPU: label, optimizer, dtype of weights, and the largest ratio to the time of the fused AdamW.
_BESIDE_FUSED = [
    ("level 2", FREE, "float32", 0.7),
    ("level 2, limiter", LIMITED, "float32", 1.05),
    ("level 2, folded rule", f"{FREE}, foam", "float32", 0.85),
    ("level 0", "GWTAdamW level 0", "float32", 0.9),
    ("level 2, bfloat16", FREE, "bfloat16", 0.8),
    ("level 2, bfloat16 moments", FREE_HALF, "float32", 1.5),
    ("level 2, int8 moments", f"{FREE}, int8 moments", "float32", 1.5),
    ("level 2, bfloat16, stochastic", f"{FREE}, stochastic rounding", "bfloat16", 1.5),
    ("level 2, bfloat16, split", f"{FREE}, split rounding", "bfloat16", 1.5),
    ("level 2, bfloat16, stochastic, bfloat16 moments", f"{FREE_HALF}, stochastic rounding", "bfloat16", 1.5),
    ("level 2, bfloat16, stochastic, int8 moments", f"{FREE}, int8 moments, stochastic rounding", "bfloat16", 1.5),
    ("level 2, float16, stochastic", f"{FREE}, stochastic rounding", "float16", 1.5),
]


class Target(NamedTuple):
    """A measured value and its bound."""

    model: str
    """Name of a model, or of a kernel's case."""
    label: str
    value: float
    bound: float
    at_least: bool
    unit: str = "1"

    def __str__(self) -> str:
        met = self.value >= self.bound if self.at_least else self.value <= self.bound
        bound = f"{'at least' if self.at_least else 'at most'} {self.bound:g}, {'met' if met else 'NOT met'}"
        return f"{self.model}: {self.label}: {self.value:.2f} (target: {bound})"


class _Promise(NamedTuple):
    """A bound on the ratio of two optimizers' step times, for the named models or for all."""

    label: str
    over: Key
    under: Key
    bound: float
    at_least: bool
    models: tuple[str, ...] = ()


def _half(name: str) -> Key:
    return name, "bfloat16"


def _single(name: str) -> Key:
    return name, "float32"


_PROMISES = {
    "cpu": [
        _Promise("times as fast as the ptwt step", _single("ptwt level 2, limiter"), _single(LIMITED), 10.0, True),
        _Promise(
            *("times as long as AdamW(foreach=False)", _single(LIMITED), _single("AdamW(foreach=False)")),
            *(1.2, False),
        ),
        *(
            _Promise(
                f"{label}, times as long as AdamW(fused=True) on the same weights",
                (own, weights),
                ("AdamW(fused=True)", weights),
                bound,
                at_least=False,
            )
            for label, own, weights, bound in _BESIDE_FUSED
        ),
    ],
    "cuda": [
        _Promise(
            *("level 2, times as fast as fused AdamW in bfloat16", _half("AdamW(fused=True)"), _half(FREE)),
            *(1.7, True, ("llama_7b",)),
        ),
        _Promise(
            *("level 2, bfloat16 moments, times as fast as fused AdamW in bfloat16", _half("AdamW(fused=True)")),
            *(_half(FREE_HALF), 1.7, True, ("llama_7b",)),
        ),
        _Promise(
            *("level 2, times as fast as fused AdamW in float32", _single("AdamW(fused=True)"), _half(FREE)),
            *(3.0, True, ("llama_7b",)),
        ),
        _Promise(
            *("level 2, times as fast as bitsandbytes", _half("bitsandbytes AdamW8bit"), _half(FREE)),
            *(1.25, True, ("llama_7b",)),
        ),
        _Promise(
            *("level 2, time with over without limiter", _half(LIMITED), _half(FREE)),
            *(1.4, False, ("llama_1b", "llama_7b")),
        ),
        _Promise(
            *("level 2, time with over without clipping", _half(CLIPS), _half(FREE)),
            *(1.35, False, ("llama_1b", "llama_7b")),
        ),
        # Expected to cost nothing, except at level 0 (a tenth of the 1B model), which has no limiter pass to use.
        _Promise(
            *("level 2, limiter, time with over without skipping", _half(SKIPS), _half(LIMITED)),
            *(1.03, False, ("llama_1b", "llama_7b")),
        ),
        _Promise(
            *("level 2, time with over without telemetry", _half(TELEMETRY), _half(FREE)),
            *(1.05, False, ("llama_1b", "llama_7b")),
        ),
        _Promise("times as fast as the ptwt step", _half("ptwt level 2, limiter"), _half(LIMITED), 50.0, True),
    ],
}


def compared(device_type: str) -> set[Key]:
    """Return the optimizers whose step times the targets compare."""
    return {key for promise in _PROMISES[device_type] for key in (promise.over, promise.under)}


def targets(model: str, found: Mapping[Key, Found], device_type: str, launch_latency: float | None) -> list[Target]:
    """Return the targets of a model, computed from measurements without clipping.

    Args:
        model: Name of the model, such as `llama_7b`.
        found: Metrics by optimizer; optimizers without a time are missing.
        device_type: "cpu" or "cuda".
        launch_latency: Wall time of one small kernel in seconds; None on a CPU.
    """
    return [
        *_ratios(model, found, _PROMISES[device_type]),
        *(_of_cuda(model, found, launch_latency) if device_type == "cuda" else ()),
    ]


def kernel_targets(seconds: Mapping[Case, float], bandwidth: float, cache: int) -> list[Target]:
    """Return the targets for the step's kernels at level 2 in bf16, each with the case that is farthest from it.

    Args:
        seconds: Median time by case.
        bandwidth: Bytes per second of a copy, in the same run.
        cache: Bytes of the L2 cache.
    """
    steps = [c for c in seconds if c.kernel == "step" and c.level == 2 and c.data == torch.bfloat16]
    limited = {case: case._replace(kernel="step_limiter") for case in steps}
    shares = {case: bytes_moved(case) / seconds[case] / bandwidth for case in steps}
    ratios = {case: seconds[other] / seconds[case] for case, other in limited.items() if other in seconds}
    quantized = {case for case in steps if case.quantized and case.elements >= 2**24}
    steps = [case for case in steps if not case.quantized]
    large = {case for case in steps if case.elements >= 2**24}
    stages = {
        name: {
            c: bytes_moved(c) / seconds[c] / bandwidth
            for c in seconds
            if (c.kernel, c.level, c.data) == (name, 2, torch.bfloat16) and not c.quantized and c.elements >= 2**24
        }
        for name in ("step_muon", "step_orthogonal")
    }
    cached = {case for case in steps if bytes_read_twice(limited[case]) <= cache / 2}
    promises = [
        ("16M elements or more, share of the copy bandwidth", shares, large, 0.92, True),
        ("16M elements or more, int8 moments, share of the copy bandwidth", shares, quantized, 0.88, True),
        ("row path, share of the copy bandwidth", shares, {c for c in steps if c.shape == (2048, 5461)}, 0.7, True),
        ("16M elements or more, time with over without limiter", ratios, large, 1.4, False),
        *(
            (
                f"{name}, 16M elements or more, share of the copy bandwidth",
                stages[name],
                set(stages[name]),
                0.9,
                True,
            )
            for name in ("step_muon", "step_orthogonal")
        ),
        ("in half of the L2 cache, time with over without limiter", ratios, cached, 1.15, False),
    ]
    found = []
    for label, values, cases, bound, at_least in promises:
        own = {case: values[case] for case in cases if case in values}
        if own:
            worst = min(own, key=lambda case: own[case] if at_least else -own[case])
            found.append(Target(str(worst), label, own[worst], bound, at_least))
    return found


def _ratios(model: str, found: Mapping[Key, Found], promises: Iterable[_Promise]) -> Iterator[Target]:
    for label, over, under, bound, at_least, models in promises:
        if over in found and under in found and (not models or model in models):
            ratio = found[over]["step_time"] / found[under]["step_time"]
            yield Target(model, label, ratio, bound, at_least)


def _of_cuda(model: str, found: Mapping[Key, Found], launch_latency: float | None) -> Iterator[Target]:
    for name in (FREE, LIMITED):
        own = found.get(_half(name), {})
        if "peak_extra_bytes" in own:
            label = f"{name.removeprefix('GWTAdamW ')}, peak extra MiB"
            yield Target(model, label, own["peak_extra_bytes"] / 2**20, 1.0, False, "MiB")
    own = found.get(_half(FREE), {})
    if not own:
        return
    if model in ("llama_1b", "llama_7b") and "copy_bandwidth_fraction" in own:
        # No bandwidth is promised for the 60M shapes, most of which is embedding at level 0.
        yield Target(model, "level 2, fraction of the copy bandwidth", own["copy_bandwidth_fraction"], 0.9, True)
    if model == "llama_7b":
        for package in ("torchao", "flashoptim"):
            times = {key: each["step_time"] for key, each in found.items() if key[0].startswith(package + " ")}
            if times:
                name, weights = fastest = min(times, key=times.__getitem__)
                label = f"level 2, times as fast as the fastest setting of {package} ({name}, {weights})"
                yield Target(model, label, times[fastest] / own["step_time"], 1.0, True)
    fused = found.get(_half("AdamW(fused=True)"))
    if model == "llama_60m" and fused:
        # A small model's step is bound by latency, so wall time counts.
        speed = Target(
            model, "level 2, times as fast as fused AdamW", fused["wall_time"] / own["wall_time"], 2.0, True
        )
        easier = speed
        if launch_latency is not None:
            label = "level 2, wall time over one kernel's launch latency"
            latency = Target(model, label, own["wall_time"] / launch_latency, 1.3, False)
            easier = max(speed, latency, key=_margin)
        yield easier
        yield speed._replace(label="level 2, never slower than fused AdamW, times as fast", bound=1.0)


def _margin(target: Target) -> float:
    return target.value / target.bound if target.at_least else target.bound / target.value
