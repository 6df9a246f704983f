"""Tests that factors of sharded parameters are those of whole ones, in real processes over gloo."""

from __future__ import annotations

from pathlib import Path

from tests.support import forked, sharded_factors


def test_float64_equals_unsharded() -> None:
    forked.run(4, sharded_factors.float64)


def test_kernels_step_shards_as_whole_tensors() -> None:
    forked.run(2, sharded_factors.triton)


def test_checkpoints_move_between_numbers_of_processes(tmp_path: Path) -> None:
    forked.run(2, sharded_factors.checkpoints, tmp_path)
