"""Which kernel variants there are, and how each is compiled ahead of time as its launch would compile it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest.mock import patch

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import driver

from bench.codegen.launches import (
    DWT,
    IDWT,
    KERNELS,
    LAUNCHED_FROM,
    LIMITER,
    NORM,
    OBSERVE,
    STEP,
    SUM,
    arrays_of,
    launch_variant,
)
from bench.codegen.variant import Variant

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
PATHS = ("flat", "row")


def variants(
    targets: Sequence[str],
    kernels: Sequence[str],
    weights: Sequence[str],
    moments: Sequence[str],
    levels: Sequence[int],
    paths: Sequence[str],
) -> Iterator[Variant]:
    """Yield each distinct variant within the given choices, in a table's order."""
    for target, kernel in itertools.product(targets, kernels):
        if kernel in (LIMITER, SUM, OBSERVE):
            yield Variant(target, kernel)
        elif kernel in (DWT, IDWT):  # level 0 is a copy, without a kernel
            for w, path, level in itertools.product(weights, paths, levels):
                if level:
                    yield Variant(target, kernel, w, None, level, path)
        else:
            for limited in (False, True) if kernel == STEP else (None,):
                for w, m, path, level in itertools.product(weights, moments, paths, levels):
                    if level or not (limited or kernel == NORM):  # AdamW has no limiter
                        for rule, rounding in _storings(kernel, w, level, limited):
                            yield Variant(target, kernel, w, m, level, path, limited, rule, rounding)


def _storings(kernel: str, weights: str, level: int, limited: bool | None) -> list[tuple[str | None, str | None]]:
    """Rules and roundings of a step: each rule with the nearest, each rounding with the rule of one pass."""
    if kernel == NORM:
        return [(None, None)]
    if limited:
        return [("gwt", "nearest")]
    other = {"bf16": ["stochastic", "split"], "fp16": ["stochastic"]}.get(weights, [])
    foam = [("foam", "nearest")] if level else []
    return [("gwt", "nearest"), *foam, *(("foam" if level else "gwt", rounding) for rounding in other)]


def compile_variant(
    variant: Variant, overrides: dict[str, Any] | None = None
) -> tuple[CompiledKernel, dict[str, Any]]:
    """Compile a variant for its target, which need not be at hand.

    The library's own launch is run on tensors without storage, and the call that reaches the kernel goes to
    Triton's warm-up, which compiles what a launch with these arguments would. Their addresses count as aligned to
    16 bytes, which an allocator's are.

    Args:
        variant: What to compile.
        overrides: Compile-time constants to replace where the kernel has them.

    Returns:
        The compiled kernel, with all of its intermediate forms, and its compile-time constants.

    Raises:
        RuntimeError: the launch does not reach the kernel.
    """
    calls = [(args, kwargs) for kernel, args, kwargs in _record(variant) if kernel == variant.kernel]
    if len(calls) != 1:
        raise RuntimeError(f"the launch calls the kernel {len(calls)} times instead of once: {variant}")
    args, kwargs = calls[0]
    kwargs.update({k: v for k, v in (overrides or {}).items() if k in kwargs})
    with patch.object(driver, "_active", _Ahead(variant.target)):
        compiled = getattr(LAUNCHED_FROM[variant.kernel], variant.kernel).warmup(*args, grid=(1,), **kwargs)
    return compiled, {k: v for k, v in kwargs.items() if isinstance(v, int)}


class _Ahead:
    """What Triton asks of a driver before it compiles, answered for a device that is not there."""

    def __init__(self, target: str) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self.target]

    def get_current_device(self) -> str:
        return f"ahead of time for {self.target}"  # the key under which compiled kernels are kept

    def get_current_stream(self, device: str) -> int:
        return 0


def _record(variant: Variant) -> list[tuple[str, tuple[Any, ...], dict[str, Any]]]:
    """Run the launch of a variant and return each call of a kernel: its name and arguments."""
    calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    class Recorder:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: object) -> Callable[..., None]:
            return lambda *args, **kwargs: calls.append((self.name, args, kwargs))

    module = LAUNCHED_FROM[variant.kernel]
    recorders: dict[str, Any] = {name: Recorder(name) for name in KERNELS if LAUNCHED_FROM[name] is module}
    shape = _shape(2 if variant.level is None else variant.level, variant.path)
    with patch.multiple(module, **recorders):
        launch_variant(variant, arrays_of(variant, [shape], torch.device("meta")), shape[-1])
    return calls


def _shape(level: int, path: str | None) -> tuple[int, int]:
    """A shape that takes the path: whole blocks and a multiple of 8 elements, or neither."""
    return (5, 4 * 2**level - 1) if path == "row" else (8, 4 * 2**level)
