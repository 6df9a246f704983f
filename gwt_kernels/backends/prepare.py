"""Choose the runner of a bucket: Triton's kernels, the step in C, or PyTorch's operators."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor

from gwt_kernels.backends import choice
from gwt_kernels.backends.bucket import Bucket
from gwt_kernels.backends.factored_bucket import FactoredBucket
from gwt_kernels.backends.heads import HeadsRunner
from gwt_kernels.backends.runner import ElementwiseRunner


def prepare(bucket: Bucket, backend: choice.Backend | None) -> ElementwiseRunner:
    """Return the runner of a bucket.

    Args:
        bucket: A bucket of at least one tensor.
        backend: The requested backend; None chooses Triton for CUDA tensors, the step in C for CPU tensors if it
            can be compiled, and PyTorch's operators elsewhere.

    Raises:
        RuntimeError: the requested backend cannot run on these tensors.
        ValueError: the backend is unknown, or the tensors are invalid for its kernels.
    """
    if isinstance(bucket, FactoredBucket):
        if is_on_triton(bucket, backend):
            from gwt_kernels.backends.triton.adafactor import TritonAdafactorRunner

            return TritonAdafactorRunner(bucket)
        if choice.is_compiled(backend, bucket.device):
            from gwt_kernels.backends.cpu.adafactor import CompiledAdafactorRunner

            return CompiledAdafactorRunner(bucket)
        from gwt_kernels.backends.torch.adafactor import AdafactorRunner

        return AdafactorRunner(bucket)
    if bucket.stated.is_factored:
        raise ValueError(f"rule={bucket.rule!r} keeps factors, for which a bucket has no place: use GWTAdafactor")
    on_triton = is_on_triton(bucket, backend)
    if bucket.heads is not None or (on_triton and bucket.shares_rows):
        return HeadsRunner(bucket, partial(prepare, backend=backend), partial(row_summer, backend=backend))
    if on_triton:
        from gwt_kernels.backends.triton.runner import TritonRunner

        return TritonRunner(bucket)
    if not bucket.is_literal and choice.is_compiled(backend, bucket.device):
        from gwt_kernels.backends.cpu.runner import CompiledRunner

        return CompiledRunner(bucket)
    from gwt_kernels.backends.torch.runner import TorchRunner

    return TorchRunner(bucket)


def row_summer(bucket: Bucket, backend: choice.Backend | None) -> Callable[[Sequence[Tensor]], Tensor]:
    """Return a function that adds up this process's parts of the rows of gradients: ``[rows, numbers]``."""
    if is_on_triton(bucket, backend):
        from gwt_kernels.backends.triton.row_sums import RowSummer

        return RowSummer(bucket)
    from gwt_kernels.backends.torch.row_sums import row_sums

    return partial(row_sums, bucket)


def is_on_triton(bucket: Bucket, backend: choice.Backend | None) -> bool:
    """Return whether Triton kernels update a bucket, which must support the dtypes of all its arrays.

    Raises:
        ValueError, RuntimeError: as :func:`prepare`.
    """
    kind = bucket.level, bucket.wavelet, bucket.boundary
    return {choice.resolve_update(backend, bucket.device, dtype, *kind) for dtype in bucket.dtypes} == {"triton"}
