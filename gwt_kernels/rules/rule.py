"""What an update rule is: a name, the state it keeps, its limiter, and its statements in PyTorch and in Triton."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from gwt_kernels.core.notes import Notes
from gwt_kernels.hyper import Hyper

__all__ = ["Moments", "Rule", "Update"]

Moments = Callable[[Tensor, Tensor, Tensor, Hyper, int, Notes | None], tuple[Tensor, ...]]
"""Update first and second moment in place from a gradient: ``moments(g, m, v, hyper, level, notes)``.

``g`` is ``[..., N]`` in any dtype; ``m`` and ``v`` are ``[..., ceil(N / 2**level)]`` in the arithmetic's.
Returns what :data:`Update` takes.
"""

Update = Callable[[Tensor, Tensor, tuple[Tensor, ...], Tensor | float, Hyper, int, Notes | None], None]
"""Subtract the update from weights in place: ``update_(p, g, parts, step_size, hyper, level, notes)``.

``p`` is ``[..., N]`` in the dtype of the arithmetic, its weight decay already applied; ``parts`` are what
:data:`Moments` returned, and may be overwritten.
"""


@dataclass(frozen=True)
class Rule:
    """An element-wise update rule on the block means of a gradient.

    Attributes:
        name: The option ``rule`` of an optimizer.
        moments: The PyTorch statement of its moments.
        update_: The PyTorch statement of its update.
        direction: The part of the update whose norm the limiter compares, from what ``moments`` returned, as a
            tensor of its own; None for a rule without limiter.
        norm_growth_limit: The limiter's default gamma; None for none.
        is_literal: Whether the published algorithm states it for every wavelet and boundary.
    """

    name: str
    moments: Moments
    update_: Update
    direction: Callable[[tuple[Tensor, ...]], Tensor] | None = None
    norm_growth_limit: float | None = None
    is_literal: bool = False
