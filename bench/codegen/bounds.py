"""What an H100 issues and moves in a second, and which of both bounds a kernel that is counted."""

from __future__ import annotations

from typing import NamedTuple

MULTIPROCESSORS, SCHEDULERS, LANES = 132, 4, 32
CLOCK = 1.7e9
"""Of a multiprocessor, in a second: each scheduler issues one warp's instruction a cycle."""
BANDWIDTH = 3.0e12
"""Bytes that its memory is taken to move in a second; its data sheet says 3.35e12."""

ARITHMETIC = (
    f"an H100 issues {MULTIPROCESSORS} x {SCHEDULERS} x {LANES} instructions of a thread a cycle, at "
    f"{CLOCK / 1e9:.1f} GHz, and moves {BANDWIDTH / 1e12:.1f} TB/s"
)


class Shares(NamedTuple):
    """How busy a kernel can keep issue slots and memory: the one that bounds it to the full, the other in part."""

    issue: float
    bandwidth: float


def demand(slots: float, moved: float) -> float:
    """Time to issue over time to move, for one element: above 1 the issue slots bound the kernel, below the memory.

    Args:
        slots: Issue slots in lanes: 32 for each instruction that a warp issues.
        moved: Bytes.
    """
    return slots / (MULTIPROCESSORS * SCHEDULERS * LANES * CLOCK) / (moved / BANDWIDTH)


def shares(slots: float, moved: float) -> Shares:
    """See :func:`demand`."""
    needed = demand(slots, moved)
    return Shares(min(1.0, needed), min(1.0, 1 / needed))
