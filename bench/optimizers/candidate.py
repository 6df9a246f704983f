"""One optimizer on one model's shapes: construction on random data, new gradients, and counts of bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from bench.common.measure import plain_tensors
from bench.common.models import Shape
from gwt_kernels import GWTAdamW
from gwt_kernels.functional import Rounding, Rule

WEIGHT_DECAY = 0.1
NO_NORM = 1e30  # clips nothing, but the norm must be computed; for infinity it need not be

Group = dict[str, Any]


class Likeness(NamedTuple):
    """How close an optimizer's update must come to another's, usually AdamW's, if there is no oracle for it."""

    cosine: float
    """Lower bound on the cosine of the angle between the two updates of a tensor."""
    shortest: float
    longest: float
    """Bounds on the ratio of the update's length to the other's."""


class Candidate(NamedTuple):
    """An optimizer to be timed, and the reference that its step is checked against."""

    name: str
    dtype: torch.dtype
    level: int | None
    """Levels of the transform; None for optimizers without one."""
    limiter: bool
    build: Callable[[list[Group]], Optimizer]
    """Builds the optimizer from groups with a key "transformed": are they attention and MLP matrices?"""
    oracle: Callable[[list[Group]], Optimizer] | None
    """The same computation in plain PyTorch, for a float64 check; None if only a likeness is checked."""
    peer: str = "gwt"
    """The optimizer's package, as `--peers` names it."""
    likeness: Likeness | None = None
    resembles: Callable[[list[Group]], Optimizer] = partial(AdamW, foreach=False)  # type: ignore[assignment]
    """Builds the optimizer that the likeness refers to, in float64."""
    state_bytes: float | None = None
    """Upper bound on the bytes of state per element; None: two moments as GWT or torch keep them."""

    @property
    def check(self) -> str:
        return "sanity" if self.oracle is None else "oracle"

    @property
    def weights(self) -> str:
        return str(self.dtype).removeprefix("torch.")


class BuiltCandidate(NamedTuple):
    """A candidate built on the tensors of a model, with its state allocated."""

    candidate: Candidate
    shapes: Sequence[Shape]
    tensors: list[nn.Parameter]
    optimizer: Optimizer
    gradients: dict[tuple[int, ...], Tensor]
    """One gradient per size, never handed out itself, since some optimizers overwrite their gradients."""

    @property
    def clips(self) -> bool:
        """Whether the step clips, which reads the gradients for their norm."""
        return getattr(self.optimizer, "max_grad_norm", None) is not None

    def clipped_step(self) -> None:
        """Take a step with clipping: by the framework's function before the step, or within the step."""
        if self.clips:
            self.optimizer.max_grad_norm = 1.0  # type: ignore[attr-defined]
            self.optimizer.step()
            self.optimizer.max_grad_norm = NO_NORM  # type: ignore[attr-defined]
            return
        nn.utils.clip_grad_norm_(self.tensors, 1.0)
        self.optimizer.step()


EXTRAS: dict[str, Group] = {
    "clips in the step": {"max_grad_norm": NO_NORM},
    "skips bad batches": {"skip_nonfinite": True},
    "telemetry": {"telemetry": True},
}
"""What a step may do besides, and its options."""


def gwt(
    level: int,
    dtype: torch.dtype,
    *,
    limiter: bool,
    rule: Rule = "gwt",
    moments: torch.dtype | None = None,
    rounding: Rounding | None = None,
    extra: str | None = None,
) -> Candidate:
    """Return GWTAdamW on the device's default backend; its oracle is the torch backend with unrounded moments.

    ``extra`` is a key of :data:`EXTRAS`.
    """
    options: Group = {"norm_growth_limit": 1.01 if limiter else None, "rule": rule}
    words = [f"GWTAdamW level {level}"]
    words += ["foam"] if rule == "foam" else []
    words += ["limiter"] if limiter else []
    words += [extra] if extra else []
    words += [f"{str(moments).removeprefix('torch.')} moments"] if moments else []
    words += [f"{rounding} rounding"] if rounding else []
    own = EXTRAS[extra] if extra else {}
    return Candidate(
        ", ".join(words),
        dtype,
        level,
        limiter,
        lambda groups: GWTAdamW(groups, state_dtype=moments, weight_rounding=rounding, **options, **own),
        lambda groups: GWTAdamW(groups, backend="torch", **options),
    )


def ptwt(level: int, dtype: torch.dtype) -> Candidate:
    """Return the literal step with ptwt's convolutions; its oracle is the package's torch backend."""

    def build_literal(groups: list[Group]) -> Optimizer:
        from bench.optimizers.ptwt_step import LiteralGWTAdamW  # needs ptwt, which may not be installed

        return LiteralGWTAdamW(groups)

    name = f"ptwt level {level}, limiter"
    return gwt(level, dtype, limiter=True)._replace(name=name, build=build_literal, peer="ptwt")


def adamw(dtype: torch.dtype, **implementation: bool) -> Candidate:
    """Return torch.optim.AdamW in the named implementation; its oracle is the plain loop.

    On narrow dtypes only the fused implementation computes in float32; the others round in between, and are checked
    by likeness.
    """
    ((key, value),) = implementation.items()
    exact = dtype == torch.float32 or implementation.get("fused", False)
    return Candidate(
        f"AdamW({key}={value})",
        dtype,
        None,
        False,
        lambda groups: AdamW(groups, **implementation),  # type: ignore[arg-type]
        (lambda groups: AdamW(groups, foreach=False)) if exact else None,
        peer="torch",
        likeness=None if exact else Likeness(0.999, 0.98, 1.02),
    )


def bytes_needed(candidate: Candidate, shapes: Sequence[Shape]) -> int:
    """Estimate the peak bytes of a candidate: weights, gradients, moments, and the check of its largest tensor."""
    total = 0.0
    largest = 0
    moment = candidate.dtype.itemsize if candidate.level is None else max(candidate.dtype.itemsize, 4)
    for shape in shapes:
        elements = torch.Size(shape.size).numel()
        width = 2 ** (candidate.level or 0) if shape.transformed else 1
        state = 2 * moment / width if candidate.state_bytes is None else candidate.state_bytes
        total += elements * (2 * candidate.dtype.itemsize + state)
        largest = max(largest, elements)
    return int(total) + 12 * 8 * largest


def build(candidate: Candidate, shapes: Sequence[Shape], device: torch.device) -> BuiltCandidate:
    """Allocate random weights and gradients, and the optimizer with its state."""
    generator = torch.Generator(device).manual_seed(0)
    gradients: dict[tuple[int, ...], Tensor] = {}
    tensors = []
    for shape in shapes:
        p = nn.Parameter(torch.empty(shape.size, dtype=candidate.dtype, device=device))
        p.data.normal_(std=0.02, generator=generator)
        if shape.size not in gradients:
            gradients[shape.size] = torch.empty_like(p.data).normal_(generator=generator)
        tensors.append(p)
    built = BuiltCandidate(
        candidate, shapes, tensors, candidate.build(groups_of(shapes, tensors, candidate.level)), gradients
    )
    renew_gradients(built)
    built.optimizer.step()
    return built


def groups_of(shapes: Sequence[Shape], tensors: Sequence[Tensor], level: int | None) -> list[Group]:
    """Return parameter groups by whether tensors are transformed and whether they decay."""
    groups: dict[tuple[bool, bool], Group] = {}
    for shape, tensor in zip(shapes, tensors, strict=True):
        fresh: Group = {
            "params": [],
            "weight_decay": WEIGHT_DECAY if shape.decayed else 0.0,
            "transformed": shape.transformed,
        }
        if level is not None:
            fresh["level"] = level if shape.transformed else 0
        groups.setdefault((shape.transformed, shape.decayed), fresh)["params"].append(tensor)
    return list(groups.values())


def set_rate(optimizer: Optimizer, rate: float) -> None:
    """Set the learning rate of every group; torchao keeps it in a tensor."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def renew_gradients(built: BuiltCandidate) -> None:
    """Give every tensor a new gradient buffer, as a backward pass does."""
    for p in built.tensors:
        p.grad = built.gradients[tuple(p.shape)].clone()


def bytes_moved(built: BuiltCandidate) -> int:
    """Return the bytes that a step must move: gradients read once, weights and state read and written once.

    Projections are only read. The limiter needs the norm of the whole normalised approximation before any weight is
    written, so it reads gradients and moments a second time. Clipping reads the gradients once more before that,
    for their norm; the check for non-finite gradients shares the limiter's first read.
    """
    skips = getattr(built.optimizer, "skip_nonfinite", False)
    total = 0
    for p in built.tensors:
        state = built.optimizer.state[p]
        moments = _bytes_of([value for key, value in state.items() if key != "projector"])
        gradient = p.numel() * p.element_size()
        total += 3 * gradient + 2 * moments + _bytes_of(state.get("projector"))
        if "limiter_norm" in state:
            total += gradient + moments
        if built.clips or (skips and "limiter_norm" not in state):
            total += gradient
    return total


def _bytes_of(holder: object) -> int:
    return sum(t.numel() * t.element_size() for t in plain_tensors(holder) if t.dim())  # scalars are not counted


def peak_extra_bytes(built: BuiltCandidate, device: torch.device) -> int | None:
    """Return the bytes that a step allocates temporarily; None if the allocator does not report them."""
    if device.type != "cuda":
        return None
    renew_gradients(built)
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    built.optimizer.step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before
