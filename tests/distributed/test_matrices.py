"""Tests of matrices that travel to one process: against whole ones, in real processes over gloo, and of the plan alone."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch

from gwt_kernels.distributed import matrix_plan
from gwt_kernels.distributed.matrix_plan import FEWEST_BATCHES, OVERLAPPED, Layout, Unit
from gwt_kernels.rules.newton_schulz import WORKSPACE_BYTES, NewtonSchulz
from tests.support import exchanged, forked

BF16 = NewtonSchulz()


def test_shards_equal_whole_matrices() -> None:
    forked.run(4, exchanged.equals_whole)


def test_bits_are_those_of_whole_matrices() -> None:
    forked.run(4, exchanged.bits)


def test_meshes_of_some_processes_in_any_order() -> None:
    forked.run(5, exchanged.some_processes)


def test_models_that_engines_divide() -> None:
    forked.run(4, exchanged.engines)


def test_batches_travel_while_others_are_computed() -> None:
    forked.run(2, exchanged.overlap)


def test_what_cannot_be_gathered_is_refused_on_every_process() -> None:
    forked.run(2, exchanged.refusals)


def test_a_dead_process_ends_the_others() -> None:
    forked.run(2, exchanged.a_dead_process)
