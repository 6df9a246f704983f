"""Public multi-level Haar transform: check arguments and choose a backend."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gwt_kernels.backends import choice


def haar_dwt(x: Tensor, level: int, *, backend: choice.Backend | None = None) -> list[Tensor]:
    """Compute the multi-level orthonormal Haar transform of the last dimension.

    The coefficients equal ``pywt.wavedec(x, "haar", mode="zero", level=level, axis=-1)``: an odd
    length is padded with one zero on the right at each level. With ``a = x`` at level 0,
    ``a_next[k] = (a[2k] + a[2k+1]) / sqrt(2)`` and ``d[k] = (a[2k] - a[2k+1]) / sqrt(2)``
    (arXiv 2501.07237, section 3). Differentiable any number of times in forward and reverse mode.
    Composes with ``torch.func``, ``torch.compile`` and ``torch.export``.

    Args:
        x: Floating-point tensor ``[..., N]`` of any strides. Arithmetic is float32 (float64 for float64).
        level: Number of levels ``L >= 0``, with ``2**L < 2 * N``.
        backend: ``"triton"``, ``"torch"``, or None for Triton on CUDA tensors and torch elsewhere.
            ``"compiled"`` means torch here: C has no transform.

    Returns:
        ``[A, D_L, ..., D_1]`` of x's dtype and device, contiguous; ``D_l`` is ``[..., ceil(N / 2**l)]`` and
        ``A`` has the shape of ``D_L``. At level 0, ``[A]`` is a copy of x.

    Raises:
        TypeError: x is not a dense tensor of real floating-point numbers of 16 bits or more, or level is not an
            integer.
        ValueError: x has no dimension, the level does not fit the width, or the backend is unknown.
        RuntimeError: the requested backend cannot run on x.
    """
    check_tensor("x", x)
    check_level(level, x.shape[-1], "x")
    if _resolve(backend, x.device, x.dtype, level) == "torch":
        from gwt_kernels.backends.torch import haar as implementation

        return implementation.haar_dwt(x, level)
    return torch.ops.gwt_kernels.haar_dwt.default(x, level)  # type: ignore[no-any-return]


def haar_idwt(
    coeffs: Sequence[Tensor], length: int | None = None, *, backend: choice.Backend | None = None
) -> Tensor:
    """Invert :func:`haar_dwt`.

    Equals ``pywt.waverec(coeffs, "haar", mode="zero", axis=-1)[..., :length]``.

    Args:
        coeffs: ``[A, D_L, ..., D_1]`` as :func:`haar_dwt` returns it.
        length: Width ``N`` of the result; the width of ``D_1`` must be ``ceil(N / 2)``. None means
            twice the width of ``D_1``.
        backend: As for :func:`haar_dwt`.

    Returns:
        Tensor ``[..., length]`` of the coefficients' dtype and device, contiguous.

    Raises:
        TypeError: a coefficient is not a tensor that :func:`haar_dwt` accepts, coefficients differ in dtype or
            device, or length is not an integer.
        ValueError: there are no coefficients, their shapes do not belong to one length, or length is negative.
        RuntimeError: the requested backend cannot run on the coefficients.
    """
    coeffs = list(coeffs)
    length = check_coefficients(coeffs, length)
    if _resolve(backend, coeffs[0].device, coeffs[0].dtype, len(coeffs) - 1) == "torch":
        from gwt_kernels.backends.torch import haar as implementation

        return implementation.haar_idwt(coeffs, length)
    return torch.ops.gwt_kernels.haar_idwt.default(coeffs, length)  # type: ignore[no-any-return]


def _resolve(
    backend: choice.Backend | None, device: torch.device, dtype: torch.dtype, level: int
) -> choice.Backend:
    """Return the backend of :func:`choice.resolve`; meta tensors need no device that runs kernels."""
    if device.type == "meta" and backend == "triton":
        device = torch.device("cpu" if choice.launches_on("cpu") else "cuda")
    return choice.resolve(backend, device, dtype, level)


# Set by torch.compiler.assume_constant_result, which would import the compiler.
_resolve._dynamo_marked_constant = True  # type: ignore[attr-defined]


def deepest_level(width: int) -> int:
    """Return the deepest level of a row of ``width`` elements: the largest with ``2**level < 2 * width``."""
    return max(width - 1, 0).bit_length()


def check_level(level: int, width: int, what: str) -> None:
    """Raise unless ``level`` is an integer with ``0 <= level`` and ``2**level < 2 * width``."""
    if isinstance(level, bool) or not isinstance(level, int):
        raise TypeError(f"level must be an integer, got {level!r} for {what}")
    if level < 0:
        raise ValueError(f"level must not be negative, got {level} for {what}")
    if level and width <= 2 ** (min(level, 64) - 1):  # this form can be a guard of a graph with symbolic width
        deepest = deepest_level(int(width))
        raise ValueError(
            f"level {level} is too deep for {what}, whose last dimension is {width}: 2**level must be below "
            f"twice the width, so use level {deepest} or less"
        )


def band_widths(length: int, level: int) -> list[int]:
    """Return the widths of ``[A, D_L, ..., D_1]`` of a row of ``length`` elements: ``ceil(length / 2**l)``."""
    widths = [length]
    for _ in range(level):
        widths.append((widths[-1] + 1) // 2)
    return [widths[-1], *widths[:0:-1]]


def check_tensor(name: str, x: Tensor) -> None:
    """Raise unless ``x`` is a dense tensor of real floating-point numbers with at least one dimension."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"{name} must be a real floating-point tensor, got {getattr(x, 'dtype', type(x))}")
    if x.layout != torch.strided or x.is_nested:
        raise TypeError(
            f"{name} must be a dense tensor, got one of layout {x.layout}: convert it, as by to_dense()"
        )
    if x.dtype.itemsize < 2:
        raise TypeError(f"{name} is {x.dtype}, in which PyTorch computes nothing: convert it to 16 bits or more")
    if x.dim() == 0:
        raise ValueError(f"{name} must have at least one dimension, got a scalar: give it one with reshape(1)")


def check_coefficients(coeffs: Sequence[Tensor], length: int | None) -> int:
    """Return the width of the tensor that has these coefficients, or raise."""
    if not coeffs:
        raise ValueError("coeffs must hold at least the approximation, got an empty sequence")
    first = coeffs[0]
    for i, c in enumerate(coeffs):
        check_tensor(f"coeffs[{i}]", c)
        if c.dtype != first.dtype or c.device != first.device:
            raise TypeError(
                f"coeffs[{i}] is {c.dtype} on {c.device}, but coeffs[0] is {first.dtype} on {first.device}: "
                f"convert them to one dtype and device"
            )
        if c.shape[:-1] != first.shape[:-1]:
            raise ValueError(f"coeffs[{i}] has shape {tuple(c.shape)}, but coeffs[0] {tuple(first.shape)}")
    if length is not None and (isinstance(length, bool) or not isinstance(length, (int, torch.SymInt))):
        raise TypeError(f"length must be an integer or None, got {length!r}")
    if length is not None and length < 0:
        raise ValueError(f"length must not be negative, got {length}")
    level = len(coeffs) - 1
    widths = [c.shape[-1] for c in coeffs]
    if length is None:
        length = 2 * widths[-1] if level else widths[-1]
    expected = band_widths(length, level)
    if widths != expected:
        raise ValueError(
            f"coefficients of widths {widths} do not belong to length {length}, which has {expected}: "
            f"pass the width of the tensor that was transformed"
        )
    return length
