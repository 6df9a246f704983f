"""What is added up over processes that share tensors: the limiter's norms, and what gradients decide."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gwt_kernels.core.dtensor import is_sharded
from gwt_kernels.distributed.sharding import reduced_over
from gwt_kernels.rules.limiter import limit_

__all__ = ["GradNormReduction", "LimiterReduction", "ShardSums"]


class ShardSums:
    """Adds up numbers of sharded parameters over the processes that hold their shards.

    Every process makes it of the same parameters in the same order, and takes part in every collective whichever of
    them have gradients there.

    Where all parameters are sharded over the same processes, these alone communicate. Where they are not, all
    processes do at once if every mesh holds all of them, and else one mesh dimension after the other.

    Args:
        params: Sharded over several processes, on one device.
        lengths: How many numbers each of them has; None for one.
    """

    def __init__(self, params: Sequence[Tensor], lengths: Sequence[int] | None = None) -> None:
        self.device = params[0].device
        wide = {torch.promote_types(p.dtype, torch.float32) for p in params}
        self.dtype = torch.float64 if torch.float64 in wide else torch.float32
        lengths = [1] * len(params) if lengths is None else lengths
        self._n = sum(lengths)
        owners = torch.tensor(lengths, dtype=torch.int64, device="cpu")
        owners = torch.arange(len(params), dtype=torch.int64, device="cpu").repeat_interleave(owners)
        self._rounds: list[tuple[Any, Tensor | None]] = []
        for group, members in _rounds(params):
            chosen = None if members is None else torch.isin(owners, torch.tensor(members, device="cpu"))
            self._rounds.append((group, None if chosen is None else chosen.nonzero().view(-1).to(self.device)))
        # For a round of all processes: whose sums this one contributes, as the first that holds such a shard.
        own = torch.tensor([_is_first(p) for p in params], dtype=torch.bool, device="cpu")
        self._own = None if bool(own.all()) else own[owners].to(self.device)
        self._work: Any = None

    def zeros(self) -> Tensor:
        """A vector of the numbers of all."""
        return torch.zeros(self._n, dtype=self.dtype, device=self.device)

    def start(self, vector: Tensor) -> None:
        """Begin to add up the vectors of all processes; nothing waits for the result."""
        import torch.distributed as dist

        self.finish()  # where no parameter had a gradient, nothing has asked for the last step's result
        self._vector = vector
        for group, members in self._rounds:
            self.finish()
            if group is dist.group.WORLD and self._own is not None:
                self._vector = torch.where(self._own, self._vector, 0)
            self._part = self._vector if members is None else self._vector[members]
            self._members = members
            self._work = dist.all_reduce(self._part, group=group, async_op=True)

    def finish(self) -> Tensor | None:
        """The sums that were begun last; None where there are none."""
        if self._work is not None:
            self._work.wait()
            self._work = None
            if self._members is not None:
                self._vector[self._members] = self._part
        return getattr(self, "_vector", None)


class LimiterReduction:
    """Sums of squares of all limited, sharded parameters on one device, and the limiter's divisors from them.

    Args:
        params: All parameters that have a limiter and are sharded over several processes, on one device; as
            :class:`ShardSums` takes them.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        self._place = {id(p): i for i, p in enumerate(params)}
        self._device = params[0].device
        self._sums = ShardSums(params)

    def places_of(self, params: Sequence[Tensor]) -> Tensor:
        """Where the sums of ``params`` lie in the vector of all."""
        return torch.tensor([self._place[id(p)] for p in params], dtype=torch.int64, device=self._device)

    def start(self, sums: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Begin to add up the sums of all processes, given as places and values; nothing waits for the result."""
        vector = self._sums.zeros()
        for places, values in sums:
            vector[places] = values.to(vector.dtype)
        self._sums.start(vector)

    def divisors(
        self, places: Tensor, limiter_norms: Tensor, gammas: Sequence[float], control: Tensor | None
    ) -> Tensor:
        """The limiter's divisors of the parameters at ``places``, all on the device.

        Their norms are replaced, unless ``control`` (see :func:`gwt_kernels.control.control_`) skips the step.
        """
        vector = self._sums.finish()
        assert vector is not None
        norms = vector[places].sqrt().to(limiter_norms.dtype)
        old = limiter_norms.clone()
        limits = limit_(limiter_norms, norms, self._gamma_tensor(tuple(gammas), norms.dtype))
        if control is not None:
            limiter_norms.copy_(torch.where(control[1] > 0, limiter_norms, old))
        return limits

    def _gamma_tensor(self, gammas: tuple[float, ...], dtype: torch.dtype) -> Tensor | float:
        first = gammas[0]
        if gammas.count(first) == len(gammas):
            return first
        return torch.tensor(gammas, dtype=dtype, device="cpu").to(self._device, non_blocking=True)


class GradNormReduction:
    """Sums over the elements of all parameters, each counted by one process of those that hold it.

    Args:
        params: All parameters, some of them sharded.

    Raises:
        ValueError: they lie on meshes of different processes, so that no group of processes has them all.
    """

    def __init__(self, params: Sequence[Any]) -> None:
        import torch.distributed as dist

        meshes = [p.device_mesh for p in params if is_sharded(p)]
        members = {tuple(sorted(mesh.mesh.flatten().tolist())) for mesh in meshes}
        if len(members) > 1:
            raise ValueError(
                f"parameters are on meshes of different processes, {' and '.join(map(str, sorted(members)))}: "
                f"their common gradient norm is not known; leave max_grad_norm and skip_nonfinite off"
            )
        mesh = meshes[0]
        self._groups = [mesh.get_group(dim) for dim in range(mesh.ndim) if mesh.size(dim) > 1]
        if len(self._groups) > 1 and mesh.size() == dist.get_world_size():
            self._groups = [dist.group.WORLD]
        self._is_first = not any(mesh.get_coordinate())

    def counts(self, p: Tensor) -> bool:
        """Whether this process is the one that counts what it holds of ``p``."""
        return _is_first(p) if is_sharded(p) else self._is_first

    def add_up(self, total: Tensor) -> None:
        """Replace ``total`` by the sum over all processes; nothing on the host waits for it on a CUDA device."""
        import torch.distributed as dist

        for group in self._groups:
            dist.all_reduce(total, group=group)


def _rounds(params: Sequence[Any]) -> list[tuple[Any, list[int] | None]]:
    """The groups of processes to reduce over, one after the other, and whose sums (None: everybody's)."""
    import torch.distributed as dist

    rounds: dict[tuple[int, ...], tuple[Any, list[int]]] = {}  # in the order in which parameters first need them
    for i, p in enumerate(params):
        for mesh, dim in reduced_over(p):
            group = mesh.get_group(dim)
            rounds.setdefault(tuple(dist.get_process_group_ranks(group)), (group, []))[1].append(i)
    if len(rounds) > 1 and all(p.device_mesh.size() == dist.get_world_size() for p in params):
        return [(dist.group.WORLD, None)]
    return [(group, members if len(members) < len(params) else None) for group, members in rounds.values()]


def _is_first(p: Any) -> bool:
    """Whether this is the first of the processes that hold the same shard of ``p``."""
    coordinate, sharded = p.device_mesh.get_coordinate(), [dim for _, dim in reduced_over(p)]
    return all(c == 0 or dim in sharded for dim, c in enumerate(coordinate))
