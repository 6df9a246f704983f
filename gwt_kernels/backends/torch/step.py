"""A step in plain PyTorch, one tensor after another and a chunk of it at a time, by the rules' own statements."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from gwt_kernels.backends.torch.haar import compute_dtype
from gwt_kernels.backends.torch.storage import Chunk, Storage
from gwt_kernels.core.hyper import Rounding
from gwt_kernels.core.hyper import Rule as RuleName
from gwt_kernels.core.level import Level
from gwt_kernels.core.notes import Notes
from gwt_kernels.core.tensor_step import TensorStep
from gwt_kernels.formats.moments import MomentFormat, stored_as
from gwt_kernels.rules import Rule, rule_of
from gwt_kernels.rules.limiter import limit_
from gwt_kernels.rules.rule import Context

CHUNK = 1 << 20  # elements: few enough to stay in the caches between passes, and enough for efficient operators


def gwt_adamw_(tensor_steps: Iterable[TensorStep], *, level: Level, rule: RuleName, rounding: Rounding) -> None:
    """See :func:`gwt_kernels.functional.gwt_adamw_`; arguments are already checked."""
    for tensor_step in tensor_steps:
        if tensor_step.p.numel() == 0:
            if tensor_step.rows is None or not tensor_step.rows.sums.numel():
                continue
            tensor_step = _without_columns(tensor_step)
        tensor_step, stated = scaled_ahead(tensor_step), rule_of(rule, level)
        if stated.corrects_inside:
            tensor_step = tensor_step._replace(hyper=tensor_step.hyper.corrected(tensor_step.step))
        notes = None if tensor_step.row is None else Notes(tensor_step.row)
        stored = _stored(tensor_step)
        storage = Storage(level, stored, rounding, tensor_step.step, tensor_step.key, tensor_step.span, notes)
        _step(chunks(tensor_step, stored.block_size(level)), tensor_step, stated, storage)
        if notes is not None:
            notes.close()


def update_sums(tensor_steps: Sequence[TensorStep], *, level: Level, rule: RuleName) -> Tensor:
    """See :meth:`gwt_kernels.backends.runner.Runner.reduce`; arguments are already checked."""
    stated, p = rule_of(rule, level), tensor_steps[0].p
    direction = stated.direction
    if direction is None:
        raise ValueError(f"level {level} has no limiter, and no sums of its update's squares")
    sums = torch.zeros(len(tensor_steps), dtype=compute_dtype(p.dtype), device=p.device)
    for total, tensor_step in zip(sums, tensor_steps, strict=True):
        if tensor_step.p.numel() == 0:
            continue
        tensor_step = scaled_ahead(tensor_step)
        stored = _stored(tensor_step)
        storage = Storage(level, stored, "nearest", step=0, key=0)
        for chunk in chunks(tensor_step, stored.block_size(level)):
            m, v = _both([x.clone() for x in storage.load_moments(chunk, dtype_of(tensor_step))])
            total += _sum_of_squares(
                direction(stated.moments(chunk.g, m, v, Context(tensor_step.hyper, level, None, chunk.rows)))
            )
    return sums


def _without_columns(tensor_step: TensorStep) -> TensorStep:
    """Return a step with dummy weights for a tensor without columns here, which has moments of whole rows."""
    assert tensor_step.rows is not None
    p, g, m = (
        torch.zeros_like(tensor_step.rows.sums, dtype=x.dtype)
        for x in (tensor_step.p, tensor_step.g, tensor_step.m)
    )
    return tensor_step._replace(p=p, g=g, m=tensor_step.m if tensor_step.m.numel() else m, low=None)


def _stored(tensor_step: TensorStep) -> MomentFormat:
    """Return the storage format of the tensor's moments; float32 if it has none."""
    return stored_as(torch.float32 if tensor_step.m is None else tensor_step.m.dtype)


def _both(moments: Sequence[Tensor]) -> tuple[Any, Any]:
    """Return the first and the second moment, None for missing ones."""
    m, v, *_ = *moments, None, None
    return m, v


def dtype_of(tensor_step: TensorStep) -> torch.dtype:
    """Return the dtype of the tensor's arithmetic."""
    stored = tensor_step.p.dtype if tensor_step.m is None or tensor_step.scales else tensor_step.m.dtype
    return compute_dtype(torch.promote_types(tensor_step.p.dtype, stored))


def scaled_ahead(tensor_step: TensorStep) -> TensorStep:
    """Multiply the gradient by its factor if that is a tensor, and set the factor to 1."""
    factor = tensor_step.hyper.grad_factor
    if not isinstance(factor, Tensor):
        return tensor_step
    return tensor_step._replace(
        g=tensor_step.g.to(dtype_of(tensor_step)) * factor, hyper=tensor_step.hyper._replace(grad_factor=1.0)
    )


def _step(chunks: Iterable[Chunk], tensor_step: TensorStep, rule: Rule, storage: Storage) -> None:
    """Update a tensor's moments, then weights; with the limiter all moments first, for the whole tensor's norm."""
    hyper, level, notes, dtype = tensor_step.hyper, storage.level, storage.notes, dtype_of(tensor_step)
    limits = rule.direction is not None
    gamma = hyper.norm_growth_limit if limits and tensor_step.norm is not None else None
    step_size: Tensor | float = hyper.step_size(storage.step, rule.is_scaled, rule.corrects_bias)
    limit = tensor_step.limit if limits else None
    if limit is not None:
        step_size = step_size / limit
    total: Tensor | None = None  # squared norm of the rule's direction
    pending = []
    for chunk in chunks:
        moments = storage.load_moments(chunk, dtype)
        parts = rule.moments(chunk.g, *_both(moments), Context(hyper, level, notes, chunk.rows))
        if gamma is None or rule.direction is None:
            _update(chunk, parts, step_size, tensor_step, rule, storage)
        else:
            # On a CPU sum adds in a tree; vector_norm adds one by one, which is less exact.
            part = _sum_of_squares(rule.direction(parts))
            total = part if total is None else total + part
            pending.append((chunk, parts))
        storage.store_moments(chunk, moments)
    if tensor_step.norm is not None and gamma is not None and total is not None:
        limit = limit_(tensor_step.norm, total.sqrt_(), gamma)
        step_size = step_size / limit
    if limit is not None and notes is not None:
        notes.limit(limit)
    for chunk, parts in pending:
        _update(chunk, parts, step_size, tensor_step, rule, storage)


def _update(
    chunk: Chunk,
    parts: tuple[Tensor, ...],
    step_size: Tensor | float,
    tensor_step: TensorStep,
    rule: Rule,
    storage: Storage,
) -> None:
    """Apply weight decay and the rule's update to a chunk's weights."""
    if rule.reads_weights:
        p = storage.load_weights(chunk, dtype_of(tensor_step))
    else:
        p = torch.empty_like(chunk.p, dtype=dtype_of(tensor_step))
    if tensor_step.hyper.weight_decay and rule.reads_weights:
        p.mul_(1 - float(tensor_step.hyper.lr) * tensor_step.hyper.weight_decay)
    rule.update_(p, chunk.g, parts, step_size, Context(tensor_step.hyper, storage.level, storage.notes))
    storage.store_weights(chunk, p)


def _sum_of_squares(x: Tensor) -> Tensor:
    """Return the sum of squares, and overwrite ``x``. ``square_`` does not support functionalization."""
    return x.mul_(x).sum()


def chunks(tensor_step: TensorStep, q: int) -> Iterator[Chunk]:
    """Yield views that cover the tensors row by row, in parts that fit a CPU's caches, of whole blocks of ``q``."""
    p, scales = tensor_step.p, tensor_step.scales
    m = p if tensor_step.m is None else tensor_step.m  # quantized values have its rows
    places = [x is not None for x in (p, tensor_step.g, tensor_step.m, tensor_step.v, tensor_step.low)]
    tensors = [x for x in (p, tensor_step.g, tensor_step.m, tensor_step.v, tensor_step.low) if x is not None]
    contiguous = all(x.is_contiguous() for x in tensors)
    alike = all(x.shape == p.shape for x in tensors) and p.shape[-1:] != (1,)  # at width 1 a row is a block
    if p.device.type != "cpu" or p.numel() <= CHUNK or (p.dim() == 1 and not contiguous):
        parts = [[x] for x in tensors]
    elif contiguous and alike:
        parts = [list(torch.split(x.view(-1), CHUNK)) for x in tensors]
    elif contiguous:
        whole = q // math.gcd(q, m.shape[-1]) if scales else 1  # rows that are whole blocks of values
        parts = _split([x.view(-1, x.shape[-1]) for x in tensors], CHUNK // p.shape[-1], whole)
    else:
        whole = q // math.gcd(q, m.numel() // m.shape[0]) if scales else 1
        parts = _split(tensors, CHUNK * p.shape[0] // p.numel(), whole)
    first = coefficient = 0
    for views in zip(*parts, strict=True):
        held: Any = iter(views)
        p_, g_, m_, v_, low_ = (next(held) if there else cast(Any, None) for there in places)
        count = p_.numel() if m_ is None else m_.numel()
        quanta = slice(coefficient // q, -(-(coefficient + count) // q))
        parts_ = None if scales is None else tuple(x[quanta] for x in scales)
        rows = None if tensor_step.rows is None else tensor_step.rows.part(first // p.shape[-1], p_.shape)
        yield Chunk(p_, g_, m_, v_, low_, parts_, first, coefficient, rows)
        first += p_.numel()
        coefficient += count


def _split(tensors: Sequence[Tensor], n: int, whole: int) -> list[list[Tensor]]:
    """Split the first tensor into parts of about ``n`` rows, multiples of ``whole``, and the others accordingly."""
    rows = tensors[0].shape[0]
    n = _multiple(n, math.lcm(whole, *(rows // x.shape[0] for x in tensors)))
    return [list(torch.split(x, n * x.shape[0] // rows)) for x in tensors]


def _multiple(n: int, of: int) -> int:
    """Return the largest multiple of ``of`` that is at most ``n``, or else ``of``."""
    return max(of, n // of * of)
