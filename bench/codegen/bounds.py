"""What an H100 issues, computes and moves in a second, and which of these bounds a kernel that is counted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

MULTIPROCESSORS, SCHEDULERS, LANES = 132, 4, 32
CLOCK = 1.7e9
"""Of a multiprocessor, in a second: each scheduler issues one warp's instruction a cycle."""
BANDWIDTH = 3.0e12
"""Bytes that its memory is taken to move in a second; its data sheet says 3.35e12."""
SLOTS, INTEGER, SPECIAL, SHUFFLE = "issue slots", "integer unit", "special functions", "shuffles"
RATES = {SLOTS: SCHEDULERS * LANES, INTEGER: 64, SPECIAL: 16, SHUFFLE: 32}
"""Lanes' instructions that a multiprocessor takes a cycle: in all, and by the unit that some of them need.

The units' are those of the CUDA C++ Programming Guide, "Arithmetic Instructions", for compute capability 9.0: 64
for additions, products, logic and shifts of integers, for comparisons, minima and maxima, and for conversions; 16
for reciprocals, roots and exponentials; 32 for shuffles. Selections are taken to be as quick as comparisons. Each
instruction of PTX is taken to be one of its unit's, also of 64 bits and a conversion from or to these.
"""

ARITHMETIC = (
    f"an H100 issues {MULTIPROCESSORS} x {SCHEDULERS} x {LANES} instructions of a thread a cycle, at "
    f"{CLOCK / 1e9:.1f} GHz, of which {MULTIPROCESSORS} x {RATES[INTEGER]} of the {INTEGER}, x {RATES[SPECIAL]} "
    f"{SPECIAL} and x {RATES[SHUFFLE]} {SHUFFLE}, and moves {BANDWIDTH / 1e12:.1f} TB/s"
)


class Shares(NamedTuple):
    """How busy a kernel can keep multiprocessors and memory: what bounds it to the full, the other in part."""

    issue: float
    bandwidth: float


def demands(lanes: Mapping[str, float], moved: float) -> dict[str, float]:
    """Time to compute over time to move, for one element, of each of ``RATES``: above 1 it bounds the kernel.

    Args:
        lanes: 32 for each instruction that a warp issues, in all and by unit.
        moved: Bytes.
    """
    a_cycle = MULTIPROCESSORS * CLOCK * moved / BANDWIDTH
    return {name: n / RATES[name] / a_cycle for name, n in lanes.items()}


def shares(needed: float) -> Shares:
    """Of the largest of :func:`demands`."""
    return Shares(min(1.0, needed), min(1.0, 1 / needed))
