"""Tests that sharded parameters are updated like whole ones, in real processes over gloo."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.optim import test_added_groups
from tests.support import (
    forked,
    moved_shards,
    resharded,
    sharded,
    sharded_rows,
    split_shards,
    torn_heads,
    unequal,
    wrapped,
)


def test_float64_shards_equal_whole_tensors() -> None:
    forked.run(4, sharded.float64)


def test_sharded_matrices_are_orthogonalised_as_whole_ones() -> None:
    forked.run(4, sharded.matrices)


def test_bits_of_orthogonalised_matrices_do_not_depend_on_the_number_of_processes() -> None:
    forked.run(4, sharded.matrix_bits)


def test_bits_do_not_depend_on_the_number_of_processes() -> None:
    forked.run(4, sharded.bits)


def test_only_sums_over_processes_differ_in_last_bits() -> None:
    forked.run(4, sharded.sums)


def test_bad_batches_are_skipped_by_all_processes() -> None:
    forked.run(4, sharded.skipping)


def test_checkpoints_move_between_numbers_of_processes(tmp_path: Path) -> None:
    forked.run(4, resharded.main, tmp_path)


def test_split_weights_are_gathered_and_resumed_bit_for_bit(tmp_path: Path) -> None:
    forked.run(2, split_shards.main, tmp_path)


def test_replicas_stay_equal_bit_for_bit() -> None:
    forked.run(2, wrapped.replicas)


def test_released_gradients_of_shards_give_the_same_steps() -> None:
    forked.run(2, wrapped.released)


def test_unsupported_shards_are_refused_on_every_process() -> None:
    forked.run(2, wrapped.refusals)


def test_sharded_state_is_the_truth() -> None:
    forked.run(2, moved_shards.main)


def test_parameters_sharded_after_construction() -> None:
    forked.run(1, test_added_groups.sharded_in_place_of_plain)


def test_rows_as_blocks_and_rows_that_share_a_moment_equal_unsharded_ones() -> None:
    forked.run(2, sharded_rows.rows)


def test_rows_that_processes_share_equal_whole_ones() -> None:
    forked.run(4, sharded_rows.columns)


def test_kernels_take_parts_of_rows() -> None:
    forked.run(2, sharded_rows.columns_by_kernels)


@pytest.mark.parametrize("heads", [(), (8,), (None,)], ids=["rows", "heads", "tensors"])
def test_checkpoints_of_shared_rows_move_between_numbers_of_processes(heads: Any, tmp_path: Path) -> None:
    forked.run(4, sharded_rows.checkpoints, tmp_path, *heads)


def test_sums_over_shared_rows_travel_at_once() -> None:
    forked.run(2, sharded_rows.collectives)


def test_heads_that_shards_tear_are_those_of_whole_tensors() -> None:
    forked.run(4, torn_heads.float64)


def test_kernels_take_parts_of_heads() -> None:
    forked.run(2, torn_heads.kernels)


def test_heads_that_fsdp_tears_alone_and_over_tensor_parallelism() -> None:
    forked.run(4, torn_heads.layers)


def test_sums_over_torn_heads_travel_at_once() -> None:
    forked.run(4, torn_heads.collectives)


def test_gradients_whose_squares_overflow_on_torn_heads() -> None:
    forked.run(2, torn_heads.overflowing)


def test_torn_heads_without_a_gradient_on_some_processes() -> None:
    forked.run(3, torn_heads.without_gradients)


def test_matrices_without_a_gradient_on_some_processes() -> None:
    forked.run(4, unequal.matrices)


def test_frozen_parameters_and_gradients_that_come_late() -> None:
    forked.run(2, unequal.frozen)


def test_parameters_that_few_processes_have() -> None:
    forked.run(4, unequal.meshes)
    forked.run(5, unequal.meshes_of_some)
    forked.run(4, unequal.matrices_of_some)


def test_shards_of_shards_are_judged_by_what_each_process_holds() -> None:
    forked.run(4, unequal.strided)


def test_names_of_parameters_that_other_processes_update_are_left_out() -> None:
    forked.run(2, unequal.partitioned)
