"""Tests ``level="row"``, one block a row: every backend against the C oracle, and the optimizer that keeps it."""

from __future__ import annotations

import pytest
import torch

from tests.support.poisoned import LAYOUTS
from tests.support.steps import Bucket
from tests.test_functional import HYPER, OPTIONS, backends, combinations, on, rules

# Rows of one element and of few, odd and long ones, of many tiles of a kernel; many dimensions; nothing at all.
SHAPES = [(4, 32), (3, 37), (33,), (2, 3, 64), (2, 1, 2, 35), (0, 40), (5, 1), (2, 3000), (3, 1025), (1, 1024)]


@rules
@combinations
def test_steps_of_rows_follow_the_oracle(backend, dtype, rule):
    """From the first step on, with new gradients each time, and a spike that the limiter meets at step 3."""
    bucket = Bucket(SHAPES, "row", dtype=dtype, rule=rule, limited=rule == "gwt", first=True, device=on(backend))
    workspace = {}
    for t, size in enumerate((1.0, 0.5, 30.0), start=1):
        bucket.renew_gradients(size)
        bucket.check_step(HYPER, t, backend=backend, workspace=workspace)


@pytest.mark.parametrize("layout", LAYOUTS)
@rules
@combinations
def test_layouts_of_rows(backend, dtype, rule, layout):
    bucket = Bucket(
        [(4, 32), (3, 37), (5, 2, 16)], "row", dtype=dtype, layouts=[layout], rule=rule, limited=rule == "gwt",
        device=on(backend),
    )  # fmt: skip
    for t in (3, 4):
        bucket.check_step(HYPER, t, backend=backend)


@pytest.mark.parametrize("option", OPTIONS)
@rules
@backends
def test_options_of_rows(backend, rule, option):
    limited = rule == "gwt"
    if "growth" in option and not limited:
        pytest.skip("the folded rule has no limiter")
    bucket = Bucket([(3, 40), (3, 37)], "row", rule=rule, limited=limited, device=on(backend))
    for t, size in enumerate((1.0, 8.0), start=5):
        bucket.renew_gradients(size)
        bucket.check_step(OPTIONS[option], t, backend=backend)


@backends
def test_details_of_rows_are_scaled(backend):
    bucket = Bucket([(3, 40), (3, 37)], "row", rule="foam", device=on(backend))
    bucket.check_step(HYPER._replace(detail_scale=0.3), 4, backend=backend)


@pytest.mark.parametrize("moment_dtype", [torch.bfloat16, torch.float16])
@rules
@backends
def test_narrow_moments_of_rows(backend, rule, moment_dtype):
    bucket = Bucket(
        [(4, 32), (3, 37)], "row", rule=rule, moment_dtype=moment_dtype, limited=rule == "gwt", device=on(backend)
    )
    for t in (1, 2):
        bucket.check_step(HYPER, t, backend=backend)


@backends
def test_the_comparison_notices_another_level(backend):
    """Control."""
    bucket = Bucket([(4, 32)], "row", device=on(backend))
    with pytest.raises(AssertionError, match=r"params of tensor 0, .*: [0-9]+ of 128 elements are wrong"):
        bucket.check_step(HYPER, 3, backend=backend, rule="foam")
