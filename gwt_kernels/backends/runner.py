"""Interface of a backend's runner, which updates one bucket in two phases: reduce and apply."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from gwt_kernels.backends.bucket import Bucket, StepInputs
from gwt_kernels.core.survey import Survey


class Reduction(NamedTuple):
    """Result of :meth:`Runner.reduce`, which changes no weight or moment.

    Attributes:
        grad_stats: Float32 tensors ``[2, parts]``: for parts of the gradients the sum of squares, and a number
            above 0 if an element is not finite. Empty if not requested.
        update_sums: ``sum((m / (sqrt(v) + eps))**2)`` of the new moments per parameter: ``[len(bucket)]``, float32,
            or float64 for float64 parameters. None if not requested.
    """

    grad_stats: list[Tensor]
    update_sums: Tensor | None


class Runner(Protocol):
    """Updates one bucket, whose tensor objects and memory must not change after construction.

    Attributes:
        bucket: The bucket that it updates.
        collects_grad_stats: Whether :meth:`reduce` can collect gradient statistics at no extra cost.
        survey: Functions that survey many tensors at once, in C if available, else in Python.
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
        """Compute sums over gradients and new moments that are needed before the step is taken.

        Args:
            inputs: Inputs of the step; :meth:`apply` takes the same object next.
            decision: Step decision of :func:`gwt_kernels.control.control_`, or None; not with ``grad_stats``, from
                which it follows.
            grad_stats: Whether to collect gradient statistics; only if ``collects_grad_stats``.
            update_sums: Whether to sum squares of the update, for a limiter whose norm is over several shards.
        """
        ...

    def apply(self, inputs: StepInputs, decision: Tensor | None = None, divisors: Tensor | None = None) -> None:
        """Take the step, or the rest of it after :meth:`reduce`.

        Args:
            inputs: Inputs of the step.
            decision: Step decision, float64 ``[3]`` on the bucket's device, which requires ``inputs.steps`` as a
                tensor; or None.
            divisors: The limiter's divisors of the updates, ``[len(bucket)]``; None to compute them here.
        """
        ...

    def memory(self) -> list[object]:
        """Return the objects whose memory replays of a captured step read."""
        ...


class OnePassRunner:
    """Base of runners whose rule has no limiter, so that nothing is reduced before a step."""

    bucket: Bucket
    collects_grad_stats = False

    def reduce(
        self,
        inputs: StepInputs,
        decision: Tensor | None = None,
        *,
        grad_stats: bool = False,
        update_sums: bool = False,
    ) -> Reduction:
        """See :class:`Runner`. There is neither limiter nor a first pass."""
        if grad_stats or update_sums:
            raise ValueError(f"rule={self.bucket.rule!r} has no limiter, and no first pass")
        return Reduction([], None)


class ElementwiseRunner(Runner, Protocol):
    """A runner that updates each element by itself, so that it can take other tensors of the same kinds."""

    def set_params(self, params: Sequence[Tensor]) -> None:
        """Replace the bucket's parameters by tensors of the same shapes, dtype and layouts."""
        ...


@runtime_checkable
class StagedRunner(Runner, Protocol):
    """A runner whose step has stages, between which processes that share its tensors add up sums.

    ``apply`` goes through all stages.
    """

    def stages(self, inputs: StepInputs, decision: Tensor | None = None) -> Iterator[Tensor]:
        """Take the step; yield a vector of sums between stages, and continue with what the caller made of it.

        A step that is skipped may yield nothing.
        """
        ...
