"""The optimizer step as one stateless function over lists of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gwt_kernels.backends import choice
from gwt_kernels.backends.bucket import Bucket, StepInputs
from gwt_kernels.backends.prepare import prepare
from gwt_kernels.backends.runner import Runner
from gwt_kernels.core.hyper import Boundary, Hyper, Rounding, Rule, Span
from gwt_kernels.core.level import Level
from gwt_kernels.rules import MATRIX_STAGES

__all__ = ["Boundary", "Hyper", "Rounding", "Rule", "Span", "gwt_adamw_"]


@torch.no_grad()
def gwt_adamw_(
    *,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor] | None,
    steps: Sequence[int] | Tensor,
    hypers: Sequence[Hyper],
    level: Level,
    **options: Any,
) -> None:
    """Update ``params``, ``exp_avgs``, ``exp_avg_sqs`` and ``limiter_norms`` in place by one GWT-Adam step.

    The tensors are one bucket: one device, one dtype of parameters, of gradients and of moments, one level.
    On the Triton backend the bucket is one launch per pass, whatever the number of tensors, and nothing waits
    for the device. Mathematics: docs/algorithm.md; source: arXiv 2501.07237, algorithm 1, with Fira's limiter.

    Args:
        params: Floating-point tensors ``[..., N]``, any strides; N may differ between them.
        grads: Dense gradients of the parameters' shapes, any strides.
        exp_avgs: First moments of the approximation, contiguous ``[..., nb]`` with ``nb = ceil(N / 2**level)``
            for Haar, 1 of ``level="row"``, and the approximation's width otherwise.
        exp_avg_sqs: Second moments, like ``exp_avgs``; None under a rule that keeps none (``"lion"``); of
            ``"adam_mini"`` float32 ``[..., rows / n, 1]``, one for ``n`` rows, or ``[1, ...]`` for all.
        steps: Number of this step per parameter, 1 for the first; or, counted by the device, a contiguous float64
            tensor ``[n]`` on it with the number of steps taken before this one, which is counted there.
        hypers: Options per parameter.
        level: Levels of the transform; 0 is AdamW, which ignores ``scale`` and limiter; ``"row"`` is one block a
            row of any width.
        **options: Of the bucket and of the call, all of which have defaults:

            limiter_norms: The limiter's previous norm per parameter, a scalar tensor on the parameter's device
                (0: none yet); None for a parameter without limiter. Either all are None or none is.
            rule: ``"gwt"``, the published rule; ``"foam"``, the folded one (arXiv 2512.07112), without limiter;
                ``"adamw"`` at level 0, which these are there; ``"lion"`` (arXiv 2302.06675) or ``"adam_mini"``
                (arXiv 2406.16793), on block means.
            rounding: How updated weights are stored: ``"nearest"``; ``"stochastic"``, in bfloat16 or float16; or
                ``"split"``, bfloat16 weights that with ``lows`` are float32 ones. Moments in bfloat16 are always
                rounded stochastically.
            keys: Philox keys, per parameter (:func:`gwt_kernels.core.hyper.key_of`); None for 0.
            lows: Error-correction bits of ``rounding="split"``, contiguous int16 tensors of the parameters' shapes,
                which are updated too.
            scales: Of ``exp_avgs`` in int8 and ``exp_avg_sqs`` in uint8, per parameter a float32 tensor
                ``[ceil(coefficients / n)]`` for each of them, with ``n`` of
                :func:`gwt_kernels.core.hyper.quantum`, which are updated too; None for moments in floating point.
            control: What :func:`gwt_kernels.control.control_` decided about this step, on the parameters' device: a
                factor on gradients, and whether it is taken at all; needs ``steps`` that the device counts.
            telemetry: Float64 ``[n, 6]`` on the parameters' device, rows of :mod:`gwt_kernels.telemetry`, for Haar
                and ``boundary="zero"`` alone; or None.
            spans: Where shards lie in the whole parameters, and in the whole of their moments, so that random bits
                are those of the whole, with rows padded as :func:`gwt_kernels.core.hyper.padded_spans` says; None
                for whole tensors.
            limits: The limiter's divisors of the updates, ``[len(params)]`` on their device, where the caller has
                decided them; ``limiter_norms`` are None then. None to leave it to the ``limiter_norms``.
            wavelet: ``"haar"``, or the name of a discrete wavelet of PyWavelets (torch backend only).
            boundary: How the transform continues a row beyond its ends, by PyWavelets' names; other than
                ``"zero"`` on the torch backend only.
            backend: ``"triton"``, ``"torch"``, ``"compiled"``, or None for Triton on CUDA tensors, the compiled
                step on CPUs where it can be compiled, and torch elsewhere.
            workspace: A dict that the backend may keep launch tables in between calls with the same tensors; None
                makes them anew.

    Raises:
        RuntimeError: the backend asked for cannot run on these tensors.
        TypeError: an option is unknown.
        ValueError: lists of different lengths, an unknown backend, rule, wavelet or boundary, a limiter for some
            tensors only or under the folded rule, that rule with another wavelet than Haar or another boundary
            than zeros, or ``control`` for steps that the host counts.
    """
    if not params:
        return
    control, limits = options.pop("control", None), options.pop("limits", None)
    backend, workspace = options.pop("backend", None), options.pop("workspace", None)
    choice.check_name(backend)
    if (rule := options.get("rule", "gwt")) in MATRIX_STAGES:
        raise ValueError(
            f"rule={rule!r} orthogonalises matrices between two element-wise stages, and gwt_adamw_ is one of "
            f"elements: use gwt_kernels.GWTMuon"
        )
    lengths = [len(x) for x in (grads, exp_avgs, exp_avg_sqs) if x is not None]
    if lengths.count(len(params)) != len(lengths):
        raise ValueError(f"{len(params)} params need as many of all else, got {lengths}")
    bucket = Bucket(params, exp_avgs, exp_avg_sqs, level=level, grad_dtype=grads[0].dtype, **options)
    inputs = StepInputs(grads, steps, hypers)
    bucket.check_inputs(inputs)
    if control is not None and not isinstance(steps, Tensor):
        raise ValueError("control goes with steps that the device counts: pass them as a float64 tensor")
    if limits is not None and (limits.shape != (len(params),) or bucket.limiter_norms[0] is not None):
        raise ValueError(f"limits must be one per parameter, in place of limiter_norms, got {tuple(limits.shape)}")
    runner = prepare(bucket, backend) if workspace is None else _runner(bucket, grads, backend, workspace)
    runner.apply(inputs, control, limits)


def _runner(
    bucket: Bucket, grads: Sequence[Tensor], backend: choice.Backend | None, workspace: dict[str, Any]
) -> Runner:
    """What ran the last step of the same tensors with this workspace, or a new runner."""
    kinds = [(g.dtype, g.shape, g.is_contiguous(), g.is_neg()) for g in grads]
    known = bucket.fingerprint(), kinds, backend, choice.tracer()
    if workspace.get("fingerprint") != known:
        workspace["runner"] = prepare(bucket, backend)
        workspace["fingerprint"] = known
    runner: Runner = workspace["runner"]
    return runner
