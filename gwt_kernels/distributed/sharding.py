"""This process's shard of a DTensor, and its position in the whole tensor."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gwt_kernels.core.dtensor import is_sharded, local_of
from gwt_kernels.core.hyper import Span, padded_spans
from gwt_kernels.core.level import ROW, Level, block_width

ROWS_STAY = "use FSDP2 (torch.distributed.fsdp.fully_shard), whose shards keep their rows"


def local_parts(params: Sequence[Any], grads: Sequence[Any]) -> tuple[list[Tensor], list[Tensor | None]]:
    """Return this process's shards of parameters and gradients, with the same placements.

    A gradient with other placements is redistributed first. This is a collective of all processes, since
    placements are the same on all.

    Raises:
        RuntimeError: a DTensor's gradient is not a DTensor, or is on another mesh.
    """
    kind = sys.modules["torch.distributed.tensor"].DTensor
    # FSDP2's gradients share the spec object of their parameters; comparing specs takes longer.
    if {*map(type, params)} == {kind}:
        held: list[Tensor] = [p._local_tensor for p in params]
        local: list[Any] = [
            g._local_tensor if type(g) is kind and g._spec is p._spec else _local_part(p, g, kind)
            for p, g in zip(params, grads, strict=True)
        ]
    else:
        held = [p._local_tensor if isinstance(p, kind) else p for p in params]
        local = [_local_part(p, g, kind) if isinstance(p, kind) else g for p, g in zip(params, grads, strict=True)]
    if set(map(type, local)) - {Tensor, type(None)}:  # a collective of backward may still be running
        local = [g.wait() if hasattr(g, "wait") else g for g in local]
    return held, local


def _local_part(p: Any, g: Any, kind: type) -> Any:
    """Return this process's shard of a DTensor's gradient."""
    return None if g is None else _laid_out_as(p, g, isinstance(g, kind))._local_tensor


def _laid_out_as(p: Any, g: Any, is_sharded: bool) -> Any:
    """Return the gradient with the parameter's placements."""
    if not is_sharded or (g.device_mesh is not p.device_mesh and g.device_mesh != p.device_mesh):
        where = f"on {g.device_mesh}" if is_sharded else "no DTensor"
        raise RuntimeError(
            f"a parameter of shape {tuple(p.shape)} is on {p.device_mesh}, its gradient {where}: run backward "
            f"through the sharded parameter"
        )
    return g if g.placements == p.placements else g.redistribute(p.device_mesh, p.placements)


def made_by_a_getter() -> bool:
    """Return whether checkpointing of PyTorch or torchtitan calls ``step()`` to initialize a new optimizer's state.

    That call has a learning rate of 0 and zero gradients, and must not be counted as a step.
    """
    frame = sys._getframe(1)
    for _ in range(8):  # torch's hooks and no_grad wrap step()
        if frame.f_back is None:
            return False
        frame = frame.f_back
        if frame.f_code.co_name in ("_init_optim_state", "init_optim_state"):
            return True
    return False


def reduced_over(p: Any, dim: int | None = None) -> list[tuple[Any, int]]:
    """Return the mesh dimensions, as (mesh, index), that shard a parameter; along ``dim`` if given."""
    if not is_sharded(p):
        return []
    mesh = p.device_mesh
    found = [(mesh, i) for i, x in enumerate(p.placements) if _dim(x) is not None and mesh.size(i) > 1]
    return found if dim is None else [(mesh, i) for mesh, i in found if _dim(p.placements[i]) == dim]


def divides_rows(p: Any) -> bool:
    """Return whether processes hold parts of ``p``'s rows."""
    return bool(p.dim()) and bool(reduced_over(p, p.dim() - 1))


def is_first_part_of_rows(p: Any) -> bool:
    """Return whether this process holds the first parts of rows of ``p``, or whole rows."""
    coordinate = p.device_mesh.get_coordinate() if is_sharded(p) else ()
    return not any(coordinate[i] for _, i in reduced_over(p, p.dim() - 1))


Dims = Sequence[int | None]
"""Dimensions of a parameter that an entry of its state keeps, in order; None for one of its own, of size 1."""


def zeros_like_shard(p: Any, shape: Sequence[int], dtype: torch.dtype, dims: Dims | None = None) -> Tensor:
    """Return zeros of the global ``shape``, sharded as ``p`` is: a DTensor if ``p`` is one.

    Along the last dimension, a shard is as much narrower than ``p``'s as the whole is. A shape of one dimension is
    sharded as ``p``'s first. ``dims`` are the dimensions of ``p`` that the shape keeps, if not all.
    """
    if not is_sharded(p):
        return torch.zeros(tuple(shape), dtype=dtype, device=p.device)
    from torch.distributed.tensor import DTensor

    local = torch.zeros(_local_shape(p, shape, dims), dtype=dtype, device=p.device)
    strides = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    return DTensor.from_local(
        local,
        p.device_mesh,
        placements_of(p, dims),
        run_check=False,
        shape=torch.Size(shape),
        stride=strides,
    )


def placements_of(p: Any, dims: Dims | None) -> tuple[Any, ...]:
    """Return the placements of a DTensor that keeps dimensions ``dims`` of ``p``: Replicate along the others."""
    if dims is None:
        return tuple(p.placements)
    from torch.distributed.tensor import Replicate

    return tuple(
        placement if dim is None else _moved(placement, dims.index(dim)) if dim in dims else Replicate()
        for placement, dim in ((placement, _dim(placement)) for placement in p.placements)
    )


def _moved(placement: Any, dim: int) -> Any:
    """Return the placement for dimension ``dim``."""
    if placement.dim == dim:
        return placement
    if hasattr(placement, "split_factor"):
        return type(placement)(dim, split_factor=placement.split_factor)
    return type(placement)(dim)


def places_in_whole(p: Any, shape: Sequence[int], dims: Sequence[int]) -> Tensor:
    """Return the flat indices of a tensor of the global ``shape``, with dims ``dims`` of ``p``, in this shard."""
    held = torch.zeros((), dtype=torch.int64, device="cpu")
    for d, n in zip(dims, shape, strict=True):
        held = held.unsqueeze(-1) * n + indices_of(p, d, n)
    return held


def spans_of(p: Any, shape: Sequence[int], level: Level) -> tuple[Span, Span]:
    """Return the positions of the shard of ``p``, and of its moments of the global ``shape``, in the whole."""
    spans = _spans(p, shape, level)
    assert spans is not None  # checked by check_sharding
    return spans


def _spans(p: Any, shape: Sequence[int], level: Level) -> tuple[Span, Span] | None:
    """Return :func:`spans_of`; None if no span describes a shard."""
    start, sharded = _start(p), sharded_dims(p)
    if p.dim() and p.shape[-1] % block_width(level, p.shape[-1]):  # whole rows, in the padded order of random bits
        if sharded and (_span(p, p.shape, start, sharded) is None or math.prod(p.shape[: max(sharded)]) > 1):
            return None
        row = sum(i * math.prod(p.shape[d + 1 : -1]) for d, i in enumerate(start[:-1]))
        return padded_spans(p.shape, level, row)
    first = [*start[:-1], start[-1] * shape[-1] // max(p.shape[-1], 1)] if start else []
    of_moments = sharded - {p.dim() - 1} if level == ROW else sharded  # every part of a row has them whole
    weights, coefficients = _span(p, p.shape, start, sharded), _span(p, shape, first, of_moments)
    return None if weights is None or coefficients is None else (weights, coefficients)


def check_sharding(
    p: Any, group: Mapping[str, Any], name: str, shape: Sequence[int], block_size: int, random: bool
) -> None:
    """Raise unless a step can update the shards of ``p`` separately, with moments of the global ``shape``.

    The decision depends on the whole tensor only, so all processes decide alike.

    Raises:
        TypeError: the parameter is a flat buffer of FSDP1 or ZeRO, which keeps no rows.
        ValueError: it is sharded in a way that the transform or the options cannot follow.
    """
    check_shards(p, name)
    if not is_sharded(p):
        if group["level"] and p.dim() == 1 and _is_part_of_a_buffer(p):
            raise TypeError(
                f"{name} is a part of a flat buffer, as of FSDP1, and not rows of a matrix ({ROWS_STAY}), or a "
                f"view: use level 0 or clone() it"
            )
        return
    mesh, placements = p.device_mesh, p.placements
    if p.dim() and any(_dim(x) == p.dim() - 1 for x in placements):
        _check_columns(p, group, name)
    if random and _spans(p, shape, group["level"]) is None:
        raise ValueError(
            f"{name} is sharded as {placements} on {mesh}, for which the element indices, on which "
            f"random bits depend, are not regular: use state_dtype=None and weight_rounding=None, or make every "
            f"dimension a multiple of the processes that share it, and the last one of 2**level"
        )
    if block_size > 1 and not _holds_whole_quanta(p, shape, block_size):
        raise ValueError(
            f"{group['state_dtype']} moments of {name} have a scale per {block_size} values, which {placements} on "
            f"{mesh} would split: shards of rows must be equal and multiples of {block_size} values; use "
            f"state_dtype=torch.bfloat16"
        )


def check_shards(p: Any, name: str) -> None:
    """Raise unless this process has all of ``p``, or the shard of its placements.

    Raises:
        TypeError: the parameter is a flat buffer of FSDP1 or ZeRO, which keeps no rows.
        ValueError: its placements are not shards or replicas, or the local shape differs from them.
    """
    if getattr(p, "_is_flat_param", False):
        raise TypeError(f"{name} is a flat parameter of FSDP1, the concatenation of many tensors: {ROWS_STAY}")
    if hasattr(p, "ds_id"):
        raise TypeError(f"{name} is partitioned by ZeRO stage 3, which keeps no rows: {ROWS_STAY}")
    if not is_sharded(p):
        return
    mesh, placements = p.device_mesh, p.placements
    unknown = [x for x in placements if _dim(x) is None and not x.is_replicate()]
    if unknown:
        raise ValueError(
            f"{name} has the placement {unknown[0]!r}: redistribute it to Shard or "
            f"Replicate before you pass it to the optimizer"
        )
    if mesh.get_coordinate() is None:
        raise ValueError(f"{name} is on {mesh}, to which this process does not belong: leave it out here")
    local, expected = tuple(local_of(p).shape), _local_shape(p, p.shape)
    if local != expected:
        raise ValueError(
            f"{name} has a shard of shape {local} here, where {placements} on {mesh} means {expected}: "
            f"distribute it with torch.distributed.tensor.distribute_tensor, whose division all tools share"
        )


def check_place_of(x: Any, key: str, p: Any, name: str, dims: Dims | None = None) -> None:
    """Raise unless ``x``, the entry ``key`` of ``p``'s state that keeps ``dims`` of it, is sharded as ``p`` is."""
    if is_sharded(x) != is_sharded(p):
        held, other = ("a plain tensor", "a DTensor") if is_sharded(p) else ("a DTensor", "a plain tensor")
        raise ValueError(
            f"{key} of {name} is {held}, the parameter {other}: load the state by torch.distributed.checkpoint."
            f"state_dict.set_optimizer_state_dict, with full_state_dict=True if it was gathered"
        )
    if is_sharded(p) and (x.device_mesh, x.placements) != (p.device_mesh, placements_of(p, dims)):
        raise ValueError(
            f"{key} of {name} is sharded as {x.placements} on {x.device_mesh}, the parameter as {p.placements} on "
            f"{p.device_mesh}: redistribute it, or load it by torch.distributed.checkpoint"
        )


def _is_part_of_a_buffer(p: Tensor) -> bool:
    """Return whether a one-dimensional tensor is a view of a larger storage with stride 1, as of a flat buffer."""
    if p.device.type == "meta" or p.stride(0) != 1 or not p.numel():
        return False
    return p.untyped_storage().nbytes() > p.numel() * p.element_size()


def _check_columns(p: Any, group: Mapping[str, Any], name: str) -> None:
    """Raise unless every shard of a row has whole blocks. If a row is one block, shards may have any part of it."""
    level = group["level"]
    if not level or level == ROW:
        return
    if group["wavelet"] != "haar":
        raise ValueError(
            f"{name} is sharded along its last dimension, over whose edges the filters of {group['wavelet']!r} "
            f"reach: use wavelet='haar', or shard its rows"
        )
    common = largest_blocks(p, p.dim() - 1)
    if common % 2**level:
        widths = sorted({n for runs in _runs_of_all(p, p.dim() - 1) for _, n in runs})
        fits = (common & -common).bit_length() - 1
        raise ValueError(
            f"{name} is sharded along its last dimension into widths of {widths}, which level "
            f"{level} needs to be multiples of {2**level}: use level {fits} at most for it, or shard its rows"
        )


def largest_blocks(p: Any, dim: int) -> int:
    """Return the length of the largest blocks, of equal length along ``dim``, that no shard splits."""
    return math.gcd(*(n for runs in _runs_of_all(p, dim) for run in runs for n in run))


def _runs_of_all(p: Any, dim: int) -> set[tuple[tuple[int, int], ...]]:
    """Return the different runs of indices along ``dim`` (:func:`_runs`) that shards of ``p`` have."""
    mesh, sharding = p.device_mesh, [i for i, placement in enumerate(p.placements) if _dim(placement) == dim]
    found = set()
    for places in itertools.product(*(range(mesh.size(i)) for i in sharding)):
        coordinate = [0] * mesh.ndim
        for i, place in zip(sharding, places, strict=True):
            coordinate[i] = place
        found.add(_runs(indices_of(p, dim, p.shape[dim], coordinate)))
    return found


def _holds_whole_quanta(p: Any, shape: Sequence[int], q: int) -> bool:
    """Return whether every process has whole groups of the ``q`` coefficients that share a scale."""
    if any(_dim(x) not in (None, 0) for x in p.placements):
        return False
    n = math.prod(int(mesh.size(i)) for mesh, i in reduced_over(p))
    return shape[0] % n == 0 and math.prod(shape) // n % q == 0


def _dim(placement: Any) -> int | None:
    """Return the dimension of a Shard or strided shard; None for other placements."""
    if placement.is_replicate() or placement.is_partial():
        return None
    return getattr(placement, "dim", None)


def indices_of(p: Any, dim: int, length: int, coordinate: Sequence[int] | None = None) -> Tensor:
    """Return the rising indices along ``dim`` in a process's shard of a tensor of this length, sharded like ``p``.

    The process is that at ``coordinate`` of the mesh; by default this one.
    """
    held = torch.arange(length, dtype=torch.int64, device="cpu")
    if coordinate is None:
        coordinate = p.device_mesh.get_coordinate()
    for i, placement in enumerate(p.placements):
        if _dim(placement) != dim:
            continue
        # Tensor parallelism shards before FSDP does, though its mesh dimension is later.
        divided = held.chunk(placement.split_factor) if hasattr(placement, "split_factor") else [held]
        n, rank = p.device_mesh.size(i), coordinate[i]
        parts = [part.chunk(n)[rank] for part in divided if rank < len(part.chunk(n))]
        held = torch.cat(parts) if parts else held[:0]
    return held


def held_runs(p: Any, coordinate: Sequence[int]) -> list[tuple[tuple[int, int], ...]]:
    """Return the shard of ``p`` at ``coordinate`` of the mesh: start and length of each run, per dimension."""
    return [_runs(indices_of(p, d, n, coordinate)) for d, n in enumerate(p.shape)]


def _runs(indices: Tensor) -> tuple[tuple[int, int], ...]:
    """Return start and length of each run of consecutive indices."""
    if not len(indices):
        return ()
    ends = (indices.diff() != 1).nonzero().flatten().add_(1).tolist()
    bounds = [0, *ends, len(indices)]
    return tuple((int(indices[i]), j - i) for i, j in itertools.pairwise(bounds))


def sharded_dims(p: Any) -> set[int]:
    """Return the dimensions of ``p`` that its shards divide."""
    dims = {_dim(p.placements[i]) for _, i in reduced_over(p)}
    return {dim for dim in dims if dim is not None}


def _local_shape(p: Any, shape: Sequence[int], dims: Dims | None = None) -> tuple[int, ...]:
    sharded = sharded_dims(p)
    dims = range(len(shape)) if dims is None else dims
    return tuple(
        len(indices_of(p, d, n)) if d is not None and d in sharded else n for d, n in zip(dims, shape, strict=True)
    )


def _start(p: Any) -> list[int]:
    """Return the index of this process's first element, per dimension."""
    held = {d: indices_of(p, d, p.shape[d]) for d in sharded_dims(p)}
    return [int(held[d][0]) if d in held and len(held[d]) else 0 for d in range(p.dim())]


def _span(p: Any, shape: Sequence[int], start: Sequence[int], sharded: set[int]) -> Span | None:
    """Return the position of a shard in the tensor of the global ``shape``, divided along the dims ``sharded``.

    None if no span describes it.
    """
    n_shards = {
        d: math.prod(mesh.size(i) for mesh, i in reduced_over(p) if _dim(p.placements[i]) == d) for d in sharded
    }
    strided = {_dim(x) for x in p.placements if hasattr(x, "split_factor")}
    if any(d in strided and shape[d] % n_shards[d] for d in sharded):
        return None
    if not sharded:
        return Span(0, 1, 1)
    last = max(sharded)
    if any(math.prod(shape[:d]) > 1 for d in sharded - {last}):
        return None
    first = sum(i * math.prod(shape[d + 1 :]) for d, i in enumerate(start))
    if math.prod(shape[:last]) == 1:
        return Span(first, 1, 1)
    local = [len(indices_of(p, last, shape[last])), *shape[last + 1 :]]
    return Span(first, max(1, math.prod(local)), math.prod(shape[last:]))
