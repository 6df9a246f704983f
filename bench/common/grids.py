"""Grids of hyper-parameters, as in presets, and their combinations, which are settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product

Grid = Mapping[str, Sequence[float]]
"""Values of each hyper-parameter, to be swept in every combination."""
Value = float | None


def settings_of(
    grid: Grid | Sequence[Grid], names: Sequence[str], given: Mapping[str, Sequence[float] | None] | None = None
) -> list[tuple[Value, ...]]:
    """Return every combination of a grid once, in the grid's order.

    Args:
        grid: One grid, or several in sequence, of which the later ones extend the first beyond its edges.
        names: Hyper-parameters in the order of a setting, which has None for one that the grid lacks.
        given: Values that replace the grid's, unless None or empty.
    """
    own = {name: values for name, values in (given or {}).items() if values}
    settings: list[tuple[Value, ...]] = []
    for one in [grid] if isinstance(grid, Mapping) else grid:
        settings += product(*((one | own).get(name, [None]) for name in names))
    return list(dict.fromkeys(settings))
