"""Levels of the transform, and the blocks of neighbours into which they divide a row."""

from __future__ import annotations

from typing import Literal

Level = int | Literal["row"]
"""Levels of the transform, whose blocks are ``2**level`` neighbours; or ``"row"``: one block a row of any width."""

ROW: Literal["row"] = "row"


def block_width(level: Level, width: int) -> int:
    """Return the number of elements of a block in rows of ``width``."""
    return max(width, 1) if level == ROW else 1 << level


def blocks_of(level: Level, width: int) -> int:
    """Return the number of blocks of a row of ``width``; the last block may be incomplete."""
    return 1 if level == ROW else -(-width // (1 << level))


def depth_of(level: Level) -> float:
    """Return the sort key of a level: a row is a longer block than the blocks of any level."""
    return float("inf") if level == ROW else level


def check_level_type(level: object) -> None:
    """Raise unless ``level`` is an integer of at least 0, or ``"row"``."""
    if isinstance(level, str) and level == ROW:
        return
    if isinstance(level, bool) or not isinstance(level, int):
        raise TypeError(f"level must be an integer or 'row', got {level!r}")
    if level < 0:
        raise ValueError(f"level must not be negative, got {level}: 0 is plain AdamW")
