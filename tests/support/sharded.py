"""Compare optimizers on sharded parameters, in processes that test_sharding.py starts, with those on whole ones."""

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

from gwt_kernels import GWTAdamW, GWTLion, GWTMuon
from tests.ptx import plugin
from tests.support import interpreter, runs

Layout = tuple[Sequence[int], DeviceMesh | None, Sequence[Any]]
"""A parameter's shape, its mesh (None for a whole tensor) and placements."""
ROWS, COLUMNS, WHOLE = Shard(0), Shard(1), Replicate()


def mesh_of(*shape: int) -> DeviceMesh:
    """Return a mesh of the first processes; all processes have to create it, members or not."""
    return DeviceMesh("cpu", torch.arange(math.prod(shape)).view(shape), mesh_dim_names=tuple("abc"[: len(shape)]))


def on_each_number(check: Callable[[int, DeviceMesh, DeviceMesh | None], None], numbers: Sequence[int]) -> None:
    """Call ``check`` for several numbers of processes with their mesh, and one of two dimensions if possible."""
    meshes = {n: (mesh_of(n), mesh_of(2, n // 2) if n % 2 == 0 else None) for n in numbers}
    for n in numbers:
        if dist.get_rank() < n:
            check(n, *meshes[n])
        dist.barrier()


def shard(p: Tensor, mesh: DeviceMesh | None, placements: Sequence[Any] = ()) -> nn.Parameter:
    """Return a parameter of the same values, sharded; without a mesh a whole one."""
    own = p.detach().clone()  # a shard may be a view
    return nn.Parameter(own if mesh is None else distribute_tensor(own, mesh, placements, src_data_rank=None))


def whole(x: Any) -> Any:
    """Gather a tensor."""
    if not isinstance(x, DTensor):
        return x
    return x.full_tensor()


def give(params: Sequence[Tensor], references: Sequence[Tensor], seed: int, factor: float = 1.0) -> None:
    """Give both parameters the same new gradients."""
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
    kind: Callable[..., Any] = GWTAdamW,
    whole_by: str | None = None,
    **options: Any,
) -> Any:
    """Take steps of one optimizer on sharded parameters and of one on whole ones; check all weights and states.

    Each group has a parameter of every layout. ``whole_by`` is the backend for whole ones, if it differs.
    """
    references = runs.parameters([shape for _ in groups for shape, _, _ in layouts], dtype=dtype)
    params = [shard(r, mesh, at) for r, (_, mesh, at) in zip(references, itertools.cycle(layouts))]
    n = len(layouts)
    of_whole = options if whole_by is None else options | {"backend": whole_by}
    both = [
        kind([{"params": own[i * n : i * n + n], **group} for i, group in enumerate(groups)], **how)
        for own, how in ((params, options), (references, of_whole))
    ]
    for t in range(steps):
        # Gradients that grow and shrink activate the limiter at some steps and not at others.
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
    """Return every supported way of sharding over the processes."""
    layouts: list[Layout] = [
        ((4 * world, 16), line, [ROWS]),
        ((2 * world + 1, 13), line, [ROWS]),  # uneven, and rows that are no whole blocks
        ((1, 24), line, [ROWS]),  # empty on all but the first process
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
    """Check that sharded equals unsharded, with and without limiter, under both rules, at all levels."""
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
    optimizer = compare(layouts, close, steps=9, groups=groups, lr=1e-2, weight_decay=0.1)
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
        clipped = compare(everything, close, steps=6, level=2, lr=1e-2, **options)
        assert bool(clipped.grad_norm > 3), "nothing was clipped"
    if n > 2:  # uneven shards of a row, each of whole blocks
        compare([((3, 4 * n - 2), line, [COLUMNS])], close, steps=6, level=1, lr=1e-2)
    if grid is not None:  # a mesh of some processes: sums go over one dimension after the other
        part = [((12, 32), grid, [ROWS, COLUMNS]), ((4, 16), grid, [WHOLE, ROWS]), ((4, 16), grid, [ROWS, WHOLE])]
        with mock.patch("torch.distributed.get_world_size", return_value=n + 1):
            compare(part, close, steps=6, level=2, lr=1e-2)
    # Wavelets that reach beyond a block need whole rows, which row shards have.
    rows = [x for x in layouts if len(x[0]) == 2 and x[2] in ([ROWS], [WHOLE, ROWS], [ROWS, ROWS])]
    compare(rows, close, steps=6, level=2, wavelet="db2", lr=1e-2)
    others = [{"wavelet": "bior2.2"}, {"boundary": "periodic"}, {"wavelet": "db2", "boundary": "symmetric"}]
    compare(rows, close, steps=6, level=2, groups=others, lr=1e-2)
    # Their Haar blocks end at the shard's edge, so that the boundary has no effect.
    columns = [((3, 8 * n), line, [COLUMNS])]
    compare(columns, close, steps=6, level=2, boundary="reflect", lr=1e-2)


def equal(a: Tensor, b: Tensor, where: str) -> None:
    runs.assert_same_bits(a, b, where)


def bits() -> None:
    """Check that stochastic rounding and the whole folded rule are equal bit for bit for every sharding."""
    on_each_number(_bits, [1, 2, 3, 4])


def _bits(n: int, line: DeviceMesh, grid: DeviceMesh | None) -> None:
    layouts: list[Layout] = [
        ((8, 32), line, [ROWS]),
        ((7, 13), line, [ROWS]),  # shards begin at any index of weights and of coefficients
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
    """Check that in float32 only sums over processes depend on the number of processes, in their last bits."""
    on_each_number(_sums, [2, 4])


def _sums(n: int, line: DeviceMesh, grid: DeviceMesh | None) -> None:
    layouts: list[Layout] = [((16, 64), line, [ROWS]), ((13, 37), line, [ROWS]), ((9, 20), None, [])] * 2
    differ: list[bool] = []

    def in_last_bits(a: Tensor, b: Tensor, where: str) -> None:
        differ.append(not torch.equal(a, b))
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=where)

    for options in ({"norm_growth_limit": None}, {"rule": "foam"}):
        compare(layouts, equal, steps=12, dtype=torch.float32, level=2, lr=1e-3, **options)
    for options in ({}, {"rule": "foam", "max_grad_norm": 0.5}):
        compare(layouts, in_last_bits, steps=12, dtype=torch.float32, level=2, lr=1e-3, **options)
        assert any(differ), options
        differ.clear()


def skipping() -> None:
    """Check on Triton, with gradient statistics in the limiter's first pass, that all processes skip or none."""
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
    # A reference on the torch backend is independent of the kernels, and quicker than Triton's interpreter.
    both = [GWTAdamW(params, **options), GWTAdamW(references, **options | {"backend": "torch"})]
    read = mock.Mock(wraps=control_launch.squares)
    for t in range(5):
        runs.give_gradients(references, t, factor=(0.5, 1.0, 4.0)[t % 3])
        if t in (1, 3):  # in one element, on one process, or in the whole tensor, on all processes
            references[0 if t == 1 else -1].grad[-1, -1] = math.nan
        for p, r in zip(params, references, strict=True):
            g = r.grad.clone()
            sharded = isinstance(p, DTensor)
            p.grad = distribute_tensor(g, p.device_mesh, p.placements, src_data_rank=None) if sharded else g
        with interpreter.like_a_gpu(), mock.patch.object(control_launch, "squares", read):
            both[0].step()
        both[1].step()
        assert torch.allclose(both[0].grad_norm, both[1].grad_norm, rtol=1e-6, equal_nan=True), (n, t)
        assert float(both[0].skipped_steps) == float(both[1].skipped_steps) == (t >= 1) + (t >= 3)
    if grid is None or dist.get_rank() == 0:  # the others may hold replicas, which they need not check
        assert not any(g.numel() for call in read.call_args_list for g in call.args[0]), "gradients were read again"
    for p, r, layout in zip(params, references, layouts, strict=True):
        own, expected = both[0].state[p], both[1].state[r]
        assert float(own["step"]) == float(expected["step"]) == 3, layout
        for x, y in [(p.detach(), r.detach()), *((own[key], expected[key]) for key in expected)]:
            torch.testing.assert_close(whole(x), y, rtol=1e-5, atol=1e-6)


def matrices() -> None:
    """Check that Muon and Lion on every number of processes equal those on whole tensors."""
    on_each_number(_matrices, (1, 2, 3, 4))


def _matrices(n: int, line: DeviceMesh, grid: DeviceMesh | None) -> None:
    layouts = layouts_of(n, line, grid)
    experts: list[Layout] = [
        ((2 * n + 1, 5, 8), line, [ROWS]),
        ((2, 5, 8), line, [ROWS]),
        ((3, 4 * n, 8), line, [COLUMNS]),
    ]
    exact: Any = {"lr": 0.02, "ns_dtype": torch.float64, "backend": "torch"}
    for level in (0, 2):
        muon = compare(layouts + experts, close, steps=20 if level else 6, kind=GWTMuon, level=level, **exact)
        assert len(muon.state) == len(layouts) + len(experts)
    level = (0, 2)[n % 2]  # over all numbers of processes, each case below has both levels
    clipped = {"max_grad_norm": 1.0, "skip_nonfinite": True, "nesterov": False}
    compare(layouts, close, steps=4, kind=GWTMuon, level=level, **clipped, **exact)
    # A workspace for a few matrices at a time, so that several batches are exchanged.
    compare(layouts + experts, close, steps=4, kind=GWTMuon, level=level, workspace_bytes=48 << 10, **exact)
    compare(layouts, close, steps=4, kind=GWTLion, level=2 - level, lr=0.02, backend="torch")
    _fused_matrices(n, line, grid, exact)


def _fused_matrices(n: int, line: DeviceMesh, grid: DeviceMesh | None, exact: dict[str, Any]) -> None:
    """Check shards that end within matrices of ``row_splits``, each of which has its own learning-rate factor."""
    rows = 8 * n + 1
    layouts: list[Layout] = [
        ((rows, 4), line, [ROWS]),
        ((rows, 4 * n), line, [COLUMNS]),
        ((rows, 8), line, [WHOLE]),
        ((rows, 4), None, []),
        ((2 * n + 1, rows, 4), line, [ROWS]),
        ((3, rows, 4), line, [COLUMNS]),
    ]
    if grid is not None:
        layouts += [((rows, 8), grid, [ROWS, COLUMNS]), ((rows, 4), grid, [WHOLE, ROWS])]
    for adjust in ("original", "match_rms_adamw"):
        options: dict[str, Any] = {"row_splits": (4 * n + 1, 3 * n, n), "adjust_lr_fn": adjust, "level": 2}
        compare(layouts, close, steps=4, kind=GWTMuon, **options, **exact)
        compare(layouts, close, steps=2, kind=GWTMuon, workspace_bytes=16 << 10, **options, **exact)


def matrix_bits() -> None:
    """Check that Muon's random bits are those of whole tensors, on every number of processes."""
    on_each_number(_matrix_bits, (1, 2, 4))


def _matrix_bits(n: int, line: DeviceMesh, grid: DeviceMesh | None) -> None:
    layouts: list[Layout] = [
        ((8 * n, 64), line, [ROWS]),
        ((4 * n, 36), line, [ROWS]),
        ((2 * n, 8, 64), line, [ROWS]),
    ]
    for rounding in ("stochastic", "split"):
        for moments in (torch.bfloat16, None):
            options: Any = {"weight_rounding": rounding, "state_dtype": moments, "ns_dtype": torch.float32}
            options |= {"steps": 3, "dtype": torch.bfloat16, "kind": GWTMuon, "lr": 0.02, "backend": "torch"}
            compare(layouts, equal, **options)
            fused: list[Layout] = [
                ((8 * n, 4), line, [ROWS])
            ]  # one at a time, since products of a batch may have other bits
            compare(fused, equal, row_splits=(5 * n, 2 * n, n), level=1, **options)
