"""Interface of an update rule: its name, state and limiter, and its statements in PyTorch and in Triton."""

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
    """Arguments of a rule's statements besides tensors.

    Attributes:
        hyper: Options of the parameter.
        level: Levels of the transform.
        notes: Receives gradient and update for telemetry; None without telemetry.
        rows: If other processes hold columns of the gradient's rows, the sums over whole rows that the rule needs,
            of the gradient times its factor.
    """

    hyper: Hyper
    level: Level
    notes: Notes | None = None
    rows: RowSums | None = None

    def scaled_blocks(self, g: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, int]:
        """Return the gradient times its factor, padded to whole blocks; the blocks' means; and their width."""
        width = width_of(g, self.level, self.rows)
        g = self.hyper.scaled(pad_to_blocks(g.to(dtype), self.level))
        mean = block_sums(g, self.level, self.rows).div_(width) if self.level else g
        if self.notes is not None:
            self.notes.gradient(g, 1.0, mean, width)
        return g, mean, width


def subtract(p: Tensor, g: Tensor, parts: tuple[Tensor, ...], step_size: Tensor | float, context: Context) -> None:
    """Subtract the whole blocks of updates that moments returned: :data:`Update` of rules without limiter."""
    update = cut_like(parts[0], p)
    p.sub_(update, alpha=step_size)  # type: ignore[arg-type]  # a number, as there is no limiter
    if context.notes is not None:
        context.notes.update(update, float(step_size))


Moments = Callable[[Tensor, Tensor, Any, Context], tuple[Tensor, ...]]
"""Update first and second moment in place from a gradient: ``moments(g, m, v, context)``.

``g`` is ``[..., N]`` in any dtype; ``m`` and ``v`` are ``[..., nb]``, one number per block, in the dtype of the
arithmetic; ``v`` is None for a rule without second moment. Returns the ``parts`` that :data:`Update` takes.
"""

Update = Callable[[Tensor, Tensor, tuple[Tensor, ...], Tensor | float, Context], None]
"""Subtract the update from weights in place: ``update_(p, g, parts, step_size, context)``.

``p`` is ``[..., N]`` in the dtype of the arithmetic, its weight decay already applied; ``parts`` are what
:data:`Moments` returned, and may be overwritten.
"""


class Kernel(NamedTuple):
    """A rule's statements in Triton, for the tile of a program: ``NB`` blocks of ``W`` elements, in float32.

    ``numbers`` are ``b1, 1 - b1, b2, 1 - b2, eps, detail_scale``. The calling kernel computes means and residuals.

    Attributes:
        moments: ``kernel_moments(mean, square, m, v, numbers, root)`` returns the new ``m`` and ``v``, from the
            blocks' means, the means of the squares ``Rule.squares``, and the old ``m`` and ``v``, all ``[NB]``.
            ``root`` is ``sqrt(W)``. A rule without second moment gets any ``v``, and returns as ``v`` the numbers
            of each block that its update takes.
        update: ``kernel_update(g, residual, m, v, step_size, numbers, per_root)`` returns the numbers to subtract
            from the weights, ``[NB, W]``, from gradients and residuals ``[NB, W]``. ``per_root`` is ``1 / root``.
        direction: ``kernel_direction(m, v, numbers)``: see ``Rule.direction``; ``[NB]``. None without limiter.
    """

    moments: Any
    update: Any
    direction: Any


@dataclass(frozen=True)
class Rule:
    """An element-wise update rule on the block means of a gradient.

    Attributes:
        name: The option ``rule`` of an optimizer.
        module: Name of the module that has its statements; those in Triton have the names in :class:`Kernel`.
        moments: The PyTorch statement of its moments.
        update_: The PyTorch statement of its update.
        direction: Returns, from the result of ``moments``, the part of the update whose norm the limiter compares,
            as a new tensor; None for a rule without limiter.
        slots: State entries that hold its moments, in order.
        row_slots: Those ``slots`` that have a number for a row, or for the rows of a head, instead of a block; they
            are kept in float32 (float64 for float64 parameters), whatever the ``state_dtype``.
        plain: The rule to which it reduces at level 0; None for itself.
        statements: Names of ``kernel_moments`` and ``kernel_update`` in the module.
        last_stage: The rule that takes the matrices made of this rule's result as gradients; None if the update is
            element-wise.
        reads_weights: Whether an update changes weights; otherwise it replaces them, without weight decay.
        norm_growth_limit: The limiter's default gamma; None for no limiter.
        is_scaled: Whether the option ``scale`` multiplies its update.
        corrects_bias: Whether it has Adam's bias correction.
        corrects_inside: Whether it corrects only the moments, inside the root: see :meth:`Hyper.corrected`.
        takes_detail_scale: Whether it takes a factor on details.
        squares: Squares whose mean its moments take in Triton: those of a block's ``"elements"``, or of the
            ``"coefficients"`` that share a second moment; None for none.
        is_literal: Whether the published algorithm defines it for every wavelet and boundary.
        is_of_elements: Whether a first moment averages block means, and a second moment of a block the mean of its
            squared elements; otherwise both are of the approximation coefficient.
        is_factored: Whether it also keeps the factors of a second moment (``core/factored.py``).
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
        """Return the number of sums over a row that a step needs where processes hold parts: :class:`RowSums`."""
        return 2 if level == ROW and self.squares == "elements" else 1

    @property
    def kernel(self) -> Kernel:
        """The rule's statements in Triton, wrapped by ``triton.jit`` at the first access."""
        kernel.load()
        module = sys.modules[self.module]
        moments, update = (getattr(module, name) for name in self.statements)
        return Kernel(moments, update, getattr(module, "kernel_direction", None))
