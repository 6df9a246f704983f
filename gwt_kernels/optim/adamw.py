"""GWTAdamW, a torch.optim optimizer: its options and what they mean; how it steps is base.py's."""

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
        params: What ``torch.optim.AdamW`` takes: tensors, named tensors, or group dicts. Every option below
            may be overridden per group, but for ``max_grad_norm``, ``skip_nonfinite``, ``capturable`` and
            ``telemetry``, which are the whole optimizer's.
        lr: Learning rate, a float or a one-element CPU tensor; with ``capturable`` also a float32 tensor on the
            parameters' device.
        betas: Decay of the first and of the second moment, each in [0, 1).
        eps: Added to the root of the second moment. Since the root is not bias-corrected, ``eps`` here is
            ``torch.optim.AdamW``'s times ``sqrt(1 - b2**t)``.
        weight_decay: Decoupled weight decay.
        level: Levels of the transform; moments shrink by ``2**level``. ``2**level`` must be below twice the
            last dimension of every tensor in the group. ``"row"`` is one block a row of any width: two numbers of
            state a row.
        scale: Factor on the update of transformed tensors; level 0 ignores it.
        rule: ``"gwt"``, the published rule, or ``"foam"``, the folded one, whose updates are bounded; of a group
            that stays at level 0 ``"adamw"``, which both are there.
        norm_growth_limit: The limiter's gamma, at least 1; None for no limiter. By default the published 1.01
            where ``rule="gwt"``; the folded rule and level 0 have none.
        wavelet: ``"haar"``, or the name of a discrete wavelet of PyWavelets, orthogonal or biorthogonal (torch
            backend only).
        state_dtype: dtype of the moments; None means float32, and float64 for float64 parameters. In bfloat16
            they are rounded stochastically; in int8 they are codes with a float32 scale per 128 of them, but for
            tensors of fewer than 4096 coefficients, levels above 6 and rows, which stay float32.
        weight_rounding: How bfloat16 and float16 weights are stored: ``"nearest"`` (None), ``"stochastic"``, or,
            for bfloat16, ``"split"``: with the lower half of a float32 weight beside each, in the state.
        seed: Of the random bits, which depend on it, the parameter (its name where the groups have names, its
            place otherwise), the step and the element's index alone; at least 0 and below ``2**32``.
        maximize: Ascend instead of descend.
        correct_bias: Multiply updates by Adam's bias correction, ``sqrt(1-b2**t) / (1-b1**t)``.
        res_scale: Factor on what an element differs by from the mean of its block, under ``rule="foam"``.
        boundary: How the transform continues a row beyond its ends: ``"zero"``, or PyWavelets' ``"constant"``,
            ``"symmetric"``, ``"reflect"`` or ``"periodic"`` (torch backend only).
        max_grad_norm: Global norm over all parameters to clip to within the step, as
            ``torch.nn.utils.clip_grad_norm_`` before it would, to rounding; gradients are read once more and stay
            as they are. None for no clipping, infinity to measure the norm alone, which Triton's limiter does on
            its way.
        skip_nonfinite: Skip a step, all of it, when any gradient holds an infinity or a NaN; ``skipped_steps``
            counts. Otherwise such gradients spoil weights and moments, as in ``torch.optim.AdamW``.
        capturable: Keep step counts on the parameters' device and take ``lr`` as a tensor there, so that a CUDA
            graph may capture the step and replay it. Needs the Triton backend for CUDA tensors.
        telemetry: Note, on the device, what :meth:`telemetry` tells about each tensor's steps; for Haar,
            ``boundary="zero"`` and parameters that are not sharded.
        backend: ``"triton"``, ``"compiled"`` (the step in C, for CPU tensors), ``"torch"``, or None for Triton on
            CUDA tensors, C on CPU tensors where a compiler is at hand, and torch elsewhere.

    State per parameter: ``step`` (float64 scalar; on the CPU, or on the parameter's device where that counts);
    ``exp_avg`` and ``exp_avg_sq`` (``[..., ceil(N / 2**level)]`` for Haar, ``[..., 1]`` at ``level="row"``, on the
    parameter's device); where the limiter is on, ``limiter_norm`` (scalar on the parameter's device: float32,
    float64 for float64 parameters); and what int8 moments and ``weight_rounding="split"`` add (docs/interface.md).

    Raises:
        TypeError: an option or a parameter has the wrong type.
        ValueError: an option is out of range or unknown, or a level does not fit a parameter's width.
        RuntimeError: the backend asked for cannot run on a parameter, a CUDA graph could not capture its step, or a
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
