"""Rates at which an H100 issues, computes and moves, and which of them bounds a kernel with known counts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

MULTIPROCESSORS, SCHEDULERS, LANES = 132, 4, 32
CLOCK = 1.7e9
"""Cycles per second of a multiprocessor, in each of which every scheduler issues one warp's instruction."""
BANDWIDTH = 3.0e12
"""Assumed bytes per second of its memory; the data sheet says 3.35e12."""
SLOTS, INTEGER, SPECIAL, SHUFFLE = "issue slots", "integer unit", "special functions", "shuffles"
RATES = {SLOTS: SCHEDULERS * LANES, INTEGER: 64, SPECIAL: 16, SHUFFLE: 32}
"""Instructions of lanes that a multiprocessor takes per cycle: in total, and by the unit that some of them need.

The units' rates are from the CUDA C++ Programming Guide, "Arithmetic Instructions", for compute capability 9.0: 64
for additions, products, logic and shifts of integers, for comparisons, minima and maxima, and for conversions; 16
for reciprocals, roots and exponentials; 32 for shuffles. Selections are assumed to be as fast as comparisons. Each
PTX instruction is assumed to be one of its unit, also if it has 64 bits or converts from or to 64 bits.
"""

ARITHMETIC = (
    f"an H100 issues {MULTIPROCESSORS} x {SCHEDULERS} x {LANES} instructions of a thread a cycle, at "
    f"{CLOCK / 1e9:.1f} GHz, of which {MULTIPROCESSORS} x {RATES[INTEGER]} of the {INTEGER}, x {RATES[SPECIAL]} "
    f"{SPECIAL} and x {RATES[SHUFFLE]} {SHUFFLE}, and moves {BANDWIDTH / 1e12:.1f} TB/s"
)


class Shares(NamedTuple):
    """How busy a kernel can keep multiprocessors and memory: 1 for the one that bounds it, less for the other."""

    issue: float
    bandwidth: float


def demands(lanes: Mapping[str, float], moved: float) -> dict[str, float]:
    """Return the time to compute over the time to move by key of ``RATES``; above 1 this bounds the kernel.

    Args:
        lanes: Instructions per element, 32 for each that a warp issues, in total and by unit.
        moved: Bytes that move per element.
    """
    a_cycle = MULTIPROCESSORS * CLOCK * moved / BANDWIDTH
    return {name: n / RATES[name] / a_cycle for name, n in lanes.items()}


def shares(needed: float) -> Shares:
    """Return the shares that follow from the largest of :func:`demands`."""
    return Shares(min(1.0, needed), min(1.0, 1 / needed))
