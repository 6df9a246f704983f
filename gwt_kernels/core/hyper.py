"""Options of a parameter's update, as every backend takes them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from gwt_kernels.core.level import Level, block_width

Rule = Literal["gwt", "foam", "adamw", "lion", "muon", "adam_mini", "adafactor"]
"""``"gwt"``: arXiv 2501.07237, algorithm 1; ``"foam"``: the folded variant, arXiv 2512.07112; ``"adamw"``: AdamW,
which both equal at level 0; on block means ``"lion"`` (arXiv 2302.06675), ``"muon"``, ``"adam_mini"`` (arXiv
2406.16793) and ``"adafactor"`` (arXiv 1804.04235)."""


Rounding = Literal["nearest", "stochastic", "split"]
"""Rounding of updated weights to 16 bits; ``"split"`` stores the other 16 bits of a float32 in the state."""


Boundary = Literal["zero", "constant", "symmetric", "reflect", "periodic"]
"""Signal extension beyond the ends of a row, by PyWavelets' names."""


class Span(NamedTuple):
    """Positions of a shard's elements in the whole tensor: runs whose starts are ``pitch`` elements apart.

    Element ``e`` of the shard is element ``first + e // run * pitch + e % run`` of the whole.
    """

    first: int
    run: int
    pitch: int


def padded_spans(shape: Sequence[int], level: Level, first_row: int = 0) -> tuple[Span, Span] | None:
    """Return the spans of weights and coefficients among random bits' indices; None if rows are whole blocks.

    The indices pad other rows to a multiple of 4 blocks, so that a call of Philox serves 4 coefficients, or 8
    weights, of one row only.

    Args:
        shape: Shape of the tensor, or of a range of its rows.
        level: Level of the transform.
        first_row: Index of the first of these rows in the whole tensor.
    """
    width = shape[-1] if len(shape) else 1
    block = block_width(level, width)
    if width % block == 0:
        return None
    blocks = -(-width // block)
    padded = -(-blocks // 4) * 4
    weights = Span(first_row * padded * block, width, padded * block)
    return weights, Span(first_row * padded, blocks, padded)


def key_of(seed: int, stream: int) -> int:
    """Return a parameter's Philox key: 32 bits of the seed, 31 bits of the parameter's stream."""
    return (stream & 0x7FFFFFFF) << 32 | seed & 0xFFFFFFFF


def literal_alone(wavelet: str, boundary: str) -> str | None:
    """Return what the folded step does not support, such as ``"wavelet 'db2'"``; None if it supports both."""
    if wavelet != "haar":
        return f"wavelet {wavelet!r}"
    return None if boundary == "zero" else f"boundary {boundary!r}"


def check_rounding(rounding: object, dtype: torch.dtype, wavelet: str, boundary: str = "zero") -> None:
    """Raise a ValueError unless weights of ``dtype`` support this rounding."""
    if not isinstance(rounding, str) or rounding not in get_args(Rounding):
        raise ValueError(
            f"unknown weight_rounding {rounding!r}: use one of {', '.join(map(repr, get_args(Rounding)))}, or None"
        )
    if rounding == "nearest":
        return
    dtypes = (torch.bfloat16,) if rounding == "split" else (torch.bfloat16, torch.float16)
    if dtype not in dtypes:
        raise ValueError(
            f"weight_rounding={rounding!r} is for {' or '.join(map(str, dtypes))} weights, not {dtype}: "
            f"use 'nearest'"
        )
    if unknown := literal_alone(wavelet, boundary):
        raise ValueError(
            f"weight_rounding={rounding!r} knows no {unknown}: use 'nearest', or wavelet='haar' and boundary='zero'"
        )


class Hyper(NamedTuple):
    """Options of one parameter: plain numbers, except a learning rate that is a tensor on the device.

    Attributes:
        lr: Learning rate, at least 0: a number, or a float32 scalar tensor on the parameter's device.
        beta1: Decay of ``exp_avg``, in [0, 1).
        beta2: Decay of ``exp_avg_sq``, in [0, 1).
        eps: Added to the root of ``exp_avg_sq``, at least 0; there is no bias correction inside the root.
        weight_decay: Decoupled weight decay, at least 0.
        scale: Factor on the update of a transformed tensor; ignored by AdamW and by level 0 of its rules.
        norm_growth_limit: The limiter's ``gamma``, at least 1; None for no limiter. Level 0 ignores it.
        maximize: Maximize the objective instead of minimizing it.
        grad_factor: Factor on the gradient: clipping, and the inverse of a loss scale. On the torch backend a
            scalar tensor while operators are traced symbolically.
        correct_bias: Whether the update is multiplied by ``sqrt(1-b2**t) / (1-b1**t)``.
        detail_scale: Factor on the differences of elements from their block mean, for rules that use it.
        rule_options: Options of one rule only, in a record from its module; None for most rules.
    """

    lr: float | Tensor = 1e-3
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-6
    weight_decay: float = 0.0
    scale: float = 0.25
    norm_growth_limit: float | None = 1.01
    maximize: bool = False
    grad_factor: float | Tensor = 1.0
    correct_bias: bool = True
    detail_scale: float = 1.0
    rule_options: Any = None

    @property
    def signed_factor(self) -> Any:
        """``grad_factor``, negated by ``maximize``: a number or a tensor."""
        return -self.grad_factor if self.maximize else self.grad_factor

    def scaled(self, g: Tensor) -> Tensor:
        """Return a gradient times ``signed_factor``; the same object if that is 1."""
        return g if self.signed_factor == 1.0 else g * self.signed_factor

    def step_size(self, step: int, is_scaled: bool | int, corrects_bias: bool = True) -> float:
        """Return the update's factor at ``step`` (1 for the first): ``lr * sqrt(1-b2**t) / (1-b1**t) [* scale]``.

        Source: arXiv 2501.07237, algorithm 1: Adam's bias correction, outside the root. It is omitted with
        ``correct_bias=False`` or a rule without it.
        """
        if not (self.correct_bias and corrects_bias):
            return float(self.lr) * (self.scale if is_scaled else 1.0)
        correction1, correction2 = self._corrections(step)
        return float(self.lr) * math.sqrt(correction2) / correction1 * (self.scale if is_scaled else 1.0)

    def corrected(self, step: int) -> Hyper:
        """Return options with which ``step_size * (m + s*r) / (sqrt(v) + eps)`` has bias-corrected moments.

        With ``c1 = 1 - b1**t`` and ``c2 = 1 - b2**t`` it is ``(m/c1 + s*r) / (sqrt(v/c2) + eps)`` times rate and
        scale: details are multiplied by ``c1``, ``eps`` by ``sqrt(c2)``, since :meth:`step_size` divides by them.
        """
        if not self.correct_bias:
            return self
        correction1, correction2 = self._corrections(step)
        return self._replace(eps=self.eps * math.sqrt(correction2), detail_scale=self.detail_scale * correction1)

    def _corrections(self, step: int) -> tuple[float, float]:
        """Return ``1 - b1**t`` and ``1 - b2**t`` by expm1, which keeps their digits for powers close to 1."""
        correction1 = -math.expm1(step * math.log(self.beta1)) if self.beta1 else 1.0
        correction2 = -math.expm1(step * math.log(self.beta2)) if self.beta2 else 1.0
        return correction1, correction2
