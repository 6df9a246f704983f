"""Runs GWTAdamW on sharded parameters, in processes that test_sharding.py starts, beside the whole ones."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from gwt_kernels import GWTAdamW
from gwt_kernels.optim.base import PlannedOptimizer
from tests.ptx import plugin
from tests.support import interpreter, runs

Layout = tuple[Sequence[int], DeviceMesh | None, Sequence[Any]]
"""A parameter's shape, its mesh (None for a whole tensor) and placements."""
ROWS, COLUMNS, WHOLE = Shard(0), Shard(1), Replicate()


def mesh_of(*shape: int) -> DeviceMesh:
    """A mesh of the first processes; all processes have to make it, those that do not belong to it too."""
    return DeviceMesh("cpu", torch.arange(math.prod(shape)).view(shape), mesh_dim_names=tuple("abc"[: len(shape)]))


def on_each_number(check: Callable[[int, DeviceMesh, DeviceMesh | None], None], numbers: Sequence[int]) -> None:
    """``check`` with so many of the processes at hand, their mesh, and one of two dimensions where there is one."""
    meshes = {n: (mesh_of(n), mesh_of(2, n // 2) if n % 2 == 0 else None) for n in numbers}
    for n in numbers:
        if dist.get_rank() < n:
            check(n, *meshes[n])
        dist.barrier()


def shard(p: Tensor, mesh: DeviceMesh | None, placements: Sequence[Any] = ()) -> nn.Parameter:
    """A parameter of the same values, sharded; without a mesh a whole one."""
    own = p.detach().clone()  # a shard may be a view
    return nn.Parameter(own if mesh is None else distribute_tensor(own, mesh, placements, src_data_rank=None))


def whole(x: Any) -> Any:
    """All of a tensor, wherever its parts are."""
    if not isinstance(x, DTensor):
        return x
    return x.full_tensor()


def give(params: Sequence[Tensor], references: Sequence[Tensor], seed: int, factor: float = 1.0) -> None:
    """The same new gradients to both."""
    runs.give_gradients(references, seed, factor)
    for p, r in zip(params, references, strict=True):
        g = r.grad.clone()
        if isinstance(p, DTensor):
            g = distribute_tensor(g, p.device_mesh, p.placements, src_data_rank=None)
        p.grad = g


def compare(
    layouts: Sequence[Layout],
    check: Callable[[Any, Any, str], None],
    *,
    steps: int,
    dtype: torch.dtype = torch.float64,
    groups: Sequence[dict[str, Any]] = ({},),
    kind: Callable[..., PlannedOptimizer] = GWTAdamW,
    **options: Any,
) -> PlannedOptimizer:
    """Steps of one optimizer on sharded parameters and of one on whole ones, then a look at all their numbers.

    Parameters of every layout are in every one of the groups.
    """
    references = runs.parameters([shape for _ in groups for shape, _, _ in layouts], dtype=dtype)
    params = [shard(r, mesh, at) for r, (_, mesh, at) in zip(references, itertools.cycle(layouts))]
    n = len(layouts)
    both = [
        kind([{"params": own[i * n : i * n + n], **group} for i, group in enumerate(groups)], **options)
        for own in (params, references)
    ]
    for t in range(steps):
        # Gradients that grow and shrink let the limiter act at some steps and not at others.
        give(params, references, t, factor=(0.5, 1.0, 4.0)[t % 3])
        for optimizer in both:
            optimizer.step()
    for i, (p, r) in enumerate(zip(params, references, strict=True)):
        where = f"parameter {i}, {layouts[i % n]}"
        check(whole(p.detach()), r.detach(), where)
        own, expected = both[0].state[p], both[1].state[r]
        assert list(own) == list(expected), where
        for key in own:
            assert own[key].shape == expected[key].shape, (where, key)
            check(whole(own[key]), expected[key], f"{where}: {key}")
    return both[0]


def close(a: Tensor, b: Tensor, where: str) -> None:
    """Raise AssertionError unless equal to 1e-12, relative to the largest element."""
    assert a.dtype == b.dtype == torch.float64, where
    error, size = (a - b).abs().max().item(), b.abs().max().item()
    assert error <= 1e-12 * size, f"{where}: off by {error} of {size}"


def layouts_of(world: int, line: DeviceMesh, grid: DeviceMesh | None) -> list[Layout]:
    """Every way of sharding that the processes allow."""
    layouts: list[Layout] = [
        ((4 * world, 16), line, [ROWS]),
        ((2 * world + 1, 13), line, [ROWS]),  # uneven, and rows that are no whole blocks
        ((1, 24), line, [ROWS]),  # empty everywhere but on the first process
        ((3, 8 * world), line, [COLUMNS]),
        ((2, 5, 16), line, [COLUMNS]),  # a dimension in the middle
        ((6, 10), line, [WHOLE]),
        ((6, 10), None, []),
    ]
    if grid is not None:
        layouts += [
            ((10, 24), grid, [WHOLE, ROWS]),  # HSDP
            ((12, 32), grid, [ROWS, COLUMNS]),  # FSDP and tensor parallelism
            ((13, 16), grid, [ROWS, ROWS]),
        ]
    return layouts


def float64() -> None:
    """Sharded equals unsharded, with and without limiter, under both rules, transformed or not."""
    on_each_number(_float64, [2, 3, 4])


def _float64(n: int, line: DeviceMesh, grid: DeviceMesh | None) -> None:
    layouts = layouts_of(n, line, grid)
    groups = [
        {"level": 2},
        {"level": 1, "norm_growth_limit": None},
        {"level": 3, "rule": "foam", "norm_growth_limit": None, "maximize": True},
        {"level": 0, "lr": 3e-3},
        {"level": 1, "correct_bias": False, "boundary": "zero"},
    ]
    optimizer = compare(layouts, close, steps=50, groups=groups, lr=1e-2, weight_decay=0.1)
    for group, p in ((g, p) for g in optimizer.param_groups for p in g["params"]):
        m = optimizer.state[p]["exp_avg"]
        assert isinstance(m, DTensor) == isinstance(p, DTensor)
        if isinstance(p, DTensor):
            assert (m.device_mesh, m.placements) == (p.device_mesh, p.placements)
            assert m.shape == (*p.shape[:-1], -(-p.shape[-1] // 2 ** group["level"]))
    norms = [optimizer.state[p]["limiter_norm"] for p in optimizer.param_groups[0]["params"]]
    everywhere: list[Any] = [None] * n
    dist.all_gather_object(everywhere, norms, group=line.get_group())
    for others in everywhere:
        runs.assert_same_bits(others, norms)
    everything = [x for x in layouts if x[1] in (None, grid or line)]  # no common norm over different meshes
    for options in ({"max_grad_norm": 3.0}, {"skip_nonfinite": True}, {"max_grad_norm": 2.0, "rule": "foam"}):
        clipped = compare(everything, close, steps=10, level=2, lr=1e-2, **options)
        assert bool(clipped.grad_norm > 3), "nothing was clipped"
    if n > 2:  # uneven shards of a row, each of whole blocks
        compare([((3, 4 * n - 2), line, [COLUMNS])], close, steps=10, level=1, lr=1e-2)
    if grid is not None:  # a mesh that is a part of all processes: one dimension after the other
        part = [((12, 32), grid, [ROWS, COLUMNS]), ((4, 16), grid, [WHOLE, ROWS]), ((4, 16), grid, [ROWS, WHOLE])]
        with mock.patch("torch.distributed.get_world_size", return_value=n + 1):
            compare(part, close, steps=10, level=2, lr=1e-2)
    # Wavelets that reach over the edges of blocks need whole rows, which row shards have.
    rows = [x for x in layouts if len(x[0]) == 2 and x[2] in ([ROWS], [WHOLE, ROWS], [ROWS, ROWS])]
    compare(rows, close, steps=10, level=2, wavelet="db2", lr=1e-2)
    others = [{"wavelet": "bior2.2"}, {"boundary": "periodic"}, {"wavelet": "db2", "boundary": "symmetric"}]
    compare(rows, close, steps=10, level=2, groups=others, lr=1e-2)
    # No Haar block of theirs reaches beyond a shard's edge, so that the boundary has nothing to say.
    columns = [((3, 8 * n), line, [COLUMNS])]
    compare(columns, close, steps=10, level=2, boundary="reflect", lr=1e-2)


def equal(a: Tensor, b: Tensor, where: str) -> None:
    runs.assert_same_bits(a, b, where)


def bits() -> None:
    """What is rounded at random, and all of the folded rule, is the same to the bit however it is sharded."""
    on_each_number(_bits, [1, 2, 3, 4])


def _bits(n: int, line: DeviceMesh, grid: DeviceMesh | None) -> None:
    layouts: list[Layout] = [
        ((8, 32), line, [ROWS]),
        ((7, 13), line, [ROWS]),  # shards begin at any index, of weights and of coefficients
        ((5, 9), line, [ROWS]),
        ((1, 64), line, [ROWS]),
        ((3, 24 * n), line, [COLUMNS]),
        ((2, 5, 24), line, [COLUMNS]),
        ((3, 3, 8 * n), line, [Shard(2)]),
        ((9, 20), line, [WHOLE]),
        ((9, 20), None, []),
    ]
    if grid is not None:
        layouts += [
            ((10, 32), grid, [WHOLE, ROWS]),
            ((12, 32), grid, [ROWS, COLUMNS]),
            ((14, 12), grid, [ROWS, ROWS]),
        ]
    groups: list[dict[str, Any]] = [
        {"level": 2},
        {"level": 2, "state_dtype": torch.bfloat16},
        {"level": 0, "state_dtype": torch.bfloat16},
        {"level": 3, "state_dtype": torch.bfloat16, "weight_rounding": "split"},
    ]
    compare(
        layouts,
        equal,
        steps=8,
        dtype=torch.bfloat16,
        groups=groups,
        rule="foam",
        weight_rounding="stochastic",
        lr=1e-2,
        weight_decay=0.1,
    )
    quantized = [((4 * n, 128), line, [ROWS]), ((8 * n, 512), line, [ROWS]), ((9, 20), None, [])]
    compare(quantized, equal, steps=3, dtype=torch.bfloat16, rule="foam", state_dtype=torch.int8)


def sums() -> None:
    """In float32 what is added up over processes depends on their number, in its last bits; nothing else does."""
    on_each_number(_sums, [2, 4])


def _sums(n: int, line: DeviceMesh, grid: DeviceMesh | None) -> None:
    layouts: list[Layout] = [((16, 64), line, [ROWS]), ((13, 37), line, [ROWS]), ((9, 20), None, [])] * 2
    differ: list[bool] = []

    def in_last_bits(a: Tensor, b: Tensor, where: str) -> None:
        differ.append(not torch.equal(a, b))
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=where)

    for options in ({"norm_growth_limit": None}, {"rule": "foam"}):
        compare(layouts, equal, steps=30, dtype=torch.float32, level=2, lr=1e-3, **options)
    for options in ({}, {"rule": "foam", "max_grad_norm": 0.5}):
        compare(layouts, in_last_bits, steps=30, dtype=torch.float32, level=2, lr=1e-3, **options)
        assert any(differ), options
        differ.clear()


def skipping() -> None:
    """On Triton, where the limiter's first pass looks at the gradients: all processes skip, or none does."""
    plugin.begin()
    on_each_number(_skipping, [1, 2, 4])


def _skipping(n: int, line: DeviceMesh, grid: DeviceMesh | None) -> None:
    from gwt_kernels.backends.triton import control_launch

    layouts: list[Layout] = [((4 * n, 16), line, [ROWS]), ((2 * n + 1, 13), line, [ROWS]), ((1, 24), line, [ROWS])]
    if grid is not None:
        layouts = [((10, 24), grid, [WHOLE, ROWS]), ((12, 32), grid, [ROWS, COLUMNS])]
    layouts.append(((6, 10), None, []))
    references = runs.parameters([shape for shape, _, _ in layouts])
    params = [shard(r, mesh, at) for r, (_, mesh, at) in zip(references, layouts, strict=True)]
    options: dict[str, Any] = {"lr": 0.01, "level": 2, "backend": "triton", "skip_nonfinite": True}
    both = [GWTAdamW(own, **options) for own in (params, references)]
    read = mock.Mock(wraps=control_launch.squares)
    for t in range(7):
        runs.give_gradients(references, t, factor=(0.5, 1.0, 4.0)[t % 3])
        if t in (1, 4):  # in one element, which one process has, or in the whole tensor's, which all have
            references[0 if t == 1 else -1].grad[-1, -1] = math.nan
        for p, r in zip(params, references, strict=True):
            g = r.grad.clone()
            sharded = isinstance(p, DTensor)
            p.grad = distribute_tensor(g, p.device_mesh, p.placements, src_data_rank=None) if sharded else g
        with interpreter.like_a_gpu(), mock.patch.object(control_launch, "squares", read):
            both[0].step()
        with interpreter.like_a_gpu():
            both[1].step()
        assert torch.allclose(both[0].grad_norm, both[1].grad_norm, rtol=1e-6, equal_nan=True), (n, t)
        assert float(both[0].skipped_steps) == float(both[1].skipped_steps) == (t >= 1) + (t >= 4)
    if grid is None or dist.get_rank() == 0:  # the others may hold replicas, which they need not look at
        assert not any(g.numel() for call in read.call_args_list for g in call.args[0]), "gradients were read again"
    for p, r, layout in zip(params, references, layouts, strict=True):
        own, expected = both[0].state[p], both[1].state[r]
        assert float(own["step"]) == float(expected["step"]) == 5, layout
        for x, y in [(p.detach(), r.detach()), *((own[key], expected[key]) for key in expected)]:
            torch.testing.assert_close(whole(x), y, rtol=1e-5, atol=1e-6)
