"""The optimizer step as one stateless function over lists of tensors; picks a backend."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import starmap
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from gwt_kernels import backends
from gwt_kernels.hyper import (
    Begun,
    Boundary,
    Hyper,
    Rounding,
    Rule,
    Span,
    check_rounding,
    check_rule,
    literal_alone,
)
from gwt_kernels.single import Single

__all__ = ["Begun", "Boundary", "Hyper", "Rounding", "Rule", "Span", "gwt_adamw_", "is_on_triton", "update_sums"]


@torch.no_grad()
def gwt_adamw_(
    *,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    limiter_norms: Sequence[Tensor | None],
    steps: Sequence[int] | Tensor,
    hypers: Sequence[Hyper],
    level: int,
    rule: Rule = "gwt",
    rounding: Rounding = "nearest",
    keys: Sequence[int] | None = None,
    lows: Sequence[Tensor | None] | None = None,
    scales: Sequence[tuple[Tensor, Tensor] | None] | None = None,
    control: Tensor | None = None,
    telemetry: Tensor | None = None,
    spans: Sequence[tuple[Span, Span]] | None = None,
    limits: Tensor | None = None,
    wavelet: str = "haar",
    boundary: Boundary = "zero",
    backend: backends.Backend | None = None,
    workspace: dict[str, Any] | None = None,
    same_tensors: bool = False,
    looks: bool = False,
) -> Begun | None:
    """Update ``params``, ``exp_avgs``, ``exp_avg_sqs`` and ``limiter_norms`` in place by one GWT-Adam step.

    The tensors are one bucket: one device, one dtype of parameters, of gradients and of moments, one level.
    On the Triton backend the bucket is one launch per pass, whatever the number of tensors, and nothing waits
    for the device. Mathematics: docs/algorithm.md; source: arXiv 2501.07237, algorithm 1, with Fira's limiter.

    Args:
        params: Floating-point tensors ``[..., N]``, any strides; N may differ between them.
        grads: Dense gradients of the parameters' shapes, any strides.
        exp_avgs: First moments of the approximation, contiguous ``[..., nb]`` with ``nb = ceil(N / 2**level)``
            for Haar and the approximation's width otherwise.
        exp_avg_sqs: Second moments, like ``exp_avgs``.
        limiter_norms: The limiter's previous norm per parameter, a scalar tensor on the parameter's device
            (0: none yet); None for a parameter without limiter. Either all are None or none is.
        steps: Number of this step per parameter, 1 for the first; or, counted by the device, a contiguous float64
            tensor ``[n]`` on it with the number of steps taken before this one, which is counted there.
        hypers: Options per parameter.
        level: Levels of the transform; 0 is AdamW, which ignores ``scale`` and limiter.
        rule: ``"gwt"``, the published rule, or ``"foam"``, the folded one (arXiv 2512.07112), which has no limiter.
        rounding: How updated weights are stored: ``"nearest"``; ``"stochastic"``, in bfloat16 or float16; or
            ``"split"``, bfloat16 weights that with ``lows`` are float32 ones. Moments in bfloat16 are always
            rounded stochastically.
        keys: Of the random bits, per parameter (:func:`gwt_kernels.hyper.key_of`); None for 0.
        lows: The low halves of the weights, contiguous int16 tensors of the parameters' shapes, which are updated
            too; only where ``rounding="split"``.
        scales: Of ``exp_avgs`` in int8 and ``exp_avg_sqs`` in uint8, per parameter a pair of float32 tensors
            ``[ceil(coefficients / quantum(level))]`` (:func:`gwt_kernels.hyper.quantum`), which are updated too;
            None for moments in floating point.
        control: What :func:`gwt_kernels.control.control_` decided about this step, on the parameters' device: a
            factor on gradients, and whether it is taken at all; needs ``steps`` that the device counts.
        telemetry: Float64 ``[n, 6]`` on the parameters' device, rows of :mod:`gwt_kernels.telemetry`, for Haar
            and ``boundary="zero"`` alone; or None.
        spans: Where the tensors are shards: of what elements of the whole parameters, and of their moments, so
            that random bits are those of the whole; None for whole tensors.
        limits: The limiter's divisors of the updates, ``[len(params)]`` on their device, where the caller has
            decided them (from :func:`update_sums`); ``limiter_norms`` are None then. None to leave it to the
            ``limiter_norms``.
        wavelet: ``"haar"``, or the name of a discrete wavelet of PyWavelets (torch backend only).
        boundary: How the transform continues a row beyond its ends, by PyWavelets' names; other than ``"zero"`` on
            the torch backend only.
        backend: ``"triton"``, ``"torch"``, ``"compiled"``, or None for Triton on CUDA tensors, the compiled step on
            CPUs where it can be compiled, and torch elsewhere.
        workspace: A dict that the backend may keep launch tables in between calls with the same tensors;
            None makes them anew.
        same_tensors: Promise that all but ``grads`` are the objects of the last call with this ``workspace``, their
            memory where it was, that options are equal to its (of ``hypers`` and ``steps`` the values may
            be others, but not whether there is a limiter), and that ``grads`` have the shapes and the dtype that
            they had and are contiguous where they were: these checks are then not repeated.
        looks: Stop where the limiter's first pass has read the gradients, and return what it saw of them: it costs
            no reading of its own. For the Triton backend, with ``limiter_norms``, ``steps`` that the device counts,
            no ``grad_factor``, and ``control`` left to what is returned.

    Returns:
        None, the step is taken; but where it ``looks``, the rest of it.

    Raises:
        RuntimeError: the backend asked for cannot run on these tensors.
        ValueError: lists of different lengths, an unknown backend, rule, wavelet or boundary, a limiter for some
            tensors only or under the folded rule, that rule with another wavelet than Haar or another boundary
            than zeros, ``control`` for steps that the host counts, or a step that cannot look at the gradients
            first.
    """
    if not params:
        nothing = torch.empty(0, dtype=torch.float32, device="cpu")
        return Begun([], lambda control, limits: None, nothing) if looks else None
    workspace = {} if workspace is None else workspace
    keys = [0] * len(params) if keys is None else keys
    lows = [None] * len(params) if lows is None else lows
    scales = [None] * len(params) if scales is None else scales
    tensors = (params, grads, exp_avgs, exp_avg_sqs, limiter_norms)
    if not (same_tensors and "choices" in workspace):
        _check_lengths(tensors, steps, hypers, keys, lows, scales, spans, limits)
        _check_steps(params[0], steps, control)
        _check_transform(params[0], exp_avgs[0], rule, rounding, wavelet, boundary, observed=telemetry is not None)
        _check_lows_and_scales(exp_avgs[0], rounding, lows, scales)
        _check_limiter(limiter_norms, hypers, rule)
        # Every array has to suit the backend, not the parameters alone.
        workspace["choices"] = _choices((params, grads, exp_avgs), level, wavelet, backend, boundary)
    choices = workspace["choices"]
    if looks:
        _check_looks(choices, level, limiter_norms, steps, hypers, control)
    counts = None
    if "torch" in choices and isinstance(steps, Tensor):
        if control is not None:  # on a CUDA device the one place that waits for it
            factor, go, _ = control.tolist()
            if not go:
                if telemetry is not None:
                    telemetry[:, 4:].add_(1)
                return None
            hypers = [hyper._replace(grad_factor=hyper.grad_factor * factor) for hyper in hypers]
        counts, steps = steps, list(map(int, (steps + 1).tolist()))
    if "torch" not in choices:
        from gwt_kernels.triton_backend import launch

        return launch.gwt_adamw_(
            *tensors,
            steps,
            hypers,
            level=level,
            rule=rule,
            rounding=rounding,
            keys=keys,
            lows=lows,
            scales=scales,
            control=control,
            telemetry=telemetry,
            spans=spans,
            limits=limits,
            workspace=workspace,
            same_tensors=same_tensors,
            looks=looks,
        )
    absent = [None] * len(params)
    divisors = absent if limits is None else limits.unbind()
    if level and literal_alone(wavelet, boundary):
        from gwt_kernels.torch_backend import literal

        literal.gwt_adamw_(
            *tensors, list(steps), hypers, level=level, wavelet=wavelet, boundary=boundary, limits=divisors
        )
    else:
        rows = absent if telemetry is None else telemetry.unbind()
        beside = (keys, lows, scales, absent if spans is None else spans, divisors, rows)
        parts = zip(*tensors, steps, hypers, *beside, strict=True)
        singles = list(starmap(Single, parts))
        how: dict[str, Any] = {"level": level, "rule": rule, "rounding": rounding}
        compiled_step = _in_c(singles, level, backend, workspace if same_tensors else None)
        if compiled_step is not None:
            compiled_step.gwt_adamw_(singles, **how, workspace=workspace, same_tensors=same_tensors)
        else:
            from gwt_kernels.torch_backend import step as torch_step

            torch_step.gwt_adamw_(singles, **how)
    if counts is not None:
        counts.add_(1)
    return None


def is_on_triton(
    arrays: Sequence[Sequence[Tensor]],
    level: int,
    wavelet: str = "haar",
    backend: backends.Backend | None = None,
    boundary: str = "zero",
) -> bool:
    """Whether :func:`gwt_adamw_` would launch kernels for a bucket's parameters, gradients and moments."""
    return _choices(arrays, level, wavelet, backend, boundary) == {"triton"}


@torch.no_grad()
def update_sums(
    *,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[int] | Tensor,
    hypers: Sequence[Hyper],
    level: int,
    scales: Sequence[tuple[Tensor, Tensor] | None] | None = None,
    rounding: Rounding = "nearest",
    keys: Sequence[int] | None = None,
    lows: Sequence[Tensor | None] | None = None,
    control: Tensor | None = None,
    spans: Sequence[tuple[Span, Span]] | None = None,
    wavelet: str = "haar",
    boundary: Boundary = "zero",
    backend: backends.Backend | None = None,
    workspace: dict[str, Any] | None = None,
    same_tensors: bool = False,
    looks: bool = False,
) -> Begun:
    """What the limiter needs to know of the step that :func:`gwt_adamw_` would take; no weight or moment changes.

    For tensors that are shards: added up over the processes that share a tensor, these are the squares of the
    norms that the limiter compares. Arguments as there.

    Returns:
        The step, begun, with its sums: of no meaning where ``control`` says that the step is skipped. On the Triton
        backend ``finish`` takes the rest; unless it ``looks`` the device has counted the step, where it counts. On
        the others :func:`gwt_adamw_` takes the step, with ``limits`` and the same arguments.
    """
    scales = [None] * len(params) if scales is None else scales
    tensors = (params, grads, exp_avgs, exp_avg_sqs)
    choices = _choices(tensors[:3], level, wavelet, backend, boundary)
    if "torch" in choices and control is not None:
        hypers = [hyper._replace(grad_factor=hyper.grad_factor * float(control[0])) for hyper in hypers]
    if level and literal_alone(wavelet, boundary):
        from gwt_kernels.torch_backend import literal

        sums = literal.update_sums(*tensors, hypers, level=level, wavelet=wavelet, boundary=boundary)
        return Begun([], None, sums)
    if "torch" in choices:
        parts = zip(*tensors, hypers, scales, strict=True)
        singles = [Single(p, g, m, v, None, 0, hyper, scales=scale) for p, g, m, v, hyper, scale in parts]
        compiled_step = _in_c(singles, level, backend)
        if compiled_step is not None:
            return Begun([], None, compiled_step.update_sums(singles, level=level))
        from gwt_kernels.torch_backend import step as torch_step

        return Begun([], None, torch_step.update_sums(singles, level=level))
    from gwt_kernels.triton_backend import launch

    return launch.update_sums(
        *tensors,
        steps,
        hypers,
        level=level,
        scales=scales,
        rounding=rounding,
        keys=keys,
        lows=lows,
        control=control,
        spans=spans,
        workspace={} if workspace is None else workspace,
        same_tensors=same_tensors,
        looks=looks,
    )


def _in_c(
    singles: Sequence[Single],
    level: int,
    backend: backends.Backend | None,
    workspace: dict[str, Any] | None = None,
) -> ModuleType | None:
    """The step in C where it takes a bucket that Triton does not; None where PyTorch's operators do.

    Given the ``workspace`` of a call with the same tensors, what that one found out is not asked again.
    """
    if not backends.is_compiled(backend, singles[0].p.device):
        return None
    from gwt_kernels.compiled_backend import step

    return step if step.kept(workspace) is not None or step.knows(singles, level) else None


def _choices(
    arrays: Sequence[Sequence[Tensor]],
    level: int,
    wavelet: str,
    backend: backends.Backend | None,
    boundary: str,
) -> set[backends.Backend]:
    kinds, device = {x[0].dtype for x in arrays} - {torch.int8}, arrays[0][0].device
    return {backends.resolve_update(backend, device, dtype, level, wavelet, boundary) for dtype in kinds}


def _check_lengths(
    tensors: Sequence[Sequence[Any]],
    steps: Sequence[int] | Tensor,
    hypers: Sequence[Hyper],
    keys: Sequence[int],
    lows: Sequence[Tensor | None],
    scales: Sequence[tuple[Tensor, Tensor] | None],
    spans: Sequence[tuple[Span, Span]] | None,
    limits: Tensor | None,
) -> None:
    params, *others = tensors
    n = len(params)
    if any(len(x) != n for x in (*others, steps, hypers)):
        raise ValueError(f"{n} params need as many of all else, got {list(map(len, (*others, steps, hypers)))}")
    if not len(keys) == len(lows) == len(scales) == n:
        lengths = [len(keys), len(lows), len(scales)]
        raise ValueError(f"{n} params need as many keys, lows and scales, got {lengths}")
    if limits is not None and (limits.shape != (n,) or tensors[4][0] is not None):
        raise ValueError(f"limits must be one per parameter, in place of limiter_norms, got {tuple(limits.shape)}")
    if spans is not None and len(spans) != n:
        raise ValueError(f"{n} params need as many spans, got {len(spans)}")


def _check_steps(p: Tensor, steps: Sequence[int] | Tensor, control: Tensor | None) -> None:
    if isinstance(steps, Tensor):
        if (steps.dtype, steps.device, steps.is_contiguous()) != (torch.float64, p.device, True):
            raise ValueError(
                f"steps that the device counts must be contiguous float64 on {p.device}, "
                f"got {steps.dtype} on {steps.device}"
            )
    elif control is not None:
        raise ValueError("control goes with steps that the device counts: pass them as a float64 tensor")


def _check_transform(
    p: Tensor, m: Tensor, rule: Rule, rounding: Rounding, wavelet: str, boundary: str, *, observed: bool
) -> None:
    check_rule(rule, wavelet, boundary)
    unknown = literal_alone(wavelet, boundary)
    if observed and unknown:
        raise ValueError(f"telemetry knows no {unknown}: turn it off, or use wavelet='haar' and boundary='zero'")
    check_rounding(rounding, p.dtype, wavelet, boundary)
    if unknown and m.dtype in (torch.bfloat16, torch.int8):
        raise ValueError(f"moments in {m.dtype} know no {unknown}: keep them in float32")


def _check_looks(
    choices: set[backends.Backend],
    level: int,
    limiter_norms: Sequence[Tensor | None],
    steps: Sequence[int] | Tensor,
    hypers: Sequence[Hyper],
    control: Tensor | None,
) -> None:
    limited = level > 0 and limiter_norms[0] is not None
    as_they_are = control is None and all(hyper.grad_factor == 1 for hyper in hypers)
    if choices != {"triton"} or not limited or not isinstance(steps, Tensor) or not as_they_are:
        raise ValueError(
            "a step that looks at the gradients first needs the Triton backend, a limiter, steps that the device "
            "counts, and neither a grad_factor nor control before it has looked"
        )


def _check_lows_and_scales(
    m: Tensor,
    rounding: Rounding,
    lows: Sequence[Tensor | None],
    scales: Sequence[tuple[Tensor, Tensor] | None],
) -> None:
    if ([low is None for low in lows].count(False) == len(lows)) != (rounding == "split"):
        raise ValueError("lows must hold a tensor for every parameter where rounding='split', and None otherwise")
    if [scale is None for scale in scales].count(True) != (0 if m.dtype == torch.int8 else len(scales)):
        raise ValueError("scales must hold a pair of tensors for every parameter whose moments are int8, else None")


def _check_limiter(limiter_norms: Sequence[Tensor | None], hypers: Sequence[Hyper], rule: Rule) -> None:
    absent = [norm is None for norm in limiter_norms].count(True)
    if absent == len(limiter_norms):
        return
    if absent:
        raise ValueError(
            "limiter_norms must hold a tensor for every parameter of the bucket, or None for every one"
        )
    if rule == "foam":
        raise ValueError("rule='foam' has no limiter: pass None in limiter_norms for every parameter")
    if None in [hyper.norm_growth_limit for hyper in hypers]:
        raise ValueError(
            "norm_growth_limit is None for a parameter that has a limiter norm: pass None in limiter_norms as well"
        )
