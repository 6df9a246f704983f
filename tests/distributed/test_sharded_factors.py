"""Tests that factors of sharded parameters are those of whole ones, in real processes over gloo."""

from __future__ import annotations

from tests.support import forked, sharded_factors


def test_float64_equals_unsharded() -> None:
    forked.run(2, sharded_factors.float64)
