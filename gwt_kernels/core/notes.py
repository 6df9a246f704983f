"""What telemetry notes about one parameter's step off Triton: sums over its chunks."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["COLUMNS", "Notes"]

COLUMNS = ("details", "approximation", "update", "limit", "nonfinite", "steps")
"""Of a row of telemetry: see :mod:`gwt_kernels.telemetry`."""
_DETAILS, _APPROXIMATION, _UPDATE, _LIMIT, _NONFINITE, _STEPS = range(len(COLUMNS))


class Notes:
    """Fills one row of :mod:`gwt_kernels.telemetry` while a step passes over the parameter's chunks."""

    def __init__(self, row: Tensor) -> None:
        self._row = row
        row[:_LIMIT] = 0
        row[_LIMIT] = 1
        row[_STEPS] += 1

    def gradient(self, g: Tensor, factor: float, mean: Tensor, width: int) -> None:
        """A chunk of the gradient, what it is multiplied by, and the means of its blocks after that."""
        self.squares_of_gradient(_square(g) * factor**2, _square(mean) * width)

    def squares_of_gradient(self, squares: Tensor, approximation: Tensor) -> None:
        """Sums over a chunk: of the gradient's squares, and of those of its approximation."""
        self._row[_DETAILS] += (squares - approximation).clamp(min=0)
        self._row[_APPROXIMATION] += approximation

    def update(self, update: Tensor, factor: float = 1.0) -> None:
        """A chunk of the update over ``factor``."""
        self.squares_of_update(_square(update) * factor**2)

    def squares_of_update(self, squares: Tensor) -> None:
        """The sum over a chunk."""
        self._row[_UPDATE] += squares

    def limit(self, limit: Tensor) -> None:
        """The limiter's divisor."""
        self._row[_LIMIT] = limit

    def close(self) -> None:
        """After the last chunk."""
        self._row[_NONFINITE] += ~torch.isfinite(self._row[:_UPDATE].sum())


def _square(x: Tensor) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    norm: Tensor = torch.linalg.vector_norm(x, dtype=wide)
    return norm.double().square()
