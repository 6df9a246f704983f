"""Runs a bucket's steps in C, and by PyTorch's operators where a bucket or a gradient is not for it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from gwt_kernels.backends.cpu import step
from gwt_kernels.backends.torch.runner import TorchRunner
from gwt_kernels.core.tensor_step import Single

__all__ = ["CompiledRunner"]


class CompiledRunner(TorchRunner):
    """See :class:`gwt_kernels.backends.runner.Runner`. Keeps what C takes of a bucket from step to step."""

    _packed: step.Packed | None = None

    def _update(self, singles: Sequence[Single]) -> None:
        bucket, packed = self.bucket, self._packed
        if packed is not None:
            packed.renew(singles)
        elif step.knows(singles, bucket.level):
            packed = step.Packed(singles, bucket.level, bucket.rule, bucket.rounding)
        else:
            super()._update(singles)
            return
        packed.step()
        self._packed = packed if packed.lasts else None

    def _sums(self, singles: Sequence[Single]) -> Tensor:
        if step.knows(singles, self.bucket.level):
            return step.update_sums(singles, level=self.bucket.level)
        return super()._sums(singles)
