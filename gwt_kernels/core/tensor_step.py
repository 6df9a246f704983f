"""One tensor's part of a step, for backends that update tensors one after another."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from gwt_kernels.core.hyper import Hyper, Span


class TensorStep(NamedTuple):
    """One element of each list that :func:`gwt_kernels.functional.gwt_adamw_` takes."""

    p: Tensor
    g: Tensor
    m: Any
    """``exp_avg``; None for a rule without moments."""
    v: Any
    """``exp_avg_sq``; None for a rule without second moment."""
    norm: Tensor | None
    """The limiter's previous norm."""
    step: int
    hyper: Hyper
    key: int = 0
    low: Tensor | None = None
    scales: tuple[Tensor, ...] | None = None
    span: tuple[Span, Span] | None = None
    limit: Tensor | None = None
    row: Tensor | None = None
    """Row of telemetry."""
    rows: Any = None
    """:class:`gwt_kernels.rules.blocks.RowSums`, where other processes hold parts of the rows, or None."""

    @property
    def moments(self) -> list[Tensor]:
        """The first moment, and the second if there is one."""
        return [x for x in (self.m, self.v) if x is not None]
