"""GWTAdafactor, Adafactor on the approximation of each gradient: its options. Its steps are in base.py."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from gwt_kernels.backends import choice
from gwt_kernels.core.hyper import Boundary, Rounding
from gwt_kernels.optim.base import PlannedOptimizer
from gwt_kernels.optim.options import FIXED


class GWTAdafactor(PlannedOptimizer):
    """Adafactor (arXiv 1804.04235) on the approximation of each gradient, as the authors of GWT combine them.

    The second moment of a matrix is kept as means of its rows and of its columns. The first moment, if kept, has
    one number per block of ``2**level`` neighbours. Level 0 is Adafactor. The formulas are in docs/algorithm.md.

    Args:
        params: As for ``torch.optim.AdamW``. Every option may be overridden per group, except the options of the
            whole optimizer (see :class:`gwt_kernels.GWTAdamW`), ``adamw_betas`` and ``adamw_eps``. Groups with
            ``rule="adamw"`` use AdamW: :func:`gwt_kernels.gwt_param_groups` makes them of the tensors that it does
            not transform.
        lr: Learning rate. ``relative_step`` ignores it; it may then be None.
        level: Levels of the transform.
        scale: Factor on the updates of transformed tensors.
        beta1: Decay of the first moment, in [0, 1); None for no first moment.
        eps: Number added to the squares of the approximation, and least RMS of weights for ``scale_parameter``.
        clip_threshold: Largest RMS of the approximation's update, to which a tensor's update is scaled down.
        decay_rate: The second moment's decay at step ``t`` is ``1 - t**decay_rate``.
        weight_decay: Decoupled weight decay, times the learning rate after ``relative_step`` and
            ``scale_parameter``.
        scale_parameter: Multiply the learning rate by the RMS of a tensor's weights.
        relative_step: Use ``min(1e-2, 1 / sqrt(t))`` as learning rate.
        warmup_init: Use ``min(1e-6 * t, 1 / sqrt(t))`` instead; needs ``relative_step``.
        details: ``"divided"``: the details of a gradient are divided as its approximation is; ``"published"``: they
            are not divided by any second moment.
        wavelet: As for :class:`gwt_kernels.GWTAdamW`.
        boundary: As for :class:`gwt_kernels.GWTAdamW`.
        adamw_betas: ``betas`` of groups with ``rule="adamw"`` that have none of their own.
        adamw_eps: ``eps`` of such groups, added to the root of the second moment, which is not bias-corrected.
        state_dtype: dtype of the first moment. This and all options below are as for
            :class:`gwt_kernels.GWTAdamW`.

    State per parameter: ``step``; ``exp_avg`` (``[..., ceil(N / 2**level)]``) unless ``beta1`` is None;
    ``exp_avg_sq_row`` (``[..., rows]``) and ``exp_avg_sq_col`` (``[..., ceil(N / 2**level)]``, for each matrix),
    or, in one dimension, ``exp_avg_sq``, in float32 (float64 for float64 parameters). Groups with ``rule="adamw"``
    have AdamW's state.

    Raises:
        TypeError, ValueError, RuntimeError: as :class:`gwt_kernels.GWTAdamW`.
    """

    rules = ("adafactor", "adamw")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor | None = 1e-2,
        *,
        level: int = 2,
        scale: float = 0.25,
        beta1: float | None = 0.9,
        eps: tuple[float, float] = (1e-30, 1e-3),
        clip_threshold: float = 1.0,
        decay_rate: float = -0.8,
        weight_decay: float = 0.0,
        scale_parameter: bool = False,
        relative_step: bool = False,
        warmup_init: bool = False,
        details: Literal["published", "divided"] = "divided",
        wavelet: str = "haar",
        boundary: Boundary = "zero",
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
        super().__init__(params, FIXED | locals() | {"rule": "adafactor"})
