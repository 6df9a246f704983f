"""Tables and amounts as aligned text."""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["aligned", "amount", "three_digits", "unit_of"]

UNITS = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10), ("B", 1))


def unit_of(size: int) -> tuple[str, int]:
    """The unit in which an amount of bytes reads well, and its bytes."""
    return next(unit for unit in UNITS if size >= 0.1 * unit[1] or unit[1] == 1)


def amount(size: int) -> str:
    """Bytes in the unit that suits them, to two decimals."""
    unit, factor = unit_of(size)
    return f"{size / factor:,.2f} {unit}" if factor > 1 else f"{size} B"


def three_digits(value: float) -> str:
    """A number to three significant digits, without an exponent."""
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}" if value else "0"


def aligned(rows: Sequence[Sequence[str]], right: Sequence[int]) -> str:
    """Rows of cells as lines with a column each; those of the columns `right` are set to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
