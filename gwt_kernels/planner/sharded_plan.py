"""The costs of a model that is sharded over processes, as data and as text."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from torch import Tensor

from gwt_kernels.optim.state import head_rows_of, kept_dims, takes_rows
from gwt_kernels.planner.costs import adamw_state, bytes_of, limiter_bytes, pass_bytes
from gwt_kernels.planner.matrix_work import MatrixWork
from gwt_kernels.planner.mesh import Axis, Division, Mesh, divisions_of_state, part_of, shape_of_part, torn_by
from gwt_kernels.planner.plan import Plan, label, moments_of
from gwt_kernels.planner.tables import aligned, three_digits, unit_of


class Held(NamedTuple):
    """Bytes that one process stores, and that its step reads and writes."""

    weight_bytes: int
    """Including frozen weights."""
    gradient_bytes: int
    state_bytes: int
    """State of the planned optimizer, including scalars, which every process has."""
    moved_bytes: int
    """Traffic of each of its steps."""
    adamw_state_bytes: int
    """State of ``torch.optim.AdamW`` with moments in the weights' dtype."""
    adamw_moved_bytes: int
    """Traffic of each step of ``torch.optim.AdamW``, without clipping."""


class Collective(NamedTuple):
    """Communication between processes in a step, for one purpose."""

    purpose: str
    engine: bool
    """Whether DDP or FSDP2 sends it during forward and backward, and not the optimizer in its step."""
    kind: Literal["all-reduce", "all-gather", "reduce-scatter", "all-to-all"]
    processes: int
    """Number of processes that take part."""
    calls: int
    """Number of collectives per step."""
    total_bytes: int
    """Bytes of all calls together: reduced, present after gathering, or sent to others by the busiest process."""

    def seconds(self, link_bandwidth: float, latency: float) -> float:
        """Return the predicted time of recursive doubling and halving on a network of equal links.

        With ``n`` processes a gather or a scatter takes ``ceil(log2(n))`` successive messages, which send
        ``(n - 1) / n`` of the bytes; an all-reduce is a scatter and a gather (Thakur, Rabenseifner and
        Gropp, "Optimization of Collective Communication Operations in MPICH", 2005). In an all-to-all all
        messages of a process are under way at once.
        """
        if self.kind == "all-to-all":
            return self.calls * latency + self.total_bytes / link_bandwidth
        passes = 2 if self.kind == "all-reduce" else 1
        hops = self.calls * math.ceil(math.log2(self.processes))
        sent = self.total_bytes * (self.processes - 1) / self.processes
        return passes * (hops * latency + sent / link_bandwidth)


@dataclass(frozen=True)
class ShardedPlan:
    """Result of `plan_sharded`, in bytes and seconds; ``str()`` is the text that the command prints."""

    plan: Plan
    """The model as a whole."""
    mesh: Mesh
    largest: Held
    """Bytes of the first process, which stores most: the first part of every division is the largest."""
    even_bytes: int
    """Weights, gradients and state per process if all tensors could be divided evenly, rounded up."""
    divisions: Mapping[str, tuple[Division, ...]]
    """Divisions of each weight, in order."""
    clip: bool
    """Whether gradients are read once more before the step, for their norm."""
    collectives: tuple[Collective, ...]
    link_bandwidth: float
    """Bytes per second."""
    latency: float
    """Seconds."""
    host_time: float
    """Host seconds for each tensor."""
    matrices: MatrixWork | None = None
    """What processes compute and send for matrices, if the optimizer orthogonalises any."""
    matrix_flops: float = 1.0
    """Floating-point operations per second of products of matrices."""

    @property
    def matrix_seconds(self) -> float:
        """Predicted time of the products of matrices on the process that has most of them."""
        return 0.0 if self.matrices is None else max(self.matrices.flops) / self.matrix_flops

    @property
    def collective_seconds(self) -> float:
        """Predicted time of the optimizer's collectives, without overlap."""
        return sum(c.seconds(self.link_bandwidth, self.latency) for c in self.collectives if not c.engine)

    @property
    def engine_seconds(self) -> float:
        """Predicted time of DDP's or FSDP2's collectives, which overlap with forward and backward."""
        return sum(c.seconds(self.link_bandwidth, self.latency) for c in self.collectives if c.engine)

    @property
    def memory_seconds(self) -> float | None:
        """Time to move the bytes of the largest share at the plan's bandwidth; None without a bandwidth."""
        return None if self.plan.bandwidth is None else self.largest.moved_bytes / self.plan.bandwidth

    @property
    def host_seconds(self) -> float:
        """Predicted host time of the optimizer's step, which does not depend on the size of shards."""
        return self.host_time * len(self.plan.states)

    @property
    def seconds(self) -> float | None:
        """Predicted time of the optimizer's step: memory, matrices and collectives, or the host time if longer.

        No overlap is assumed, although matrices travel while others are computed.

        None without a memory bandwidth.
        """
        if self.memory_seconds is None:
            return None
        return max(self.memory_seconds + self.matrix_seconds + self.collective_seconds, self.host_seconds)

    def held_by(self, fsdp: int, tp: int) -> Held:
        """Return the bytes of the process at these mesh coordinates; replicas have the same."""
        return held(self.plan, self.mesh, self.divisions, self.clip, {"fsdp": fsdp, "tp": tp})

    def shapes(self, fsdp: int = 0, tp: int = 0) -> dict[str, tuple[int, ...]]:
        """Return the shape of each weight's shard on the process at these mesh coordinates."""
        at: dict[Axis, int] = {"fsdp": fsdp, "tp": tp}
        return {name: shape_of_part(p.shape, self.divisions[name], self.mesh, at) for name, p in weights(self.plan)}

    def as_dict(self) -> dict[str, Any]:
        """Return all data as plain numbers, strings, lists and dicts, for JSON."""
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
            "matrices": None
            if self.matrices is None
            else {**self.matrices.as_dict(), "predicted_seconds": self.matrix_seconds},
            "matrix_flops": self.matrix_flops,
            "predicted_host_seconds": self.host_seconds,
            "predicted_memory_seconds": self.memory_seconds,
            "predicted_collective_seconds": self.collective_seconds,
            "predicted_engine_seconds": self.engine_seconds,
            "predicted_step_seconds": self.seconds,
        }

    def __str__(self) -> str:
        parts = (_shares(self), *(() if self.matrices is None else (_matrices(self),)), _collectives(self))
        return "\n\n".join(parts)


def weights(planned: Plan) -> Iterator[tuple[str, Tensor]]:
    """Yield name and meta tensor of all weights, frozen ones last."""
    yield from ((name, p) for name, (p, _) in planned.states.items())
    yield from planned.frozen.items()


def held(
    planned: Plan, mesh: Mesh, divisions: Mapping[str, tuple[Division, ...]], clip: bool, at: Mapping[Axis, int]
) -> Held:
    """Return the bytes that the process at a mesh coordinate stores and that its step moves."""
    frozen = bytes_of(*(part_of(p, divisions[name], mesh, at) for name, p in planned.frozen.items()))
    sums = [0] * 5
    for name, (whole, state) in planned.states.items():
        p = part_of(whole, divisions[name], mesh, at)
        group = planned.groups[name]
        torn = torn_by(whole, divisions[name], mesh, head_rows_of(group))
        kept = {key: divisions_of_state(kept_dims(key, whole, group, torn), divisions[name]) for key in state}
        shards = {key: part_of(x, kept[key], mesh, at) for key, x in state.items()}
        adamw = adamw_state(p, p.dtype)
        of_parts = takes_rows(group) and any(dim == whole.dim() - 1 for _, dim in divisions[name])
        reads = clip + (of_parts and head_rows_of(group) == 1)  # pass_bytes counts that of heads
        moved = pass_bytes(p, shards, group) + limiter_bytes(p, shards) + reads * bytes_of(p)
        row = (bytes_of(p), bytes_of(*shards.values()), moved, bytes_of(*adamw.values()), pass_bytes(p, adamw))
        sums = [a + b for a, b in zip(sums, row, strict=True)]
    gradients, *rest = sums
    return Held(frozen + gradients, gradients, *rest)


def _shares(sharded: ShardedPlan) -> str:
    plan, held = sharded.plan, sharded.largest
    common = held.weight_bytes + held.gradient_bytes
    unit, size = unit_of(common)
    rows: list[tuple[str, ...]] = [
        ("optimizer", "moments", "weights", "gradients", "states", "together", "step moves", "memory, ms",
         *(("matrices, ms",) if sharded.matrices is not None else ()), "collectives, ms", "host, ms", "step, ms")
    ]  # fmt: skip
    # AdamW's host time is unknown, and so is the time of its step.
    ours: list[float] = [] if sharded.matrices is None else [sharded.matrix_seconds]
    theirs: list[float | None] = [] if sharded.matrices is None else [0.0]
    for cost, state, moved, seconds in (
        (plan.adamw[0], held.adamw_state_bytes, held.adamw_moved_bytes, (*theirs, 0.0, None, None)),
        (
            plan.chosen,
            held.state_bytes,
            held.moved_bytes,
            (*ours, sharded.collective_seconds, sharded.host_seconds, sharded.seconds),
        ),
    ):
        amounts = (held.weight_bytes, held.gradient_bytes, state, common + state, moved)
        times: list[str] = []
        if plan.bandwidth is not None:
            every = (moved / plan.bandwidth, *seconds)
            times = ["-" if each is None else three_digits(1e3 * each) for each in every]
        rows.append((label(cost), moments_of(cost), *(f"{amount / size:.3f}" for amount in amounts), *times))
    if plan.bandwidth is None:
        rows = [row[:7] for row in rows]
        speed = "give --bandwidth or --measure for a step's time"
    else:
        speed = (
            f"times predicted for memory of {plan.bandwidth / 1e9:,.1f} GB/s and a host that takes "
            f"{1e6 * sharded.host_time:,.1f} us a tensor"
        )
    excess = 100 * ((common + held.state_bytes) / sharded.even_bytes - 1)
    return (
        f"The largest of {_processes(sharded)}, {unit} ({speed})\n{aligned(rows, right=range(2, len(rows[0])))}\n"
        f"It holds {excess:.1f} % more than an even share."
    )


def _matrices(sharded: ShardedPlan) -> str:
    work = sharded.matrices
    assert work is not None
    most, least, total = max(work.flops), min(work.flops), sum(work.flops)
    return (
        f"Newton-Schulz of the matrices (time predicted for {sharded.matrix_flops / 1e12:,.1f} TFLOP/s)\n"
        f"All processes {total / 1e9:,.3f} GFLOP a step, the busiest {most / 1e9:,.3f} "
        f"({three_digits(1e3 * sharded.matrix_seconds)} ms), the least busy {least / 1e9:,.3f}.\n"
        f"A process sends up to {max(work.sent_bytes):,} bytes to owners of matrices and back, and adds up "
        f"{max(work.reduced_bytes):,} with\nreplicas, while other matrices are computed."
    )


def _processes(sharded: ShardedPlan) -> str:
    n = sharded.mesh.size
    return "1 process" if n == 1 else f"{n:,} processes ({sharded.mesh})"


def _collectives(sharded: ShardedPlan) -> str:
    if not sharded.collectives:
        return "Collectives of a step: none"

    def row(c: Collective) -> tuple[str, ...]:
        seconds = c.seconds(sharded.link_bandwidth, sharded.latency)
        sender = "engine" if c.engine else "optimizer"
        counts = (f"{c.processes:,}", f"{c.calls:,}", f"{c.total_bytes:,}", three_digits(1e3 * seconds))
        return sender, c.purpose, c.kind, *counts

    heading = ("sent by", "what", "collective", "processes", "calls", "bytes in all", "time, ms")
    table = aligned([heading, *map(row, sharded.collectives)], right=(3, 4, 5, 6))
    units = ", with one fully_shard a layer and one for the rest," if sharded.mesh.fsdp > 1 else ""
    activations = " Activations, which tensor parallelism sends, are not counted." if sharded.mesh.tp > 1 else ""
    return (
        f"Collectives of a step (times predicted for links of {sharded.link_bandwidth / 1e9:,.1f} GB/s and "
        f"{1e6 * sharded.latency:,.1f} us a message)\n{table}\n"
        f"The optimizer's are in its step's time. The engine's{units} run beside forward and backward.{activations}"
    )
