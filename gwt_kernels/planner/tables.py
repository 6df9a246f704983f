"""Format tables and amounts of bytes as aligned text."""

from __future__ import annotations

import math
from collections.abc import Sequence

UNITS = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10), ("B", 1))


def unit_of(size: int) -> tuple[str, int]:
    """Return a readable unit for an amount of bytes, and the bytes of that unit."""
    return next(unit for unit in UNITS if size >= 0.1 * unit[1] or unit[1] == 1)


def amount(size: int) -> str:
    """Format bytes in a readable unit, with two decimals."""
    unit, factor = unit_of(size)
    return f"{size / factor:,.2f} {unit}" if factor > 1 else f"{size} B"


def three_digits(value: float) -> str:
    """Format a number with three significant digits, without exponent."""
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}" if value else "0"


def aligned(rows: Sequence[Sequence[str]], right: Sequence[int]) -> str:
    """Format rows of cells as lines of aligned columns; the columns `right` are right-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
