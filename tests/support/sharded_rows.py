"""Runs rows as blocks, and rows that share a second moment, on sharded parameters beside whole ones."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard

from gwt_kernels import GWTAdamMini, GWTAdamW, GWTLion
from tests.support.sharded import COLUMNS, ROWS, WHOLE, close, compare, equal, on_each_number, shard


def rows() -> None:
    """Sharded along their rows they equal whole ones: in float64, and to the bit where rounded at random."""
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
    optimizer = compare(layouts, close, steps=12, groups=groups, lr=1e-2, weight_decay=0.1)
    for p in optimizer.param_groups[0]["params"]:
        assert optimizer.state[p]["exp_avg"].shape == (*p.shape[:-1], 1)
    compare(layouts, close, steps=6, level="row", kind=GWTLion, lr=1e-2)
    compare(layouts, close, steps=12, groups=[{"level": 0}, {"level": 2}, {"level": "row"}], kind=GWTAdamMini)
    compare([((4 * n, 16), line, [ROWS]), ((2, 4, 8), line, [ROWS])], close, steps=6, kind=GWTAdamMini, head_rows=2)
    narrow = {"dtype": torch.bfloat16, "state_dtype": torch.bfloat16, "weight_rounding": "stochastic"}
    two = [x for x in layouts if len(x[0]) == 2]
    compare(two, equal, steps=5, level="row", rule="foam", **narrow)
    compare(two, equal, steps=5, groups=[{"level": 0}, {"level": 1}], kind=GWTAdamMini, **narrow)


def refusals() -> None:
    """What needs the sums of whole rows, or whole heads, is refused by name on every process."""
    on_each_number(_refusals, [2])


def _refusals(n: int, line: DeviceMesh, grid: DeviceMesh | None) -> None:
    columns = shard(torch.zeros(4, 16), line, [COLUMNS])
    with pytest.raises(ValueError, match=r"parameter 0 .*level='row' needs the sums of whole rows: shard its rows"):
        GWTAdamW([columns], level="row")
    with pytest.raises(ValueError, match=r"parameter 0 .*rule='adam_mini' needs the sums of whole rows"):
        GWTAdamMini([columns])
    with pytest.raises(ValueError, match="head_rows=None would need to leave whole heads: use head_rows=1"):
        GWTAdamMini([shard(torch.zeros(4, 16), line, [ROWS])], head_rows=None)
    with pytest.raises(ValueError, match="head_rows=2 would need to leave whole heads"):
        GWTAdamMini([shard(torch.zeros(6, 16), line, [ROWS])], head_rows=2)
    GWTAdamMini([{"params": [columns], "rule": "adamw"}, {"params": [nn.Parameter(torch.zeros(2, 8))]}])
