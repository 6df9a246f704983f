"""Cases of bench.kernels: kernels by shape, level and dtype, and the bytes that each call must move."""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from bench.common.models import shapes_of
from gwt_kernels.backends import choice
from gwt_kernels.formats.int8 import block_size
from gwt_kernels.haar.transform import deepest_level
from gwt_kernels.rules import Rule, rule_of

KERNELS = ("step", "step_limiter", "haar_dwt", "haar_idwt")
RULE_KERNELS = ("step_foam", "step_adam_mini", "step_muon", "step_orthogonal")
"""Steps of other rules, and the stages of GWT-Muon before and after its matrix products."""
MATRICES = torch.bfloat16
"""dtype of the matrices between these stages."""
PARTS = ("matrices", "sizes", "grid")
MODELS = ("llama_60m", "llama_350m", "llama_1b", "llama_7b", "llama_70b")
CPU_MODEL = "llama_350m"  # its matrices take a CPU long enough to hide the overhead of a call
DTYPES = (torch.bfloat16, torch.float32, torch.float16)
MOMENTS = (torch.float32, torch.bfloat16, torch.int8)

EXPERTS = {"mixtral-like": (8, 14336, 4096), "deepseek-like": (64, 1408, 2048)}
"""Shapes of experts stacked in one tensor, by mixture-of-experts model."""

ROW = 4096  # width of the tensors in the sweep over sizes
MAX_SETS = 1024

Shape = tuple[int, ...]


class Case(NamedTuple):
    """One kernel on one tensor."""

    kernel: str
    shape: Shape
    level: int
    data: torch.dtype
    """Dtype of weights and gradients, or of a transform's input."""
    moments: torch.dtype | None
    """Dtype of the moments; None for a transform, and for a rule without moments."""

    @property
    def is_step(self) -> bool:
        return self.kernel.startswith("step")

    @property
    def rule(self) -> Rule:
        """The rule of a step at its level."""
        named = self.kernel.removeprefix("step_") if self.kernel in RULE_KERNELS else "gwt"
        return rule_of(named, self.level)

    @property
    def written(self) -> torch.dtype:
        """Dtype of the weights, or of the matrices written in their place."""
        return self.data if self.rule.reads_weights else MATRICES

    @property
    def read(self) -> torch.dtype:
        """Dtype of the gradients, or of the orthogonalised matrices read in their place."""
        return self.data if self.rule.slots else MATRICES

    @property
    def quantized(self) -> bool:
        """Whether the moments are int8, with scales."""
        return self.moments == torch.int8

    @property
    def limited(self) -> bool:
        return self.kernel == "step_limiter"

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def width(self) -> str:
        """ "flat" if blocks lie end to end, "odd" if the last block of each row is cut short."""
        return "odd" if self.shape[-1] % 2**self.level else "flat"

    def band(self, level: int) -> int:
        """Number of elements of the approximation, or of the details, at a level."""
        return math.prod(self.shape[:-1]) * -(-self.shape[-1] // 2**level)

    def __str__(self) -> str:
        dtypes = short(self.data) + (f"/{short(self.moments)}" if self.moments else "")
        return f"{self.kernel} {'x'.join(map(str, self.shape))} level {self.level} {dtypes}"


def short(dtype: torch.dtype) -> str:
    """Return the dtype's name without the module."""
    return str(dtype).removeprefix("torch.")


def bytes_held(case: Case) -> int:
    """Count the bytes of one set of buffers: weights, gradients and moments, or a tensor and its coefficients."""
    if case.is_step:
        return case.elements * (case.written.itemsize + case.read.itemsize) + _moment_bytes(case)
    coefficients = case.band(case.level) + sum(map(case.band, range(1, case.level + 1)))
    return (case.elements + coefficients) * case.data.itemsize


def _moment_bytes(case: Case) -> int:
    """Count the bytes of the moments that the rule has, with the scales of int8 moments."""
    total = 0
    for slot in case.rule.slots:
        assert case.moments is not None
        if slot in case.rule.row_slots:
            total += math.prod(case.shape[:-1]) * torch.float32.itemsize
        else:
            coefficients = case.band(case.level)
            scales = -(-coefficients // block_size(case.level)) * torch.float32.itemsize if case.quantized else 0
            total += coefficients * case.moments.itemsize + scales
    return total


def bytes_moved(case: Case) -> int:
    """Count the bytes that a call must move.

    A step reads the gradients once, and reads and writes weights and moments once; matrices in place of weights are
    only written. The limiter needs the norm of the whole normalised approximation before any weight is written, so
    it reads gradients and moments a second time. A transform reads its tensor and writes the coefficients; its
    inverse does the reverse.
    """
    if not case.is_step:
        return bytes_held(case)
    once = case.read.itemsize + case.written.itemsize * (1 + case.rule.reads_weights)
    return case.elements * once + 2 * _moment_bytes(case) + bytes_read_twice(case)


def bytes_read_twice(case: Case) -> int:
    """Count the bytes of gradients and moments, which a step with limiter reads twice."""
    if case.moments is None or not case.limited:
        return 0
    return case.elements * case.data.itemsize + _moment_bytes(case)


def set_count(case: Case, cache: int) -> int:
    """Return how many sets of buffers must take turns so that the others fill a cache of this size twice.

    At least two, since a second set holds the values from before the step; at most `MAX_SETS`.
    """
    return min(MAX_SETS, max(2, 1 + -(-2 * cache // bytes_held(case))))


def obstacle(case: Case, device: torch.device, backend: choice.Backend | None) -> str | None:
    """Return why a case cannot run, or None."""
    for dtype, known in ((case.data, DTYPES), (case.moments, (*DTYPES, torch.int8, None))):
        if dtype is not None and dtype not in known:
            taken = ", ".join(short(each) for each in known if each)
            return f"not supported: the kernels take {taken}, not {short(dtype)}"
    if case.quantized and case.rule.row_slots:
        return f"not possible: {case.kernel} knows no int8 moments"
    if case.level > deepest_level(case.shape[-1]):
        return f"not possible: level {case.level} is too deep for rows of {case.shape[-1]}"
    if backend == "triton" or (backend is None and device.type == "cuda"):
        why = choice.triton_obstacle(device, case.data, case.level)
        return why and f"no kernel: {why}"
    return None


class Grid(NamedTuple):
    """A Cartesian product of shapes, levels and options."""

    source: str
    shapes: Sequence[Shape]
    levels: Sequence[int]
    data: Sequence[torch.dtype]
    moments: Sequence[torch.dtype]
    is_of_adamw: bool = False
    """Whether AdamW updates these tensors, such as embeddings, with every rule."""

    def cases(self, kernels: Sequence[str]) -> Iterator[Case]:
        """Yield the cases of the product, dtype by dtype; level 0 has no transform and no limiter."""
        product = itertools.product(self.data, self.moments, self.shapes, self.levels, kernels)
        for data, moments, shape, level, kernel in product:
            if self.is_of_adamw and kernel != "step":
                continue
            case = Case(kernel, shape, level, data, None)
            if level or kernel in ("step", *RULE_KERNELS[1:]):
                yield case._replace(moments=moments) if case.is_step and case.rule.slots else case


def plan(options: argparse.Namespace) -> dict[Case, str]:
    """Return the cases selected by the command line, each with the source of its shape."""
    full = options.full
    small = options.device.type == "cpu" and not full
    levels, data, moments = options.levels, options.weights, options.moments
    one = (
        levels or (range(7) if full else (2,)),
        data or (DTYPES if full else DTYPES[:1]),
        moments or (MOMENTS if full else MOMENTS[:1]),
    )
    every = (
        levels or ((0, 1, 2, 3) if small else range(7)),
        data or (DTYPES[:2] if small else DTYPES),
        moments or MOMENTS,
    )
    grids: list[Grid] = []
    if options.shapes:
        grids.append(Grid("command line", options.shapes, *one))
    elif "matrices" in options.parts:
        for model in options.models or ((CPU_MODEL,) if small else MODELS):
            shapes = [shape for shape in shapes_of(model, layers=1) if len(shape.size) > 1]
            grids.append(Grid(model, [shape.size for shape in shapes if shape.transformed], *one))
            # Embedding and head stay at level 0, and on a CPU they would take longer than the rest together.
            if not small and (levels is None or 0 in levels):
                rest = [shape.size for shape in shapes if not shape.transformed]
                grids.append(Grid(model, rest, (0,), *one[1:], is_of_adamw=True))
        if not small and not options.models:
            grids += [Grid(name, [shape], *one) for name, shape in EXPERTS.items()]
    if not options.shapes and "sizes" in options.parts:
        sizes = options.sizes or ((16, 20, 24) if small else range(16, 32))
        grids.append(Grid("sizes", [_tensor_of(2**size, ROW) for size in sizes], *one))
        if full:
            grids.append(Grid("sizes", [_tensor_of(2**size, ROW + 1) for size in sizes], *one))
    if not options.shapes and "grid" in options.parts:
        grids.append(Grid("grid", ((2048, 2048), (2048, 2731)) if small else ((4096, 4096), (2048, 5461)), *every))
    cases: dict[Case, list[str]] = {}
    for grid in grids:
        for case in grid.cases(options.kernels):
            if case.width in options.widths:
                cases.setdefault(case, []).append(grid.source)
    return {case: ", ".join(dict.fromkeys(sources)) for case, sources in cases.items()}


def _tensor_of(elements: int, width: int) -> Shape:
    """Return a shape of rows of `width` with at least `elements` elements."""
    return -(-elements // width), width
