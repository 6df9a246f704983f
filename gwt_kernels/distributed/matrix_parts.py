"""Assemble matrices from parts in buffers, with one copy for parts that lie end to end."""

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
        at: Its offset in the buffer of held parts if ``is_held``, else in that of matrices.
        is_held: Whether this process holds all of it.
        parts: Its parts, as (arrives, offset in its buffer, part); none if ``is_held``.
    """

    unit: Unit
    at: int
    is_held: bool
    parts: list[tuple[bool, int, Part]]


class Copy(NamedTuple):
    """The same part of several units; the units lie end to end, and so do the parts.

    Attributes:
        n: Number of units.
        shape: Shape of a unit.
        at: Offset of the first unit in the buffer of matrices.
        arrives: Whether the parts arrive, or lie among those held.
        start: Offset of the first part there.
        part: Any of the parts.
    """

    n: int
    shape: tuple[int, ...]
    at: int
    arrives: bool
    start: int
    part: Part


def copies_of(wholes: Sequence[Whole]) -> list[Copy]:
    """Return the copies that assemble units from their parts."""
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
    """Return runs of matrices that lie end to end, as (held here, offset, shape ``[n, rows, cols]``).

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
    """Return the offsets of items of these sizes that lie end to end, and the end of the last."""
    return [0, *itertools.accumulate(sizes)]


def view_of(buffer: Tensor, at: int, shape: Sequence[int]) -> Tensor:
    """Return the contiguous tensor of ``shape`` that begins at element ``at`` of ``buffer``."""
    return buffer[at : at + math.prod(shape)].view(shape)
