"""Update rows that share a second moment, each with a copy of it, and the shared second moments separately."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy

import torch
from torch import Tensor

from gwt_kernels.backends.bucket import Bucket, StepInputs
from gwt_kernels.backends.runner import ElementwiseRunner, OnePassRunner
from gwt_kernels.core.level import ROW, blocks_of
from gwt_kernels.core.send import send
from gwt_kernels.rules.blocks import Heads


class HeadsRunner(OnePassRunner):
    """See :class:`gwt_kernels.backends.runner.Runner`. A head is the rows that share a second moment.

    Sums over rows are added up to sums over heads. Each row then uses the mean of its head and a copy of its head's
    second moment, as a part of a row uses sums over the whole row. The second moments themselves are updated as
    those of rows without columns: all that a process keeps, also for heads of which it has no row.

    Args:
        bucket: A bucket whose rows share second moments.
        make: Returns the runner of a bucket whose rows share none.
        summer: Returns a function that adds up the rows of a bucket's gradients.
    """

    def __init__(
        self,
        bucket: Bucket,
        make: Callable[[Bucket], ElementwiseRunner],
        summer: Callable[[Bucket], Callable[[Sequence[Tensor]], Tensor]],
    ) -> None:
        self.bucket = bucket
        device, seconds = bucket.device, [v.reshape(-1, 1) for v in bucket.moments[1]]
        heads = bucket.heads or list(map(_equal_heads, bucket.n_rows, map(len, seconds)))
        lengths = torch.tensor([n for each in heads for n in each.lengths], dtype=torch.int64, device="cpu")
        wholes = torch.tensor([each.rows for each in heads for _ in each.lengths], dtype=torch.int64, device="cpu")
        self._lengths, self._wholes = send(lengths, device), send(wholes, device)
        owners = torch.arange(len(lengths), dtype=torch.int64, device=device)
        self._owners = torch.repeat_interleave(owners, self._lengths, output_size=sum(bucket.n_rows))
        self._copies = torch.empty(len(self._owners), dtype=seconds[0].dtype, device=device)

        given = copy(bucket)
        given.heads = None
        if given.whole_widths is None:
            given.whole_widths = [max(1, p.shape[-1]) if p.dim() else 1 for p in bucket.params]
        self._sum_rows = summer(given)
        of_rows = copy(given)
        of_rows.gives_heads = True
        of_rows.exp_avg_sqs = [
            v.view((*p.shape[:-1], 1) if p.dim() else ())
            for p, v in zip(bucket.params, torch.split(self._copies, bucket.n_rows), strict=True)
        ]
        of_heads = Bucket(
            [p.new_empty(len(v), 0) for p, v in zip(bucket.params, seconds, strict=True)],
            [v.new_zeros(len(v), blocks_of(bucket.level, 0)) for v in seconds],
            seconds,
            level=bucket.level,
            grad_dtype=bucket.grad_dtype,
            rule=bucket.rule,
            whole_widths=given.whole_widths,
        )
        of_heads.gives_heads = True
        self._no_grads = [p.to(bucket.grad_dtype) for p in of_heads.params]
        self._runners = make(of_heads), make(of_rows)
        self.survey = self._runners[1].survey

    def set_params(self, params: Sequence[Tensor]) -> None:
        """See :class:`gwt_kernels.backends.runner.ElementwiseRunner`."""
        self.bucket.params = params
        self._runners[1].set_params(params)

    def head_sums(self, row_sums: Tensor) -> Tensor:
        """Return sums of squares over the rows here of each head: in double, in a fixed order, finite or NaN."""
        squares = row_sums[:, 0].double()
        if self.bucket.level == ROW:
            squares = squares.square()
        sums = torch.segment_reduce(squares, "sum", lengths=self._lengths, initial=0, unsafe=True)
        return cap_(sums.to(self._copies.dtype))

    def apply(self, inputs: StepInputs, decision: Tensor | None = None, divisors: Tensor | None = None) -> None:
        """See :class:`gwt_kernels.backends.runner.Runner`."""
        of_heads, of_rows = self._runners
        row_sums = self._sum_rows(inputs.grads) if inputs.row_sums is None else inputs.row_sums
        head_sums = self.head_sums(row_sums) if inputs.head_sums is None else inputs.head_sums
        means = (head_sums / self._wholes).to(self._copies.dtype)
        seconds = [v.reshape(-1) for v in self.bucket.moments[1]]
        torch.index_select(torch.cat(seconds), 0, self._owners, out=self._copies)
        steps = inputs.steps.clone() if isinstance(inputs.steps, Tensor) else inputs.steps
        of_heads.apply(
            inputs._replace(grads=self._no_grads, steps=steps, row_sums=self._numbers(means, means)), decision
        )
        told = self._numbers(row_sums[:, 0], means.index_select(0, self._owners))
        of_rows.apply(inputs._replace(row_sums=told), decision, divisors)

    def memory(self) -> list[object]:
        """See :class:`gwt_kernels.backends.runner.Runner`."""
        return [self, *(x for runner in self._runners for x in runner.memory())]

    def _numbers(self, sums: Tensor, means: Tensor) -> Tensor:
        """Return ``row_sums``: the means of the rows' heads, after the rows' own sums if rows are blocks."""
        return torch.stack((sums, means), 1) if self.bucket.level == ROW else means.unsqueeze(1)


def cap_(squares: Tensor) -> Tensor:
    """Replace overflowed sums of squares by the largest number, which times 0 is 0; infinity would give NaN."""
    return squares.clamp_(max=torch.finfo(squares.dtype).max)


def _equal_heads(rows: int, heads: int) -> Heads:
    """Return ``heads`` heads that divide ``rows`` rows equally."""
    return Heads([rows // heads] * heads, max(1, rows // heads)) if heads else Heads([], 1)
