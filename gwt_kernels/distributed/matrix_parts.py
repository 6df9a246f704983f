"""How matrices are put together from parts that lie in buffers, as many at once as lie in order."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from gwt_kernels.distributed.matrix_plan import Part, Unit
from gwt_kernels.rules.newton_schulz import matrix_shapes


class Whole(NamedTuple):
    """A unit that this process orthogonalises.

    Attributes:
        at: Where it lies among the batch's matrices; or, as this process holds all of it, among its parts.
        is_held: Which of both.
        parts: What it is put together from: whether that arrives, where it lies, and the part.
    """

    unit: Unit
    at: int
    is_held: bool
    parts: list[tuple[bool, int, Part]]


class Copy(NamedTuple):
    """The same part of several units, which lie end to end as the parts do.

    Attributes:
        n: How many.
        shape: A unit's.
        at: Where the first unit lies among the batch's matrices.
        arrives: Whether the parts arrive, or lie among those held.
        start: Where the first of them lies.
        part: Any of them.
    """

    n: int
    shape: tuple[int, ...]
    at: int
    arrives: bool
    start: int
    part: Part


def copies_of(wholes: Sequence[Whole]) -> list[Copy]:
    """How units are put together from their parts, as many at once as lie in order."""
    made: list[Copy] = []
    going_on: dict[tuple[int, bool, int], int] = {}
    for unit, at, _, parts in wholes:
        for arrives, start, part in parts:
            last = going_on.get((at, arrives, start))
            if last is None or (made[last].shape, made[last].part[1:]) != (unit.shape, part[1:]):
                last = len(made)
                made.append(Copy(0, unit.shape, at, arrives, start, part))
            made[last] = made[last]._replace(n=made[last].n + 1)
            going_on[at + unit.numel, arrives, start + part.numel] = last
    return made


def runs_of(wholes: Sequence[tuple[Whole, bool]]) -> list[tuple[bool, int, tuple[int, ...]]]:
    """Matrices of one shape that lie end to end: whether this process holds them, where they lie, and the shape.

    Args:
        wholes: Units, and whether each is one matrix whatever its dimensions: ``flatten``.
    """
    runs: list[tuple[bool, int, tuple[int, ...]]] = []
    for (unit, at, is_held, _), flatten in wholes:
        *_, rows, cols = matrix_shapes(unit.shape, flatten)[0]
        n = unit.numel // (rows * cols)
        if runs and runs[-1][0] == is_held:
            _, start, (more, *kind) = runs[-1]
            if kind == [rows, cols] and start + more * rows * cols == at:
                runs[-1] = is_held, start, (more + n, rows, cols)
                continue
        runs.append((is_held, at, (n, rows, cols)))
    return runs


def starts_of(sizes: Sequence[int]) -> list[int]:
    """Where things of these sizes begin that lie end to end, and where the last ends."""
    return [0, *itertools.accumulate(sizes)]


def view_of(buffer: Tensor, at: int, shape: Sequence[int]) -> Tensor:
    """The contiguous tensor of ``shape`` that begins at an element of ``buffer``."""
    return buffer[at : at + math.prod(shape)].view(shape)
