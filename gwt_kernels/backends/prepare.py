"""Chooses what updates a bucket: Triton's kernels, the step in C, or PyTorch's operators."""

from __future__ import annotations

from gwt_kernels.backends import choice
from gwt_kernels.backends.bucket import Bucket
from gwt_kernels.backends.factored_bucket import FactoredBucket
from gwt_kernels.backends.runner import Runner

__all__ = ["is_on_triton", "prepare"]


def prepare(bucket: Bucket, backend: choice.Backend | None) -> Runner:
    """The runner of a bucket.

    Args:
        bucket: Of one tensor at least.
        backend: What was asked for; None chooses Triton for CUDA tensors, the step in C for CPU tensors where it
        can
            be compiled, and PyTorch's operators elsewhere.

    Raises:
        RuntimeError: the backend asked for cannot run on these tensors.
        ValueError: the backend is unknown, or its kernels could not trust the tensors.
    """
    if isinstance(bucket, FactoredBucket):
        if is_on_triton(bucket, backend):
            from gwt_kernels.backends.triton.adafactor import TritonAdafactorRunner

            return TritonAdafactorRunner(bucket)
        from gwt_kernels.backends.torch.adafactor import AdafactorRunner

        return AdafactorRunner(bucket)
    if is_on_triton(bucket, backend):
        from gwt_kernels.backends.triton.runner import TritonRunner

        return TritonRunner(bucket)
    if not bucket.is_literal and choice.is_compiled(backend, bucket.device):
        from gwt_kernels.backends.cpu.runner import CompiledRunner

        return CompiledRunner(bucket)
    from gwt_kernels.backends.torch.runner import TorchRunner

    return TorchRunner(bucket)


def is_on_triton(bucket: Bucket, backend: choice.Backend | None) -> bool:
    """Whether kernels update a bucket: all of its arrays have to suit them, not the parameters alone.

    Raises:
        ValueError, RuntimeError: as :func:`prepare`.
    """
    if bucket.shares_rows:
        if backend == "triton":
            raise RuntimeError(f"backend='triton' cannot run here: {choice.HEADS}")
        return False
    kind = bucket.level, bucket.wavelet, bucket.boundary
    return {choice.resolve_update(backend, bucket.device, dtype, *kind) for dtype in bucket.dtypes} == {"triton"}
