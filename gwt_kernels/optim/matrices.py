"""Options of groups whose updates are orthogonalised matrices, and the stage of a step that orthogonalises them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import compress
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gwt_kernels.backends import choice
from gwt_kernels.backends.matrix_runner import MatrixStage, check_cut
from gwt_kernels.core.dtensor import is_sharded
from gwt_kernels.distributed.matrices import MatrixExchange, MatrixParameter
from gwt_kernels.optim.state import moment_format, state_shape
from gwt_kernels.rules import MATRIX_STAGES
from gwt_kernels.rules.newton_schulz import (
    DTYPES,
    NewtonSchulz,
    check_workspace,
    matrix_shapes,
    update_scale,
)

_STAGE_OPTIONS = (
    "ns_coefficients", "ns_steps", "eps", "ns_dtype", "adjust_lr_fn", "workspace_bytes", "flatten", "row_splits",
)  # fmt: skip
_EMBEDDING = re.compile(r"^(embed\w*|\w*_embed|\w*embeddings?|\w*embedding_table|wte|wpe)$", re.IGNORECASE)
_NO_EMBEDDING = re.compile(r"proj|linear|dense|mapping", re.IGNORECASE)
_CONVOLUTION = re.compile(r"(^|[._])\w*conv(olution)?\d*d?([._]|$)", re.IGNORECASE)
_KERNELS = ([1, 1], [3, 3], [5, 5], [7, 7])


class MatrixOptions(NamedTuple):
    """Options of a group's matrix stage; groups that share a stage have equal ones.

    Attributes:
        newton_schulz: The iteration.
        adjust_lr_fn: How the learning rate depends on a matrix's shape.
        workspace_bytes: The most bytes that matrices computed at once may take.
        flatten: Whether tensors of more than two dimensions are one matrix.
        row_splits: Numbers of rows that are orthogonalised separately, or None.
    """

    newton_schulz: NewtonSchulz
    adjust_lr_fn: str | None
    workspace_bytes: int
    flatten: bool
    row_splits: tuple[int, ...] | None


def has_matrices(group: Mapping[str, Any]) -> bool:
    """Return whether the rule of a group, which need not be checked yet, has a matrix stage."""
    rule = group["rule"]
    return isinstance(rule, str) and rule in MATRIX_STAGES


def stage_key(group: Mapping[str, Any]) -> tuple[Any, ...] | None:
    """Return a key of the matrix stage of a group, which need not be checked yet; None if it has no stage."""
    if not has_matrices(group):
        return None
    values = map(group.get, _STAGE_OPTIONS)  # None for those that a group lacks
    return tuple(tuple(value) if isinstance(value, list) else value for value in values)


def matrix_options(group: Mapping[str, Any]) -> MatrixOptions | None:
    """Return the options of a group's matrix stage; None if its rule has none."""
    if not has_matrices(group):
        return None
    dtype = getattr(torch, ns_dtype_name(group["ns_dtype"]))
    iteration = NewtonSchulz(tuple(group["ns_coefficients"]), group["ns_steps"], group["eps"], dtype)
    splits = group["row_splits"]
    return MatrixOptions(
        iteration,
        group["adjust_lr_fn"],
        group["workspace_bytes"],
        group["flatten"],
        None if splits is None else tuple(splits),
    )


def ns_dtype_name(ns_dtype: torch.dtype | str) -> str:
    """Return the option as a checkpoint stores it: a plain name.

    Raises:
        ValueError: Newton-Schulz does not support this dtype.
    """
    name = str(ns_dtype).removeprefix("torch.")
    if name not in (known := [str(dtype).removeprefix("torch.") for dtype in DTYPES]):
        raise ValueError(f"ns_dtype={ns_dtype!r} must be one of {', '.join(f'torch.{each}' for each in known)}")
    return name


def check_matrix_options(group: Mapping[str, Any]) -> None:
    """Raise unless the options of a group's matrix stage are valid.

    Raises:
        TypeError, ValueError: an option is not; the message names it.
    """
    if not has_matrices(group):
        return
    for name in ("ns_coefficients", "row_splits"):
        value = group[name]
        if not isinstance(value, (tuple, list)) and not (value is None and name == "row_splits"):
            raise TypeError(f"{name}={value!r} must be a tuple of numbers")
    options = matrix_options(group)
    assert options is not None
    options.newton_schulz.check()
    update_scale(options.adjust_lr_fn, (1, 1))
    if isinstance(options.workspace_bytes, bool) or not isinstance(options.workspace_bytes, int):
        raise TypeError(f"workspace_bytes={options.workspace_bytes!r} must be an int")


def check_matrix(p: Tensor, group: Mapping[str, Any], label: str) -> None:
    """Raise unless a parameter is a matrix, or a batch of matrices, that the stage of its group, if any, can take.

    Args:
        p: The parameter.
        group: Its group.
        label: The parameter's label from :func:`gwt_kernels.optim.checks.label_of`.

    Raises:
        TypeError, ValueError, RuntimeError: It is not; the message names the parameter and the remedy.
    """
    options = matrix_options(group)
    if options is None:
        return
    path = label.removeprefix("parameter ").strip("'\"").removesuffix(".weight")
    owner = path.rpartition(".")[2]
    if _EMBEDDING.search(owner) and not _NO_EMBEDDING.search(owner):
        raise ValueError(
            f"{label} is called an embedding, whose rows are looked up and not multiplied: put it into a group "
            f"with rule='adamw', as gwt_param_groups does"
        )
    is_kernel = p.dim() > 3 and list(p.shape[-2:]) in _KERNELS
    if p.dim() > 2 and not options.flatten and (is_kernel or _CONVOLUTION.search(path)):
        raise ValueError(
            f"{label} of shape {tuple(p.shape)} is a convolution's by its {'shape' if is_kernel else 'name'}, and "
            f"its last two dimensions are no matrix: use flatten=True in its group, or rule='adamw'"
        )
    dtype = options.newton_schulz.dtype
    try:
        if p.device.type != "meta":
            choice.resolve_update(group["backend"], p.device, dtype, group["level"])
    except RuntimeError as error:
        raise RuntimeError(f"{label} (ns_dtype {dtype}): {error}") from None
    check_workspace(
        label, p.shape, options.newton_schulz, options.workspace_bytes, options.flatten, options.row_splits
    )
    stored = moment_format(p, group)
    if stored.codec is not None and p.dim() > 2 and not is_sharded(p):  # shards are checked later, by the plan
        named = f"{label} of shape {tuple(p.shape)}"
        for piece in matrix_stage([p], [label], options).pieces:
            if piece.length < len(p):
                check_cut(piece, state_shape(p, group), stored, group["level"], named)


def is_exchanged(p: Any, group: Mapping[str, Any]) -> bool:
    """Return whether processes exchange matrices of a parameter, also those that have no gradient of it."""
    return has_matrices(group) and p.requires_grad and is_sharded(p) and p.device_mesh.size() > 1


def matrix_stage(
    params: Sequence[Tensor], names: Sequence[str], options: MatrixOptions, has_grad: Sequence[bool] | None = None
) -> MatrixStage:
    """Return the matrix stage of parameters, whole or sharded; all processes must construct it alike.

    Args:
        params: The parameters.
        names: Their names in errors.
        options: Options of their groups.
        has_grad: Which of them have a gradient on this process, None for all; the stage is for these only.

    Raises:
        ValueError: a parameter's shards cannot be gathered.
    """
    exchange, scales = exchange_of(params, names, options, has_grad)
    present = [True] * len(params) if has_grad is None else has_grad
    scales, names = list(compress(scales, present)), list(compress(names, present))
    return MatrixStage(exchange.run, options.newton_schulz.dtype, scales, exchange.pieces, names)


def exchange_of(
    params: Sequence[Tensor], names: Sequence[str], options: MatrixOptions, has_grad: Sequence[bool] | None = None
) -> tuple[MatrixExchange, list[float]]:
    """Return the exchange that orthogonalises matrices, and the factors on updates; see :func:`matrix_stage`."""
    flatten, splits = options.flatten, options.row_splits
    scales, matrices = [], []
    present = [True] * len(params) if has_grad is None else has_grad
    for p, name, here in zip(params, names, present, strict=True):
        # A shard may have rows of several splits: whole matrices are multiplied by factors relative to the first.
        first, *rest = [
            update_scale(options.adjust_lr_fn, s) for s in matrix_shapes(p.shape, flatten, splits, name)
        ]
        scales.append(first)
        factors = (1.0, *(scale / first for scale in rest))
        matrices.append(MatrixParameter(name, p, flatten, splits, factors, here))
    return MatrixExchange(matrices, options.newton_schulz, options.workspace_bytes), scales
