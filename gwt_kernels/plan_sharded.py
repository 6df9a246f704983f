"""What each of many processes holds of a planned model, what they send each other, and how long a step takes."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from gwt_kernels.hyper import quantum
from gwt_kernels.mesh import FIRST, Axis, Division, Mesh, divisions_of, length_of_part, part_of, shape_of_part
from gwt_kernels.plan import Plan, adamw_state, bytes_of, limiter_bytes, pass_bytes
from gwt_kernels.state import MOMENTS, SCALES

__all__ = [
    "HOST_TIME",
    "LATENCY",
    "LINK_BANDWIDTH",
    "Collective",
    "Held",
    "ShardedPlan",
    "parse_seconds",
    "plan_sharded",
]

LINK_BANDWIDTH = 50e9
"""Bytes per second that a process sends while it receives as many. An assumption: a network of 400 Gbit/s a GPU."""
LATENCY = 10e-6
"""Seconds from one process to another for a message of no size. An assumption: of the order of a network's."""
HOST_TIME = 5e-6
"""Seconds of Python and of launches for each tensor of a step. An assumption: ``bench.host`` saw 2 to 8 µs."""

_BUCKETS = [2**20, 25 * 2**20]  # the sizes at which DDP sends gradients: the first bucket's, and the others'


class Held(NamedTuple):
    """Bytes that one process holds, and that its step moves."""

    weight_bytes: int
    """Frozen weights among them."""
    gradient_bytes: int
    state_bytes: int
    """Of `GWTAdamW`, scalars among them, which every process has."""
    moved_bytes: int
    """Read and written by each step of `GWTAdamW`."""
    adamw_state_bytes: int
    """Of ``torch.optim.AdamW``, with moments in the weights' dtype, in place of ``state_bytes``."""
    adamw_moved_bytes: int
    """By each of its steps, without clipping."""


class Collective(NamedTuple):
    """What processes send each other in a step, for one purpose."""

    purpose: str
    engine: bool
    """Whether it is PyTorch's engine that sends it, around forward and backward, and not the optimizer's step."""
    kind: Literal["all-reduce", "all-gather", "reduce-scatter"]
    processes: int
    """How many take part in each."""
    calls: int
    """How many a step."""
    total_bytes: int
    """Of all of them together: what is reduced, or what has been gathered."""

    def seconds(self, link_bandwidth: float, latency: float) -> float:
        """A model of its time: recursive doubling and halving on a network of equal links.

        With ``n`` processes a gather or a scatter takes ``ceil(log2(n))`` messages one after the other, in which
        ``(n - 1) / n`` of the bytes go out; an all-reduce is a scatter and a gather (Thakur, Rabenseifner and
        Gropp, "Optimization of Collective Communication Operations in MPICH", 2005).
        """
        passes = 2 if self.kind == "all-reduce" else 1
        hops = self.calls * math.ceil(math.log2(self.processes))
        sent = self.total_bytes * (self.processes - 1) / self.processes
        return passes * (hops * latency + sent / link_bandwidth)


@dataclass(frozen=True)
class ShardedPlan:
    """What `plan_sharded` found. Bytes and seconds; ``str()`` is the text that the command prints."""

    plan: Plan
    """The model as a whole."""
    mesh: Mesh
    largest: Held
    """What the process that holds most holds. It is the first: the first part of every division is the largest."""
    even_bytes: int
    """Weights, gradients and state that each would hold if all tensors could be divided evenly, rounded up."""
    divisions: Mapping[str, tuple[Division, ...]]
    """How each weight is divided, first division first."""
    clip: bool
    """Whether gradients are read once more before the step, for their norm."""
    collectives: tuple[Collective, ...]
    link_bandwidth: float
    """Bytes per second."""
    latency: float
    """Seconds."""
    host_time: float
    """Seconds for each tensor."""

    @property
    def collective_seconds(self) -> float:
        """Predicted time of the optimizer's own collectives, as if nothing went on beside them."""
        return sum(c.seconds(self.link_bandwidth, self.latency) for c in self.collectives if not c.engine)

    @property
    def engine_seconds(self) -> float:
        """Predicted time of the engine's collectives, which a training step is meant to hide behind arithmetic."""
        return sum(c.seconds(self.link_bandwidth, self.latency) for c in self.collectives if c.engine)

    @property
    def memory_seconds(self) -> float | None:
        """Time in which memory of the plan's bandwidth moves the bytes of the largest share; None without one."""
        return None if self.plan.bandwidth is None else self.largest.moved_bytes / self.plan.bandwidth

    @property
    def host_seconds(self) -> float:
        """Predicted time of the host's part of the optimizer's step, which is the same however small the shares."""
        return self.host_time * len(self.plan.states)

    @property
    def seconds(self) -> float | None:
        """Predicted time of the optimizer's step: memory, then collectives; the host's beside them, if longer.

        None without a memory bandwidth.
        """
        if self.memory_seconds is None:
            return None
        return max(self.memory_seconds + self.collective_seconds, self.host_seconds)

    def held_by(self, fsdp: int, tp: int) -> Held:
        """What the process at this place in the mesh holds; replicas hold the same."""
        return _held(self.plan, self.mesh, self.divisions, self.clip, {"fsdp": fsdp, "tp": tp})

    def shapes(self, fsdp: int = 0, tp: int = 0) -> dict[str, tuple[int, ...]]:
        """What the process at this place in the mesh holds of each weight."""
        at: dict[Axis, int] = {"fsdp": fsdp, "tp": tp}
        return {
            name: shape_of_part(p.shape, self.divisions[name], self.mesh, at) for name, p in _weights(self.plan)
        }

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain numbers, strings, lists and dicts, for JSON."""
        return {
            "world_size": self.mesh.size,
            "mesh": self.mesh._asdict(),
            "largest": self.largest._asdict(),
            "even_bytes": self.even_bytes,
            "shapes": {name: list(shape) for name, shape in self.shapes().items()},
            "collectives": [
                {**c._asdict(), "predicted_seconds": c.seconds(self.link_bandwidth, self.latency)}
                for c in self.collectives
            ],
            "link_bandwidth": self.link_bandwidth,
            "latency": self.latency,
            "host_time": self.host_time,
            "predicted_host_seconds": self.host_seconds,
            "predicted_memory_seconds": self.memory_seconds,
            "predicted_collective_seconds": self.collective_seconds,
            "predicted_engine_seconds": self.engine_seconds,
            "predicted_step_seconds": self.seconds,
        }

    def __str__(self) -> str:
        from gwt_kernels.plan_text import render_sharded

        return render_sharded(self)


def parse_seconds(text: str, what: str = "latency") -> float:
    """Seconds from ``"1e-5"``, ``"10us"`` or ``"0.01ms"``.

    Raises:
        ValueError: the text is none of these, or a second or more, so that its unit must have been forgotten.
    """
    found = re.fullmatch(r"\s*(\d*\.?\d+(?:[eE][+-]?\d+)?)\s*(us|ms|s)?\s*", text, re.ASCII)
    value = float(found[1]) * {"us": 1e-6, "ms": 1e-3}.get(found[2], 1) if found else math.nan
    if not 0 <= value < 1:
        raise ValueError(f"{what} {text!r} is not understood: give seconds below 1, such as 1e-5 or 10us")
    return value


def plan_sharded(
    planned: Plan,
    mesh: Mesh,
    *,
    clip: bool = False,
    tensor_parallel: Mapping[str, str] | None = None,
    link_bandwidth: float = LINK_BANDWIDTH,
    latency: float = LATENCY,
    host_time: float = HOST_TIME,
) -> ShardedPlan:
    """Divide a planned model over processes, as PyTorch divides it; nothing is allocated, no process is started.

    ``fsdp`` divides the rows (dimension 0) of every tensor as :func:`torch.chunk` does, so that the last processes
    may hold less or nothing; moments follow their parameters. ``tp`` divides the layers that a tensor-parallel plan
    names, before ``fsdp`` does. Replicas (``dp``) hold the same. All limited parameters are taken to lie on the
    whole mesh, so that the limiter needs one all-reduce.

    Args:
        planned: The model as a whole, as :func:`gwt_kernels.plan.plan` returns it.
        mesh: How many processes there are, and along which axes.
        clip: Whether ``max_grad_norm`` is on: gradients are read once more, and there is another all-reduce.
            ``skip_nonfinite`` alone has that too, but reads only gradients without limiter.
        tensor_parallel: ``"colwise"`` (divides a linear layer's outputs), ``"rowwise"`` (its inputs) or
            ``"embedding_rowwise"``, by the module's name with ``*`` for a number. None: that of transformers.
        link_bandwidth: Bytes per second between processes.
        latency: Seconds of a message of no size.
        host_time: Seconds of the host for each tensor of a step.

    Raises:
        ValueError: a number is out of range, the mesh has a ``tp`` of which the model's layers say nothing, or a
            division tears blocks, or int8 moments' scales, apart: the error names the tensor and what works.
    """
    if min(mesh) < 1:
        raise ValueError(f"mesh {mesh!r} has an axis without processes: use 1 for an axis that is not there")
    if not (math.isfinite(link_bandwidth) and link_bandwidth > 0):
        raise ValueError(
            f"link_bandwidth must be a finite number of bytes per second above 0, got {link_bandwidth}"
        )
    for what, value in (("latency", latency), ("host_time", host_time)):
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{what} must be a finite number of seconds of at least 0, got {value}")
    ways = planned.tensor_parallel if tensor_parallel is None else tensor_parallel
    if mesh.tp > 1 and not ways:
        raise ValueError(
            f"{planned.model} has no plan for tensor parallelism: use a mesh with fsdp or dp alone, or name its "
            f"layers in plan_sharded(..., tensor_parallel={{'layers.*.down': 'rowwise', ...}})"
        )
    divisions = {name: divisions_of(name, p, mesh, ways) for name, p in _weights(planned)}
    _check_columns(planned, mesh, divisions)
    _check_rows(planned, mesh, divisions)
    return ShardedPlan(
        plan=planned,
        mesh=mesh,
        largest=_held(planned, mesh, divisions, clip, FIRST),
        even_bytes=_even_bytes(planned, mesh, divisions),
        divisions=divisions,
        clip=clip,
        collectives=(*_of_the_step(planned, mesh, divisions, clip), *_of_the_engine(planned, mesh, divisions)),
        link_bandwidth=link_bandwidth,
        latency=latency,
        host_time=host_time,
    )


def _weights(planned: Plan) -> Iterator[tuple[str, Tensor]]:
    yield from ((name, p) for name, (p, _) in planned.states.items())
    yield from planned.frozen.items()


def _held(
    planned: Plan, mesh: Mesh, divisions: Mapping[str, tuple[Division, ...]], clip: bool, at: Mapping[Axis, int]
) -> Held:
    frozen = bytes_of(*(part_of(p, divisions[name], mesh, at) for name, p in planned.frozen.items()))
    sums = [0] * 5
    for name, (whole, state) in planned.states.items():
        p = part_of(whole, divisions[name], mesh, at)
        own = {key: part_of(x, divisions[name], mesh, at) for key, x in state.items()}
        adamw = adamw_state(p, p.dtype)
        moved = pass_bytes(p, own) + limiter_bytes(p, own) + (bytes_of(p) if clip else 0)
        row = (bytes_of(p), bytes_of(*own.values()), moved, bytes_of(*adamw.values()), pass_bytes(p, adamw))
        sums = [a + b for a, b in zip(sums, row, strict=True)]
    gradients, *rest = sums
    return Held(frozen + gradients, gradients, *rest)


def _even_bytes(planned: Plan, mesh: Mesh, divisions: Mapping[str, tuple[Division, ...]]) -> int:
    total = Fraction()
    for name, p in _weights(planned):
        _, state = planned.states.get(name, (p, {}))
        copies = 1 if name in planned.frozen else 2  # a weight, and its gradient
        scalars = bytes_of(*(x for x in state.values() if x.dim() == 0))
        parts = math.prod(getattr(mesh, axis) for axis, _ in divisions[name])
        total += scalars + Fraction(copies * bytes_of(p) + bytes_of(*state.values()) - scalars, parts)
    return math.ceil(total)


def _check_columns(planned: Plan, mesh: Mesh, divisions: Mapping[str, tuple[Division, ...]]) -> None:
    """Raise unless every process holds whole blocks of every row that is transformed."""
    torn: dict[str, tuple[int, set[int]]] = {}
    for entry in planned.entries:
        widths = {entry.shape[-1]} if entry.level else {0}
        for axis, dim in divisions[entry.name]:
            if dim == len(entry.shape) - 1:
                n = getattr(mesh, axis)
                widths = {length_of_part(width, n, i) for width in widths for i in range(n)}
                if (common := math.gcd(*widths)) % 2**entry.level:
                    torn[entry.name] = ((common & -common).bit_length() - 1, widths - {0})
    if torn:
        name, (_, widths) = min(torn.items(), key=lambda item: item[1][0])
        level, works = planned.chosen.level or 0, min(fits for fits, _ in torn.values())
        others = f" (and {len(torn) - 1} more tensors)" if len(torn) > 1 else ""
        raise ValueError(
            f"mesh {mesh} divides the columns of {name}{others} into widths of {sorted(widths)}; level "
            f"{level} needs multiples of {2**level}, for blocks stay whole: use level {works} at most, exclude "
            f"these tensors from the transform, or divide them into fewer parts"
        )


def _check_rows(planned: Plan, mesh: Mesh, divisions: Mapping[str, tuple[Division, ...]]) -> None:
    """Raise where the optimizer would: scales of int8 moments torn apart, or random bits without a place."""
    for entry in planned.entries:
        state, split = planned.states[entry.name][1], divisions[entry.name]
        n = math.prod(getattr(mesh, axis) for axis, _ in split)
        rows = [dim for _, dim in split if dim == 0]
        even = not split or entry.shape[0] % n == 0
        if SCALES[0] in state and split:
            q = quantum(entry.level)
            if not even or len(rows) < len(split) or state[MOMENTS[0]].numel() // n % q:
                raise ValueError(
                    f"int8 moments of {entry.name} have a scale per {q} of them, which mesh {mesh} would tear "
                    f"apart: they need equal shards of rows, each of whole scales; use bfloat16 moments, or "
                    f"another mesh"
                )
        if len(rows) > 1 and not even and state[MOMENTS[0]].dtype == torch.bfloat16:
            raise ValueError(
                f"the {entry.shape[0]} rows of {entry.name} are divided by tp and by fsdp into {n} uneven parts, "
                f"where the random bits that bfloat16 moments need have no place: use float32 moments, or another "
                f"mesh"
            )


def _of_the_step(
    planned: Plan, mesh: Mesh, divisions: Mapping[str, tuple[Division, ...]], clip: bool
) -> Iterator[Collective]:
    if not any(divisions.values()):
        return  # replicas decide alike, each by itself
    if clip:
        yield Collective("gradient norm, non-finite", False, "all-reduce", mesh.size, 1, 2 * 8)
    limited = [name for name, (_, state) in planned.states.items() if "limiter_norm" in state and divisions[name]]
    if limited:
        axes = {axis for name in limited for axis, _ in divisions[name]}
        n = mesh.size if len(axes) > 1 else getattr(mesh, *axes)
        width = max(planned.states[name][1]["limiter_norm"].element_size() for name in limited)
        yield Collective("limiter norms", False, "all-reduce", n, 1, width * len(limited))


def _of_the_engine(
    planned: Plan, mesh: Mesh, divisions: Mapping[str, tuple[Division, ...]]
) -> Iterator[Collective]:
    """What DDP or FSDP2 sends of weights and gradients; tensor parallelism's activations depend on the batch."""
    sizes = {name: bytes_of(part_of(p, divisions[name], mesh, FIRST)) for name, p in _weights(planned)}
    trained = {name: sizes[name] for name in planned.states}
    if mesh.fsdp > 1:
        # Shards are padded to the first one's size, so that all are alike.
        layers = {name: match[0] if (match := re.match(r".*?\.\d+\.", name)) else "" for name in sizes}
        blocks = {layer for layer in layers.values() if layer}
        gathered = mesh.fsdp * sum(sizes.values())
        again = mesh.fsdp * sum(size for name, size in sizes.items() if layers[name])
        units, sent = len(set(layers.values())), len({layers[name] for name in trained})
        yield Collective("weights, forward", True, "all-gather", mesh.fsdp, units, gathered)
        if blocks:
            yield Collective("weights, backward", True, "all-gather", mesh.fsdp, len(blocks), again)
        total = mesh.fsdp * sum(trained.values())
        yield Collective("gradients", True, "reduce-scatter", mesh.fsdp, sent, total)
        if mesh.dp > 1:
            yield Collective("gradients' shards", True, "all-reduce", mesh.dp, sent, sum(trained.values()))
    elif mesh.dp > 1:
        parts = [part_of(p, divisions[name], mesh, FIRST) for name, (p, _) in planned.states.items()]
        yield Collective("gradients", True, "all-reduce", mesh.dp, _buckets(parts), sum(trained.values()))


def _buckets(params: Sequence[Tensor]) -> int:
    """How many buckets DDP makes of gradients that arrive last layer first: each is sent once it is full."""
    filled: dict[torch.dtype, int] = {}
    full: Counter[torch.dtype] = Counter()
    for p in reversed(params):
        filled[p.dtype] = filled.get(p.dtype, 0) + bytes_of(p)
        if filled[p.dtype] >= _BUCKETS[min(full[p.dtype], 1)]:
            full[p.dtype] += 1
            filled[p.dtype] = 0
    return full.total() + sum(size > 0 for size in filled.values())
