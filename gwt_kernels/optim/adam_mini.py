"""GWTAdamMini, Adam-mini with its first moment on the means of blocks: its options. Its steps are in base.py."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from gwt_kernels.backends import choice
from gwt_kernels.core.hyper import Rounding
from gwt_kernels.core.level import Level
from gwt_kernels.optim.base import PlannedOptimizer
from gwt_kernels.optim.options import FIXED


class GWTAdamMini(PlannedOptimizer):
    """Adam-mini (arXiv 2406.16793) whose first moment lives on the block means of each gradient.

    A block is ``2**level`` neighbours along the last dimension. The second moment is one number for the rows of a
    head. Level 0 is Adam-mini, with Adam's bias correction, inside the root. The formulas are in docs/algorithm.md.

    Args:
        params: As for ``torch.optim.AdamW``. Every option may be overridden per group, except the options of the
            whole optimizer (see :class:`gwt_kernels.GWTAdamW`). Groups with ``rule="adamw"`` use AdamW:
            :func:`gwt_kernels.gwt_param_groups` makes them of the tensors that it does not transform.
        lr: Learning rate.
        betas: Decay of the first and of the second moment, each in [0, 1).
        eps: Added to the root of the second moment, which is bias-corrected, except in groups with
            ``rule="adamw"``.
        weight_decay: Decoupled weight decay.
        level: Levels of the transform, or ``"row"``: one block per row.
        scale: Factor on updates; level 0 ignores it.
        head_rows: Number of neighbouring rows (along the last dimension but one) that share a second moment, such
            as those of an attention head; None: all rows of a tensor share one. 1-D tensors have one. If several
            rows share one, Triton reads gradients twice, first for the sums over rows.
        state_dtype: dtype of the first moment. This and all options below are as for
            :class:`gwt_kernels.GWTAdamW`, except that with int8 the first moment stays float32. The second moment
            is float32 (float64 for float64 parameters).

    State per parameter: ``step``, ``exp_avg`` (``[..., ceil(N / 2**level)]``) and ``exp_avg_sq``
    (``[..., rows / head_rows, 1]``, or ``[1, ..., 1]`` for None; whole along dimensions whose shards split heads).

    Raises:
        TypeError, ValueError, RuntimeError: as :class:`gwt_kernels.GWTAdamW`.
    """

    rules = ("adam_mini", "adamw")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        level: Level = 2,
        scale: float = 1.0,
        head_rows: int | None = 1,
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
        super().__init__(params, FIXED | locals() | {"rule": "adam_mini"})
