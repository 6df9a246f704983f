"""Meshes of processes, and the shards into which PyTorch divides a model's tensors over them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from gwt_kernels.distributed.heads import torn_of

Axis = Literal["fsdp", "tp"]
Division = tuple[Axis, int]
"""Mesh axis over which a tensor is sharded, and the sharded dimension."""

# Names that transformers gives to tensor-parallel styles, with the dimension of the weight that each shards.
_DIMENSIONS = {
    "colwise": 0,
    "colwise_rep": 0,
    "colwise_gather_output": 0,
    "embedding_rowwise": 0,
    "rowwise": 1,
    "rowwise_rep": 1,
    "replicated": None,
    "replicated_with_grad_allreduce": None,
    "sequence_parallel": None,
}
FIRST: Mapping[Axis, int] = {"fsdp": 0, "tp": 0}


class Mesh(NamedTuple):
    """Number of processes along each axis: replicas first, tensor parallelism last, as in PyTorch's guides."""

    dp: int = 1
    """Replicas: DDP, or with ``fsdp`` HSDP."""
    fsdp: int = 1
    """Processes that shard the rows of every tensor (FSDP2)."""
    tp: int = 1
    """Processes that shard layers (tensor parallelism)."""

    @property
    def size(self) -> int:
        """Number of processes."""
        return math.prod(self)

    def __str__(self) -> str:
        axes = [f"{axis}={n}" for axis, n in self._asdict().items() if n > 1]
        return ",".join(axes) or "one process"


def mesh_of(world_size: int | None = None, text: str | None = None) -> Mesh:
    """Return the mesh of ``"dp=2,fsdp=4,tp=8"``: missing axes are 1; without text all processes are on ``fsdp``.

    Args:
        world_size: Number of processes; None for the text's product, or 1.
        text: Axes with the number of processes along each, in any order.

    Raises:
        ValueError: a number is below 1, the text has another format, or its product is not the world size.
    """
    if world_size is not None and world_size < 1:
        raise ValueError(f"world size {world_size} is no number of processes: it is at least 1")
    if text is None:
        return Mesh(fsdp=world_size or 1)
    axes: dict[str, int] = {}
    for part in text.split(","):
        found = re.fullmatch(r"\s*(dp|fsdp|tp)\s*=\s*(\d+)\s*", part, re.ASCII)
        if found is None or found[1] in axes or int(found[2]) < 1:
            raise ValueError(
                f"mesh {text!r} is not understood at {part!r}: name each of dp, fsdp and tp at most once, with at "
                f"least 1 process, such as dp=2,fsdp=4,tp=8"
            )
        axes[found[1]] = int(found[2])
    mesh = Mesh(**axes)
    if world_size is not None and mesh.size != world_size:
        factors = " x ".join(map(str, axes.values()))
        raise ValueError(
            f"mesh {text!r} has {factors} = {mesh.size} processes, but the world size is {world_size}: make them "
            f"equal"
        )
    return mesh


def divisions_of(name: str, p: Tensor, mesh: Mesh, ways: Mapping[str, str]) -> tuple[Division, ...]:
    """Return the divisions of a parameter in their order: first by tensor parallelism, then by FSDP2."""
    divisions: list[Division] = []
    way = way_of(name, ways) if mesh.tp > 1 else None
    if way is not None:
        if way not in _DIMENSIONS or p.dim() > 2:
            raise ValueError(
                f"{name} of shape {tuple(p.shape)} is {way!r} in the plan for tensor parallelism, of which "
                f"no rule is known here: use tp=1, or say how it is divided: plan_sharded(..., tensor_parallel=...)"
            )
        dim = _DIMENSIONS[way]
        if dim is not None and dim < p.dim():  # the bias of a rowwise layer is not sharded
            divisions.append(("tp", dim))
    if mesh.fsdp > 1:
        if p.dim() == 0:
            raise ValueError(f"{name} is a scalar, which has no rows to divide: make it a tensor of one element")
        divisions.append(("fsdp", 0))
    return tuple(divisions)


def axes_of(name: str, mesh: Mesh, ways: Mapping[str, str]) -> tuple[str, ...]:
    """Return the axes of the mesh that a parameter is on: FSDP2's with its replicas, and tensor parallelism's."""
    by_engine = {"dp": mesh.fsdp > 1, "fsdp": True, "tp": way_of(name, ways) is not None}
    return tuple(axis for axis, n in mesh._asdict().items() if n > 1 and by_engine[axis])


def way_of(name: str, ways: Mapping[str, str]) -> str | None:
    """Return a parameter's style in a tensor-parallel plan, which names modules or their parameters; else None."""
    for pattern, way in ways.items():
        numbered = re.escape(pattern).replace(r"\*", r"\d+")
        if re.fullmatch(rf"{numbered}(\.weight|\.bias)?", name):
            return way
    return None


def length_of_part(whole: int, n: int, i: int) -> int:
    """Return the length of part ``i`` of the ``n`` that :func:`torch.chunk` makes; 0 if there is none."""
    each = -(-whole // n)
    return max(0, min(each, whole - i * each))


def lengths_of_parts(whole: int, n: int) -> set[int]:
    """Return the lengths of all parts, three at most: of a full part, of the last one, and 0."""
    each = -(-whole // n)
    full = whole // each if each else 0
    return {length_of_part(whole, n, i) for i in {0, full, n - 1} if i < n}


def lengths_along(dim: int, whole: int, divisions: Sequence[Division], mesh: Mesh) -> set[int]:
    """Return the lengths of all parts of a tensor along a dimension."""
    lengths = {whole}
    for axis, divided in divisions:
        if divided == dim:
            lengths = set[int]().union(*(lengths_of_parts(length, getattr(mesh, axis)) for length in lengths))
    return lengths


def torn_by(p: Tensor, divisions: Sequence[Division], mesh: Mesh, head_rows: int | None) -> tuple[int, ...]:
    """Return the dimensions along which shards would tear heads of ``head_rows`` rows (None: of all rows)."""
    rows = p.dim() - 2
    sharded = {dim for axis, dim in divisions if getattr(mesh, axis) > 1}
    return torn_of(sharded, rows, lambda: math.gcd(*lengths_along(rows, p.shape[rows], divisions, mesh)), head_rows)


def shape_of_part(
    shape: Sequence[int], divisions: Sequence[Division], mesh: Mesh, at: Mapping[Axis, int]
) -> tuple[int, ...]:
    local = list(shape)
    for axis, dim in divisions:
        if dim < len(local):  # scalars are not sharded
            local[dim] = length_of_part(local[dim], getattr(mesh, axis), at[axis])
    return tuple(local)


def divisions_of_state(dims: Sequence[int | None] | None, divisions: Sequence[Division]) -> Sequence[Division]:
    """Return the divisions of a state entry that keeps dimensions ``dims`` of its parameter; None: all of them."""
    if dims is None:
        return divisions
    return [(axis, dims.index(dim)) for axis, dim in divisions if dim in dims]


def part_of(x: Tensor, divisions: Sequence[Division], mesh: Mesh, at: Mapping[Axis, int]) -> Tensor:
    return torch.empty(shape_of_part(x.shape, divisions, mesh, at), dtype=x.dtype, device="meta")
