"""A backend's runner: what updates one bucket, in two phases, and what the first of them finds."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

from gwt_kernels.backends.bucket import Bucket, StepInputs
from gwt_kernels.core.survey import Survey

__all__ = ["Reduction", "Runner"]


class Reduction(NamedTuple):
    """What :meth:`Runner.reduce` found; no weight or moment has changed.

    Attributes:
        grad_stats: Where gradients were read, of parts of them the sum of squares, and more than 0 where an element
            is not finite: float32 ``[2, parts]``, several times.
        update_sums: ``sum((m / (sqrt(v) + eps))**2)`` of the new moments per parameter: ``[len(bucket)]``, in
        float32,
            or in float64 for float64 parameters. None where not asked for.
    """

    grad_stats: list[Tensor]
    update_sums: Tensor | None


class Runner(Protocol):
    """Updates one bucket of tensors, whose objects and memory stay what they were when it was made.

    Attributes:
        bucket: What it updates.
        collects_grad_stats: Whether :meth:`reduce` can read gradients for what decides about the step at no cost.
        survey: How it looks at many tensors at once: through Python, or through C where that can be had.
    """

    bucket: Bucket
    collects_grad_stats: bool
    survey: Survey

    def reduce(
        self,
        inputs: StepInputs,
        decision: Tensor | None = None,
        *,
        grad_stats: bool = False,
        update_sums: bool = False,
    ) -> Reduction:
        """Find what has to be known of a step before it is taken, from its gradients and its new moments.

        Args:
            inputs: Of the step; :meth:`apply` takes the very same object next.
            decision: What was decided about the step (:func:`gwt_kernels.control.control_`), if anything; not with
                ``grad_stats``, from which it follows.
            grad_stats: Whether to read gradients for the decision; where ``collects_grad_stats`` alone.
            update_sums: Whether to add up squares of the update, for a limiter whose norm is over several shards.
        """
        ...

    def apply(self, inputs: StepInputs, decision: Tensor | None = None, divisors: Tensor | None = None) -> None:
        """Take the step, or the rest of it after :meth:`reduce`.

        Args:
            inputs: Of the step.
            decision: What was decided about the step, float64 ``[3]`` on the bucket's device; needs
            ``inputs.steps``
                that the device counts. None where nothing was to be decided.
            divisors: The limiter's divisors of the updates, ``[len(bucket)]``, where the caller has decided them.
        """
        ...

    def memory(self) -> list[object]:
        """What replays of a captured step go on reading."""
        ...
