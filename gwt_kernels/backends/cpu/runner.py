"""Run a bucket's steps in C, or by PyTorch's operators if C does not support the bucket or a gradient."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from gwt_kernels.backends.bucket import StepInputs
from gwt_kernels.backends.cpu import step
from gwt_kernels.backends.torch.runner import TorchRunner
from gwt_kernels.core.laid_out import LaidOut
from gwt_kernels.core.tensor_step import TensorStep


class CompiledRunner(TorchRunner):
    """See :class:`gwt_kernels.backends.runner.Runner`. Keeps the packed bucket between steps."""

    _packed: step.Packed | None = None

    def _update(self, inputs: StepInputs, divisors: Tensor | None) -> None:
        if self._packed is None:
            super()._update(inputs, divisors)
            return
        self._packed.renew(inputs, divisors)
        self._step(self._packed)

    def set_params(self, params: Sequence[Tensor]) -> None:
        """See :class:`gwt_kernels.backends.triton.runner.TritonRunner`."""
        super().set_params(params)
        if self._packed is not None:
            self._packed.set_params(params)
            self._packed = self._packed if self._packed.lasts else None

    def _take(self, tensor_steps: Sequence[TensorStep], row_sums: Tensor | None) -> None:
        bucket = self.bucket
        level = bucket.level
        if not step.knows(tensor_steps, level, bucket.stated):
            super()._take(tensor_steps, row_sums)
            return
        packed = step.Packed(tensor_steps, level, bucket.stated, bucket.rounding)
        packed.set_rows(row_sums)
        self._step(packed)
        self._packed = packed if packed.lasts else None

    def _step(self, packed: step.Packed) -> None:
        packed.step()
        if isinstance(self.bucket.params, LaidOut):  # whose memory others use between steps
            packed.release_params()

    def _sums(self, tensor_steps: Sequence[TensorStep], row_sums: Tensor | None) -> Tensor:
        level = self.bucket.level
        if step.knows(tensor_steps, level, self.bucket.stated):
            return step.update_sums(tensor_steps, level=level, row_sums=row_sums)
        return super()._sums(tensor_steps, row_sums)
