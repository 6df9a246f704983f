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
from gwt_kernels.rules.rule import Pass

CHUNK = 1 << 20  # elements; a chunk stays in the caches between the passes over it, and passes stay long enough


def gwt_adamw_(tensor_steps: Iterable[TensorStep], *, level: Level, rule: RuleName, rounding: Rounding) -> None:
    """See :func:`gwt_kernels.functional.gwt_adamw_`; arguments are already checked."""
    for own in tensor_steps:
        if own.p.numel() == 0:
            if own.rows is None or not own.rows.sums.numel():
                continue
            own = _without_columns(own)
        own, stated = scaled_ahead(own), rule_of(rule, level)
        if stated.corrects_inside:
            own = own._replace(hyper=own.hyper.corrected(own.step))
        notes = None if own.row is None else Notes(own.row)
        stored = _stored(own)
        storage = Storage(level, stored, rounding, own.step, own.key, own.span, notes)
        _step(chunks(own, stored.block_size(level)), own, stated, storage)
        if notes is not None:
            notes.close()


def update_sums(tensor_steps: Sequence[TensorStep], *, level: Level, rule: RuleName) -> Tensor:
    """See :meth:`gwt_kernels.backends.runner.Runner.reduce`; arguments are already checked."""
    stated, p = rule_of(rule, level), tensor_steps[0].p
    direction = stated.direction
    if direction is None:
        raise ValueError(f"level {level} has no limiter, and no sums of its update's squares")
    sums = torch.zeros(len(tensor_steps), dtype=compute_dtype(p.dtype), device=p.device)
    for total, own in zip(sums, tensor_steps, strict=True):
        if own.p.numel() == 0:
            continue
        own = scaled_ahead(own)
        stored = _stored(own)
        storage = Storage(level, stored, "nearest", step=0, key=0)
        for chunk in chunks(own, stored.block_size(level)):
            m, v = _both([x.clone() for x in storage.load_moments(chunk, dtype_of(own))])
            total += _sum_of_squares(
                direction(stated.moments(chunk.g, m, v, Pass(own.hyper, level, None, chunk.rows)))
            )
    return sums


def _without_columns(own: TensorStep) -> TensorStep:
    """A tensor of rows without columns here, whose moments are of whole rows: with weights of no use."""
    assert own.rows is not None
    p, g, m = (torch.zeros_like(own.rows.sums, dtype=x.dtype) for x in (own.p, own.g, own.m))
    return own._replace(p=p, g=g, m=own.m if own.m.numel() else m, low=None)


def _stored(own: TensorStep) -> MomentFormat:
    """How its moments are stored, if it has any."""
    return stored_as(torch.float32 if own.m is None else own.m.dtype)


def _both(moments: Sequence[Tensor]) -> tuple[Any, Any]:
    """The first moment, or None, and the second, or None."""
    m, v, *_ = *moments, None, None
    return m, v


def dtype_of(own: TensorStep) -> torch.dtype:
    """The dtype of its arithmetic."""
    stored = own.p.dtype if own.m is None or own.scales else own.m.dtype
    return compute_dtype(torch.promote_types(own.p.dtype, stored))


def scaled_ahead(own: TensorStep) -> TensorStep:
    """The tensor with its gradient multiplied by a factor that has no number, and no factor left."""
    factor = own.hyper.grad_factor
    if not isinstance(factor, Tensor):
        return own
    return own._replace(g=own.g.to(dtype_of(own)) * factor, hyper=own.hyper._replace(grad_factor=1.0))


def _step(chunks: Iterable[Chunk], own: TensorStep, rule: Rule, storage: Storage) -> None:
    """One tensor: moments, then weights; with the limiter, all moments first, as its norm is the tensor's."""
    hyper, level, notes, dtype = own.hyper, storage.level, storage.notes, dtype_of(own)
    limits = rule.direction is not None
    gamma = hyper.norm_growth_limit if limits and own.norm is not None else None
    step_size: Tensor | float = hyper.step_size(storage.step, rule.is_scaled, rule.corrects_bias)
    limit = own.limit if limits else None
    if limit is not None:
        step_size = step_size / limit
    total: Tensor | None = None  # squared norm of the rule's direction
    pending = []
    for chunk in chunks:
        moments = storage.load_moments(chunk, dtype)
        parts = rule.moments(chunk.g, *_both(moments), Pass(hyper, level, notes, chunk.rows))
        if gamma is None or rule.direction is None:
            _update(chunk, parts, step_size, own, rule, storage)
        else:
            # On a CPU sum adds in a tree, vector_norm one by one and so less exactly.
            part = _sum_of_squares(rule.direction(parts))
            total = part if total is None else total + part
            pending.append((chunk, parts))
        storage.store_moments(chunk, moments)
    if own.norm is not None and gamma is not None and total is not None:
        limit = limit_(own.norm, total.sqrt_(), gamma)
        step_size = step_size / limit
    if limit is not None and notes is not None:
        notes.limit(limit)
    for chunk, parts in pending:
        _update(chunk, parts, step_size, own, rule, storage)


def _update(
    chunk: Chunk,
    parts: tuple[Tensor, ...],
    step_size: Tensor | float,
    own: TensorStep,
    rule: Rule,
    storage: Storage,
) -> None:
    """Weight decay, and the rule's update, of a chunk's weights."""
    if rule.reads_weights:
        p = storage.load_weights(chunk, dtype_of(own))
    else:
        p = torch.empty_like(chunk.p, dtype=dtype_of(own))
    if own.hyper.weight_decay and rule.reads_weights:
        p.mul_(1 - float(own.hyper.lr) * own.hyper.weight_decay)
    rule.update_(p, chunk.g, parts, step_size, Pass(own.hyper, storage.level, storage.notes))
    storage.store_weights(chunk, p)


def _sum_of_squares(x: Tensor) -> Tensor:
    """Of all elements; overwrites them. ``square_``, which is the same, knows no functionalization."""
    return x.mul_(x).sum()


def chunks(own: TensorStep, q: int) -> Iterator[Chunk]:
    """Views that cover the tensors row by row, small enough for the caches on a CPU, of whole quanta of ``q``."""
    p, scales = own.p, own.scales
    m = p if own.m is None else own.m  # whose rows and widths are those of what is kept
    places = [x is not None for x in (p, own.g, own.m, own.v, own.low)]
    tensors = [x for x in (p, own.g, own.m, own.v, own.low) if x is not None]
    contiguous = all(x.is_contiguous() for x in tensors)
    alike = all(x.shape == p.shape for x in tensors) and p.shape[-1:] != (1,)  # where no row says what a block is
    if p.device.type != "cpu" or p.numel() <= CHUNK or (p.dim() == 1 and not contiguous):
        parts = [[x] for x in tensors]
    elif contiguous and alike:
        parts = [list(torch.split(x.view(-1), CHUNK)) for x in tensors]
    elif contiguous:
        whole = q // math.gcd(q, m.shape[-1]) if scales else 1  # rows that are whole quanta
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
        rows = None if own.rows is None else own.rows.part(first // p.shape[-1], p_.shape)
        yield Chunk(p_, g_, m_, v_, low_, parts_, first, coefficient, rows)
        first += p_.numel()
        coefficient += count


def _split(tensors: Sequence[Tensor], n: int, whole: int) -> list[list[Tensor]]:
    """Parts of ``n`` rows of the first tensor, or fewer, as need be, and what of the others belongs to them."""
    rows = tensors[0].shape[0]
    n = _multiple(n, math.lcm(whole, *(rows // x.shape[0] for x in tensors)))
    return [list(torch.split(x, n * x.shape[0] // rows)) for x in tensors]


def _multiple(n: int, of: int) -> int:
    """The largest multiple that is not above ``n``, and at least one."""
    return max(of, n // of * of)
