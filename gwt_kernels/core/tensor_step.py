"""One tensor of a bucket and all that belongs to it, for backends that update one tensor after another."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from gwt_kernels.core.hyper import Hyper, Span

__all__ = ["TensorStep"]


class TensorStep(NamedTuple):
    """Each as :func:`gwt_kernels.functional.gwt_adamw_` takes a list of it."""

    p: Tensor
    g: Tensor
    m: Tensor
    """``exp_avg``."""
    v: Tensor
    """``exp_avg_sq``."""
    norm: Tensor | None
    """The limiter's previous one."""
    step: int
    hyper: Hyper
    key: int = 0
    low: Tensor | None = None
    scales: tuple[Tensor, Tensor] | None = None
    span: tuple[Span, Span] | None = None
    limit: Tensor | None = None
    row: Tensor | None = None
    """Telemetry's."""
