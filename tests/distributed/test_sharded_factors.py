"""Tests that factors of sharded parameters are those of whole ones, in real processes over gloo."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gwt_kernels import GWTAdafactor
from tests.support import forked, sharded_factors


def test_float64_equals_unsharded() -> None:
    forked.run(4, sharded_factors.float64)


def test_kernels_step_shards_as_whole_tensors() -> None:
    forked.run(2, sharded_factors.triton)


def test_checkpoints_move_between_numbers_of_processes(tmp_path: Path) -> None:
    forked.run(2, sharded_factors.checkpoints, tmp_path)


def test_clip_is_no_function_of_sums_over_rows_and_columns() -> None:
    """Check that equal factors have updates of different size, which therefore need a second collective."""
    params = [torch.nn.Parameter(torch.zeros(2, 2, dtype=torch.float64)) for _ in range(2)]
    optimizer = GWTAdafactor(params, lr=1.0, level=0, beta1=None, clip_threshold=1e9)
    squares = torch.tensor([[[2.0, 0.0], [0.0, 2.0]], [[1.0, 1.0], [1.0, 1.0]]], dtype=torch.float64)
    for gradients in (torch.tensor([[1.0, 2.0], [3.0, 7.0]], dtype=torch.float64).expand(2, 2, 2), squares.sqrt()):
        before = [p.detach().clone() for p in params]
        for p, g in zip(params, gradients, strict=True):
            p.grad = g.clone()
        optimizer.step()
    states = [optimizer.state[p] for p in params]
    for key in ("exp_avg_sq_row", "exp_avg_sq_col"):
        torch.testing.assert_close(states[0][key], states[1][key], rtol=1e-14, atol=0)
    sizes = [float((p.detach() - x).norm()) for p, x in zip(params, before, strict=True)]
    assert sizes[0] != pytest.approx(sizes[1], rel=0.05)
