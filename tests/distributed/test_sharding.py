"""Tests that sharded parameters are updated as whole ones, in real processes over gloo."""

from __future__ import annotations

from pathlib import Path

from tests.optim import test_added_groups
from tests.support import forked, moved_shards, resharded, sharded, sharded_rows, split_shards, wrapped


def test_float64_equals_unsharded() -> None:
    forked.run(4, sharded.float64)


def test_bits_do_not_depend_on_the_number_of_processes() -> None:
    forked.run(4, sharded.bits)


def test_what_is_added_up_over_processes_differs_in_its_last_bits_and_nothing_else_does() -> None:
    forked.run(4, sharded.sums)


def test_bad_batches_are_skipped_by_all_processes() -> None:
    forked.run(4, sharded.skipping)


def test_checkpoints_move_between_numbers_of_processes(tmp_path: Path) -> None:
    forked.run(4, resharded.main, tmp_path)


def test_halves_of_weights_are_gathered_and_go_on_to_the_bit(tmp_path: Path) -> None:
    forked.run(2, split_shards.main, tmp_path)


def test_replicas_stay_the_same_to_the_bit() -> None:
    forked.run(2, wrapped.replicas)


def test_what_cannot_be_honoured_is_refused_on_every_process() -> None:
    forked.run(2, wrapped.refusals)


def test_the_state_of_shards_is_the_truth() -> None:
    forked.run(2, moved_shards.main)


def test_parameters_that_are_sharded_after_the_optimizer_is_made() -> None:
    forked.run(1, test_added_groups.sharded_in_place_of_plain)


def test_rows_as_blocks_and_rows_that_share_a_moment_equal_unsharded_ones() -> None:
    forked.run(2, sharded_rows.rows)


def test_rows_that_no_process_holds_are_refused() -> None:
    forked.run(2, sharded_rows.refusals)
