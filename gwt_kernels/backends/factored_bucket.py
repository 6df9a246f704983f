"""A bucket whose rule keeps factors of a second moment, and possibly no first moment."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from gwt_kernels.backends.bucket import Bucket
from gwt_kernels.core.factored import Matrices
from gwt_kernels.core.level import blocks_of
from gwt_kernels.formats.moments import MomentFormat, wide
from gwt_kernels.rules import Rule, rule_of


class FactoredBucket(Bucket):
    """See :class:`gwt_kernels.backends.bucket.Bucket`.

    Args:
        params: As there.
        exp_avgs: As there; None without first moments (``beta1=None``).
        exp_avg_sqs: None.
        factors: Means of rows ``[..., rows]``, None for a tensor of one dimension, and of columns ``[..., nb]``,
            per parameter; contiguous, in the dtype of the arithmetic.
        wholes: Shape of the whole moments, of which this may be a shard, and elements of the whole, per parameter.
        options: As there.

    Raises:
        ValueError: as there; or the factors do not fit.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        exp_avgs: Sequence[Tensor] | None,
        exp_avg_sqs: None = None,
        *,
        factors: Sequence[tuple[Tensor | None, Tensor]],
        wholes: Sequence[tuple[Sequence[int], int]],
        **options: Any,
    ) -> None:
        self.factors = factors
        self.matrices = [Matrices.of(shape) for shape, _ in wholes]
        self.numels = [numel for _, numel in wholes]
        """Elements of the whole parameters."""
        rule = rule_of(options["rule"], options["level"])
        self._stated = rule if exp_avgs is not None else replace(rule, slots=())
        super().__init__(params, exp_avgs or [None] * len(params), exp_avg_sqs, **options)  # type: ignore[list-item]
        if not len(factors) == len(wholes) == len(params):
            raise ValueError(f"{len(params)} params need as many factors, got {len(factors)} and {len(wholes)}")
        for p, local, sums in zip(params, self.local_matrices(), factors, strict=True):
            blocks = blocks_of(self.level, p.shape[-1]) if p.dim() else 1
            shapes = [None if x is None else tuple(x.shape) for x in sums]
            fits = self.is_literal or local.numel == (math.prod(p.shape[:-1]) * blocks if p.dim() else 1)
            if not fits or any(x is not None and (x.device != p.device or not x.is_contiguous()) for x in sums):
                raise ValueError(
                    f"a parameter of shape {tuple(p.shape)} at level {self.level} needs contiguous factors on "
                    f"{p.device} for its rows, and for {blocks} columns, got shapes {shapes}"
                )

    @property
    def stated(self) -> Rule:
        """The rule at its level; without slots if there are no first moments."""
        return self._stated

    @property
    def stored(self) -> MomentFormat:
        """See :class:`gwt_kernels.backends.bucket.Bucket`."""
        return super().stored if self.stated.slots else wide(self.params[0].dtype)

    def local_matrices(self) -> list[Matrices]:
        """Return the shapes of this process's moments, from those of the factors."""
        return [
            Matrices.of((*col.shape[:-1], 1 if row is None else row.shape[-1], *col.shape[-1:]))
            for row, col in self.factors
        ]

    def fingerprint(self) -> list[Any]:
        """See :class:`gwt_kernels.backends.bucket.Bucket`."""
        factors = [x for own in self.factors for x in own if x is not None]
        return [*super().fingerprint(), [(id(x), x.data_ptr(), x.dtype, x.shape) for x in factors]]
