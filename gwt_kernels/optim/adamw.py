"""GWTAdamW, a torch.optim optimizer: its options and their meaning. Its steps are in base.py."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from gwt_kernels.backends import choice
from gwt_kernels.core.hyper import Boundary, Rounding, Rule
from gwt_kernels.core.level import Level
from gwt_kernels.optim.base import PlannedOptimizer


class GWTAdamW(PlannedOptimizer):
    """AdamW whose moments live on the wavelet approximation of each gradient.

    Implements GWT-Adam (arXiv 2501.07237, algorithm 1) with decoupled weight decay in
    ``torch.optim.AdamW``'s order and Fira's norm-growth limiter. A group's ``level`` applies to every tensor
    in it; use :func:`gwt_kernels.gwt_param_groups` to transform the matrices that the paper transforms and to
    leave the rest at level 0, which is AdamW without bias correction inside the root. The update of a block
    of ``2**level`` neighbours and its derivation are in docs/algorithm.md.

    Args:
        params: As for ``torch.optim.AdamW``: tensors, named tensors, or group dicts. Every option below
            may be overridden per group, except ``max_grad_norm``, ``skip_nonfinite``, ``capturable`` and
            ``telemetry``, which apply to the whole optimizer.
        lr: Learning rate, a float or a one-element CPU tensor; with ``capturable`` also a float32 tensor on the
            parameters' device.
        betas: Decay of the first and of the second moment, each in [0, 1).
        eps: Added to the root of the second moment. Since the root is not bias-corrected, ``eps`` here is
            ``torch.optim.AdamW``'s times ``sqrt(1 - b2**t)``.
        weight_decay: Decoupled weight decay.
        level: Levels of the transform; moments shrink by ``2**level``. ``2**level`` must be below twice the
            last dimension of every tensor in the group. ``"row"`` is one block per row of any width, with two
            numbers of state per row.
        scale: Factor on the update of transformed tensors; level 0 ignores it.
        rule: ``"gwt"``, the published rule, or ``"foam"``, the folded one, whose updates are bounded; in groups at
            level 0 also ``"adamw"``, which both equal there.
        norm_growth_limit: The limiter's gamma, at least 1; None for no limiter. By default the published 1.01
            where ``rule="gwt"``; the folded rule and level 0 have none.
        wavelet: ``"haar"``, or the name of a discrete wavelet of PyWavelets, orthogonal or biorthogonal (torch
            backend only).
        state_dtype: dtype of the moments; None means float32, and float64 for float64 parameters. In bfloat16
            they are rounded stochastically. In int8 they are quantized values with a float32 scale per 128 of them
            (fewer above level 3); tensors of fewer than 4096 coefficients, levels above 6 and ``level="row"`` stay
            float32.
        weight_rounding: How bfloat16 and float16 weights are stored: ``"nearest"`` (None), ``"stochastic"``, or,
            for bfloat16, ``"split"``: with the lower half of each float32 master weight in the state.
        seed: Seed of the random bits, which depend only on it, the parameter (its name if the groups have names,
            else its position), the step and the element's index; at least 0 and below ``2**32``.
        maximize: Ascend instead of descend.
        correct_bias: Multiply updates by Adam's bias correction, ``sqrt(1-b2**t) / (1-b1**t)``.
        res_scale: Factor on the difference of an element from the mean of its block, with ``rule="foam"``.
        boundary: How the transform continues a row beyond its ends: ``"zero"``, or PyWavelets' ``"constant"``,
            ``"symmetric"``, ``"reflect"`` or ``"periodic"`` (torch backend only).
        max_grad_norm: Clip gradients to this global norm over all parameters within the step. Up to rounding the
            result is that of ``torch.nn.utils.clip_grad_norm_`` before it. Gradients are read once more and do not
            change. None for no clipping; infinity to measure the norm only, in the first pass of Triton's limiter
            if there is one.
        skip_nonfinite: Skip the whole step when any gradient has an infinity or a NaN; ``skipped_steps`` counts
            these. Otherwise such gradients spoil weights and moments, as in ``torch.optim.AdamW``.
        capturable: Keep step counts on the parameters' device and take ``lr`` as a tensor there, so that a CUDA
            graph may capture the step and replay it. Needs the Triton backend for CUDA tensors.
        telemetry: Record on the device the statistics of each tensor's steps that :meth:`telemetry` returns; for
            Haar, ``boundary="zero"`` and parameters that are not sharded.
        backend: ``"triton"``, ``"compiled"`` (the step in C, for CPU tensors), ``"torch"``, or None for Triton on
            CUDA tensors, C on CPU tensors if there is a compiler, and torch elsewhere.

    State per parameter: ``step`` (float64 scalar; on the CPU, or on the parameter's device if that counts steps);
    ``exp_avg`` and ``exp_avg_sq`` (``[..., ceil(N / 2**level)]`` for Haar, ``[..., 1]`` at ``level="row"``, on the
    parameter's device); with the limiter, ``limiter_norm`` (scalar on the parameter's device: float32, or float64
    for float64 parameters); and what int8 moments and ``weight_rounding="split"`` add (docs/interface.md).

    Raises:
        TypeError: an option or a parameter has the wrong type.
        ValueError: an option is out of range or unknown, or a level does not fit a parameter's width.
        RuntimeError: the requested backend cannot run on a parameter, a CUDA graph could not capture its step, or a
            lazy module's parameter has no shape before the first forward pass.
    """

    rules = ("gwt", "foam", "adamw")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        level: Level = 2,
        scale: float = 0.25,
        rule: Rule = "gwt",
        norm_growth_limit: float | Literal["published"] | None = "published",
        wavelet: str = "haar",
        state_dtype: torch.dtype | str | None = None,
        weight_rounding: Rounding | None = None,
        seed: int = 0,
        maximize: bool = False,
        correct_bias: bool = True,
        res_scale: float = 1.0,
        boundary: Boundary = "zero",
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        capturable: bool = False,
        telemetry: bool = False,
        backend: choice.Backend | None = None,
    ) -> None:
        super().__init__(params, locals())
