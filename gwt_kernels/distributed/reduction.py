"""Reductions over processes that share tensors: limiter norms, sums over rows and heads, and gradient norm."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from itertools import accumulate, chain, pairwise
from typing import Any

import torch
from torch import Tensor

from gwt_kernels.core.dtensor import is_sharded
from gwt_kernels.core.send import send
from gwt_kernels.distributed.sharding import is_first_part_of_rows, reduced_over
from gwt_kernels.rules.limiter import limit_


class ShardSums:
    """Add up numbers of sharded parameters over the processes that hold their shards.

    Every process makes it from the same parameters in the same order, and takes part in every collective, whichever
    parameters have gradients there.

    Numbers are added up over one mesh dimension after another. If parameters on meshes of all processes need
    several process groups, and ``dims`` is None, one all-reduce over all processes replaces theirs.

    Args:
        params: Parameters on one device that are sharded over several processes.
        lengths: How many numbers each parameter has; None for one.
        dims: For each parameter the dimensions along which its numbers are added up; processes that differ along
            other dimensions may have more or fewer numbers. None for all dimensions that shards divide.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        lengths: Sequence[int] | None = None,
        dims: Sequence[Collection[int]] | None = None,
    ) -> None:
        self.device = params[0].device
        wide = {torch.promote_types(p.dtype, torch.float32) for p in params}
        self.dtype = torch.float64 if torch.float64 in wide else torch.float32
        lengths = [1] * len(params) if lengths is None else lengths
        firsts = [0, *accumulate(lengths)]
        self._places = {id(p): range(*ends) for p, ends in zip(params, pairwise(firsts), strict=True)}
        self._n = firsts[-1]
        owners = torch.tensor(lengths, dtype=torch.int64, device="cpu")
        owners = torch.arange(len(params), dtype=torch.int64, device="cpu").repeat_interleave(owners)
        self._rounds: list[tuple[Any, Tensor | None]] = []
        at_once, rounds = _rounds(params, dims)
        for group, members in rounds:
            chosen = None
            if members is not None:
                wanted = torch.tensor(members, dtype=torch.int64, device="cpu")
                chosen = send(torch.isin(owners, wanted).nonzero().view(-1), self.device)
            self._rounds.append((group, chosen))
        # For an all-reduce over all processes: the sums that this one contributes, as the first with such a shard.
        firsts = [i not in at_once or _is_first(p) for i, p in enumerate(params)]
        is_first = torch.tensor(firsts, dtype=torch.bool, device="cpu")
        self._own = None if all(firsts) else send(is_first[owners], self.device)
        self._work: Any = None

    def places_of(self, params: Sequence[Tensor]) -> Tensor:
        """Return the indices of the numbers of ``params`` among those of all parameters."""
        ranges = [self._places[id(p)] for p in params]
        places = [torch.arange(x.start, x.stop, dtype=torch.int64, device="cpu") for x in ranges]
        return send(torch.cat(places), self.device)

    def zeros(self) -> Tensor:
        """Return a vector for the numbers of all parameters."""
        return torch.zeros(self._n, dtype=self.dtype, device=self.device)

    def gathered(self, sums: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """Return a vector of the numbers of all parameters from (places, values); 0 at other places."""
        vector = self.zeros()
        for places, values in sums:
            vector[places] = values.view(-1).to(vector.dtype)
        return vector

    def start(self, vector: Tensor) -> None:
        """Begin to add up the vectors of all processes; the last all-reduce is not waited for."""
        import torch.distributed as dist

        self.finish()  # where no parameter had a gradient, nothing has asked for the last step's result
        self._vector = vector if self._own is None else torch.where(self._own, vector, 0)
        for group, members in self._rounds:
            self.finish()
            self._part = self._vector if members is None else self._vector[members]
            self._members = members
            self._work = dist.all_reduce(self._part, group=group, async_op=True)

    def finish(self) -> Tensor | None:
        """Wait for the sums that were begun last, and return them; None if none were."""
        if self._work is not None:
            self._work.wait()
            self._work = None
            if self._members is not None:
                self._vector[self._members] = self._part
        return getattr(self, "_vector", None)


class LimiterReduction:
    """Sums of squares of all limited, sharded parameters on one device, and the limiter's divisors from them.

    Args:
        params: All parameters on one device that have a limiter and are sharded over several processes, as
            :class:`ShardSums` takes them.
        of_rows: For each whether its moments are those of whole rows, kept by every process with a part of the row.
    """

    def __init__(self, params: Sequence[Tensor], of_rows: Sequence[bool]) -> None:
        self._device = params[0].device
        self._sums = ShardSums(params)
        self.places_of = self._sums.places_of
        counts = [not rows or is_first_part_of_rows(p) for p, rows in zip(params, of_rows, strict=True)]
        is_counted = torch.tensor(counts, dtype=torch.bool, device="cpu")
        self._counts = None if all(counts) else send(is_counted, self._device)
        self._gammas: dict[tuple[tuple[float, ...], torch.dtype], Tensor] = {}

    def start(self, sums: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Begin to add up sums, passed as (places, values): see :meth:`ShardSums.start`."""
        vector = self._sums.gathered(sums)
        self._sums.start(vector if self._counts is None else torch.where(self._counts, vector, 0))

    def divisors(
        self, places: Tensor, limiter_norms: Tensor, gammas: Sequence[float], control: Tensor | None
    ) -> Tensor:
        """Return the limiter's divisors of the parameters at ``places``, computed on the device.

        ``limiter_norms`` are updated, unless ``control`` (see :func:`gwt_kernels.control.control_`) skips the step.
        """
        vector = self._sums.finish()
        assert vector is not None
        norms = vector[places].sqrt().to(limiter_norms.dtype)
        old = limiter_norms.clone()
        limits = limit_(limiter_norms, norms, self._gamma_tensor(tuple(gammas), norms.dtype))
        if control is not None:
            limiter_norms.copy_(torch.where(control[1] > 0, limiter_norms, old))
        return limits

    def memory(self) -> list[Tensor]:
        """Return tensors that a step with other options would replace, and replays of a captured one read."""
        return list(self._gammas.values())

    def _gamma_tensor(self, gammas: tuple[float, ...], dtype: torch.dtype) -> Tensor | float:
        first = gammas[0]
        if gammas.count(first) == len(gammas):
            return first
        key = gammas, dtype
        if key not in self._gammas:  # sent once, so that a CUDA graph may capture the steps that follow
            self._gammas = {key: send(torch.tensor(gammas, dtype=dtype, device="cpu"), self._device)}
        return self._gammas[key]


class RowReduction:
    """Sums over rows, or heads, of all parameters on one device whose rows or heads are divided over processes.

    Args:
        params: As :class:`ShardSums` takes them.
        numbers: For each how many numbers it has on this process, and along which dimensions they are added up.
    """

    def __init__(self, params: Sequence[Tensor], numbers: Sequence[tuple[int, Collection[int]]]) -> None:
        self._sums = ShardSums(params, *zip(*numbers, strict=True))
        self.places_of = self._sums.places_of

    def start(self, sums: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Begin to add up this process's parts, passed as (places, values): see :meth:`ShardSums.start`."""
        self._sums.start(self._sums.gathered(sums))

    def finish(self, places: Tensor, parts: Tensor) -> Tensor:
        """Return the sums at ``places``, in shape and dtype of ``parts``, this process's own."""
        total = self._sums.finish()
        assert total is not None
        return total[places].to(parts.dtype).view(parts.shape)


class GradNormReduction:
    """Sums over the gradients of all parameters; one of the processes that have an element counts it.

    Args:
        params: All parameters, some of them sharded.

    Raises:
        ValueError: their meshes have different processes, so that no process group has all of these.
    """

    def __init__(self, params: Sequence[Any]) -> None:
        import torch.distributed as dist

        meshes = [p.device_mesh for p in params if is_sharded(p)]
        members = {tuple(sorted(mesh.mesh.flatten().tolist())) for mesh in meshes}
        if len(members) > 1:
            raise ValueError(
                f"parameters are on meshes of different processes, {' and '.join(map(str, sorted(members)))}: "
                f"no process can decide about all of them: leave max_grad_norm, skip_nonfinite and a GradScaler "
                f"off, or give each mesh's parameters an optimizer of their own"
            )
        mesh = meshes[0]
        self._groups = [mesh.get_group(dim) for dim in range(mesh.ndim) if mesh.size(dim) > 1]
        if len(self._groups) > 1 and mesh.size() == dist.get_world_size():
            self._groups = [dist.group.WORLD]
        self._is_first = not any(mesh.get_coordinate())

    def counts(self, p: Tensor) -> bool:
        """Return whether this process counts its shard of ``p``."""
        return _is_first(p) if is_sharded(p) else self._is_first

    def add_up(self, total: Tensor) -> None:
        """Replace ``total`` by the sum over all processes, without waiting for CUDA devices."""
        import torch.distributed as dist

        for group in self._groups:
            dist.all_reduce(total, group=group)


def _rounds(
    params: Sequence[Any], dims: Sequence[Collection[int]] | None
) -> tuple[set[int], list[tuple[Any, list[int] | None]]]:
    """Return parameters to add up over all processes at once, and process groups with their parameters, in order.

    Parameters are indices; None for all. Which are added up at once, replicas included, depends only on parameters
    that all processes have.
    """
    import torch.distributed as dist

    def rounds_of(members: Iterable[int]) -> list[tuple[Any, list[int]]]:
        rounds: dict[tuple[int, ...], tuple[Any, list[int]]] = {}  # in order of first use
        for i in members:
            p = params[i]
            for mesh, dim in chain.from_iterable(reduced_over(p, d) for d in ([None] if dims is None else dims[i])):
                group = mesh.get_group(dim)
                rounds.setdefault(tuple(dist.get_process_group_ranks(group)), (group, []))[1].append(i)
        return list(rounds.values())

    everywhere = {i for i, p in enumerate(params) if p.device_mesh.size() == dist.get_world_size()}
    chosen, at_once = rounds_of(sorted(everywhere)), set[int]()
    if len(chosen) > 1 and dims is None:
        chosen, at_once = [(dist.group.WORLD, sorted(everywhere))], everywhere
    # Larger meshes first: some of their processes may lack the parameters on smaller ones.
    rest = (i for i in range(len(params)) if i not in everywhere)
    chosen += rounds_of(sorted(rest, key=lambda i: -params[i].device_mesh.size()))
    return at_once, [(group, members if len(members) < len(params) else None) for group, members in chosen]


def _is_first(p: Any) -> bool:
    """Return whether this is the first of the processes with the same shard of ``p``."""
    coordinate, sharded = p.device_mesh.get_coordinate(), [dim for _, dim in reduced_over(p)]
    return all(c == 0 or dim in sharded for dim, c in enumerate(coordinate))
