"""Runs a bucket's steps in C, and by PyTorch's operators where a bucket or a gradient is not for it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from gwt_kernels.compiled_backend import step
from gwt_kernels.single import Single
from gwt_kernels.torch_backend.runner import TorchRunner

__all__ = ["CompiledRunner"]


class CompiledRunner(TorchRunner):
    """See :class:`gwt_kernels.backends.runner.Runner`."""

    def _update(self, singles: Sequence[Single]) -> None:
        bucket = self.bucket
        if step.knows(singles, bucket.level):
            step.gwt_adamw_(singles, level=bucket.level, rule=bucket.rule, rounding=bucket.rounding)
        else:
            super()._update(singles)

    def _sums(self, singles: Sequence[Single]) -> Tensor:
        if step.knows(singles, self.bucket.level):
            return step.update_sums(singles, level=self.bucket.level)
        return super()._sums(singles)
