"""Run Adafactor's step in C, or by PyTorch's operators if C does not support the bucket or a gradient."""

from __future__ import annotations

from torch import Tensor

from gwt_kernels.backends.bucket import StepInputs
from gwt_kernels.backends.cpu import step
from gwt_kernels.backends.factored_bucket import FactoredBucket
from gwt_kernels.backends.torch.adafactor import AdafactorRunner, FactoredStep
from gwt_kernels.core.tensor_step import TensorStep

_KEPT_FROM = 2
"""The level from which writing squares of coefficients and reading them is quicker than reading gradients again."""


class CompiledAdafactorRunner(AdafactorRunner):
    """See :class:`gwt_kernels.backends.runner.StagedRunner`. Keeps the packed tensors between steps."""

    def __init__(self, bucket: FactoredBucket) -> None:
        super().__init__(bucket)
        self._packed: dict[int, step.Packed] = {}

    def _step_of(self, place: int, tensor_step: TensorStep, keeps: bool) -> FactoredStep:
        bucket = self._factored
        known = step.knows([tensor_step], bucket.level, bucket.stated)
        if bucket.is_literal or tensor_step.row is not None or not tensor_step.p.numel() or not known:
            return super()._step_of(place, tensor_step, keeps)
        own = _CompiledStep(bucket, place, tensor_step, keeps)
        own.pack(self._packed.pop(place, None))
        if own.packed.lasts:
            self._packed[place] = own.packed
        return own


class _CompiledStep(FactoredStep):
    """The step of one tensor, whose passes over gradients and weights are in C."""

    packed: step.Packed

    def pack(self, known: step.Packed | None) -> None:
        """Pack the tensor for C, into what was packed for its step before this one, if there was any."""
        bucket, numbers = self._bucket, self._tensor_step.hyper.rule_options
        hyper = self._tensor_step.hyper._replace(eps=numbers.eps, beta2=float(numbers.divides_details))
        g = self._tensor_step.g.resolve_neg().contiguous()
        self._tensor_step = self._tensor_step._replace(g=g, hyper=hyper)
        self.packed = known or step.Packed([self._tensor_step], bucket.level, bucket.stated, bucket.rounding)
        self._renew()

    def _renew(self) -> None:
        tensor_step = self._tensor_step
        self.packed.renew(StepInputs([tensor_step.g], [tensor_step.step], [tensor_step.hyper]), None)

    def _line_sums(self) -> tuple[Tensor, Tensor]:
        batch, rows, columns = self.local
        of_rows, of_columns = (self._factors[1].new_empty(batch, n) for n in (rows, columns))
        self.packed.set_factors(None, self._factors[1], self.local)
        if self._keeps and int(self._bucket.level) >= _KEPT_FROM:
            self._kept = self._factors[1].new_empty(self.local)
        self.packed.sum_squares(batch, self._kept, of_rows, of_columns)
        return of_rows, of_columns

    def _divided_sum(self, row: Tensor | None, col: Tensor, mean: Tensor) -> Tensor:
        self.packed.set_factors(row, col, self.local)
        return col.new_tensor(self.packed.sum_divided(self.local.batch, self._kept, mean))

    def _fold(self, clip: Tensor, rate: float | Tensor) -> None:
        hyper = self._tensor_step.hyper._replace(lr=float(rate))
        self._tensor_step = self._tensor_step._replace(hyper=hyper)
        row, col = self._roots(clip)
        self.packed.set_factors(row, col, self.local)
        self._renew()
        self.packed.step()
