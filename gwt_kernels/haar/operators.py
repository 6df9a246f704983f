"""Operators ``gwt_kernels::haar_dwt`` and ``haar_idwt``, for autograd, torch.func, torch.compile and torch.export.

They run Triton kernels on supported tensors and PyTorch's operators on others, so a program exported on one machine
runs on another. The transform is linear and its transpose is the inverse, so derivatives are calls of
these operators; torch.func differentiates PyTorch's operators instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gwt_kernels.backends import choice
from gwt_kernels.backends.torch import haar as statement
from gwt_kernels.haar.transform import band_widths, check_coefficients, check_tensor

_LIBRARY = torch.library.Library("gwt_kernels", "DEF")  # type: ignore[no-untyped-call]
_LIBRARY.define("haar_dwt(Tensor x, int level) -> Tensor[]")  # type: ignore[no-untyped-call]
_LIBRARY.define("haar_idwt(Tensor[] coeffs, SymInt length) -> Tensor")  # type: ignore[no-untyped-call]

haar_dwt = torch.ops.gwt_kernels.haar_dwt.default
haar_idwt = torch.ops.gwt_kernels.haar_idwt.default


# Implementations ---------------------------------------------------------------------------------------------


def _dwt(x: Tensor, level: int) -> list[Tensor]:
    _check_dwt(x, level)
    return _implementation(x, level).haar_dwt(x, level)  # type: ignore[no-any-return]


def _idwt(coeffs: list[Tensor], length: int) -> Tensor:
    check_coefficients(coeffs, length)
    return _implementation(coeffs[0], len(coeffs) - 1).haar_idwt(coeffs, length)  # type: ignore[no-any-return]


def _implementation(x: Tensor, level: int) -> Any:
    if choice.triton_obstacle(x.device, x.dtype, level) is not None:
        return statement
    from gwt_kernels.backends.triton import haar_launch

    return haar_launch


def _fake_dwt(x: Tensor, level: int) -> list[Tensor]:
    _check_dwt(x, level)
    return [x.new_empty((*x.shape[:-1], width)) for width in band_widths(x.shape[-1], level)]


def _fake_idwt(coeffs: Sequence[Tensor], length: int) -> Tensor:
    check_coefficients(coeffs, length)
    return coeffs[0].new_empty((*coeffs[0].shape[:-1], length))


def _check_dwt(x: Tensor, level: int) -> None:
    """Raise on a wrong tensor or level; levels too deep for the width are valid, as gradients of an inverse."""
    check_tensor("x", x)
    if level < 0:
        raise ValueError(f"level must not be negative, got {level}")


# Derivatives ------------------------------------------------------------------------------------------------


class _DWT(torch.autograd.Function):
    """The transform, whose gradient is the inverse."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, level: int) -> tuple[Tensor, ...]:
        with torch._C._AutoDispatchBelowAutograd():
            coeffs = tuple(haar_dwt(x, level))
        ctx.length, ctx.level = x.shape[-1], level
        return coeffs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return haar_idwt(gradients, ctx.length), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> tuple[Tensor, ...]:
        return tuple(haar_dwt(tangent, ctx.level))


class _IDWT(torch.autograd.Function):
    """The inverse, whose gradient is the transform."""

    @staticmethod
    def forward(ctx: Any, length: int, *coeffs: Tensor) -> Tensor:
        ctx.length, ctx.level = length, len(coeffs) - 1
        with torch._C._AutoDispatchBelowAutograd():
            return haar_idwt(coeffs, length)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return None, *haar_dwt(gradient, ctx.level)

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor) -> Tensor:
        return haar_idwt(tangents, ctx.length)  # type: ignore[no-any-return]


def _differentiable_dwt(x: Tensor, level: int) -> list[Tensor]:
    if torch._C._are_functorch_transforms_active():  # torch.func cannot apply an autograd.Function here
        return statement.haar_dwt(x, level)
    return list(_DWT.apply(x, level))  # type: ignore[no-untyped-call]


def _differentiable_idwt(coeffs: list[Tensor], length: int) -> Tensor:
    if torch._C._are_functorch_transforms_active():
        return statement.haar_idwt(coeffs, length)
    return _IDWT.apply(length, *coeffs)  # type: ignore[no-any-return, no-untyped-call]


# Batches ----------------------------------------------------------------------------------------------------


def _batched_dwt(info: Any, in_dims: tuple[int, None], x: Tensor, level: int) -> tuple[list[Tensor], list[int]]:
    return haar_dwt(x.movedim(in_dims[0], 0), level), [0] * (level + 1)


def _batched_idwt(
    info: Any, in_dims: tuple[Sequence[int | None], None], coeffs: Sequence[Tensor], length: int
) -> tuple[Tensor, int]:
    batched = [
        c.expand(info.batch_size, *c.shape) if dim is None else c.movedim(dim, 0)
        for c, dim in zip(coeffs, in_dims[0], strict=True)
    ]
    return haar_idwt(batched, length), 0


def _register() -> None:
    for operator, compute, fake, differentiable, batched, stated in (
        (haar_dwt, _dwt, _fake_dwt, _differentiable_dwt, _batched_dwt, statement.haar_dwt),
        (haar_idwt, _idwt, _fake_idwt, _differentiable_idwt, _batched_idwt, statement.haar_idwt),
    ):
        for key, function in (
            ("CompositeExplicitAutograd", compute),
            ("Autograd", differentiable),
            ("Batched", stated),  # for torch.autograd.grad(is_grads_batched=True)
        ):
            _LIBRARY.impl(operator, function, key)  # type: ignore[no-untyped-call]
        torch.library.register_fake(operator, fake, lib=_LIBRARY)
        torch.library.register_vmap(operator, batched, lib=_LIBRARY)


_register()
