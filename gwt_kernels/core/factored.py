"""The second moment of matrices as factors: means of rows and of columns, their names, shapes and dimensions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

FACTORS = ("exp_avg_sq_row", "exp_avg_sq_col")
"""State entries that hold the factors. A tensor of one dimension has ``exp_avg_sq``, of all its coefficients."""


def factor_dims(dims: int) -> dict[str, tuple[int, ...]]:
    """Return the factors of a tensor of ``dims`` dimensions, and the dimensions of its moments that each keeps."""
    if dims < 2:
        return {"exp_avg_sq": tuple(range(dims))}
    every = tuple(range(dims))
    return {FACTORS[0]: every[:-1], FACTORS[1]: (*every[:-2], every[-1])}


class Matrices(NamedTuple):
    """A tensor, or its moments, as a batch of matrices; one dimension or none is a single row."""

    batch: int
    rows: int
    columns: int

    @classmethod
    def of(cls, shape: Sequence[int]) -> Matrices:
        """Return the matrices of a shape ``[..., rows, columns]``."""
        return cls(math.prod(shape[:-2]), shape[-2] if len(shape) > 1 else 1, shape[-1] if shape else 1)

    @property
    def numel(self) -> int:
        """Number of elements of all matrices."""
        return self.batch * self.rows * self.columns

    @property
    def parts(self) -> list[int]:
        """Lengths of the sums that a step computes for a tensor with these moments, in order.

        They are the sums of squares of the approximation over rows, and over columns; per matrix the sum of new row
        factors, without ``eps``; and the sum of squares of the weights.
        """
        return [self.batch * self.rows, self.batch * self.columns, self.batch, 1]
