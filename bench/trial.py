"""One optimizer on one model's shapes: built on random data, checked in float64, timed, its bytes counted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from bench.measure import clock
from bench.models import load_config
from gwt_kernels import GWTAdamW, gwt_param_groups

WEIGHT_DECAY = 0.1

Group = dict[str, Any]


class Shape(NamedTuple):
    """One tensor of a model, as `gwt_param_groups` sorts it."""

    name: str
    size: tuple[int, ...]
    transformed: bool
    decayed: bool


class Candidate(NamedTuple):
    """An optimizer to be timed, and the same computation in plain PyTorch that float64 checks run."""

    name: str
    dtype: torch.dtype
    level: int | None
    """Levels of the transform; None for optimizers that know none."""
    limiter: bool
    build: Callable[[list[Group]], Optimizer]
    oracle: Callable[[list[Group]], Optimizer]


class Trial(NamedTuple):
    """A candidate on the tensors of a model, its state allocated."""

    candidate: Candidate
    shapes: Sequence[Shape]
    tensors: list[nn.Parameter]
    optimizer: Optimizer


def gwt(level: int, dtype: torch.dtype, *, limiter: bool) -> Candidate:
    """GWTAdamW on the device's own backend; its oracle is the torch backend."""
    options: Group = {"norm_growth_limit": 1.01 if limiter else None}
    return Candidate(
        f"GWTAdamW level {level}" + (", limiter" if limiter else ""),
        dtype,
        level,
        limiter,
        lambda groups: GWTAdamW(groups, **options),
        lambda groups: GWTAdamW(groups, backend="torch", **options),
    )


def ptwt(level: int, dtype: torch.dtype) -> Candidate:
    """The literal step by ptwt's convolutions; its oracle is the package's torch backend."""

    def build_literal(groups: list[Group]) -> Optimizer:
        from bench.ptwt_step import LiteralGWTAdamW  # ptwt is needed by nothing else, the CUDA suite included

        return LiteralGWTAdamW(groups)

    name = f"ptwt level {level}, limiter"
    return gwt(level, dtype, limiter=True)._replace(name=name, build=build_literal)


def adamw(dtype: torch.dtype, **implementation: bool) -> Candidate:
    """torch.optim.AdamW by the one implementation named; its oracle is the plain loop."""
    ((key, value),) = implementation.items()
    return Candidate(
        f"AdamW({key}={value})",
        dtype,
        None,
        False,
        lambda groups: AdamW(groups, **implementation),  # type: ignore[arg-type]
        lambda groups: AdamW(groups, foreach=False),
    )


def shapes_of(model: str, *, layers: int | None = None, embeddings: bool = True) -> list[Shape]:
    """Return the tensors of a model of `bench/configs`; nothing is allocated.

    Args:
        model: Name of a configuration file, without ".json".
        layers: Number of layers to take; None for all.
        embeddings: Whether embedding, output head and last norm are part of it.
    """
    from transformers import LlamaForCausalLM

    config = load_config(model)
    config.num_hidden_layers = layers or config.num_hidden_layers
    with torch.device("meta"):
        on_meta = LlamaForCausalLM(config)
    return [
        Shape(name, tuple(parameter.shape), group["level"] > 0, group["weight_decay"] > 0)
        for group in gwt_param_groups(on_meta, level=1, weight_decay=WEIGHT_DECAY)
        for name, parameter in zip(group["param_names"], group["params"], strict=True)
        if embeddings or ".layers." in name
    ]


def bytes_needed(candidate: Candidate, shapes: Sequence[Shape]) -> int:
    """Estimate what a trial holds at its peak: weights, gradients, moments, its largest check."""
    total = largest = 0
    moment = candidate.dtype.itemsize if candidate.level is None else max(candidate.dtype.itemsize, 4)
    for shape in shapes:
        elements = torch.Size(shape.size).numel()
        width = 2 ** (candidate.level or 0) if shape.transformed else 1
        total += elements * 2 * candidate.dtype.itemsize + 2 * elements * moment // width
        largest = max(largest, elements)
    return total + 12 * 8 * largest


def build(candidate: Candidate, shapes: Sequence[Shape], device: torch.device) -> Trial:
    """Allocate the weights and gradients with random values, and the optimizer with its state."""
    generator = torch.Generator(device).manual_seed(0)
    tensors = []
    for shape in shapes:
        p = nn.Parameter(torch.empty(shape.size, dtype=candidate.dtype, device=device))
        p.data.normal_(std=0.02, generator=generator)
        p.grad = torch.empty_like(p.data).normal_(generator=generator)
        tensors.append(p)
    optimizer = candidate.build(_groups(shapes, tensors, candidate.level))
    optimizer.step()
    return Trial(candidate, shapes, tensors, optimizer)


def check(trial: Trial) -> float:
    """Take one step of the whole model and compare it with the oracle's in float64.

    The state is first set to random values in the proportions of mid-training, with the limiter active: from
    a state of zeros, a block with hardly any approximation divides by nearly nothing, and no tolerance would
    mean much. The first and the last tensor of every kind are compared, weights and moments.

    Returns:
        The largest error, over what rounding explains: a result above 1 is wrong.
    """
    candidate, shapes, tensors, optimizer = trial
    kinds: dict[tuple[Any, ...], list[int]] = {}
    for index, shape in enumerate(shapes):
        kinds.setdefault(shape[1:], []).append(index)
    watched = sorted({index for kind in kinds.values() for index in (kind[0], kind[-1])})

    for p in tensors:
        state = optimizer.state[p]
        state["exp_avg"].normal_()
        state["exp_avg_sq"].uniform_(0.5, 1.5)
        if "limiter_norm" in state:
            state["limiter_norm"].mul_(0.1)
    before = {index: _values(tensors[index], optimizer) for index in watched}
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 1.0  # the update has to stand far above the rounding of bf16 weights
    optimizer.step()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate

    worst = 0.0
    for index in watched:
        old = before.pop(index)
        expected = _oracle_step(candidate, shapes[index], old, tensors[index].grad)
        found = _values(tensors[index], optimizer)
        if found.keys() != expected.keys():
            return float("inf")
        for key, value in found.items():
            worst = max(worst, _error(value, expected[key], old[key]))
    return worst


def _groups(shapes: Sequence[Shape], tensors: Sequence[Tensor], level: int | None) -> list[Group]:
    groups: dict[tuple[bool, bool], Group] = {}
    for shape, tensor in zip(shapes, tensors, strict=True):
        fresh: Group = {"params": [], "weight_decay": WEIGHT_DECAY if shape.decayed else 0.0}
        if level is not None:
            fresh["level"] = level if shape.transformed else 0
        groups.setdefault((shape.transformed, shape.decayed), fresh)["params"].append(tensor)
    return list(groups.values())


def _values(p: Tensor, optimizer: Optimizer) -> dict[str, Tensor]:
    """Copies of what a step changes, the step's number apart."""
    state = optimizer.state[p]
    values = {key: value.clone() for key, value in state.items() if key != "step"}
    return {"weights": p.detach().clone(), **values}


def _oracle_step(
    candidate: Candidate, shape: Shape, start: dict[str, Tensor], grad: Tensor | None
) -> dict[str, Tensor]:
    assert grad is not None
    p = nn.Parameter(start["weights"].double())
    p.grad = grad.double()
    oracle = candidate.oracle(_groups([shape], [p], candidate.level))
    for group in oracle.param_groups:
        group["lr"] = 1.0
    oracle.step()  # allocates the state and brings its step to the candidate's
    p.data.copy_(start["weights"])
    for key, value in start.items():
        if key in oracle.state[p]:
            oracle.state[p][key].copy_(value)
    oracle.step()
    return _values(p, oracle)


def _error(found: Tensor, expected: Tensor, old: Tensor) -> float:
    """Largest error over its bound, which is what rounding explains; NaN counts as infinite.

    The bound is half a unit in the last place of the stored dtype, plus the float32 arithmetic before it: 2
    units of the value, which is decayed before it is changed, and 16 of the tensor's largest change (not the
    element's own change, since `g - mean + m` cancels).
    """
    if found.numel() == 0:
        return 0.0
    change = (expected - old).abs().max()
    bound = torch.finfo(found.dtype).eps / 2 * expected.abs() * 1.001
    bound = bound + torch.finfo(torch.float32).eps * (2 * old.double().abs() + 16 * change)
    ratio = float(((found.double() - expected).abs() / bound).max())
    return ratio if ratio == ratio else float("inf")


def timed_step(trial: Trial, device: torch.device) -> tuple[float, float]:
    """Give every tensor a new gradient buffer, then time one step: seconds on the device and on the host."""
    for p in trial.tensors:
        assert p.grad is not None
        p.grad = p.grad.clone()
    return clock(trial.optimizer.step, device)


def bytes_moved(trial: Trial) -> int:
    """Return the bytes a step must move: gradients read, weights and moments read and written, all once.

    The limiter needs the norm of the whole normalised approximation before any weight is written, so it reads
    gradients and moments a second time.
    """
    total = 0
    for p in trial.tensors:
        state = trial.optimizer.state[p]
        moments = sum(state[key].numel() * state[key].element_size() for key in ("exp_avg", "exp_avg_sq"))
        weights = p.numel() * p.element_size()
        gradients = p.grad.numel() * p.grad.element_size() if p.grad is not None else 0
        total += gradients + 2 * weights + 2 * moments
        if "limiter_norm" in state:
            total += gradients + moments
    return total


def peak_extra_bytes(trial: Trial, device: torch.device) -> int | None:
    """Return the bytes a step allocates beyond what it finds; None where the allocator does not tell."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    trial.optimizer.step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before
