"""Public multi-level Haar transform: checks its arguments and picks a backend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gwt_kernels import backends

__all__ = ["haar_dwt", "haar_idwt"]


def haar_dwt(x: Tensor, level: int, *, backend: backends.Backend | None = None) -> list[Tensor]:
    """Multi-level orthonormal Haar transform of the last dimension.

    The coefficients equal ``pywt.wavedec(x, "haar", mode="zero", level=level, axis=-1)``: an odd
    length is padded with one zero on the right at each level. With ``a = x`` at level 0,
    ``a_next[k] = (a[2k] + a[2k+1]) / sqrt(2)`` and ``d[k] = (a[2k] - a[2k+1]) / sqrt(2)``
    (arXiv 2501.07237, section 3). Differentiable: the transform is linear and its transpose is the inverse.

    Args:
        x: Floating-point tensor ``[..., N]`` of any strides. Arithmetic is float32 (float64 for float64).
        level: Number of levels ``L >= 0``, with ``2**L < 2 * N``.
        backend: ``"triton"``, ``"torch"``, or None for Triton on CUDA tensors and torch elsewhere, as
            ``"compiled"``, which has a step alone.

    Returns:
        ``[A, D_L, ..., D_1]`` of x's dtype and device, contiguous; ``D_l`` is ``[..., ceil(N / 2**l)]`` and
        ``A`` has the shape of ``D_L``. At level 0, ``[A]`` is a copy of x.

    Raises:
        TypeError: x is not a real floating-point tensor, or level is not an integer.
        ValueError: x has no dimension, the level does not fit the width, or the backend is unknown.
        RuntimeError: the backend asked for cannot run on x.
    """
    _check_tensor("x", x)
    check_level(level, x.shape[-1], "x")
    run_on = backends.resolve(backend, x.device, x.dtype, level)
    if run_on == "torch":
        from gwt_kernels.torch_backend import haar as implementation

        return implementation.haar_dwt(x, level)
    return list(_TritonDWT.apply(x, level))  # type: ignore[no-untyped-call]


def haar_idwt(
    coeffs: Sequence[Tensor], length: int | None = None, *, backend: backends.Backend | None = None
) -> Tensor:
    """Inverse of :func:`haar_dwt`.

    Equals ``pywt.waverec(coeffs, "haar", mode="zero", axis=-1)[..., :length]``.

    Args:
        coeffs: ``[A, D_L, ..., D_1]`` as :func:`haar_dwt` returns it.
        length: Width ``N`` of the result; the width of ``D_1`` must be ``ceil(N / 2)``. None means
            twice the width of ``D_1``.
        backend: As for :func:`haar_dwt`.

    Returns:
        Tensor ``[..., length]`` of the coefficients' dtype and device, contiguous.

    Raises:
        TypeError: a coefficient is not a real floating-point tensor, they differ in dtype or device, or length
                is not an integer.
        ValueError: there are no coefficients, or their widths do not follow from one length.
        RuntimeError: the backend asked for cannot run on the coefficients.
    """
    coeffs = list(coeffs)
    length = _check_coefficients(coeffs, length)
    level = len(coeffs) - 1
    run_on = backends.resolve(backend, coeffs[0].device, coeffs[0].dtype, level)
    if run_on == "torch":
        from gwt_kernels.torch_backend import haar as implementation

        return implementation.haar_idwt(coeffs, length)
    return _TritonIDWT.apply(length, *coeffs)  # type: ignore[no-any-return, no-untyped-call]


class _TritonDWT(torch.autograd.Function):
    """The forward kernel; its gradient is the inverse, since the transform is orthonormal."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, level: int) -> tuple[Tensor, ...]:
        from gwt_kernels.triton_backend import haar_launch as implementation

        ctx.length = x.shape[-1]
        return tuple(implementation.haar_dwt(x, level))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _TritonIDWT.apply(ctx.length, *grads), None  # type: ignore[no-untyped-call]


class _TritonIDWT(torch.autograd.Function):
    """The inverse kernel; its gradient is the forward transform."""

    @staticmethod
    def forward(ctx: Any, length: int, *coeffs: Tensor) -> Tensor:
        from gwt_kernels.triton_backend import haar_launch as implementation

        ctx.level = len(coeffs) - 1
        return implementation.haar_idwt(list(coeffs), length)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, *_TritonDWT.apply(grads[0], ctx.level)  # type: ignore[no-untyped-call]


def deepest_level(width: int) -> int:
    """The largest level with ``2**level < 2 * width``: the deepest that a row of ``width`` elements allows."""
    return max(width - 1, 0).bit_length()


def check_level(level: int, width: int, what: str) -> None:
    """Raise unless ``level`` is an integer with ``0 <= level`` and ``2**level < 2 * width``."""
    if isinstance(level, bool) or not isinstance(level, int):
        raise TypeError(f"level must be an integer, got {level!r} for {what}")
    if level < 0:
        raise ValueError(f"level must not be negative, got {level} for {what}")
    deepest = deepest_level(width)
    if level > deepest:
        raise ValueError(
            f"level {level} is too deep for {what}, whose last dimension is {width}: 2**level must be below "
            f"twice the width, so use level {deepest} or less"
        )


def _check_tensor(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"{name} must be a real floating-point tensor, got {getattr(x, 'dtype', type(x))}")
    if x.dim() == 0:
        raise ValueError(f"{name} must have at least one dimension, got a scalar: give it one with reshape(1)")


def _check_coefficients(coeffs: list[Tensor], length: int | None) -> int:
    """Return the width that the coefficients stand for, or raise."""
    if not coeffs:
        raise ValueError("coeffs must hold at least the approximation, got an empty sequence")
    for i, c in enumerate(coeffs):
        _check_tensor(f"coeffs[{i}]", c)
        if c.dtype != coeffs[0].dtype or c.device != coeffs[0].device:
            raise TypeError(
                f"coeffs[{i}] is {c.dtype} on {c.device}, but coeffs[0] is {coeffs[0].dtype} on "
                f"{coeffs[0].device}: convert them to one dtype and device"
            )
        if c.shape[:-1] != coeffs[0].shape[:-1]:
            raise ValueError(f"coeffs[{i}] has shape {tuple(c.shape)}, but coeffs[0] {tuple(coeffs[0].shape)}")
    if length is not None and (isinstance(length, bool) or not isinstance(length, int)):
        raise TypeError(f"length must be an integer or None, got {length!r}")
    widths = [c.shape[-1] for c in coeffs]
    if length is None:
        length = widths[-1] if len(coeffs) == 1 else 2 * widths[-1]
    level = len(coeffs) - 1
    expected = [-(-length // 2**i) for i in (level, *range(level, 0, -1))]
    if widths != expected:
        raise ValueError(
            f"coefficients of widths {widths} do not belong to length {length}, which has {expected}: "
            f"pass the width of the tensor that was transformed"
        )
    return length
