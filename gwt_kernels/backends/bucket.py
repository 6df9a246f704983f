"""Buckets, the tensors that a backend updates together, and their inputs for a step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from itertools import starmap
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gwt_kernels.core.hyper import (
    Boundary,
    Hyper,
    Rounding,
    Rule,
    Span,
    check_rounding,
    literal_alone,
    padded_spans,
)
from gwt_kernels.core.level import ROW, Level, blocks_of
from gwt_kernels.core.tensor_step import TensorStep
from gwt_kernels.formats.moments import FORMATS, MomentFormat, stored_as
from gwt_kernels.rules import Rule as RuleOf
from gwt_kernels.rules import check_rule, rule_of
from gwt_kernels.rules.blocks import Heads, RowSums


class StepInputs(NamedTuple):
    """Inputs of a bucket for one step.

    Attributes:
        grads: Dense gradients of the parameters' shapes, any strides.
        steps: Number of this step per parameter, 1 for the first; or, counted by the device, a contiguous float64
            tensor ``[n]`` on it with the number of steps taken before this one.
        hypers: Options per parameter.
        row_sums: For a bucket with parts of rows, sums over whole rows: ``[rows, Bucket.row_numbers]``.
        head_sums: For a bucket with parts of heads, sums over whole heads: ``[second moments]``.
    """

    grads: Sequence[Tensor]
    steps: Sequence[int] | Tensor
    hypers: Sequence[Hyper]
    row_sums: Tensor | None = None
    head_sums: Tensor | None = None


class Bucket:
    """Tensors of one device that a backend updates together: one dtype of parameters, of gradients and of moments.

    Args:
        params: Floating-point tensors ``[..., N]``, any strides; N may differ between them.
        exp_avgs: First moments of the approximation, contiguous ``[..., nb]``; None under a rule that has none.
        exp_avg_sqs: Second moments, like ``exp_avgs``; None under a rule that has none.
        level: Levels of the transform, or ``"row"``.
        grad_dtype: dtype of the gradients.
        limiter_norms: The limiter's previous norm per parameter, a scalar tensor; None for a bucket without
            limiter.
        rule: Name of the update rule.
        rounding: How updated weights are stored.
        keys: Philox keys per parameter; None for 0.
        lows: Error-correction bits of ``rounding="split"``, contiguous int16 tensors of the parameters' shapes.
        scales: Scales of quantized moments, float32 tensors per parameter, one for each moment.
        spans: Where shards of parameters, and of their moments, lie in the whole; None for whole tensors.
        telemetry: Float64 ``[n, 6]``: see :mod:`gwt_kernels.telemetry`.
        whole_widths: Widths of whole rows if the parameters have parts of rows; None if they have whole rows.
        heads: Rows that share a second moment, if the parameters have parts of heads; None for whole heads.
        wavelet: Name of the wavelet.
        boundary: How the transform continues a row beyond its ends.

    Raises:
        ValueError: lists of different lengths, an unknown rule, rounding, wavelet or boundary, options that do not
            go together, a limiter for some tensors only or under a rule that has none, or a number of second
            moments that does not divide the rows.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        exp_avgs: Sequence[Tensor] | None,
        exp_avg_sqs: Sequence[Tensor | None] | None,
        *,
        level: Level,
        grad_dtype: torch.dtype,
        limiter_norms: Sequence[Tensor | None] | None = None,
        rule: Rule = "gwt",
        rounding: Rounding = "nearest",
        keys: Sequence[int] | None = None,
        lows: Sequence[Tensor | None] | None = None,
        scales: Sequence[tuple[Tensor, ...] | None] | None = None,
        spans: Sequence[tuple[Span, Span]] | None = None,
        telemetry: Tensor | None = None,
        whole_widths: Sequence[int] | None = None,
        heads: Sequence[Heads] | None = None,
        wavelet: str = "haar",
        boundary: Boundary = "zero",
    ) -> None:
        absent = [None] * len(params)
        self.params = params
        self.device = params[0].device if len(params) else torch.device("cpu")
        """Device of all tensors."""
        self.exp_avgs: Sequence[Any] = absent if exp_avgs is None else exp_avgs
        self.exp_avg_sqs = absent if exp_avg_sqs is None else exp_avg_sqs
        self.level, self.rule, self.rounding, self.grad_dtype = level, rule, rounding, grad_dtype
        self.wavelet, self.boundary, self.telemetry, self.spans = wavelet, boundary, telemetry, spans
        self.whole_widths, self.heads = whole_widths, heads
        self.gives_heads = False
        """Whether ``StepInputs.row_sums`` has for each row the mean of squares over its head."""
        self.keys = [0] * len(params) if keys is None else keys
        self.limiter_norms = absent if limiter_norms is None else limiter_norms
        self.lows = absent if lows is None else lows
        self.scales = absent if scales is None else scales
        self._places: Sequence[tuple[Span, Span] | None] = absent if spans is None else spans
        self._check_lengths()
        self._check_rule()
        self._check_transform()
        if spans is None and self.params and self.is_random:
            self._places = [padded_spans(p.shape, level) for p in params]
        self._check_state()
        if self.stated.row_slots and self.heads is None:
            self._check_heads()

    def __len__(self) -> int:
        return len(self.params)

    @property
    def is_limited(self) -> bool:
        """Whether a step limits the growth of the update's norm by itself. Level 0 has no limiter."""
        return bool(self.level) and self.limiter_norms[0] is not None

    @property
    def stored(self) -> MomentFormat:
        """Format of the moments: floating-point numbers, rounded to nearest, if no format has their dtype."""
        return stored_as(self.exp_avgs[0].dtype if self.stated.slots else torch.float32)

    @property
    def stated(self) -> RuleOf:
        """The rule at its level."""
        return rule_of(self.rule, self.level)

    @property
    def is_by_rows(self) -> bool:
        """Whether the update of a block depends on its whole row."""
        return self.level == ROW or bool(self.stated.row_slots)

    @property
    def shares_rows(self) -> bool:
        """Whether rows share a second moment with other rows."""
        kept = zip(self.n_rows, self.moments[1], strict=True) if self.stated.row_slots else ()
        return self.heads is not None or any(v.numel() != n for n, v in kept)

    @cached_property
    def n_rows(self) -> list[int]:
        """Rows of each parameter."""
        return [math.prod(p.shape[:-1]) for p in self.params]

    @property
    def row_numbers(self) -> int:
        """Number of sums that a step needs for each whole row if parameters have parts of rows; else 0."""
        if self.whole_widths is None:
            return 0
        return self.stated.row_numbers(self.level) if self.squares == self.stated.squares else 2

    @property
    def squares(self) -> str | None:
        """``Rule.squares``, but ``"elements"`` if ``gives_heads`` and rows are blocks."""
        return "elements" if self.gives_heads and self.level == ROW else self.stated.squares

    def row_length(self, i: int) -> int:
        """Return the elements of a whole row of a parameter if it is one block, else its blocks."""
        assert self.whole_widths is not None
        width = self.whole_widths[i]
        return width if self.level == ROW else blocks_of(self.level, width)

    @property
    def moments(self) -> list[Sequence[Tensor]]:
        """First moments, and the second ones if there are any."""
        arrays: list[Any] = [self.exp_avgs, self.exp_avg_sqs]
        return arrays[: len(self.stated.slots)]

    @property
    def is_quantized(self) -> bool:
        """Whether moments are stored with scales."""
        return bool(self.stored.scales)

    @property
    def is_random(self) -> bool:
        """Whether weights or moments are rounded stochastically."""
        return self.rounding == "stochastic" or self.stored.is_random

    @property
    def is_literal(self) -> bool:
        """Whether the transform is not one of separate blocks, so that the published algorithm runs literally."""
        return bool(self.level) and literal_alone(self.wavelet, self.boundary) is not None

    @property
    def dtypes(self) -> set[torch.dtype]:
        """dtypes of the floating-point arrays, including gradients."""
        return {self.params[0].dtype, self.grad_dtype, self.stored.arithmetic}

    def fingerprint(self) -> list[Any]:
        """Return what tells this bucket from another: options, tensor objects, and addresses of their memory."""
        arrays: list[Any] = [self.params, self.exp_avgs, self.exp_avg_sqs, self.limiter_norms, self.lows]
        tensors = [x for array in arrays for x in array] + [x for own in self.scales for x in own or ()]
        tensors.append(self.telemetry)
        places = [None if x is None else (id(x), x.data_ptr(), x.dtype, x.shape, x.stride()) for x in tensors]
        options = [self.level, self.rule, self.rounding, self.wavelet, self.boundary, self.grad_dtype]
        return [*options, list(self.keys), self.spans and list(self.spans), places]

    def tensor_steps(self, inputs: StepInputs, divisors: Tensor | None = None) -> list[TensorStep]:
        """Return the step of each tensor; ``divisors`` are the limiter's if the caller has computed them."""
        absent = [None] * len(self)
        columns: Any = (
            self.params,
            inputs.grads,
            self.exp_avgs,
            self.exp_avg_sqs,
            self.limiter_norms,
            inputs.steps,
            inputs.hypers,
            self.keys,
            self.lows,
            self.scales,
            self._places,
            absent if divisors is None else divisors.unbind(),
            absent if self.telemetry is None else self.telemetry.unbind(),
            self._rows_of(inputs),
        )
        return list(starmap(TensorStep, zip(*columns, strict=True)))

    def _rows_of(self, inputs: StepInputs) -> Sequence[RowSums | None]:
        """Return the sums over whole rows of scaled gradients, per parameter."""
        if inputs.row_sums is None:
            return [None] * len(self)
        rows = []
        for i, own in enumerate(torch.split(inputs.row_sums, self.n_rows)):
            sums = [x.reshape(*self.params[i].shape[:-1], 1) for x in own.unbind(1)]
            rows.append(RowSums(self.row_length(i), *sums).scaled(inputs.hypers[i].signed_factor, self.level))
        return rows

    def check_inputs(self, inputs: StepInputs) -> None:
        """Raise a ValueError unless ``inputs`` belong to this bucket; the backend checks shapes."""
        grads, steps, hypers, row_sums, _ = inputs
        n, lengths = len(self), [len(grads), len(steps), len(hypers)]
        if lengths != [n] * 3:
            raise ValueError(f"{n} params need as many of all else, got {lengths}")
        if (0 if row_sums is None else row_sums.shape[1]) != self.row_numbers:
            raise ValueError("a step on parts of rows, and no other, needs sums over whole rows")
        if isinstance(steps, Tensor) and (
            (steps.dtype, steps.device, steps.is_contiguous()) != (torch.float64, self.device, True)
        ):
            raise ValueError(
                f"steps that the device counts must be contiguous float64 on {self.device}, "
                f"got {steps.dtype} on {steps.device}"
            )
        if self.limiter_norms[0] is not None and None in [hyper.norm_growth_limit for hyper in hypers]:
            raise ValueError(
                "norm_growth_limit is None for a parameter that has a limiter norm: pass None in limiter_norms as "
                "well"
            )

    def _check_lengths(self) -> None:
        names = ["exp_avgs", "exp_avg_sqs", "limiter_norms", "keys", "lows", "scales"]
        lengths = {
            name: len(getattr(self, name)) for name in [*names, *(["spans"] if self.spans is not None else [])]
        }
        if any(n != len(self) for n in lengths.values()):
            raise ValueError(f"{len(self)} params need as many of all else, got {lengths}")

    def _check_rule(self) -> None:
        check_rule(self.rule, self.wavelet, self.boundary, self.level)
        slots = self.stated.slots
        found = [name for name in ("exp_avgs", "exp_avg_sqs") if None not in getattr(self, name)]
        if found != [f"{slot}s" for slot in slots]:
            raise ValueError(
                f"rule={self.rule!r} keeps {' and '.join(slots) or 'nothing'}: pass tensors for every parameter of "
                f"what it keeps, and None for the rest, got {' and '.join(found) or 'none'}"
            )

    def _check_transform(self) -> None:
        unknown = literal_alone(self.wavelet, self.boundary)
        if self.telemetry is not None and unknown:
            raise ValueError(
                f"telemetry knows no {unknown}: turn it off, or use wavelet='haar' and boundary='zero'"
            )
        check_rounding(self.rounding, self.params[0].dtype, self.wavelet, self.boundary)
        if self.stored.scales and (self.level == ROW or self.stated.row_slots):
            raise ValueError(f"moments in {self.exp_avgs[0].dtype} have no place in rows: keep them in float32")
        narrow = {x.dtype for x in self.exp_avg_sqs if x is not None} - {torch.float32, torch.float64}
        if self.stated.row_slots and narrow:
            raise ValueError(f"second moments of rows are {narrow.pop()}: keep them in float32")
        if unknown and self.stored.is_random:
            raise ValueError(f"moments in {self.stored.dtypes[0]} know no {unknown}: keep them in float32")

    def _check_state(self) -> None:
        n, slots = len(self), self.stated.slots
        if list(self.lows).count(None) != (0 if self.rounding == "split" else n):
            raise ValueError(
                "lows must hold a tensor for every parameter where rounding='split', and None otherwise"
            )
        counts = {0 if own is None else len(own) for own in self.scales}
        if counts != {len(slots) if self.is_quantized else 0}:
            raise ValueError(
                f"scales must hold {'a pair of tensors' if len(slots) > 1 else 'a tensor'} for every parameter "
                f"whose moments are "
                f"{' or '.join(x.name for x in FORMATS.values() if x.scales)}, else None"
            )
        absent = [norm is None for norm in self.limiter_norms].count(True)
        if 0 < absent < n:
            raise ValueError(
                "limiter_norms must hold a tensor for every parameter of the bucket, or None for every one"
            )
        if rule_of(self.rule).norm_growth_limit is None and not absent:
            raise ValueError(f"rule={self.rule!r} has no limiter: pass None in limiter_norms for every parameter")

    def _check_heads(self) -> None:
        for rows, v in zip(self.n_rows, self.moments[1], strict=True):
            heads = v.numel()
            if rows % heads if heads else rows:
                raise ValueError(
                    f"{rows} rows cannot share {heads} second moments: pass one for every n rows, or for all"
                )
