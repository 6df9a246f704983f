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
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from gwt_kernels.hyper import Hyper, Rounding, Rule, quantum
from gwt_kernels.single import Single
from gwt_kernels.torch_backend.haar import compute_dtype
from gwt_kernels.torch_backend.storage import Chunk, Storage
from gwt_kernels.torch_backend.telemetry import Notes

__all__ = ["gwt_adamw_", "limit_", "update_sums"]

CHUNK = 1 << 20  # elements; a chunk stays in the caches between the passes over it, and passes stay long enough


def gwt_adamw_(singles: Iterable[Single], *, level: int, rule: Rule, rounding: Rounding) -> None:
    """See :func:`gwt_kernels.functional.gwt_adamw_`; arguments are already checked."""
    for own in singles:
        if own.p.numel() == 0:
            continue
        own = _scaled_ahead(own)
        notes = None if own.row is None else Notes(own.row)
        storage = Storage(level, rounding, own.step, own.key, own.span, notes)
        chunks, dtype = _chunks(own, quantum(level)), _dtype_of(own)
        if level == 0:
            _adamw(chunks, dtype, own.hyper, storage)
        elif rule == "foam":
            _foam(chunks, dtype, own.hyper, level, storage)
        else:
            _gwt(chunks, dtype, own.norm, own.hyper, level, storage, own.limit)
        if notes is not None:
            notes.close()


def update_sums(singles: Sequence[Single], *, level: int) -> Tensor:
    """See :func:`gwt_kernels.functional.update_sums`; arguments are already checked."""
    p = singles[0].p
    sums = torch.zeros(len(singles), dtype=compute_dtype(p.dtype), device=p.device)
    for total, own in zip(sums, singles, strict=True):
        if own.p.numel() == 0:
            continue
        own = _scaled_ahead(own)
        storage = Storage(level, "nearest", step=0, key=0)
        for chunk in _chunks(own, quantum(level)):
            kept = [x.clone() for x in storage.load_moments(chunk, _dtype_of(own))]
            m_, _, _, gain = _moments(chunk, kept[0], kept[1], own.hyper, level)
            total += _sum_of_squares(m_ * gain)
    return sums


def _dtype_of(own: Single) -> torch.dtype:
    """The dtype of its arithmetic."""
    return compute_dtype(own.p.dtype if own.scales else torch.promote_types(own.p.dtype, own.m.dtype))


def _scaled_ahead(own: Single) -> Single:
    """The tensor with its gradient multiplied by a factor that has no number, and no factor left."""
    factor = own.hyper.grad_factor
    if not isinstance(factor, Tensor):
        return own
    return own._replace(g=own.g.to(_dtype_of(own)) * factor, hyper=own.hyper._replace(grad_factor=1.0))


def _adamw(chunks: Iterable[Chunk], dtype: torch.dtype, hyper: Hyper, storage: Storage) -> None:
    """Level 0: Adam with decoupled weight decay, without bias correction inside the root."""
    step_size = hyper.step_size(storage.step, level=0)
    for chunk in chunks:
        p, m, v = storage.load(chunk, dtype)
        g = _scaled(chunk.g.to(dtype), hyper)
        m.mul_(hyper.beta1).add_(g, alpha=1 - hyper.beta1)
        v.mul_(hyper.beta2).addcmul_(g, g, value=1 - hyper.beta2)
        denominator = v.sqrt().add_(hyper.eps)
        if hyper.weight_decay:
            p.mul_(1 - float(hyper.lr) * hyper.weight_decay)
        p.addcdiv_(m, denominator, value=-step_size)
        if storage.notes is not None:
            storage.notes.gradient(g, 1.0, g, 1)
            storage.notes.update(m / denominator, step_size)
        storage.store_moments(chunk, m, v)
        storage.store_weights(chunk, p)


def _gwt(
    chunks: Iterable[Chunk],
    dtype: torch.dtype,
    norm: Tensor | None,
    hyper: Hyper,
    level: int,
    storage: Storage,
    limit: Tensor | None,
) -> None:
    """Levels above 0: moments, then weights; with the limiter, all moments first, as its norm is the tensor's."""
    width = 2**level
    gamma = None if norm is None else hyper.norm_growth_limit
    step_size: Tensor | float = hyper.step_size(storage.step, level)
    if limit is not None:
        step_size = step_size / limit
    total: Tensor | None = None  # squared norm of m / (sqrt(v) + eps)
    pending = []
    for chunk in chunks:
        m, v, mean, gain = _moments(chunk, *storage.load_moments(chunk, dtype), hyper, level)
        if storage.notes is not None:
            storage.notes.gradient(chunk.g, hyper.signed_factor, mean, width)
        offset = mean.sub_(m, alpha=1 / math.sqrt(width))
        if gamma is None:
            _update(chunk, gain, offset, step_size, width, hyper, storage)
        else:
            # On a CPU sum adds in a tree, vector_norm one by one and so less exactly.
            part = _sum_of_squares(m * gain)
            total = part if total is None else total + part
            pending.append((chunk, gain, offset))
        storage.store_moments(chunk, m, v)
    if norm is not None and gamma is not None and total is not None:
        limit = limit_(norm, total.sqrt_(), gamma)
        step_size = step_size / limit
    if limit is not None and storage.notes is not None:
        storage.notes.limit(limit)
    for chunk, gain, offset in pending:
        _update(chunk, gain, offset, step_size, width, hyper, storage)


def _moments(chunk: Chunk, m: Tensor, v: Tensor, hyper: Hyper, level: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The moments, updated in place, the gradient's means and ``1 / (sqrt(v) + eps)``."""
    width = 2**level
    mean = _block_sums(chunk.g.to(m.dtype), level).mul_(hyper.signed_factor / width)
    m.mul_(hyper.beta1).add_(mean, alpha=(1 - hyper.beta1) * math.sqrt(width))
    v.mul_(hyper.beta2).addcmul_(mean, mean, value=(1 - hyper.beta2) * width)
    gain = v.sqrt().add_(hyper.eps).reciprocal_()  # of an element's update per element of its gradient
    return m, v, mean, gain


def _foam(chunks: Iterable[Chunk], dtype: torch.dtype, hyper: Hyper, level: int, storage: Storage) -> None:
    """The folded rule: a denominator per element, which bounds every element's update."""
    width = 2**level
    step_size = hyper.step_size(storage.step, level)
    for chunk in chunks:
        g = _scaled(_pad_to_multiple(chunk.g.to(dtype), width), hyper)
        mean = _block_sums(g, level).div_(width)
        p, m, v = storage.load(chunk, dtype)
        m.mul_(hyper.beta1).add_(mean, alpha=1 - hyper.beta1)
        v.mul_(hyper.beta2).add_(_block_sums(g.square(), level), alpha=(1 - hyper.beta2) / width)
        residual = g.reshape(*mean.shape, width) - mean.unsqueeze(-1)
        denominator = torch.addcmul(v.unsqueeze(-1), residual, residual).sqrt_().add_(hyper.eps)
        update = residual.add_(m.unsqueeze(-1)).div_(denominator).view(g.shape)
        if hyper.weight_decay:
            p.mul_(1 - float(hyper.lr) * hyper.weight_decay)
        update = update[..., : chunk.p.shape[-1]]
        p.sub_(update, alpha=step_size)
        if storage.notes is not None:
            storage.notes.gradient(g, 1.0, mean, width)
            storage.notes.update(update, step_size)
        storage.store_moments(chunk, m, v)
        storage.store_weights(chunk, p)


def _scaled(g: Tensor, hyper: Hyper) -> Tensor:
    return g if hyper.signed_factor == 1.0 else g * hyper.signed_factor


def limit_(previous: Tensor, norm: Tensor, gamma: float | Tensor) -> Tensor:
    """Fira's norm-growth limiter: the divisor of the update, with ``previous`` replaced, all on the device."""
    growth = norm / (previous + 1e-8)
    limit = torch.where(previous == 0, torch.ones_like(growth), growth.clamp(min=gamma) / gamma)
    previous.copy_(norm / limit)
    return limit


def _sum_of_squares(x: Tensor) -> Tensor:
    """Of all elements; overwrites them. ``square_``, which is the same, knows no functionalization."""
    return x.mul_(x).sum()


def _block_sums(g: Tensor, level: int) -> Tensor:
    """Sums of ``2**level`` neighbours along the last dimension, zeros beyond its end: ``[..., nb]``.

    Pairwise additions of strided halves: on a CPU several times as fast as a sum over a short last axis.
    """
    for _ in range(level):
        g = _pad_to_multiple(g, 2)
        g = g[..., 0::2] + g[..., 1::2]
    return g


def _update(
    chunk: Chunk,
    gain: Tensor,
    offset: Tensor,
    step_size: Tensor | float,
    width: int,
    hyper: Hyper,
    storage: Storage,
) -> None:
    """``p_i -= lr*weight_decay*p_i + step_size * gain_k * (+-g_i - offset_k)`` for element ``i`` of block ``k``.

    ``gain`` and ``offset`` (``mean - m / sqrt(W)``) are overwritten.
    """
    p, g = storage.load_weights(chunk, gain.dtype), _pad_to_multiple(chunk.g.to(gain.dtype), width)
    if hyper.weight_decay:
        p.mul_(1 - float(hyper.lr) * hyper.weight_decay)
    gain.mul_(step_size)
    offset.mul_(gain)
    blocks = g.reshape(*gain.shape, width)
    factor = -hyper.signed_factor
    update = torch.addcmul(offset.unsqueeze(-1), blocks, gain.unsqueeze(-1), value=factor).view(g.shape)
    update = update[..., : p.shape[-1]]
    p.add_(update)
    if storage.notes is not None:
        storage.notes.update(update)
    storage.store_weights(chunk, p)


def _pad_to_multiple(x: Tensor, width: int) -> Tensor:
    """``x`` with zeros on the right up to a whole number of blocks."""
    missing = -x.shape[-1] % width
    return F.pad(x, (0, missing)) if missing else x


def _chunks(own: Single, q: int) -> Iterator[Chunk]:
    """Views that cover the tensors row by row, small enough for the caches on a CPU, of whole quanta of ``q``."""
    p, m, scales = own.p, own.m, own.scales
    tensors = [x for x in (p, own.g, m, own.v, own.low) if x is not None]
    contiguous = all(x.is_contiguous() for x in tensors)
    whole = q // math.gcd(q, m.numel() // m.shape[0]) if scales and m.dim() else 1  # rows that are whole quanta
    if p.device.type != "cpu" or p.numel() <= CHUNK or (p.dim() == 1 and not contiguous):
        parts = [[x] for x in tensors]
    elif contiguous and m.shape == p.shape:
        parts = [list(torch.split(x.view(-1), CHUNK)) for x in tensors]
    elif contiguous:
        rows = _multiple(CHUNK // p.shape[-1], q // math.gcd(q, m.shape[-1]) if scales else 1)
        parts = [list(torch.split(x.view(-1, x.shape[-1]), rows)) for x in tensors]
    else:
        parts = [list(torch.split(x, _multiple(CHUNK * p.shape[0] // p.numel(), whole))) for x in tensors]
    first = coefficient = 0
    for p_, g_, m_, v_, *low_ in zip(*parts, strict=True):
        quanta = slice(coefficient // q, -(-(coefficient + m_.numel()) // q))
        parts_ = None if scales is None else (scales[0][quanta], scales[1][quanta])
        yield Chunk(p_, g_, m_, v_, low_[0] if low_ else None, parts_, first, coefficient)
        first += p_.numel()
        coefficient += m_.numel()


def _multiple(n: int, of: int) -> int:
    """The largest multiple that is not above ``n``, and at least one."""
    return max(of, n // of * of)
