"""Runs a bucket's steps in C, and by PyTorch's operators where a bucket or a gradient is not for it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from gwt_kernels.backends.cpu import step
from gwt_kernels.backends.torch.runner import TorchRunner
from gwt_kernels.core.level import ROW
from gwt_kernels.core.tensor_step import TensorStep

__all__ = ["CompiledRunner"]


class CompiledRunner(TorchRunner):
    """See :class:`gwt_kernels.backends.runner.Runner`. Keeps what C takes of a bucket from step to step."""

    _packed: step.Packed | None = None

    def _update(self, tensor_steps: Sequence[TensorStep]) -> None:
        bucket, packed, level = self.bucket, self._packed, self.bucket.level
        if level == ROW or any(own.hyper.detail_scale != 1.0 for own in tensor_steps):  # which C does not know
            super()._update(tensor_steps)
            return
        if packed is not None:
            packed.renew(tensor_steps)
        elif bucket.stated.name in step.RULES and step.knows(tensor_steps, level):
            packed = step.Packed(tensor_steps, level, bucket.rule, bucket.rounding)
        else:
            super()._update(tensor_steps)
            return
        packed.step()
        self._packed = packed if packed.lasts else None

    def _sums(self, tensor_steps: Sequence[TensorStep]) -> Tensor:
        level = self.bucket.level
        if level != ROW and step.knows(tensor_steps, level):
            return step.update_sums(tensor_steps, level=level)
        return super()._sums(tensor_steps)
