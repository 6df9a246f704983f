"""Checks of a candidate's step before it is timed: against float64, or by its likeness to another optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from bench.common.models import Shape
from bench.optimizers.candidate import BuiltCandidate, Candidate, Likeness, groups_of, renew_gradients, set_rate
from gwt_kernels.formats.int8 import decode_first, decode_second
from gwt_kernels.formats.split import join_low
from gwt_kernels.optim.state import low_bits_of


def check(built: BuiltCandidate) -> float:
    """Check a built candidate against its oracle or likeness; a result above 1 is wrong."""
    return against_oracle(built) if built.candidate.oracle is not None else against_another(built)


def against_oracle(built: BuiltCandidate) -> float:
    """Take one step of the whole model and compare it with the oracle's in float64.

    The state is first set to random values in the proportions of mid-training, with the limiter active: from a
    state of zeros, a block with a tiny approximation divides by nearly 0, and no tolerance would be meaningful. The
    first and the last tensor of every kind are compared, weights and moments.

    Returns:
        The largest error divided by its rounding-error bound.
    """
    candidate, shapes, tensors, optimizer, _ = built
    watched = _watched(shapes)
    _draw_gradients(built)
    for p in tensors:
        state = optimizer.state[p]
        if "exp_avg_scale" in state:
            state["exp_avg"].random_(-127, 128)
            state["exp_avg_sq"].random_(200, 256)
            state["exp_avg_scale"].fill_(2.0)
            state["exp_avg_sq_scale"].fill_(1.5)
        else:
            state["exp_avg"].normal_()
            state["exp_avg_sq"].uniform_(0.5, 1.5)
        if "limiter_norm" in state:
            state["limiter_norm"].mul_(0.1)
    levels = [candidate.level or 0 if shape.transformed else 0 for shape in shapes]
    before = {index: _values(tensors[index], optimizer, levels[index]) for index in watched}
    _step_at_rate_one(optimizer)

    worst = 0.0
    for index in watched:
        old = before.pop(index)
        expected = _oracle_step(candidate, shapes[index], old, _gradient(tensors[index]))
        found = _values(tensors[index], optimizer, levels[index])
        if found.keys() != expected.keys():
            return float("inf")
        stored = optimizer.state[tensors[index]]
        for key, value in found.items():
            if f"{key}_scale" in stored:
                continue  # the bound is one quantization step: see tests/formats/test_quantized.py
            at_random = key in ("exp_avg", "exp_avg_sq") and value.dtype == torch.bfloat16
            at_random |= key == "weights" and _rounding_of(tensors[index], optimizer) == "stochastic"
            worst = max(worst, _error(value, expected[key], old[key], at_random=at_random))
    return worst


def against_another(built: BuiltCandidate) -> float:
    """Take a second step with new gradients, and compare its update with that of the other optimizer in float64.

    This is a sanity check for packages with their own rule or rounding: the right tensors have moved, by about the
    right length and in about the right direction, as the candidate's likeness says.

    Returns:
        The largest of `(1 - cosine)`, length and reciprocal length, each over what the likeness allows.
    """
    candidate, shapes, tensors, optimizer, first = built
    assert candidate.likeness is not None, f"{candidate.name} has neither oracle nor likeness"
    watched = _watched(shapes)
    _draw_gradients(built)
    second = {index: _gradient(tensors[index]).clone() for index in watched}
    starts = {index: tensors[index].detach().clone() for index in watched}
    _step_at_rate_one(optimizer)

    worst = 0.0
    for index in watched:
        start = starts.pop(index).double()
        expected = _update_of(candidate, shapes[index], start, (first[shapes[index].size], second.pop(index)))
        found = tensors[index].detach().double() - start
        worst = max(worst, _unlikeness(found, expected, candidate.likeness))
    return worst


def _watched(shapes: Sequence[Shape]) -> list[int]:
    """Return the first and the last tensor of every kind."""
    kinds: dict[tuple[Any, ...], list[int]] = {}
    for index, shape in enumerate(shapes):
        kinds.setdefault(shape[1:], []).append(index)
    return sorted({index for kind in kinds.values() for index in (kind[0], kind[-1])})


def _rounding_of(p: Tensor, optimizer: Optimizer) -> str | None:
    group = next(group for group in optimizer.param_groups if any(p is own for own in group["params"]))
    found: str | None = group.get("weight_rounding")
    return found


def _draw_gradients(built: BuiltCandidate) -> None:
    """Draw a separate gradient for every tensor, so that a mix-up of tensors of equal size shows."""
    renew_gradients(built)
    for p in built.tensors:
        _gradient(p).normal_()


def _step_at_rate_one(optimizer: Optimizer) -> None:
    """Step with rate 1, so that the update is far above the rounding error of bf16 weights."""
    rate = float(optimizer.param_groups[0]["lr"])
    set_rate(optimizer, 1.0)
    optimizer.step()
    set_rate(optimizer, rate)


def _gradient(p: Tensor) -> Tensor:
    assert p.grad is not None
    return p.grad


def _values(p: Tensor, optimizer: Optimizer, level: int = 0) -> dict[str, Tensor]:
    """Copy weights and state except the step count; int8 moments are dequantized, split weights joined."""
    state = optimizer.state[p]
    values = {key: value.clone() for key, value in state.items() if key != "step"}
    for key, decode in (("exp_avg", decode_first), ("exp_avg_sq", decode_second)):
        scales = values.pop(f"{key}_scale", None)
        if scales is not None:
            values[key] = decode(values[key], scales, level)
    low = values.pop("weight_low", None)  # low bits of float32 weights
    return {"weights": p.detach().clone() if low is None else join_low(p.detach(), low_bits_of(low)), **values}


def _oracle_step(candidate: Candidate, shape: Shape, start: dict[str, Tensor], grad: Tensor) -> dict[str, Tensor]:
    assert candidate.oracle is not None
    p = nn.Parameter(start["weights"].double())
    p.grad = grad.double()
    oracle = candidate.oracle(groups_of([shape], [p], candidate.level))
    set_rate(oracle, 1.0)
    oracle.step()  # allocates the state and advances its step count to the candidate's
    p.data.copy_(start["weights"])
    for key, value in start.items():
        if key in oracle.state[p]:
            oracle.state[p][key].copy_(value)
    oracle.step()
    return _values(p, oracle)


def _error(found: Tensor, expected: Tensor, old: Tensor, *, at_random: bool = False) -> float:
    """Return the largest error over its rounding-error bound; NaN counts as infinite.

    The bound is half a unit in the last place of the stored dtype (a whole one for stochastic rounding), plus the
    float32 arithmetic before it: 2 units of the value, which is decayed before it is changed, and 16 of the
    tensor's largest change (not the element's own change, since `g - mean + m` cancels).
    """
    if found.numel() == 0:
        return 0.0
    change = (expected - old).abs().max()
    bound = torch.finfo(found.dtype).eps * (1.0 if at_random else 0.5) * expected.abs() * 1.001
    bound = bound + torch.finfo(torch.float32).eps * (2 * old.double().abs() + 16 * change)
    return _or_infinite(float(((found.double() - expected).abs() / bound).max()))


def _update_of(candidate: Candidate, shape: Shape, start: Tensor, gradients: Sequence[Tensor]) -> Tensor:
    """Return the other optimizer's update by the last gradient at rate 1, with moments from all gradients."""
    p = nn.Parameter(start.clone())
    other = candidate.resembles(groups_of([shape], [p], candidate.level))
    for gradient in gradients:
        set_rate(other, 1.0 if gradient is gradients[-1] else 0.0)
        p.grad = gradient.double()
        other.step()
    return p.detach() - start


def _unlikeness(found: Tensor, expected: Tensor, likeness: Likeness) -> float:
    length, expected_length = float(found.norm()), float(expected.norm())
    if not length:
        return float("inf")
    cosine = float((found * expected).sum()) / (length * expected_length)
    ratio = length / expected_length
    terms = ((1 - cosine) / (1 - likeness.cosine), ratio / likeness.longest, likeness.shortest / ratio)
    return max(map(_or_infinite, terms))


def _or_infinite(value: float) -> float:
    return value if value == value else float("inf")
