"""Adafactor's step by Triton's kernels, in stages between which sums may be added up over processes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor

from gwt_kernels.backends.bucket import StepInputs
from gwt_kernels.backends.factored_bucket import FactoredBucket
from gwt_kernels.backends.torch.adafactor import new_factors
from gwt_kernels.backends.triton.factored_launch import FactoredLaunch
from gwt_kernels.backends.triton.launch import Launch
from gwt_kernels.backends.triton.runner import TritonRunner
from gwt_kernels.backends.triton.tables import device_guard
from gwt_kernels.core.hyper import Hyper


class TritonAdafactorRunner(TritonRunner):
    """See :class:`gwt_kernels.backends.runner.Runner` and :class:`gwt_kernels.backends.runner.StagedRunner`.

    Raises:
        ValueError: shapes, dtypes, devices or layouts do not fit the kernels.
    """

    collects_grad_stats = False

    def __init__(self, bucket: FactoredBucket) -> None:
        super().__init__(bucket)
        self._factored = bucket
        self._sizes = [sum(own.parts) for own in bucket.local_matrices()]
        found = {x.dtype for own in bucket.factors for x in own if x is not None}
        if found != {torch.float32}:
            raise ValueError(f"factors must be float32, got {', '.join(map(str, found))}")

    def apply(self, inputs: StepInputs, decision: Tensor | None = None, divisors: Tensor | None = None) -> None:
        """See :class:`gwt_kernels.backends.runner.Runner`."""
        for _ in self.stages(inputs, decision):
            pass

    def stages(self, inputs: StepInputs, decision: Tensor | None = None) -> Iterator[Tensor]:
        """See :class:`gwt_kernels.backends.runner.StagedRunner`."""
        bucket = self.bucket
        begun = self._send(_as_kernels_take(inputs), decision, counts=True)
        pairs = [
            (cast(FactoredLaunch, launch), sent) for launch, sent in zip(self._launches, begun.sent, strict=True)
        ]
        weighted = any(hyper.rule_options.least_rms is not None for hyper in inputs.hypers)
        sums = torch.zeros(sum(self._sizes), dtype=torch.float32, device=bucket.device)
        with device_guard(bucket.device):
            for launch, sent in pairs:
                launch.add_panels(sent, sums, weighted)
        yield sums
        squares = torch.zeros(len(bucket), dtype=torch.float32, device=bucket.device)
        with device_guard(bucket.device):
            for launch, sent in pairs:
                launch.measure(sent, sums, squares)
        yield squares
        with device_guard(bucket.device):
            for launch, sent in pairs:
                launch.finish(sent, sums, squares, weighted)
        self.finish(begun, decision)
        self._renew_alone(inputs, decision, sums)

    def _launch(self, places: list[int], flat: bool) -> Launch:
        return FactoredLaunch(self._factored, places, flat)

    def _renew_alone(self, inputs: StepInputs, decision: Tensor | None, sums: Tensor) -> None:
        """Update the factors of tensors in no launch: a shard without weights may have whole factors."""
        bucket = self._factored
        for i in self._empty:
            local = bucket.local_matrices()[i]
            old, own = bucket.factors[i], inputs.hypers[i].rule_options
            first = sum(self._sizes[:i])
            *parts, _ = torch.split(sums[first : first + self._sizes[i]], local.parts)
            step = inputs.steps[i]
            rest2 = step.pow(own.decay_rate).float() if isinstance(step, Tensor) else own.rest2(step)
            new = new_factors(old, parts, bucket.matrices[i], own.eps, rest2)
            for x, y in zip(old, new, strict=False):
                if x is not None and y is not None:
                    x.copy_(y if decision is None else torch.where(decision[1] > 0, y, x))


def _as_kernels_take(inputs: StepInputs) -> StepInputs:
    """Return the step with options as kernels take them, computed for its number if the host counts steps."""
    made: dict[tuple[int, int], Hyper] = {}
    hypers = []
    for i, hyper in enumerate(inputs.hypers):
        step = 0 if isinstance(inputs.steps, Tensor) else inputs.steps[i]
        key = id(hyper), step
        if key not in made:
            own = hyper.rule_options
            rate = hyper.lr if own.largest_rate is None else own.rate(hyper, step) if step else 1.0
            made[key] = hyper._replace(
                lr=rate,
                beta2=1.0 - own.rest2(step) if step else 0.0,
                eps=1.0,
                detail_scale=float(own.divides_details),
            )
        hypers.append(made[key])
    return inputs._replace(hypers=hypers)
