"""Compare rows as blocks, and rows that share a second moment, on sharded parameters with those on whole ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard

from gwt_kernels import GWTAdamMini, GWTAdamW, GWTLion, GWTMuon, gwt_param_groups
from tests.ptx import plugin
from tests.support import interpreter, resharded, runs
from tests.support.sharded import (
    COLUMNS,
    ROWS,
    WHOLE,
    Layout,
    close,
    compare,
    equal,
    mesh_of,
    on_each_number,
    shard,
    whole,
)


def rows() -> None:
    """Check that shards of rows equal whole tensors: in float64, and bit for bit with stochastic rounding."""
    on_each_number(_rows, [1, 2])


def _rows(n: int, line: DeviceMesh, grid: DeviceMesh | None) -> None:
    layouts = [
        ((4 * n, 16), line, [ROWS]),
        ((2 * n + 1, 13), line, [ROWS]),  # uneven, of any width
        ((1, 24), line, [ROWS]),  # empty everywhere but on the first process
        ((2, 5, 16), line, [Shard(1)]),
        ((6, 10), line, [WHOLE]),
        ((6, 10), None, []),
    ]
    if grid is not None:
        layouts.append(((10, 24), grid, [Replicate(), ROWS]))
    groups = [
        {"level": "row"},
        {"level": "row", "rule": "foam", "maximize": True},
        {"level": "row", "rule": "foam", "res_scale": 0.5},
    ]
    optimizer = compare(layouts, close, steps=6, groups=groups, lr=1e-2, weight_decay=0.1)
    for p in optimizer.param_groups[0]["params"]:
        assert optimizer.state[p]["exp_avg"].shape == (*p.shape[:-1], 1)
    compare(layouts, close, steps=6, level="row", kind=GWTLion, lr=1e-2)
    compare(layouts, close, steps=6, groups=[{"level": 0}, {"level": 2}, {"level": "row"}], kind=GWTAdamMini)
    compare([((4 * n, 16), line, [ROWS]), ((2, 4, 8), line, [ROWS])], close, steps=6, kind=GWTAdamMini, head_rows=2)
    narrow = {"dtype": torch.bfloat16, "state_dtype": torch.bfloat16, "weight_rounding": "stochastic"}
    two = [x for x in layouts if len(x[0]) == 2]
    compare(two, equal, steps=5, level="row", rule="foam", **narrow)
    compare(two, equal, steps=5, groups=[{"level": 0}, {"level": 1}], kind=GWTAdamMini, **narrow)


def columns() -> None:
    """Check that shards of columns equal whole tensors; every process with a part of a row has its moments."""
    on_each_number(_columns, [1, 2, 3, 4])


def column_layouts(n: int, line: DeviceMesh, grid: DeviceMesh | None) -> list[Layout]:
    """Return every way of sharding rows: even, uneven, and with empty shards on some processes."""
    layouts: list[Layout] = [
        ((3, 8 * n), line, [COLUMNS]),
        ((5, 2 * n + 1), line, [COLUMNS]),
        ((3, 1), line, [COLUMNS]),  # on the first process alone
        ((8, n + 1), line, [COLUMNS]),  # one of four processes has an empty shard
        ((2, 5, 2 * n + 1), line, [Shard(2)]),
        ((2 * n + 1, 13), line, [ROWS]),
        ((6, 10), None, []),
    ]
    if grid is not None:
        layouts += [
            ((10, 23), grid, [WHOLE, COLUMNS]),  # HSDP
            ((11, 31), grid, [ROWS, COLUMNS]),  # FSDP and tensor parallelism
            ((13, 17), grid, [COLUMNS, ROWS]),
            ((1, 17), grid, [ROWS, COLUMNS]),  # rows on half of the processes
            ((13, 15), grid, [COLUMNS, COLUMNS]),
            ((2, 3, 9), grid, [ROWS, Shard(2)]),
        ]
    return layouts


def _columns(n: int, line: DeviceMesh, grid: DeviceMesh | None) -> None:
    layouts = column_layouts(n, line, grid)
    vectors: list[Layout] = [((2 * n + 1,), line, [ROWS]), ((1,), line, [ROWS])]
    groups: list[dict[str, Any]] = [
        {"level": "row"},
        {"level": "row", "norm_growth_limit": None},
        {"level": "row", "rule": "foam", "maximize": True},
        {"level": "row", "rule": "foam", "res_scale": 0.5},
    ]
    options: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1}
    same_everywhere(compare([*layouts, *vectors], close, steps=6, groups=groups, **options), line)
    compare([*layouts, *vectors], close, steps=6, level="row", kind=GWTLion, **options)
    blocks: list[Layout] = [((3, 8 * n), line, [COLUMNS]), ((2, 3, 4 * n), line, [Shard(2)]), ((6, 10), None, [])]
    pairs: list[Layout] = [((3, 4 * n - 2), line, [COLUMNS])] if n > 2 else []  # uneven shards of whole blocks
    for each, levels in ((layouts + vectors, [0, "row"]), (blocks, [1, 2]), (blocks + pairs, [1])):
        made = compare(each, close, steps=6, groups=[{"level": x} for x in levels], kind=GWTAdamMini, **options)
        same_everywhere(made, line)
    for head_rows in (2, None):
        heads: list[Layout] = [((4, 8 * n), line, [COLUMNS]), ((2, 4, 4 * n), line, [Shard(2)])]
        compare(heads, close, steps=6, groups=[{"level": 0}, {"level": 2}], kind=GWTAdamMini, head_rows=head_rows)
    matrices = [x for x in layouts if len(x[0]) > 1]
    muon = compare(matrices, close, steps=6, level="row", kind=GWTMuon, ns_dtype=torch.float64, **options)
    same_everywhere(muon, line)
    everything = [x for x in layouts if x[1] in (None, grid or line)]
    for chosen in ({"rule": "foam"}, {}, {"kind": GWTMuon, "ns_dtype": torch.float64}):
        clipped = compare(everything, close, steps=6, level="row", max_grad_norm=3.0, **options, **chosen)
        assert bool(clipped.grad_norm > 3), "nothing was clipped"


def same_everywhere(optimizer: Any, line: DeviceMesh) -> None:
    """Check that a row's moments and limiter norm have the same bits on every process that holds a part of it."""
    own = []
    for group in optimizer.param_groups:
        of_rows = ["exp_avg_sq"] if group["level"] != "row" else ["exp_avg", "exp_avg_sq", "limiter_norm"]
        for p in group["params"]:
            moments = {k: x for k, x in optimizer.state[p].items() if k in of_rows and isinstance(p, DTensor)}
            for x in moments.values():
                if isinstance(x, DTensor):
                    assert x.shape[-1] == 1
                    assert all(at.is_replicate() or at.dim != p.dim() - 1 for at in x.placements)
            own.append({k: whole(x) for k, x in moments.items()})
    everywhere: list[Any] = [None] * line.size()
    dist.all_gather_object(everywhere, own, group=line.get_group())
    for others in everywhere:
        runs.assert_same_bits(others, own)


def columns_by_kernels() -> None:
    """Check shards of columns by the step in C and Triton's kernels: up to the order of sums, or bit for bit."""
    plugin.begin()
    on_each_number(_columns_by_kernels, [2])


def _columns_by_kernels(n: int, line: DeviceMesh, grid: DeviceMesh | None) -> None:
    layouts: list[Layout] = [
        ((3, 2 * n + 1), line, [COLUMNS]),
        ((2, 1), line, [COLUMNS]),
        ((2, 16 * n), line, [COLUMNS]),  # in accesses of 128 bits
        ((2, 2, 2 * n + 1), line, [Shard(2)]),
        ((3, 5), line, [ROWS]),
        ((2, 9), None, []),
    ]
    blocks: list[Layout] = [((2, 12 * n), line, [COLUMNS]), ((2, 2, 4 * n), line, [Shard(2)])]

    def alike(a: Tensor, b: Tensor, where: str) -> None:
        torch.testing.assert_close(a, b, rtol=2e-5, atol=1e-6, msg=lambda text: f"{where}: {text}")

    options: dict[str, Any] = {"dtype": torch.float32, "lr": 1e-2, "weight_decay": 0.1, "steps": 3}
    groups: list[dict[str, Any]] = [
        {"level": "row"},
        {"level": "row", "rule": "foam", "res_scale": 0.5, "maximize": True},
    ]
    options["whole_by"] = "torch"  # independent of the kernels, and quicker than Triton's interpreter
    with interpreter.like_a_gpu():
        for backend in ("compiled", "triton"):
            options["backend"] = backend
            same_everywhere(compare(layouts, alike, groups=groups, **options), line)
            compare(layouts[:2], alike, level="row", max_grad_norm=1.0, skip_nonfinite=True, **options)
        compare(layouts[:4], alike, level="row", kind=GWTLion, **options)
        compare(layouts[:4], alike, groups=[{"level": 0}, {"level": "row"}], kind=GWTAdamMini, **options)
        same_everywhere(compare(blocks, alike, level=2, kind=GWTAdamMini, **options), line)
        compare(layouts[:4], alike, level="row", kind=GWTMuon, ns_dtype=torch.float32, **options)
    # Sums of whole numbers are exact in any order, so that random bits show.
    narrow: dict[str, Any] = {"dtype": torch.bfloat16, "state_dtype": torch.bfloat16, "lr": 1e-2}
    exact: list[Layout] = [((4, 16), line, [COLUMNS]), ((5, 8), line, [COLUMNS]), ((4, 2), line, [COLUMNS])]
    for backend in ("torch", "compiled", "triton"):
        with whole_gradients(), interpreter.like_a_gpu():
            for rounding in ("stochastic", "split"):
                options = narrow | {"backend": backend, "weight_rounding": rounding, "steps": 3, "level": "row"}
                compare(exact, equal, rule="foam", **options)


def whole_gradients() -> Any:
    """Patch gradients to whole numbers."""

    def give(params: Sequence[Tensor], seed: int, factor: float = 1.0) -> None:
        generator = torch.Generator().manual_seed(seed)
        for p in params:
            p.grad = torch.randint(-4, 5, p.shape, generator=generator).to(p.dtype)

    return mock.patch("tests.support.runs.give_gradients", give)


def checkpoints(folder: Path, *heads: int | None) -> None:
    """Resume a run with split rows on two processes, on four, without shards, and from a gathered state.

    If ``heads`` has a ``head_rows``, it is a run of Adam-mini whose shards of rows split heads.
    """
    pair, four = mesh_of(2), mesh_of(4)

    def build(mesh: DeviceMesh | None) -> resharded.Run:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(24, 16), nn.Tanh(), nn.Linear(16, 8)).double()
        if mesh is not None:
            fully_shard(model, mesh=mesh, shard_placement_fn=lambda p: Shard(0 if heads else p.dim() - 1))
        groups = gwt_param_groups(model, level=1 if heads else "row", include=[r"\d\.weight"])
        if heads:
            return model, GWTAdamMini(groups, lr=1e-2, head_rows=heads[0])
        return model, GWTAdamW(groups, lr=1e-2)

    reference = build(None)
    resharded.train(reference, 0, 5)
    if dist.get_rank() < 2:
        run = build(pair)
        resharded.train(run, 0, 3)
        dcp.save(resharded.state_of(run), checkpoint_id=folder, process_group=pair.get_group())
    dist.barrier()
    resharded.assert_goes_on_with(build, folder, reference, [four, pair])
    alone = build(None)
    resharded.resume(alone, folder)
    resharded.train(alone, 3, 5)
    resharded.assert_continues(alone, reference)
    if dist.get_rank() < 2:
        gathered = get_optimizer_state_dict(*run, options=StateDictOptions(full_state_dict=True))
        weights = get_model_state_dict(run[0])
        again = build(pair)
        set_model_state_dict(again[0], weights)
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=False)
        if dist.get_rank() == 0:
            others: list[Any] = [gathered]
        else:
            others = [None]
        dist.broadcast_object_list(others, src=0, group=pair.get_group())
        set_optimizer_state_dict(*again, others[0], options=options)
        resharded.train(again, 3, 5)
        resharded.assert_continues(again, reference)


def collectives() -> None:
    """Check for one all-reduce per step and group for all rows, one or two numbers each, then for the limiter's."""
    line = mesh_of(2)
    params = [shard(torch.ones(4, 6), line, [COLUMNS]), shard(torch.ones(3, 8), line, [COLUMNS])]
    params += [shard(torch.ones(4, 6), line, [ROWS]), nn.Parameter(torch.ones(4, 6))]
    for rule, expected in (("foam", [14]), ("gwt", [7, 3])):
        optimizer = GWTAdamW(params, level="row", rule=rule)
        for with_gradients in (True, False):
            for p in params:
                p.grad = torch.ones_like(p) if with_gradients or dist.get_rank() else None
            with mock.patch("torch.distributed.all_reduce", wraps=dist.all_reduce) as sent:
                optimizer.step()
            assert [len(call.args[0]) for call in sent.call_args_list] == expected, (rule, with_gradients)
