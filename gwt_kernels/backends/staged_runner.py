"""A runner whose step has stages, at the ends of which processes that share its tensors have sums to add up."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol, runtime_checkable

from torch import Tensor

from gwt_kernels.backends.bucket import StepInputs
from gwt_kernels.backends.runner import Runner

__all__ = ["StagedRunner"]


@runtime_checkable
class StagedRunner(Runner, Protocol):
    """See :class:`gwt_kernels.backends.runner.Runner`; ``apply`` goes through all stages."""

    def stages(self, inputs: StepInputs, decision: Tensor | None = None) -> Iterator[Tensor]:
        """Take the step; stop with a vector of sums at each stage's end, and go on from what it holds then.

        A step that is skipped may stop nowhere.
        """
        ...
