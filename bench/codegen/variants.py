"""All kernel variants, and the compilation of each ahead of time, as its launch would compile it."""

from __future__ import annotations

import contextlib
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
    FACTORED,
    FACTORED_KERNELS,
    IDWT,
    LAUNCHED_FROM,
    NORM,
    NORMS,
    OF_NUMBERS,
    PANEL,
    ROW_NORM,
    arrays_of,
    kernel_of,
    launch_variant,
    rule_names,
)
from bench.codegen.variant import Variant
from gwt_kernels.backends.triton import control_launch
from gwt_kernels.core.level import ROW, Level, block_width
from gwt_kernels.rules import rule_of

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
PATHS = ("flat", "row")
WIDTH = 4096
"""Row width of the weights that variants are compiled for."""


def variants(
    targets: Sequence[str],
    kernels: Sequence[str],
    weights: Sequence[str],
    moments: Sequence[str],
    levels: Sequence[Level],
    paths: Sequence[str],
    rules: Sequence[str] | None = None,
) -> Iterator[Variant]:
    """Yield each distinct variant within the given choices, in a table's order.

    A step has variants for each registered rule and its last stage, unless ``rules`` selects some.
    """
    found = _variants(targets, kernels, weights, moments, levels, paths)
    for variant in dict.fromkeys(found):  # rules without moments repeat a variant
        if rules is None or variant.rule is None or variant.rule in rules:
            yield variant


def _variants(
    targets: Sequence[str],
    kernels: Sequence[str],
    weights: Sequence[str],
    moments: Sequence[str],
    levels: Sequence[Level],
    paths: Sequence[str],
) -> Iterator[Variant]:
    for target, kernel in itertools.product(targets, kernels):
        if kernel in OF_NUMBERS:
            yield Variant(target, kernel, rule=FACTORED if kernel in FACTORED_KERNELS else None)
        elif kernel in (DWT, IDWT, PANEL):
            for w, path, level in itertools.product(weights, paths, levels):
                if level != ROW and (
                    level or kernel == PANEL
                ):  # at level 0 a transform is a copy, without a kernel
                    yield Variant(target, kernel, w, None, level, path, rule=FACTORED if kernel == PANEL else None)
        elif kernel in NORMS:
            for w, m, path, level in itertools.product(weights, moments, paths, levels):
                for rule in _measured(kernel, level):
                    if (held := _held(rule or "gwt", level, m)) is not None:
                        yield Variant(target, kernel, w, *held, level, path, rule=rule)
        else:
            for limited in (False, True):
                for w, m, path, level in itertools.product(weights, moments, paths, levels):
                    for rule, rounding in _storings(kernel, w, level, limited):
                        if (held := _held(rule, level, m)) is not None:
                            yield Variant(target, kernel, w, *held, level, path, limited, rule, rounding)


def _measured(kernel: str, level: Level) -> list[str | None]:
    """Return the rules whose updates a norm's kernel measures: None for the limiter, Adafactor for its clip."""
    limited = [None] if level and (level == ROW) == (kernel == ROW_NORM) else []  # AdamW has no limiter
    return [*limited, *([FACTORED] if kernel == NORM and level != ROW else [])]


def _storings(kernel: str, weights: str, level: Level, limited: bool) -> list[tuple[str, str]]:
    """Return rules and roundings of a step: each rule with the nearest, each rounding with one rule of the kernel.

    That rule is foam if the kernel has it. Rules without moments also have each rounding.
    """
    own = [name for name in rule_names() if kernel_of(name, level) == kernel]
    if limited:
        return [("gwt", "nearest")] if level and "gwt" in own else []
    other = {"bf16": ["stochastic", "split"], "fp16": ["stochastic"]}.get(weights, [])
    chosen = next((name for name in ("foam", *own) if name in own), None)
    in_all_ways = {chosen, *(name for name in own if not rule_of(name, level).slots)}
    return [(name, way) for name in own for way in ("nearest", *(other if name in in_all_ways else []))]


def _held(rule: str, level: Level, moments: str) -> tuple[str | None] | None:
    """Return the moments' format in a tuple, ``(None,)`` for a rule without moments; None if it is impossible."""
    stated = rule_of(rule, level)
    if not stated.slots:
        return (None,)
    return None if moments == "int8" and (level == ROW or stated.row_slots) else (moments,)


def compile_variant(
    variant: Variant, overrides: dict[str, Any] | None = None
) -> tuple[CompiledKernel, dict[str, Any]]:
    """Compile a variant for its target, which need not be present.

    The library's own launch is run on tensors without storage, and the call that reaches the kernel goes to
    Triton's warm-up, which compiles what a launch with these arguments would. Addresses count as aligned to 16
    bytes, as an allocator's are.

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
    """Substitute for the driver of a device that is absent, with what Triton needs to compile."""

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

    shape = _shape(2 if variant.level is None else variant.level, variant.path)
    with contextlib.ExitStack() as stack:
        for module in {*LAUNCHED_FROM.values(), control_launch}:
            names = [name for name in vars(module) if name.endswith("_kernel")]
            stack.enter_context(patch.multiple(module, **{name: Recorder(name) for name in names}))
        launch_variant(variant, arrays_of(variant, [shape], torch.device("meta")), shape[-1])
    return calls


def _shape(level: Level, path: str | None) -> tuple[int, int]:
    """Return a shape that takes the path: whole blocks and a multiple of 8 elements, or neither.

    Its rows are as wide as a model's, since kernels for rows choose their tiles by that width.
    """
    width = max(WIDTH, block_width(level, WIDTH))
    return (5, width - 1) if path == "row" else (8, width)
