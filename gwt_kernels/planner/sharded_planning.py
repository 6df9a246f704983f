"""Plan a model's shards on a mesh: collectives of a step, and errors for divisions that cannot work."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction

import torch
from torch import Tensor

from gwt_kernels.core.level import ROW
from gwt_kernels.formats.moments import MOMENTS, format_of
from gwt_kernels.planner.collectives import Placed, step_collectives
from gwt_kernels.planner.costs import bytes_of, name_of_dtype
from gwt_kernels.planner.matrix_work import MatrixWork, work_of
from gwt_kernels.planner.mesh import FIRST, Division, Mesh, axes_of, divisions_of, lengths_along, part_of
from gwt_kernels.planner.plan import Plan
from gwt_kernels.planner.sharded_plan import Collective, ShardedPlan, held, weights

LINK_BANDWIDTH = 50e9
"""Bytes per second that a process sends while receiving as many; assumes 400 Gbit/s per GPU."""
LATENCY = 10e-6
"""Seconds from one process to another for an empty message; an assumption of a network's order of magnitude."""
HOST_TIME = 5e-6
"""Seconds of Python and launches per tensor of a step; an assumption: ``bench.host`` measured 0.5 to 1.4 µs
without a GPU, and without the driver's launch."""

MATRIX_FLOPS = 400e12
"""Operations per second of Newton-Schulz; an assumption: two fifths of what an H100 can do in bfloat16."""

_MOST_PROCESSES = 2**31 - 1
_BUCKETS = [2**20, 25 * 2**20]  # bytes at which DDP sends its first bucket, and later ones


def plan_sharded(
    planned: Plan,
    mesh: Mesh,
    *,
    clip: bool = False,
    tensor_parallel: Mapping[str, str] | None = None,
    link_bandwidth: float = LINK_BANDWIDTH,
    latency: float = LATENCY,
    host_time: float = HOST_TIME,
    matrix_flops: float = MATRIX_FLOPS,
) -> ShardedPlan:
    """Divide a planned model over processes as PyTorch does, without allocating or starting anything.

    ``tp`` first shards the layers that a tensor-parallel plan names. ``fsdp`` then shards the rows (dimension 0) of
    every tensor as :func:`torch.chunk` does, so the last processes may have less or nothing. Moments are sharded
    like their parameters. Replicas (``dp``) have the same shards.

    Args:
        planned: The model as a whole, as :func:`gwt_kernels.plan.plan` returns it.
        mesh: Number of processes along each axis.
        clip: Whether ``max_grad_norm`` is on: gradients are read once more, and one all-reduce is added. This
            assumes that all parameters are on one mesh, even if ``tensor_parallel`` does not name them, since the
            optimizer clips no others. ``skip_nonfinite`` alone adds the all-reduce too, but reads only gradients
            of tensors without limiter.
        tensor_parallel: ``"colwise"`` (shards a linear layer's outputs), ``"rowwise"`` (its inputs) or
            ``"embedding_rowwise"`` by module name, with ``*`` for a number; None for the model's
            own plan in transformers.
        link_bandwidth: Bytes per second between processes.
        latency: Seconds of an empty message.
        host_time: Host seconds per tensor of a step.
        matrix_flops: Floating-point operations per second of Newton-Schulz's products, for Muon.

    Raises:
        ValueError: a number is out of range, the model has no plan for ``tp``, or a division splits a block or the
            values of a scale; the error names the tensor and a remedy.
    """
    if min(mesh) < 1:
        raise ValueError(f"mesh {mesh!r} has an axis without processes: use 1 for an axis that is not there")
    if mesh.size > _MOST_PROCESSES:
        raise ValueError(
            f"mesh {mesh} has {mesh.size} processes, more than the {_MOST_PROCESSES} that ranks can count: plan "
            f"for fewer"
        )
    for what, per_second, value in (
        ("link_bandwidth", "bytes", link_bandwidth),
        ("matrix_flops", "operations", matrix_flops),
    ):
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{what} must be a finite number of {per_second} per second above 0, got {value}")
    for what, value in (("latency", latency), ("host_time", host_time)):
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{what} must be a finite number of seconds of at least 0, got {value}")
    ways = planned.tensor_parallel if tensor_parallel is None else tensor_parallel
    if mesh.tp > 1 and not ways:
        raise ValueError(
            f"{planned.model} has no plan for tensor parallelism: use a mesh with fsdp or dp alone, or name its "
            f"layers in plan_sharded(..., tensor_parallel={{'layers.*.down': 'rowwise', ...}})"
        )
    divisions = {name: divisions_of(name, p, mesh, ways) for name, p in weights(planned)}
    _check_columns(planned, mesh, divisions)
    _check_rows(planned, mesh, divisions)
    axes = {name: axes_of(name, mesh, ways) for name in divisions}
    matrices = work_of(planned, mesh, divisions, axes)
    sums = step_collectives(Placed(planned, mesh, divisions, axes), clip)
    return ShardedPlan(
        plan=planned,
        mesh=mesh,
        largest=held(planned, mesh, divisions, clip, FIRST),
        even_bytes=_even_bytes(planned, mesh, divisions),
        divisions=divisions,
        clip=clip,
        collectives=(*sums, *_of_matrices(matrices), *_of_the_engine(planned, mesh, divisions)),
        link_bandwidth=link_bandwidth,
        latency=latency,
        host_time=host_time,
        matrices=matrices,
        matrix_flops=matrix_flops,
    )


def _even_bytes(planned: Plan, mesh: Mesh, divisions: Mapping[str, tuple[Division, ...]]) -> int:
    total = Fraction()
    for name, p in weights(planned):
        _, state = planned.states.get(name, (p, {}))
        copies = 1 if name in planned.frozen else 2  # a weight, and its gradient
        scalars = bytes_of(*(x for x in state.values() if x.dim() == 0))
        parts = math.prod(getattr(mesh, axis) for axis, _ in divisions[name])
        total += scalars + Fraction(copies * bytes_of(p) + bytes_of(*state.values()) - scalars, parts)
    return math.ceil(total)


def _check_columns(planned: Plan, mesh: Mesh, divisions: Mapping[str, tuple[Division, ...]]) -> None:
    """Raise unless every process has whole blocks of every transformed row."""
    torn: dict[str, tuple[int, set[int]]] = {}
    for entry in planned.entries:
        last = len(entry.shape) - 1
        if not entry.level or entry.level == ROW or last not in {dim for _, dim in divisions[entry.name]}:
            continue
        if (wavelet := planned.groups[entry.name]["wavelet"]) != "haar":
            raise ValueError(
                f"mesh {mesh} divides the columns of {entry.name}, over whose edges the filters of {wavelet!r} "
                f"reach: use wavelet='haar', or a mesh that divides rows alone"
            )
        widths = lengths_along(last, entry.shape[-1], divisions[entry.name], mesh)
        if (common := math.gcd(*widths)) % 2**entry.level:
            torn[entry.name] = ((common & -common).bit_length() - 1, widths - {0})
    if torn:
        name, (_, widths) = min(torn.items(), key=lambda item: item[1][0])
        level, works = planned.chosen.level or 0, min(fits for fits, _ in torn.values())
        assert level != ROW
        others = f" (and {len(torn) - 1} more tensors)" if len(torn) > 1 else ""
        raise ValueError(
            f"mesh {mesh} divides the columns of {name}{others} into widths of {sorted(widths)}; level "
            f"{level} needs multiples of {2**level}, so that blocks stay whole: use level {works} at most, exclude "
            f"these tensors from the transform, or divide them into fewer parts"
        )


def _check_rows(planned: Plan, mesh: Mesh, divisions: Mapping[str, tuple[Division, ...]]) -> None:
    """Raise where the optimizer would: if the values of a scale are split, or random bits have no index rule."""
    for entry in planned.entries:
        state, split = planned.states[entry.name][1], divisions[entry.name]
        n = math.prod(getattr(mesh, axis) for axis, _ in split)
        rows = [dim for _, dim in split if dim == 0]
        even = not split or entry.shape[0] % n == 0
        first = state.get(MOMENTS[0])  # None under a rule without it
        stored = None if first is None else format_of(first.dtype)
        if first is not None and stored is not None and stored.scales and split:
            q = stored.block_size(entry.level)
            if not even or len(rows) < len(split) or first.numel() // n % q:
                raise ValueError(
                    f"{stored.name} moments of {entry.name} have a scale per {q} values, which mesh {mesh} would "
                    f"split: shards of rows must be equal and multiples of {q} values; use bfloat16 moments, or "
                    f"another mesh"
                )
        if len(rows) < 2 or even:
            continue
        random = {}
        if stored is not None and stored.is_random:
            random[f"{stored.name} moments"] = "float32 moments"
        if planned.groups[entry.name]["weight_rounding"] == "stochastic":
            random[f"{name_of_dtype(entry.dtype)} weights"] = "weight_rounding=None"
        if random:
            raise ValueError(
                f"the {entry.shape[0]} rows of {entry.name} are divided by tp and by fsdp into {n} uneven parts, "
                f"for which the random bits of {' and '.join(random)} are undefined: use "
                f"{' and '.join(random.values())}, or another mesh"
            )


def _of_matrices(work: MatrixWork | None) -> Iterator[Collective]:
    """Yield the collectives that take matrices to their owners and back."""
    if work is None:
        return
    for n, calls in sorted(work.exchanges.items()):
        yield Collective("matrices to owners and back", False, "all-to-all", n, calls, work.exchanged_bytes[n])
    for n, calls in sorted(work.reductions.items()):
        yield Collective("matrices of replicas", False, "all-reduce", n, calls, work.added_bytes[n])


def _of_the_engine(
    planned: Plan, mesh: Mesh, divisions: Mapping[str, tuple[Division, ...]]
) -> Iterator[Collective]:
    """Yield the collectives of DDP or FSDP2; activations of tensor parallelism are not counted."""
    sizes = {name: bytes_of(part_of(p, divisions[name], mesh, FIRST)) for name, p in weights(planned)}
    trained = {name: sizes[name] for name in planned.states}
    if mesh.fsdp > 1:
        # Shards are padded to the size of the first.
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
    """Return the number of DDP's buckets for gradients that arrive last layer first."""
    filled: dict[torch.dtype, int] = {}
    full: Counter[torch.dtype] = Counter()
    for p in reversed(params):
        filled[p.dtype] = filled.get(p.dtype, 0) + bytes_of(p)
        if filled[p.dtype] >= _BUCKETS[min(full[p.dtype], 1)]:
            full[p.dtype] += 1
            filled[p.dtype] = 0
    return full.total() + sum(size > 0 for size in filled.values())
