"""Grids of settings, as presets hold them, and the settings that they stand for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product

Grid = Mapping[str, Sequence[float]]
"""Values of each number of an optimizer, to be tried in every combination."""
Value = float | None


def settings_of(
    grid: Grid | Sequence[Grid], names: Sequence[str], given: Mapping[str, Sequence[float] | None] | None = None
) -> list[tuple[Value, ...]]:
    """Return every combination of a grid once, in the grid's order.

    Args:
        grid: One grid, or several that are taken one after another: the later ones go beyond the first's edges.
        names: The numbers, in the order of a setting; None stands for one that the grid has not.
        given: Values to take in place of the grid's, where they are not None.
    """
    own = {name: values for name, values in (given or {}).items() if values}
    settings: list[tuple[Value, ...]] = []
    for one in [grid] if isinstance(grid, Mapping) else grid:
        settings += product(*((one | own).get(name, [None]) for name in names))
    return list(dict.fromkeys(settings))
