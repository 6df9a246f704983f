"""Collect one parameter's telemetry on backends other than Triton: sums over its chunks."""

from __future__ import annotations

import torch
from torch import Tensor

COLUMNS = ("details", "approximation", "update", "limit", "nonfinite", "steps")
"""Columns of a telemetry row: see :mod:`gwt_kernels.telemetry`."""
_DETAILS, _APPROXIMATION, _UPDATE, _LIMIT, _NONFINITE, _STEPS = range(len(COLUMNS))


class Notes:
    """Fill one row of :mod:`gwt_kernels.telemetry` while a step processes the parameter's chunks."""

    def __init__(self, row: Tensor) -> None:
        self._row = row
        row[:_LIMIT] = 0
        row[_LIMIT] = 1
        row[_STEPS] += 1

    def gradient(self, g: Tensor, factor: float, mean: Tensor, width: int) -> None:
        """Add a chunk of the gradient, the factor on it, and the block means of the product."""
        self.squares_of_gradient(_square(g) * factor**2, _square(mean) * width)

    def squares_of_gradient(self, squares: Tensor, approximation: Tensor) -> None:
        """Add a chunk's sums of squares: of the gradient, and of its approximation."""
        self._row[_DETAILS] += (squares - approximation).clamp(min=0)
        self._row[_APPROXIMATION] += approximation

    def update(self, update: Tensor, factor: float = 1.0) -> None:
        """Add a chunk of the update, which is ``factor`` times ``update``."""
        self.squares_of_update(_square(update) * factor**2)

    def squares_of_update(self, squares: Tensor) -> None:
        """Add a chunk's sum of squares of the update."""
        self._row[_UPDATE] += squares

    def limit(self, limit: Tensor) -> None:
        """Set the limiter's divisor."""
        self._row[_LIMIT] = limit

    def close(self) -> None:
        """Count a non-finite gradient, after the last chunk."""
        self._row[_NONFINITE] += ~torch.isfinite(self._row[:_UPDATE].sum())


def _square(x: Tensor) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    norm: Tensor = torch.linalg.vector_norm(x, dtype=wide)
    return norm.double().square()
