"""Run a bucket's steps in C, or by PyTorch's operators if C does not support the bucket or a gradient."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from gwt_kernels.backends.bucket import StepInputs
from gwt_kernels.backends.cpu import step
from gwt_kernels.backends.torch.runner import TorchRunner
from gwt_kernels.core.tensor_step import TensorStep

__all__ = ["CompiledRunner"]


class CompiledRunner(TorchRunner):
    """See :class:`gwt_kernels.backends.runner.Runner`. Keeps the packed bucket between steps."""

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
        knows = bucket.stated.name in step.RULES and step.knows(tensor_steps, bucket.level)
        if not knows or any(t.hyper.detail_scale != 1.0 for t in tensor_steps):
            super()._take(tensor_steps)
            return
        packed = step.Packed(tensor_steps, bucket.level, bucket.rule, bucket.rounding)
        packed.step()
        self._packed = packed if packed.lasts else None

    def _sums(self, tensor_steps: Sequence[TensorStep]) -> Tensor:
        if step.knows(tensor_steps, self.bucket.level):
            return step.update_sums(tensor_steps, level=self.bucket.level)
        return super()._sums(tensor_steps)
