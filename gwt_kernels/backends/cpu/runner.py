"""Runs a bucket's steps in C, and by PyTorch's operators where a bucket or a gradient is not for it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from gwt_kernels.backends.bucket import StepInputs
from gwt_kernels.backends.cpu import step
from gwt_kernels.backends.torch.runner import TorchRunner
from gwt_kernels.core.level import ROW
from gwt_kernels.core.tensor_step import TensorStep

__all__ = ["CompiledRunner"]


class CompiledRunner(TorchRunner):
    """See :class:`gwt_kernels.backends.runner.Runner`. Keeps what C takes of a bucket from step to step."""

    _packed: step.Packed | None = None

    def _update(self, inputs: StepInputs, divisors: Tensor | None) -> None:
        knows = all(hyper.detail_scale == 1.0 for hyper in inputs.hypers)
        if self._packed is None or not knows:
            super()._update(inputs, divisors)
            return
        self._packed.renew(inputs, divisors)
        self._packed.step()

    def _take(self, tensor_steps: Sequence[TensorStep]) -> None:
        bucket = self.bucket
        level = bucket.level
        if (
            level == ROW
            or bucket.stated.name not in step.RULES
            or not step.knows(tensor_steps, level)
            or any(own.hyper.detail_scale != 1.0 for own in tensor_steps)
        ):
            super()._take(tensor_steps)
            return
        packed = step.Packed(tensor_steps, level, bucket.rule, bucket.rounding)
        packed.step()
        self._packed = packed if packed.lasts else None

    def _sums(self, tensor_steps: Sequence[TensorStep]) -> Tensor:
        level = self.bucket.level
        if level != ROW and step.knows(tensor_steps, level):
            return step.update_sums(tensor_steps, level=level)
        return super()._sums(tensor_steps)
