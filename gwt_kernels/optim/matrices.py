"""Options of groups whose updates are orthogonalised matrices, and the stage of a step that does it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gwt_kernels.backends.matrix_runner import MatrixStage
from gwt_kernels.core.dtensor import is_sharded
from gwt_kernels.distributed.matrices import MatrixExchange, MatrixParameter
from gwt_kernels.rules import RULES
from gwt_kernels.rules.newton_schulz import (
    NewtonSchulz,
    check_workspace,
    matrix_shapes,
    update_scale,
    views_of,
)

__all__ = [
    "MatrixOptions",
    "check_matrix",
    "check_matrix_options",
    "has_matrices",
    "matrix_options",
    "matrix_stage",
]

_EMBEDDING = re.compile(r"(^|[._])(embed\w*|\w*embeddings?|wte|wpe)([._]|$)")


class MatrixOptions(NamedTuple):
    """What decides about the matrix stage of a group; of groups that share it they are equal.

    Attributes:
        newton_schulz: The iteration.
        adjust_lr_fn: How the learning rate depends on a matrix's shape.
        workspace_bytes: What matrices that are computed at once may take.
        flatten: Whether tensors of more than two dimensions are one matrix.
        row_splits: Numbers of rows that are orthogonalised apart, or None.
    """

    newton_schulz: NewtonSchulz
    adjust_lr_fn: str | None
    workspace_bytes: int
    flatten: bool
    row_splits: tuple[int, ...] | None


def has_matrices(group: Mapping[str, Any]) -> bool:
    """Whether the rule of a group has a matrix stage."""
    return RULES[group["rule"]].last_stage is not None


def matrix_options(group: Mapping[str, Any]) -> MatrixOptions | None:
    """The options of a group's matrix stage; None where its rule has none."""
    if not has_matrices(group):
        return None
    dtype = getattr(torch, str(group["ns_dtype"]), None)
    iteration = NewtonSchulz(tuple(group["ns_coefficients"]), group["ns_steps"], group["eps"], dtype)  # type: ignore[arg-type]
    splits = group["row_splits"]
    return MatrixOptions(
        iteration,
        group["adjust_lr_fn"],
        group["workspace_bytes"],
        group["flatten"],
        None if splits is None else tuple(splits),
    )


def check_matrix_options(group: Mapping[str, Any]) -> None:
    """Raise unless the options of a group's matrix stage have a meaning.

    Raises:
        TypeError, ValueError: they have none; the message names the option.
    """
    for name in ("ns_coefficients", "row_splits"):
        value = group[name]
        if not isinstance(value, (tuple, list)) and not (value is None and name == "row_splits"):
            raise TypeError(f"{name}={value!r} must be a tuple of numbers")
    options = matrix_options(group)
    if options is None:
        return
    options.newton_schulz.check()
    update_scale(options.adjust_lr_fn, (1, 1))
    if isinstance(options.workspace_bytes, bool) or not isinstance(options.workspace_bytes, int):
        raise TypeError(f"workspace_bytes={options.workspace_bytes!r} must be an int")
    if not isinstance(group["nesterov"], bool):
        raise TypeError(f"nesterov must be True or False, got {group['nesterov']!r}")


def check_matrix(p: Tensor, group: Mapping[str, Any], name: str) -> None:
    """Raise unless a parameter is a matrix, or a batch of matrices, that the stage of its group can take.

    Raises:
        TypeError, ValueError: it is not; the message names the parameter and the remedy.
    """
    options = matrix_options(group)
    if options is None:
        return
    if _EMBEDDING.search(name.removeprefix("parameter ").split(" ")[0].strip("'\"")):
        raise ValueError(
            f"{name} is called an embedding, whose rows are looked up and not multiplied: put it into a group with "
            f"rule='adamw', as gwt_param_groups does"
        )
    check_workspace(
        name, p.shape, options.newton_schulz, options.workspace_bytes, options.flatten, options.row_splits
    )


def matrix_stage(params: Sequence[Tensor], names: Sequence[str], options: MatrixOptions) -> MatrixStage:
    """The matrix stage of parameters, whole or sharded; all processes have to make it alike.

    Raises:
        ValueError: a parameter's shards cannot be gathered, or they would need factors of their own.
    """
    flatten, splits = options.flatten, options.row_splits
    scales = []
    for p, name in zip(params, names, strict=True):
        own = [update_scale(options.adjust_lr_fn, s) for s in matrix_shapes(p.shape, flatten, splits, name)]
        if len(set(own)) > 1 and is_sharded(p):
            raise ValueError(
                f"{name} is sharded, and its row_splits={splits} have other factors by adjust_lr_fn="
                f"{options.adjust_lr_fn!r}: use splits of equal size, or another adjust_lr_fn"
            )
        scales.append(own)
    exchange = MatrixExchange(
        [MatrixParameter(name, p, flatten, splits) for p, name in zip(params, names, strict=True)],
        options.newton_schulz,
        options.workspace_bytes,
    )

    def views(value: Tensor, param: int) -> Sequence[Tensor]:
        return views_of(value, flatten, splits)

    return MatrixStage(exchange.run, options.newton_schulz.dtype, scales, views)
