"""The folded GWT-Adam step in plain PyTorch, one tensor at a time.

For a block of ``W = 2**level`` neighbours with mean ``mean``, first moment ``m`` and second moment ``v``::

    A = sqrt(W) * mean
    m = b1*m + (1-b1)*A          v = b2*v + (1-b2)*A*A
    u_i = (g_i - mean + m / sqrt(W)) / (sqrt(v) + eps) / limit
    p_i = p_i - lr*weight_decay*p_i - step_size*u_i

which equals the multi-level transform, Adam on its approximation and the inverse transform (docs/algorithm.md).
The folded rule (``rule="foam"``) has instead, with ``r_i = g_i - mean`` and no limiter::

    m = b1*m + (1-b1)*mean       v = b2*v + (1-b2)*mean(g*g)
    u_i = (m + r_i) / (sqrt(v + r_i*r_i) + eps)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from gwt_kernels.hyper import Hyper
from gwt_kernels.torch_backend.haar import compute_dtype

__all__ = ["gwt_adamw_", "limit_"]

CHUNK = 1 << 20  # elements; a chunk stays in the caches between the passes over it, and passes stay long enough


def gwt_adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    limiter_norms: Sequence[Tensor | None],
    steps: Sequence[int],
    hypers: Sequence[Hyper],
    *,
    level: int,
    rule: str = "gwt",
) -> None:
    """See :func:`gwt_kernels.functional.gwt_adamw_`; arguments are already checked."""
    for p, g, m, v, norm, step, hyper in zip(
        params, grads, exp_avgs, exp_avg_sqs, limiter_norms, steps, hypers, strict=True
    ):
        if p.numel() == 0:
            continue
        if level == 0:
            _adamw(p, g, m, v, step, hyper)
        elif rule == "foam":
            _foam(p, g, m, v, step, hyper, level)
        else:
            _gwt(p, g, m, v, norm, step, hyper, level)


def _adamw(p: Tensor, g: Tensor, m: Tensor, v: Tensor, step: int, hyper: Hyper) -> None:
    """Level 0: Adam with decoupled weight decay, without bias correction inside the root."""
    dtype = compute_dtype(torch.promote_types(p.dtype, m.dtype))
    step_size = hyper.step_size(step, level=0)
    for p_, g_, m_, v_ in _chunks(p, g, m, v):
        p32, g32, m32, v32 = (x.to(dtype) for x in (p_, g_, m_, v_))
        if hyper.maximize:
            g32 = -g32
        m32.mul_(hyper.beta1).add_(g32, alpha=1 - hyper.beta1)
        v32.mul_(hyper.beta2).addcmul_(g32, g32, value=1 - hyper.beta2)
        denominator = v32.sqrt().add_(hyper.eps)
        if hyper.weight_decay:
            p32.mul_(1 - hyper.lr * hyper.weight_decay)
        p32.addcdiv_(m32, denominator, value=-step_size)
        _write_back((p_, m_, v_), (p32, m32, v32))


def _gwt(
    p: Tensor, g: Tensor, m: Tensor, v: Tensor, norm: Tensor | None, step: int, hyper: Hyper, level: int
) -> None:
    """Levels above 0: moments, then weights; with the limiter, all moments first, as its norm is the tensor's."""
    dtype = compute_dtype(torch.promote_types(p.dtype, m.dtype))
    width = 2**level
    gamma = None if norm is None else hyper.norm_growth_limit
    step_size: Tensor | float = hyper.step_size(step, level)
    total = torch.zeros((), dtype=dtype, device=p.device)  # squared norm of m / (sqrt(v) + eps)
    pending = []
    for p_, g_, m_, v_ in _chunks(p, g, m, v):
        mean = _block_sums(g_.to(dtype), level).mul_((-1 if hyper.maximize else 1) / width)
        m32, v32 = m_.to(dtype), v_.to(dtype)
        m32.mul_(hyper.beta1).add_(mean, alpha=(1 - hyper.beta1) * math.sqrt(width))
        v32.mul_(hyper.beta2).addcmul_(mean, mean, value=(1 - hyper.beta2) * width)
        gain = v32.sqrt().add_(hyper.eps).reciprocal_()  # of an element's update per element of its gradient
        offset = mean.sub_(m32, alpha=1 / math.sqrt(width))
        if gamma is None:
            _update_(p_, g_, gain, offset, step_size, width, hyper)
        else:
            # On a CPU sum adds in a tree, vector_norm one by one and so less exactly.
            total += (m32 * gain).square_().sum()
            pending.append((p_, g_, gain, offset))
        _write_back((m_, v_), (m32, v32))
    if norm is not None and gamma is not None:
        step_size = step_size / limit_(norm, total.sqrt_(), gamma)
    for p_, g_, gain, offset in pending:
        _update_(p_, g_, gain, offset, step_size, width, hyper)


def _foam(p: Tensor, g: Tensor, m: Tensor, v: Tensor, step: int, hyper: Hyper, level: int) -> None:
    """The folded rule: a denominator per element, which bounds every element's update."""
    dtype = compute_dtype(torch.promote_types(p.dtype, m.dtype))
    width = 2**level
    step_size = hyper.step_size(step, level)
    for p_, g_, m_, v_ in _chunks(p, g, m, v):
        g32 = _pad_to_multiple(g_.to(dtype), width)
        g32 = -g32 if hyper.maximize else g32
        mean = _block_sums(g32, level).div_(width)
        p32, m32, v32 = (x.to(dtype) for x in (p_, m_, v_))
        m32.mul_(hyper.beta1).add_(mean, alpha=1 - hyper.beta1)
        v32.mul_(hyper.beta2).add_(_block_sums(g32.square(), level), alpha=(1 - hyper.beta2) / width)
        residual = g32.reshape(*mean.shape, width) - mean.unsqueeze(-1)
        denominator = torch.addcmul(v32.unsqueeze(-1), residual, residual).sqrt_().add_(hyper.eps)
        update = residual.add_(m32.unsqueeze(-1)).div_(denominator).view(g32.shape)
        if hyper.weight_decay:
            p32.mul_(1 - hyper.lr * hyper.weight_decay)
        p32.sub_(update[..., : p_.shape[-1]], alpha=step_size)
        _write_back((p_, m_, v_), (p32, m32, v32))


def limit_(previous: Tensor, norm: Tensor, gamma: float) -> Tensor:
    """Fira's norm-growth limiter: the divisor of the update, with ``previous`` replaced, all on the device."""
    growth = norm / (previous + 1e-8)
    limit = torch.where(previous == 0, torch.ones_like(growth), growth.clamp(min=gamma) / gamma)
    previous.copy_(norm / limit)
    return limit


def _block_sums(g: Tensor, level: int) -> Tensor:
    """Sums of ``2**level`` neighbours along the last dimension, zeros beyond its end: ``[..., nb]``.

    Pairwise additions of strided halves: on a CPU several times as fast as a sum over a short last axis.
    """
    for _ in range(level):
        g = _pad_to_multiple(g, 2)
        g = g[..., 0::2] + g[..., 1::2]
    return g


def _update_(
    p: Tensor, g: Tensor, gain: Tensor, offset: Tensor, step_size: Tensor | float, width: int, hyper: Hyper
) -> None:
    """``p_i -= lr*weight_decay*p_i + step_size * gain_k * (+-g_i - offset_k)`` for element ``i`` of block ``k``.

    ``gain`` and ``offset`` (``mean - m / sqrt(W)``) are overwritten.
    """
    p32, g = p.to(gain.dtype), _pad_to_multiple(g.to(gain.dtype), width)
    if hyper.weight_decay:
        p32.mul_(1 - hyper.lr * hyper.weight_decay)
    gain.mul_(step_size)
    offset.mul_(gain)
    blocks = g.reshape(*gain.shape, width)
    sign = 1 if hyper.maximize else -1
    update = torch.addcmul(offset.unsqueeze(-1), blocks, gain.unsqueeze(-1), value=sign).view(g.shape)
    p32.add_(update[..., : p.shape[-1]])
    _write_back((p,), (p32,))


def _pad_to_multiple(x: Tensor, width: int) -> Tensor:
    """``x`` with zeros on the right up to a whole number of blocks."""
    missing = -x.shape[-1] % width
    return F.pad(x, (0, missing)) if missing else x


def _chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Views that cover the tensors row by row, small enough for the caches on a CPU."""
    first = tensors[0]
    contiguous = all(x.is_contiguous() for x in tensors)
    if first.device.type != "cpu" or first.numel() <= CHUNK or (first.dim() == 1 and not contiguous):
        yield tensors
    elif contiguous and all(x.shape == first.shape for x in tensors):
        yield from zip(*(torch.split(x.view(-1), CHUNK) for x in tensors), strict=True)
    elif contiguous:
        rows = max(1, CHUNK // first.shape[-1])
        yield from zip(*(torch.split(x.view(-1, x.shape[-1]), rows) for x in tensors), strict=True)
    else:
        rows = max(1, CHUNK * first.shape[0] // first.numel())
        yield from zip(*(torch.split(x, rows) for x in tensors), strict=True)


def _write_back(targets: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Store what was computed in another dtype; tensors that were updated in place already hold it."""
    for target, value in zip(targets, values, strict=True):
        if value is not target:
            target.copy_(value)
