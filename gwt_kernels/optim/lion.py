"""GWTLion, Lion with its moment on the means of blocks: its options. Its steps are in base.py."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from gwt_kernels.backends import choice
from gwt_kernels.core.hyper import Rounding
from gwt_kernels.core.level import Level
from gwt_kernels.optim.base import PlannedOptimizer
from gwt_kernels.optim.options import FIXED


class GWTLion(PlannedOptimizer):
    """Lion (arXiv 2302.06675) whose one moment lives on the block means of each gradient.

    A block is ``2**level`` neighbours along the last dimension. The state is one number per block, where Adam keeps
    two per element. Level 0 is Lion. The formulas are in docs/algorithm.md.

    Args:
        params: As for ``torch.optim.AdamW``. Every option may be overridden per group, except the options of the
            whole optimizer (see :class:`gwt_kernels.GWTAdamW`), ``adamw_betas`` and ``adamw_eps``. Groups with
            ``rule="adamw"`` use AdamW: :func:`gwt_kernels.gwt_param_groups` makes them of the tensors that it does
            not transform.
        lr: Learning rate: for Lion 3 to 10 times smaller than for AdamW.
        betas: Weight of the moment in the update, and its decay, each in [0, 1).
        weight_decay: Decoupled weight decay: for Lion 3 to 10 times larger than for AdamW.
        level: Levels of the transform, or ``"row"``: one block per row.
        scale: Factor on updates.
        detail_scale: Factor on the difference of an element from the mean of its block.
        adamw_betas: ``betas`` of groups with ``rule="adamw"`` that have none of their own.
        adamw_eps: ``eps`` of such groups, added to the root of the second moment, which is not bias-corrected.
        state_dtype: This and all options below are as for :class:`gwt_kernels.GWTAdamW`.

    State per parameter: ``step`` and ``exp_avg`` (``[..., ceil(N / 2**level)]``); with ``rule="adamw"`` also
    ``exp_avg_sq``.

    Raises:
        TypeError, ValueError, RuntimeError: as :class:`gwt_kernels.GWTAdamW`.
    """

    rules = ("lion", "adamw")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        level: Level = 2,
        scale: float = 1.0,
        detail_scale: float = 1.0,
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
        super().__init__(params, FIXED | locals() | {"rule": "lion", "eps": adamw_eps})
