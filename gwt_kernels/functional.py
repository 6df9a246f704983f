"""The optimizer step as one stateless function over lists of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gwt_kernels.backends import choice, function_arguments
from gwt_kernels.backends.bucket import Bucket, StepInputs
from gwt_kernels.backends.prepare import prepare
from gwt_kernels.backends.runner import Runner
from gwt_kernels.core.hyper import Boundary, Hyper, Rounding, Rule, Span
from gwt_kernels.core.level import Level
from gwt_kernels.rules import ADAFACTOR, MATRIX_STAGES

__all__ = ["Boundary", "Hyper", "Rounding", "Rule", "Span", "gwt_adamw_"]

OPTIONS = (
    *("limiter_norms", "rule", "rounding", "keys", "lows", "scales", "control", "telemetry", "spans", "limits"),
    *("wavelet", "boundary", "backend", "workspace"),
)
"""Keyword arguments of `gwt_adamw_` that have defaults."""


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
    On the Triton backend a bucket of any size is one launch per pass, and the host does not wait for the
    device. Mathematics: docs/algorithm.md; source: arXiv 2501.07237, algorithm 1, with Fira's limiter.

    Args:
        params: Floating-point tensors ``[..., N]``, any strides; N may differ between them.
        grads: Dense gradients of the parameters' shapes, any strides.
        exp_avgs: First moments of the approximation, contiguous ``[..., nb]`` with ``nb = ceil(N / 2**level)``
            for Haar, 1 for ``level="row"``, and the approximation's width otherwise.
        exp_avg_sqs: Second moments, like ``exp_avgs``; None with a rule that keeps none (``"lion"``). With
            ``"adam_mini"`` they are float32 ``[..., rows / n, 1]``, one for ``n`` rows, or ``[1, ...]`` for all.
        steps: Number of this step per parameter, 1 for the first; or a contiguous float64 tensor ``[n]`` on the
            device with the number of steps before this one, which the device increments.
        hypers: Options per parameter.
        level: Levels of the transform; level 0 is AdamW, which ignores ``scale`` and limiter; ``"row"`` has one
            block per row of any width.
        **options: Further keyword arguments, all with defaults:

            limiter_norms: The limiter's previous norm per parameter: scalar tensors on the parameter's device
                (0: none yet), or None for all of them without limiter.
            rule: ``"gwt"``, the published rule; ``"foam"``, the folded one (arXiv 2512.07112), without limiter;
                ``"adamw"`` at level 0, which both equal there; ``"lion"`` (arXiv 2302.06675) or ``"adam_mini"``
                (arXiv 2406.16793), on block means.
            rounding: Rounding of updated weights: ``"nearest"``; ``"stochastic"``, to bfloat16 or float16; or
                ``"split"``, float32 master weights as bfloat16 weights and ``lows``. bfloat16 moments are always
                rounded stochastically.
            keys: Philox key per parameter (:func:`gwt_kernels.core.hyper.key_of`); None for 0.
            lows: Error-correction bits of ``rounding="split"``: contiguous int16 tensors of the parameters' shapes,
                updated in place.
            scales: For quantized ``exp_avgs`` and ``exp_avg_sqs``, a pair of float32 tensors
                ``[ceil(coefficients / block size)]`` per parameter, updated in place, with the format's
                ``block_size(level)`` (``gwt_kernels.formats.moments.FORMATS``); None for floating-point moments.
            control: Step decision of :func:`gwt_kernels.control.control_` on the parameters' device: a factor on
                gradients, and whether to take the step. Requires ``steps`` as a tensor.
            telemetry: Float64 ``[n, 6]`` on the parameters' device, rows of :mod:`gwt_kernels.telemetry`, for Haar
                and ``boundary="zero"`` only; or None.
            spans: Positions of shards in the whole parameters and moments, on which random bits depend, with
                rows padded as by :func:`gwt_kernels.core.hyper.padded_spans`; None for whole tensors.
            limits: The limiter's divisors of the updates, ``[len(params)]`` on their device, in place of
                ``limiter_norms``; None to compute them from ``limiter_norms``.
            wavelet: ``"haar"``, or the name of a discrete wavelet of PyWavelets (torch backend only).
            boundary: Signal extension beyond the ends of a row, by PyWavelets' names; other than ``"zero"`` on the
                torch backend only.
            backend: ``"triton"``, ``"torch"``, ``"compiled"``, or None for Triton on CUDA tensors, the step in C
                on CPUs if it can be compiled, and torch elsewhere.
            workspace: A dict in which the backend keeps launch tables between calls with the same tensors; None
                to rebuild them.

    Raises:
        RuntimeError: the requested backend cannot run on these tensors, or a CUDA graph captures Triton's step with
            ``steps`` as a list, whose numbers a replay would repeat, or with tensors not yet in ``workspace``.
        TypeError: an option is unknown, an entry is not a dense tensor, ``params`` or ``grads`` are not real
            floating-point numbers of 16 bits or more, or a number has the wrong type.
        ValueError: lists of different lengths; tensors that are not one bucket, have other shapes, or are given
            twice; a number out of range; an unknown backend, rule, wavelet or boundary; a limiter for some
            tensors only or with the folded rule; that rule with another wavelet than Haar or another boundary
            than zero; or ``control`` with ``steps`` as a list.
    """
    lists = {"params": params, "grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    function_arguments.check_lists(lists)
    function_arguments.check_numbers(steps, hypers)
    if not params:
        return
    control, limits = options.pop("control", None), options.pop("limits", None)
    backend, workspace = options.pop("backend", None), options.pop("workspace", None)
    choice.check_name(backend)
    if workspace is not None and not isinstance(workspace, dict):
        raise TypeError(f"workspace must be a dict or None, got {type(workspace).__name__}")
    if unknown := sorted(options.keys() - OPTIONS):
        raise TypeError(f"gwt_adamw_ has no option {unknown[0]!r}: it has {', '.join(OPTIONS)}")
    function_arguments.check_options(level, options)
    if (rule := options.get("rule", "gwt")) in list(MATRIX_STAGES):
        raise ValueError(
            f"rule={rule!r} orthogonalises matrices between two element-wise stages, and gwt_adamw_ is one of "
            f"elements: use gwt_kernels.GWTMuon"
        )
    if rule == ADAFACTOR.name:
        raise ValueError(
            f"rule={rule!r} keeps factors, for which gwt_adamw_ has no place: use gwt_kernels.GWTAdafactor"
        )
    lengths = [len(x) for x in lists.values() if x is not None]
    if lengths.count(len(params)) != len(lengths):
        raise ValueError(f"{len(params)} params need as many of all else, got {lengths}")
    bucket = Bucket(params, exp_avgs, exp_avg_sqs, level=level, grad_dtype=grads[0].dtype, **options)
    inputs = StepInputs(grads, steps, hypers)
    bucket.check_inputs(inputs)
    function_arguments.check_step(bucket, inputs, control, limits)
    runner = _prepared(bucket, grads, backend) if workspace is None else _runner(bucket, grads, backend, workspace)
    runner.apply(inputs, control, limits)


def _prepared(bucket: Bucket, grads: Sequence[Tensor], backend: choice.Backend | None) -> Runner:
    """Check the tensors and return their runner."""
    function_arguments.check_kept(bucket)
    runner = prepare(bucket, backend)
    function_arguments.check_tensors(bucket, grads)  # the reason why a backend cannot run comes first
    return runner


def _runner(
    bucket: Bucket, grads: Sequence[Tensor], backend: choice.Backend | None, workspace: dict[str, Any]
) -> Runner:
    """Return the workspace's runner if it is for the same tensors, otherwise a new one."""
    kinds = [(g.dtype, g.shape, g.device, g.is_contiguous(), g.is_neg()) for g in grads]
    known = bucket.fingerprint(), kinds, backend, choice.tracer()
    if workspace.get("fingerprint") != known:
        workspace["runner"] = _prepared(bucket, grads, backend)
        workspace["fingerprint"] = known
    runner: Runner = workspace["runner"]
    return runner
