"""Plan a model's shards on a mesh: collectives of a step, and errors for divisions that cannot work."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from gwt_kernels.core.factored import FACTORS
from gwt_kernels.core.level import ROW
from gwt_kernels.formats.moments import MOMENTS, format_of
from gwt_kernels.optim.state import head_rows_of, kept_dims, row_shape, takes_rows
from gwt_kernels.planner.costs import bytes_of
from gwt_kernels.planner.matrix_work import MatrixWork, work_of
from gwt_kernels.planner.mesh import (
    FIRST,
    Axis,
    Division,
    Mesh,
    divisions_of,
    divisions_of_state,
    lengths_along,
    part_of,
    shape_of_part,
    torn_by,
)
from gwt_kernels.planner.plan import Plan
from gwt_kernels.planner.sharded_plan import Collective, ShardedPlan, held, weights
from gwt_kernels.rules import rule_of

LINK_BANDWIDTH = 50e9
"""Bytes per second that a process sends while receiving as many; assumes 400 Gbit/s per GPU."""
LATENCY = 10e-6
"""Seconds from one process to another for an empty message; an assumption of a network's order of magnitude."""
HOST_TIME = 5e-6
"""Seconds of Python and launches per tensor of a step; an assumption: ``bench.host`` measured 0.5 to 1.6 µs
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
    like their parameters. Replicas (``dp``) have the same shards. All limited parameters are assumed to be on the
    whole mesh, so that the limiter needs one all-reduce.

    Args:
        planned: The model as a whole, as :func:`gwt_kernels.plan.plan` returns it.
        mesh: Number of processes along each axis.
        clip: Whether ``max_grad_norm`` is on: gradients are read once more, and one all-reduce is added.
            ``skip_nonfinite`` alone adds the all-reduce too, but reads only gradients without limiter.
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
    matrices = work_of(planned, mesh, divisions, ways)
    sums = _of_the_step(planned, mesh, divisions, clip)
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
            f"{level} needs multiples of {2**level}, for blocks stay whole: use level {works} at most, exclude "
            f"these tensors from the transform, or divide them into fewer parts"
        )


def _check_rows(planned: Plan, mesh: Mesh, divisions: Mapping[str, tuple[Division, ...]]) -> None:
    """Raise where the optimizer would: a scale's values are split, or random bits have no index rule."""
    for entry in planned.entries:
        state, split = planned.states[entry.name][1], divisions[entry.name]
        n = math.prod(getattr(mesh, axis) for axis, _ in split)
        rows = [dim for _, dim in split if dim == 0]
        even = not split or entry.shape[0] % n == 0
        stored = format_of(state[MOMENTS[0]].dtype)
        if stored is not None and stored.scales and split:
            q = stored.block_size(entry.level)
            if not even or len(rows) < len(split) or state[MOMENTS[0]].numel() // n % q:
                raise ValueError(
                    f"{stored.name} moments of {entry.name} have a scale per {q} values, which mesh {mesh} would "
                    f"split: shards of rows must be equal and multiples of {q} values; use bfloat16 moments, or "
                    f"another mesh"
                )
        stochastic = planned.groups[entry.name]["weight_rounding"] == "stochastic"
        if len(rows) > 1 and not even and (stochastic or (stored is not None and stored.is_random)):
            what, remedy = ("weights", "weight_rounding=None") if stochastic else ("moments", "float32 moments")
            raise ValueError(
                f"the {entry.shape[0]} rows of {entry.name} are divided by tp and by fsdp into {n} uneven parts, "
                f"for which the random bits of bfloat16 {what} are undefined: use {remedy}, or another mesh"
            )


def _of_the_step(
    planned: Plan, mesh: Mesh, divisions: Mapping[str, tuple[Division, ...]], clip: bool
) -> Iterator[Collective]:
    if not any(divisions.values()):
        return  # replicas compute the same decision without communication
    for what, of in (("rows", _row_sums), ("heads", _head_sums)):
        for axis, size in _bytes_by_axis(planned, mesh, divisions, of):
            yield Collective(f"sums over {what}", False, "all-reduce", getattr(mesh, axis), 1, size)
    if clip:
        yield Collective("gradient norm, non-finite", False, "all-reduce", mesh.size, 1, 2 * 8)
    limited = [name for name, (_, state) in planned.states.items() if "limiter_norm" in state and divisions[name]]
    if limited:
        axes = {axis for name in limited for axis, _ in divisions[name]}
        n = mesh.size if len(axes) > 1 else getattr(mesh, *axes)
        width = max(planned.states[name][1]["limiter_norm"].element_size() for name in limited)
        yield Collective("limiter norms", False, "all-reduce", n, 1, width * len(limited))
    factored = [name for name, (_, state) in planned.states.items() if FACTORS[0] in state and divisions[name]]
    if factored:
        axes = {axis for name in factored for axis, _ in divisions[name]}
        n = mesh.size if len(axes) > 1 else getattr(mesh, *axes)
        width = max(planned.states[name][1][FACTORS[0]].element_size() for name in factored)
        numbers = sum(_numbers_sent(planned.states[name][1], divisions[name]) for name in factored)
        yield Collective("sums over rows and columns", False, "all-reduce", n, 1, width * numbers)
        yield Collective("updates' squares", False, "all-reduce", n, 1, width * len(factored))


_Sums = Callable[[Tensor, Mapping[str, Any], Sequence[Division], Mesh], tuple[int, Collection[int]]]
"""How many sums a process takes of a parameter before a step, and the dimensions along which they are added up."""


def _row_sums(
    p: Tensor, group: Mapping[str, Any], divisions: Sequence[Division], mesh: Mesh
) -> tuple[int, Collection[int]]:
    if not takes_rows(group):
        return 0, ()
    rows = math.prod(shape_of_part(p.shape, divisions, mesh, FIRST)[:-1])
    return rows * rule_of(group["rule"]).row_numbers(group["level"]), (p.dim() - 1,)


def _head_sums(
    p: Tensor, group: Mapping[str, Any], divisions: Sequence[Division], mesh: Mesh
) -> tuple[int, Collection[int]]:
    torn = torn_by(p, divisions, mesh, head_rows_of(group))
    kept = divisions_of_state(kept_dims(MOMENTS[1], p, group, torn), divisions)
    return math.prod(shape_of_part(row_shape(p, head_rows_of(group)), kept, mesh, FIRST)), torn


def _bytes_by_axis(
    planned: Plan, mesh: Mesh, divisions: Mapping[str, tuple[Division, ...]], of: _Sums
) -> Iterator[tuple[Axis, int]]:
    """Yield the axes along which a step adds up sums, and the bytes of these on a process."""
    numbers: Counter[Axis] = Counter()
    width = 4
    for name, (p, _) in planned.states.items():
        n, dims = of(p, planned.groups[name], divisions[name], mesh)
        divided = sorted((dim, axis) for axis, dim in divisions[name])  # in the order of the step's collectives
        axes = [axis for dim, axis in divided if dim in dims and getattr(mesh, axis) > 1]
        numbers.update(dict.fromkeys(axes, n))
        width = max(width, p.dtype.itemsize) if axes else width
    yield from ((axis, width * n) for axis, n in numbers.items())


def _of_matrices(work: MatrixWork | None) -> Iterator[Collective]:
    """Yield the collectives that take matrices to their owners and back."""
    if work is None:
        return
    for n, calls in sorted(work.exchanges.items()):
        yield Collective("matrices to owners and back", False, "all-to-all", n, calls, work.exchanged_bytes[n])
    for n, calls in sorted(work.reductions.items()):
        yield Collective("matrices of replicas", False, "all-reduce", n, calls, work.added_bytes[n])


def _numbers_sent(state: Mapping[str, Tensor], divisions: Sequence[Division]) -> int:
    """How many sums a factored tensor adds up over processes before its factors are known."""
    row, col = (state[key] for key in FACTORS)
    dims = {dim for _, dim in divisions}
    rows, columns = row.dim() in dims, row.dim() - 1 in dims
    means = math.prod(row.shape[:-1]) if rows or columns else 0
    return rows * row.numel() + columns * col.numel() + means + 1


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
