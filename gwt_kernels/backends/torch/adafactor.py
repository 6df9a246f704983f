"""Adafactor's step in plain PyTorch, in stages between which sums may be added up over processes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gwt_kernels.backends.bucket import StepInputs
from gwt_kernels.backends.factored_bucket import FactoredBucket
from gwt_kernels.backends.torch.literal import filter_bank, wavedec, waverec
from gwt_kernels.backends.torch.runner import TorchRunner
from gwt_kernels.backends.torch.step import chunks, dtype_of, scaled_ahead
from gwt_kernels.backends.torch.storage import Chunk, Storage
from gwt_kernels.core.factored import Matrices
from gwt_kernels.core.notes import Notes
from gwt_kernels.core.tensor_step import TensorStep
from gwt_kernels.rules.blocks import block_sums, width_of
from gwt_kernels.rules.rule import Context


class AdafactorRunner(TorchRunner):
    """See :class:`gwt_kernels.backends.runner.StagedRunner`."""

    def __init__(self, bucket: FactoredBucket) -> None:
        super().__init__(bucket)
        self._factored = bucket

    def apply(self, inputs: StepInputs, decision: Tensor | None = None, divisors: Tensor | None = None) -> None:
        """See :class:`gwt_kernels.backends.runner.Runner`."""
        ready = self.decided(inputs, decision)
        if ready is None:
            return
        for update in self._updates(ready, keeps=True):
            update.finish(update.squares(update.sums()))
        self.count(inputs)

    def stages(self, inputs: StepInputs, decision: Tensor | None = None) -> Iterator[Tensor]:
        """See :class:`gwt_kernels.backends.runner.StagedRunner`."""
        ready = self.decided(inputs, decision)
        if ready is None:
            return
        updates = self._updates(ready, keeps=False)
        sums = torch.cat([update.sums() for update in updates])
        yield sums
        parts = torch.split(sums, [sum(update.local.parts) for update in updates])
        squares = torch.stack([update.squares(part) for update, part in zip(updates, parts, strict=True)])
        yield squares
        for update, total in zip(updates, squares.unbind(), strict=True):
            update.finish(total)
        self.count(inputs)

    def _updates(self, inputs: StepInputs, keeps: bool) -> list[_Update]:
        bucket = self._factored
        return [
            _Update(bucket, i, scaled_ahead(tensor_step), keeps)
            for i, tensor_step in enumerate(bucket.tensor_steps(inputs))
        ]


class Factors(NamedTuple):
    """Factors updated with a step's squares, and the mean of the row factors per matrix."""

    row: Tensor | None
    col: Tensor
    mean: Tensor


def new_factors(
    old: tuple[Tensor | None, Tensor], sums: Sequence[Tensor], whole: Matrices, eps: float, rest2: float | Tensor
) -> Factors:
    """Return factors updated with sums of :attr:`gwt_kernels.core.factored.Matrices.parts`, over whole tensors.

    The result has the dtype of the sums, which may be wider than that of the factors.
    """
    rows, columns, means = sums
    row, col = (None if factor is None else factor.to(rows.dtype) for factor in old)
    assert col is not None
    n_rows, n_columns = max(whole.rows, 1), max(whole.columns, 1)
    new_row = None if row is None else row.lerp(rows.div(n_columns).add_(eps).view(row.shape), rest2)
    new_col = col.lerp(columns.div(n_rows).add_(eps).view(col.shape), rest2)
    return Factors(new_row, new_col, means.div(n_rows).add_(rest2 * eps))


class _Update:
    """The step of one tensor, in the notation of ``rules/adafactor.py``.

    Args:
        bucket: The tensor's bucket.
        place: The tensor's index in the bucket.
        tensor_step: The tensor's step.
        keeps: Whether to keep the squares, as large as the moments, for later stages; else compute them again.
    """

    def __init__(self, bucket: FactoredBucket, place: int, tensor_step: TensorStep, keeps: bool) -> None:
        self._bucket, self._tensor_step, self._keeps = bucket, tensor_step, keeps
        self._factors, self.local = bucket.factors[place], bucket.local_matrices()[place]
        self._whole, self._numel = bucket.matrices[place], bucket.numels[place]
        self._dtype = dtype_of(tensor_step)
        self._rest2 = tensor_step.hyper.rule_options.rest2(tensor_step.step)
        self._kept: Tensor | None = None
        self._new: Factors | None = None
        self._weights = self._factors[1].new_zeros(())

    def sums(self) -> Tensor:
        """Return the sums of :attr:`gwt_kernels.core.factored.Matrices.parts`."""
        tensor_step, (row, _), whole = self._tensor_step, self._factors, self._whole
        squares = self._squares()
        rows, columns = squares.sum(-1), squares.sum(-2)
        means = rows.new_zeros(self.local.batch)
        if row is not None:
            # Other processes may hold the same rows: each counts old factors by its share of the columns.
            share = self.local.columns / max(whole.columns, 1)
            means = rows.mul(self._rest2 / max(whole.columns, 1)).add_(
                row.view(rows.shape), alpha=(1 - self._rest2) * share
            )
            means = means.sum(-1)
        weights = rows.new_zeros(1)
        if tensor_step.hyper.rule_options.least_rms is not None:
            weights = self._load_weights().square().sum().view(1)
        return torch.cat([rows.view(-1), columns.view(-1), means, weights])

    def squares(self, sums: Tensor) -> Tensor:
        """Compute new factors from the sums over the whole tensor; return the sum of squares of ``A / d``."""
        *parts, weights = torch.split(sums, self.local.parts)
        self._new = new_factors(
            self._factors, parts, self._whole, self._tensor_step.hyper.rule_options.eps, self._rest2
        )
        self._weights = weights.view(())
        row, col, mean = self._new
        sums = (self._squares() / col.view(self.local.batch, 1, self.local.columns)).sum(-1)
        if row is not None:
            sums.mul_(mean.view(-1, 1)).div_(row.view(sums.shape))  # a row of zeros stays 0
        return sums.sum()

    def finish(self, total: Tensor) -> None:
        """Update factors, first moment and weights; ``total`` is the whole tensor's :meth:`squares`."""
        assert self._new is not None
        tensor_step, hyper, (row, col) = self._tensor_step, self._tensor_step.hyper, self._factors
        mean_square = total / max(self._whole.numel, 1)
        clip = (mean_square.sqrt() / hyper.rule_options.clip_threshold).clamp(min=1.0)
        rate: Any = hyper.rule_options.rate(hyper, tensor_step.step)
        if hyper.rule_options.least_rms is not None:
            rate = rate * (self._weights / max(self._numel, 1)).sqrt().clamp(min=hyper.rule_options.least_rms)
        if tensor_step.p.numel():
            denominators = self._denominators(clip)
            notes = None if tensor_step.row is None else Notes(tensor_step.row)
            if self._bucket.is_literal:
                self._transform(denominators, rate)
            else:
                self._fold(denominators, rate, notes)
            if notes is not None:
                notes.limit(clip)
                notes.close()
        if self._new.row is not None and row is not None:
            row.copy_(self._new.row)
        col.copy_(self._new.col)
        self._kept = None

    def _fold(self, denominators: Tensor, rate: Any, notes: Notes | None) -> None:
        """Update first moment and weights, chunk by chunk, by the rule's statements."""
        bucket, tensor_step, hyper, rule = (
            self._bucket,
            self._tensor_step,
            self._tensor_step.hyper,
            self._bucket.stated,
        )
        storage = Storage(
            bucket.level, bucket.stored, bucket.rounding, tensor_step.step, tensor_step.key, tensor_step.span, notes
        )
        step_size = rate * (hyper.scale if rule.is_scaled else 1.0)
        first, told = denominators if tensor_step.m is None else tensor_step.m, Context(hyper, bucket.level, notes)
        for chunk in chunks(tensor_step._replace(m=first, v=denominators), bucket.stored.block_size(bucket.level)):
            held = chunk._replace(v=None)
            moments: list[Any] = [None] if tensor_step.m is None else storage.load_moments(held, self._dtype)
            parts = rule.moments(chunk.g, moments[0], chunk.v, told)
            p = storage.load_weights(chunk, self._dtype)
            if hyper.weight_decay:
                p.mul_(1 - rate * hyper.weight_decay)
            rule.update_(p, chunk.g, parts, step_size, told)
            if tensor_step.m is not None:
                storage.store_moments(held, moments)
            storage.store_weights(chunk, p)

    def _transform(self, denominators: Tensor, rate: Any) -> None:
        """Update first moment and weights by the transform and its inverse."""
        tensor_step, hyper = self._tensor_step, self._tensor_step.hyper
        a, *details = self._approximation()
        u = a / denominators
        if tensor_step.m is not None:
            u = tensor_step.m.to(u.dtype) * hyper.beta1 + (1 - hyper.beta1) * u
            tensor_step.m.copy_(u)
        coeffs = [u]
        for i, detail in enumerate(details):
            if hyper.rule_options.divides_details:
                if i:
                    denominators = denominators.repeat_interleave(2, dim=-1)[..., : detail.shape[-1]]
                detail = detail / denominators
            coeffs.append(detail)
        update = waverec(coeffs, filter_bank(self._bucket.wavelet))[..., : tensor_step.p.shape[-1]]
        p = tensor_step.p.to(u.dtype) * (1 - rate * hyper.weight_decay)
        tensor_step.p.copy_(p - update * (rate * hyper.scale))

    def _squares(self) -> Tensor:
        """Return the squares of the approximation, as matrices."""
        if self._kept is not None:
            return self._kept
        squares = self._approximation()[0].reshape(self.local).square()
        if self._keeps:
            self._kept = squares
        return squares

    def _approximation(self) -> list[Tensor]:
        """Return the approximation of the gradient, and its details if the transform is literal."""
        bucket, g, factor = self._bucket, self._tensor_step.g.to(self._dtype), self._tensor_step.hyper.signed_factor
        if bucket.is_literal and g.numel():
            return wavedec(g * factor, filter_bank(bucket.wavelet), int(bucket.level), bucket.boundary)
        if bucket.is_literal:
            return [g.new_zeros(self.local)]
        if bucket.level:
            return [block_sums(g, bucket.level).mul_(factor / math.sqrt(width_of(g, bucket.level)))]
        return [self._tensor_step.hyper.scaled(g)]

    def _denominators(self, clip: Tensor) -> Tensor:
        """Return ``d * clip``, in the moments' shape."""
        assert self._new is not None
        row, col, mean = self._new
        made = col.sqrt().mul_(clip)
        if row is not None:
            made = made.unsqueeze(-2) * (row.sqrt() / mean.sqrt().view(*row.shape[:-1], 1)).unsqueeze(-1)
        return made.clamp_(min=self._tensor_step.hyper.rule_options.eps)  # smaller ones have zero gradients

    def _load_weights(self) -> Tensor:
        tensor_step, storage = self._tensor_step, Storage(self._bucket.level, self._bucket.stored, "nearest", 0, 0)
        chunk = Chunk(tensor_step.p, tensor_step.g, tensor_step.p, None, tensor_step.low, None, 0, 0)
        return storage.load_weights(chunk, self._dtype)
