"""What an update rule is: a name, the state it keeps, its limiter, and its statements in PyTorch and in Triton."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from gwt_kernels.core import kernel
from gwt_kernels.core.hyper import Hyper
from gwt_kernels.core.notes import Notes

__all__ = ["Kernel", "Moments", "Rule", "Update"]

Moments = Callable[[Tensor, Tensor, Any, Hyper, int, Notes | None], tuple[Tensor, ...]]
"""Update first and second moment in place from a gradient: ``moments(g, m, v, hyper, level, notes)``.

``g`` is ``[..., N]`` in any dtype; ``m`` and ``v`` are ``[..., ceil(N / 2**level)]`` in the arithmetic's; ``v`` is
None for a rule without second moment.
Returns what :data:`Update` takes.
"""

Update = Callable[[Tensor, Tensor, tuple[Tensor, ...], Tensor | float, Hyper, int, Notes | None], None]
"""Subtract the update from weights in place: ``update_(p, g, parts, step_size, hyper, level, notes)``.

``p`` is ``[..., N]`` in the dtype of the arithmetic, its weight decay already applied; ``parts`` are what
:data:`Moments` returned, and may be overwritten.
"""


class Kernel(NamedTuple):
    """A rule in Triton's language, on the tile of a program: ``NB`` blocks of ``W`` elements, in float32.

    ``numbers`` are ``b1, 1 - b1, b2, 1 - b2, eps, detail_scale``; ``KIND`` is the kind of the tile (``tiles.py``).

    Attributes:
        moments: ``kernel_moments(g, m, v, numbers, W, NB, KIND)``, of ``g [NB * W]``, ``m`` and ``v`` ``[NB]``: the
            means ``[NB]``, the residuals ``[NB, W]``, and the new ``m`` and ``v``. A rule without second moment
            gets any ``v``, and returns as ``v`` what its update takes of a block.
        update: ``kernel_update(residual, m, v, step_size, numbers, W, NB)``: what is subtracted from the weights,
            ``[NB, W]``.
        direction: ``kernel_direction(m, v, numbers)``, ``[NB]``; None for a rule without limiter.
    """

    moments: Any
    update: Any
    direction: Any


@dataclass(frozen=True)
class Rule:
    """An element-wise update rule on the block means of a gradient.

    Attributes:
        name: The option ``rule`` of an optimizer.
        module: Where its statements stand; those in Triton's language as :class:`Kernel` names them.
        moments: The PyTorch statement of its moments.
        update_: The PyTorch statement of its update.
        direction: The part of the update whose norm the limiter compares, from what ``moments`` returned, as a
            tensor of its own; None for a rule without limiter.
        slots: State entries that hold its moments, in order.
        plain: The rule that it is at level 0; None for itself.
        norm_growth_limit: The limiter's default gamma; None for none.
        is_scaled: Whether the option ``scale`` multiplies its update.
        corrects_bias: Whether it knows Adam's bias correction.
        takes_detail_scale: Whether it takes a factor on details.
        is_literal: Whether the published algorithm states it for every wavelet and boundary.
        is_of_elements: Whether moments are averages of elements: of a block's mean, and of the mean of its squares;
            else of its approximation coefficient.
        is_factored: Whether it keeps the factors of a second moment (``core/factored.py``) beside ``slots``.
    """

    name: str
    module: str
    moments: Moments
    update_: Update
    direction: Callable[[tuple[Tensor, ...]], Tensor] | None = None
    slots: tuple[str, ...] = ("exp_avg", "exp_avg_sq")
    plain: Rule | None = None
    norm_growth_limit: float | None = None
    is_scaled: bool = True
    corrects_bias: bool = True
    takes_detail_scale: bool = False
    is_literal: bool = False
    is_of_elements: bool = False
    is_factored: bool = False

    @property
    def kernel(self) -> Kernel:
        """Its statements in Triton's language, which are Triton's own functions from now on."""
        kernel.load()
        module = sys.modules[self.module]
        return Kernel(module.kernel_moments, module.kernel_update, getattr(module, "kernel_direction", None))
