"""Converters for argparse: numbers on the command lines of benchmarks, with checks of their range."""

from __future__ import annotations

import argparse
from collections.abc import Callable


def at_least(least: float, kind: type[int] | type[float] = int) -> Callable[[str], float]:
    """Return a converter for argparse that accepts finite numbers of at least `least`."""

    def convert(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = kind(least) - 1
        if not least <= value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text!r}: give a number of at least {least:g}")
        return value

    return convert


def above_zero(text: str) -> float:
    """Parse a finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r}: give a number above 0")
    return value


def share(text: str) -> float:
    """Parse a number from 0 to 1."""
    value = at_least(0.0, float)(text)
    if value > 1.0:
        raise argparse.ArgumentTypeError(f"{text!r}: give a share between 0 and 1")
    return value
