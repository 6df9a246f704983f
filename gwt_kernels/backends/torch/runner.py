"""Runner of a bucket's steps by PyTorch's operators, one tensor after another."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from gwt_kernels.backends.bucket import Bucket, StepInputs
from gwt_kernels.backends.runner import Reduction
from gwt_kernels.backends.torch import literal
from gwt_kernels.backends.torch import step as folded
from gwt_kernels.core.level import ROW
from gwt_kernels.core.notes import COLUMNS
from gwt_kernels.core.survey import PYTHON
from gwt_kernels.core.tensor_step import TensorStep


class TorchRunner:
    """See :class:`gwt_kernels.backends.runner.Runner`.

    If a device counts steps, the host waits for the counts.
    """

    collects_grad_stats = False
    survey = PYTHON

    def __init__(self, bucket: Bucket) -> None:
        self.bucket = bucket

    def set_params(self, params: Sequence[Tensor]) -> None:
        """See :class:`gwt_kernels.backends.triton.runner.TritonRunner`."""
        self.bucket.params = params

    def reduce(
        self,
        inputs: StepInputs,
        decision: Tensor | None = None,
        *,
        grad_stats: bool = False,
        update_sums: bool = False,
    ) -> Reduction:
        """See :class:`gwt_kernels.backends.runner.Runner`."""
        if grad_stats:
            raise ValueError("the first pass reads gradients for the step's decision on the Triton backend alone")
        if not update_sums:
            return Reduction([], None)
        factor = 1.0 if decision is None else float(decision[0])
        inputs = inputs._replace(steps=[0] * len(self.bucket))  # the sums do not depend on them
        return Reduction([], self._sums(self.bucket.tensor_steps(_scaled(inputs, factor)), inputs.row_sums))

    def apply(self, inputs: StepInputs, decision: Tensor | None = None, divisors: Tensor | None = None) -> None:
        """See :class:`gwt_kernels.backends.runner.Runner`."""
        ready = self.decided(inputs, decision)
        if ready is not None:
            self._update(ready, divisors)
            self.count(inputs)

    def decided(self, inputs: StepInputs, decision: Tensor | None) -> StepInputs | None:
        """Return inputs with counts on the host and the decided factor; None if the step is skipped."""
        counts = inputs.steps
        if not isinstance(counts, Tensor):
            return inputs
        if decision is not None:  # on a CUDA device the only place that waits for the decision
            factor, go, _ = decision.tolist()
            if not go:
                if self.bucket.telemetry is not None:
                    self.bucket.telemetry[:, COLUMNS.index("nonfinite") :].add_(1)  # and "steps"
                return None
            inputs = _scaled(inputs, factor)
        return inputs._replace(steps=list(map(int, (counts + 1).tolist())))

    def count(self, inputs: StepInputs) -> None:
        """Count a step that was taken, if the device counts steps."""
        if isinstance(inputs.steps, Tensor):
            inputs.steps.add_(1)

    def memory(self) -> list[object]:
        """See :class:`gwt_kernels.backends.runner.Runner`."""
        return []

    def _update(self, inputs: StepInputs, divisors: Tensor | None) -> None:
        self._take(self.bucket.tensor_steps(inputs, divisors), inputs.row_sums)

    def _take(self, tensor_steps: Sequence[TensorStep], row_sums: Tensor | None) -> None:
        bucket = self.bucket
        if bucket.is_literal and bucket.level != ROW:
            literal.gwt_adamw_(tensor_steps, level=bucket.level, wavelet=bucket.wavelet, boundary=bucket.boundary)
        else:
            folded.gwt_adamw_(tensor_steps, level=bucket.level, rule=bucket.rule, rounding=bucket.rounding)

    def _sums(self, tensor_steps: Sequence[TensorStep], row_sums: Tensor | None) -> Tensor:
        bucket = self.bucket
        if bucket.is_literal and bucket.level != ROW:
            return literal.update_sums(
                tensor_steps, level=bucket.level, wavelet=bucket.wavelet, boundary=bucket.boundary
            )
        return folded.update_sums(tensor_steps, level=bucket.level, rule=bucket.rule)


def _scaled(inputs: StepInputs, factor: float) -> StepInputs:
    """Return the step with ``factor`` on its gradients."""
    hypers = [hyper._replace(grad_factor=hyper.grad_factor * factor) for hyper in inputs.hypers]
    return inputs._replace(hypers=hypers)
