"""Run Adafactor's step of a bucket by one call of C, or by PyTorch's operators if C does not support it."""

from __future__ import annotations

import struct

from torch import Tensor

from gwt_kernels.backends.bucket import StepInputs
from gwt_kernels.backends.cpu import step
from gwt_kernels.backends.factored_bucket import FactoredBucket
from gwt_kernels.backends.torch.adafactor import AdafactorRunner
from gwt_kernels.core.hyper import Hyper

# ``gwt_factors`` of factors.c, field by field, with the formats of the struct module.
FACTORS = {
    **dict.fromkeys(("row", "col"), "P"),
    **dict.fromkeys(("matrices", "columns", "matrix_rows"), "q"),
    **dict.fromkeys(("rest2", "eps", "clip_threshold", "rate", "scale", "weight_decay", "least_rms"), "d"),
}
TABLE_ROW = struct.Struct("".join(FACTORS.values()))


class CompiledAdafactorRunner(AdafactorRunner):
    """See :class:`gwt_kernels.backends.runner.StagedRunner`. Keeps the packed bucket between steps.

    Separate stages, between which processes add up sums, run PyTorch's operators.
    """

    def __init__(self, bucket: FactoredBucket) -> None:
        super().__init__(bucket)
        self._packed: step.Packed | None = None
        is_whole = bucket.local_matrices() == bucket.matrices
        self._is_plain = is_whole and not bucket.is_literal and bucket.telemetry is None

    def apply(self, inputs: StepInputs, decision: Tensor | None = None, divisors: Tensor | None = None) -> None:
        """See :class:`gwt_kernels.backends.runner.Runner`."""
        bucket = self._factored
        ready = self.decided(inputs, decision)
        if ready is None:
            return
        own = {id(hyper): _in_c(hyper) for hyper in ready.hypers}
        given = ready._replace(hypers=[own[id(hyper)] for hyper in ready.hypers])
        if self._packed is not None:
            self._packed.renew(given, None)
            packed = self._packed
        else:
            tensor_steps = bucket.tensor_steps(given)
            if not (self._is_plain and step.knows(tensor_steps, bucket.level, bucket.stated)):
                super().apply(inputs, decision, divisors)
                return
            packed = step.Packed(tensor_steps, bucket.level, bucket.stated, bucket.rounding)
            self._packed = packed if packed.lasts else None
        packed.step_factored(b"".join(self._row(i, ready.hypers[i], int(ready.steps[i])) for i in packed.places))
        self.count(inputs)

    def _row(self, i: int, hyper: Hyper, count: int) -> bytes:
        """Return the factors and options of a tensor, as C takes them."""
        bucket, numbers = self._factored, hyper.rule_options
        (row, col), whole = bucket.factors[i], bucket.matrices[i]
        return TABLE_ROW.pack(
            0 if row is None else row.data_ptr(),
            *(col.data_ptr(), whole.batch, whole.columns, whole.rows, numbers.rest2(count), numbers.eps),
            *(numbers.clip_threshold, numbers.rate(hyper, count), hyper.scale if bucket.stated.is_scaled else 1.0),
            *(hyper.weight_decay, -1.0 if numbers.least_rms is None else numbers.least_rms),
        )


def _in_c(hyper: Hyper) -> Hyper:
    """Return options from which step.py packs the numbers that factored.inc takes."""
    numbers = hyper.rule_options
    return hyper._replace(eps=numbers.eps, beta2=float(numbers.divides_details))
