"""GWTMuon, Muon with its momentum on the means of blocks: its options. Its steps are in base.py."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from gwt_kernels.backends import choice
from gwt_kernels.core.hyper import Rounding
from gwt_kernels.core.level import Level
from gwt_kernels.optim.base import PlannedOptimizer
from gwt_kernels.optim.matrices import ns_dtype_name
from gwt_kernels.optim.options import FIXED
from gwt_kernels.rules.newton_schulz import WORKSPACE_BYTES


class GWTMuon(PlannedOptimizer):
    """Muon whose momentum lives on the block means of each gradient.

    A block is ``2**level`` neighbours along the last dimension. The difference of an element from the mean of its
    block goes into the update without momentum. The state is one number per block, where Adam keeps two per
    element. Level 0 is ``torch.optim.Muon``, for batches of matrices, shards and 16-bit weights too. The formulas
    are in docs/algorithm.md.

    Muon takes matrices only: tensors of two dimensions, and tensors of more as batches of matrices, such as experts
    ``[E, rows, cols]``. :func:`gwt_kernels.gwt_param_groups` makes a group of them, and groups with
    ``rule="adamw"`` of embeddings, heads, norms and biases: ``gwt_param_groups(model, rule="muon", scale=1.0,
    adamw_lr=3e-4)``.

    Args:
        params: As for ``torch.optim.AdamW``. Every option may be overridden per group, except the options of the
            whole optimizer (see :class:`gwt_kernels.GWTAdamW`), ``adamw_betas`` and ``adamw_eps``.
        lr: Learning rate.
        weight_decay: Decoupled weight decay, at ``lr`` before its adjustment.
        momentum: Decay of the momentum, in [0, 1).
        nesterov: Whether the update looks ahead by the gradient's part of the momentum.
        ns_coefficients: Coefficients of the quintic Newton-Schulz iteration.
        eps: The smallest norm that a matrix is divided by before the iteration.
        ns_steps: Number of iterations, below 100.
        adjust_lr_fn: Factor on the learning rate: ``"original"`` (None), ``sqrt(max(1, rows / cols))``;
            ``"match_rms_adamw"``, ``0.2 * sqrt(max(rows, cols))``, which suits AdamW's learning rates; or
            ``"spectral_unclamped"``, ``sqrt(rows / cols)``.
        level: Levels of the transform, or ``"row"``: one block per row.
        scale: Factor on the update of matrices, at level 0 too.
        detail_scale: Factor on the difference of an element from the mean of its block.
        ns_dtype: dtype of the iteration, and of matrices that travel between processes: ``torch.bfloat16``,
            ``torch.float32`` or ``torch.float64``.
        workspace_bytes: The most bytes that matrices computed at once may take, with the iteration's temporaries.
        flatten: Take tensors of more than two dimensions, such as convolutions, as one matrix ``[shape[0], -1]``.
            Blocks stay within the last dimension.
        row_splits: Numbers of rows of fused matrices that are orthogonalised separately, such as queries, keys and
            values.
        adamw_betas: ``betas`` of groups with ``rule="adamw"`` that have none of their own.
        adamw_eps: ``eps`` of such groups, added to the root of the second moment, which is not bias-corrected.
        state_dtype: This and all options below are as for :class:`gwt_kernels.GWTAdamW`.

    State per parameter: ``step``; ``exp_avg``, the momentum (``[..., ceil(N / 2**level)]``); with int8 moments
    ``exp_avg_scale``; with ``rule="adamw"`` also ``exp_avg_sq``. With DTensors every process takes part in every
    step.

    Raises:
        TypeError, ValueError, RuntimeError: As :class:`gwt_kernels.GWTAdamW`; or a tensor is not a matrix, or a
            matrix needs more than ``workspace_bytes``.
    """

    rules = ("muon", "adamw")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315),
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        *,
        level: Level = 2,
        scale: float = 1.0,
        detail_scale: float = 1.0,
        ns_dtype: torch.dtype | str = torch.bfloat16,
        workspace_bytes: int = WORKSPACE_BYTES,
        flatten: bool = False,
        row_splits: tuple[int, ...] | None = None,
        adamw_betas: tuple[float, float] = (0.9, 0.999),
        adamw_eps: float = 1e-8,
        state_dtype: torch.dtype | str | None = None,
        weight_rounding: Rounding | None = None,
        seed: int = 0,
        maximize: bool = False,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        capturable: bool = False,
        telemetry: bool = False,
        backend: choice.Backend | None = None,
    ) -> None:
        super().__init__(params, FIXED | locals() | {"rule": "muon", "ns_dtype": ns_dtype_name(ns_dtype)})
