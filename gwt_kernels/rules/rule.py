"""What an update rule is: a name, the state it keeps, its limiter, and its statements in PyTorch and in Triton."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from gwt_kernels.core import kernel
from gwt_kernels.core.hyper import Hyper
from gwt_kernels.core.level import ROW, Level
from gwt_kernels.core.notes import Notes
from gwt_kernels.rules.blocks import RowSums, block_sums, cut_like, pad_to_blocks, width_of


class Context(NamedTuple):
    """What a rule's statements are told besides tensors.

    Attributes:
        hyper: Options of the parameter.
        level: Levels of the transform.
        notes: Told of gradient and update where the step is observed.
        rows: Where the gradient has some columns of rows that it shares with other processes, the sums that the
            rule needs of whole rows, of the gradient times its factor.
    """

    hyper: Hyper
    level: Level
    notes: Notes | None = None
    rows: RowSums | None = None

    def scaled_blocks(self, g: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, int]:
        """The gradient times its factor, padded to whole blocks; the means of these; and their width."""
        width = width_of(g, self.level, self.rows)
        g = self.hyper.scaled(pad_to_blocks(g.to(dtype), self.level))
        mean = block_sums(g, self.level, self.rows).div_(width) if self.level else g
        if self.notes is not None:
            self.notes.gradient(g, 1.0, mean, width)
        return g, mean, width


def subtract(p: Tensor, g: Tensor, parts: tuple[Tensor, ...], step_size: Tensor | float, context: Context) -> None:
    """The :data:`Update` of rules without limiter whose moments return the updates of elements, in whole blocks."""
    update = cut_like(parts[0], p)
    p.sub_(update, alpha=step_size)  # type: ignore[arg-type]  # a number, as there is no limiter
    if context.notes is not None:
        context.notes.update(update, float(step_size))


Moments = Callable[[Tensor, Tensor, Any, Context], tuple[Tensor, ...]]
"""Update first and second moment in place from a gradient: ``moments(g, m, v, context)``.

``g`` is ``[..., N]`` in any dtype; ``m`` and ``v`` are ``[..., nb]``, a number a block, in the arithmetic's;
``v`` is None for a rule without second moment. Returns what :data:`Update` takes.
"""

Update = Callable[[Tensor, Tensor, tuple[Tensor, ...], Tensor | float, Context], None]
"""Subtract the update from weights in place: ``update_(p, g, parts, step_size, context)``.

``p`` is ``[..., N]`` in the dtype of the arithmetic, its weight decay already applied; ``parts`` are what
:data:`Moments` returned, and may be overwritten.
"""


class Kernel(NamedTuple):
    """A rule in Triton's language, on the tile of a program: ``NB`` blocks of ``W`` elements, in float32.

    ``numbers`` are ``b1, 1 - b1, b2, 1 - b2, eps, detail_scale``. A kernel finds means and residuals.

    Attributes:
        moments: ``kernel_moments(mean, square, m, v, numbers, root)``, of the blocks' means, of the means of
            squares that the rule takes, and of ``m`` and ``v``, all ``[NB]``, and ``root``, the square root
            of ``W``: the new ``m`` and ``v``. A rule without second moment gets any ``v``, and returns as ``v``
            what its update takes of a block.
        update: ``kernel_update(g, residual, m, v, step_size, numbers, per_root)``, of gradients and residuals
            ``[NB, W]`` and ``1 / root``: what is subtracted from the weights, ``[NB, W]``.
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
        row_slots: Those of them that are one number for a row, or for rows that belong together, and not for a
            block: they are kept in float32 whatever ``state_dtype``.
        plain: The rule that it is at level 0; None for itself.
        statements: Names of ``kernel_moments`` and ``kernel_update`` in the module.
        last_stage: The rule that takes what becomes of this one's result, a batch of matrices, as gradients; None
        where
            the update is element-wise.
        reads_weights: Whether an update changes weights; else it takes their place, without weight decay.
        norm_growth_limit: The limiter's default gamma; None for none.
        is_scaled: Whether the option ``scale`` multiplies its update.
        corrects_bias: Whether it knows Adam's bias correction.
        corrects_inside: Whether that is of the moments alone, inside the root: see :meth:`Hyper.corrected`.
        takes_detail_scale: Whether it takes a factor on details.
        squares: What else of a block its moments take in Triton: the mean of the squares of its ``"elements"``, or
            of the ``"coefficients"`` that share a second moment.
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
    row_slots: tuple[str, ...] = ()
    plain: Rule | None = None
    statements: tuple[str, str] = ("kernel_moments", "kernel_update")
    last_stage: Rule | None = None
    reads_weights: bool = True
    norm_growth_limit: float | None = None
    is_scaled: bool = True
    corrects_bias: bool = True
    corrects_inside: bool = False
    takes_detail_scale: bool = False
    squares: Literal["elements", "coefficients"] | None = None
    is_literal: bool = False
    is_of_elements: bool = False
    is_factored: bool = False

    def row_numbers(self, level: Level) -> int:
        """How many sums over a whole row a step needs where processes hold parts of it: see :class:`RowSums`."""
        return 2 if level == ROW and self.squares == "elements" else 1

    @property
    def kernel(self) -> Kernel:
        """Its statements in Triton's language, which are Triton's own functions from now on."""
        kernel.load()
        module = sys.modules[self.module]
        moments, update = (getattr(module, name) for name in self.statements)
        return Kernel(moments, update, getattr(module, "kernel_direction", None))
