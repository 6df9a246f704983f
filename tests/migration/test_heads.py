"""Migrated second moments of heads (rows that share one): all shapes, numbers of rows per head, and levels."""

from __future__ import annotations

import pytest
import torch

from gwt_kernels import GWTAdamMini, GWTAdamW, migrate
from tests.support.runs import parameters, parameters_of, train

SHAPES = ((8, 16), (4, 13), (2, 4, 21), (30,), (0, 16))  # widths that levels divide, and odd ones
NARROW = ((), (4, 0), (4, 1))
LEVELS = pytest.mark.parametrize("level", [0, 1, 3, "row"])


def build(level=0, shapes=SHAPES, **options):
    """Return Adam-mini if ``head_rows`` is given, else GWT-Adam."""
    kind = GWTAdamMini if "head_rows" in options else GWTAdamW
    return kind(parameters(shapes, dtype=torch.float64), level=level, **options)


def run_of(*what, **options):
    optimizer = build(*what, **options)
    train(optimizer, range(4))
    return optimizer


def moved(source, target):
    """Load the migrated state into the target, and return the migration."""
    migration = migrate(source.state_dict(), target)
    target.load_state_dict(migration.state_dict)
    return migration


def squares(optimizer):
    return [optimizer.state[p]["exp_avg_sq"] for p in parameters_of(optimizer)]


def assert_close(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)


@LEVELS
@pytest.mark.parametrize(("old", "new"), [(1, 2), (2, 4), (1, None), (4, None)])
def test_heads_of_whole_heads_are_those_of_a_run_from_the_start(old, new, level):
    taken = build(level, head_rows=new)
    assert moved(run_of(level, head_rows=old), taken).is_exact
    assert_close(squares(taken), squares(run_of(level, head_rows=new)))


@LEVELS
@pytest.mark.parametrize(("old", "new"), [(4, 2), (None, 1), (None, 2)])
def test_parts_of_heads_take_the_second_moment_of_the_whole(old, new, level):
    source, taken, again = run_of(level, head_rows=old), build(level, head_rows=new), build(level, head_rows=old)
    notes = [tensor.notes for tensor in moved(source, taken).tensors]
    assert {each["exp_avg"] for each in notes} == {"exact"}
    assert notes[0]["exp_avg_sq"] == "approximate: spread evenly over its rows"
    assert notes[3]["exp_avg_sq"] == "exact"  # a 1-D tensor
    for whole, parts in zip(squares(source)[:3], squares(taken)[:3], strict=True):
        ways = parts.numel() // whole.numel()
        assert_close([parts.view(-1)], [whole.view(-1).repeat_interleave(ways)])
    assert moved(taken, again).is_exact
    assert_close(squares(again), squares(source))


@pytest.mark.parametrize("level", [1, 3, "row"])
@pytest.mark.parametrize("head_rows", [1, 4, None])
def test_second_moments_come_back_from_a_lower_level(head_rows, level):
    source, lower, again = run_of(level, head_rows=head_rows), *(build(x, head_rows=head_rows) for x in (0, level))
    moved(source, lower)
    moved(lower, again)
    assert_close(squares(again), squares(source))


@LEVELS
@pytest.mark.parametrize("head_rows", [1, 2, 4, None])
def test_adamws_second_moments_become_means_over_heads(head_rows, level):
    adamw, taken, back = run_of(), build(level, head_rows=head_rows), build()
    assert moved(adamw, taken).is_exact == (level == 0)
    if level == 0:
        assert_close(squares(taken), squares(run_of(head_rows=head_rows)))
    assert not moved(taken, back).is_exact
    for v, kept, spread in zip(squares(adamw)[:4], squares(taken)[:4], squares(back)[:4], strict=True):
        means = v.view(kept.numel(), -1).mean(1, keepdim=True)
        assert_close([spread.view(kept.numel(), -1)], [means.expand(-1, v.numel() // kept.numel())])


@pytest.mark.parametrize("head_rows", [1, 4, None])
def test_second_moments_of_heads_become_those_of_another_wavelet(head_rows):
    """Compare with second moments of elements, each of which has its head's."""
    of_heads, elements = run_of(head_rows=head_rows), build()
    moved(of_heads, elements)
    found = [build(2, wavelet="db2") for _ in range(2)]
    for source, target in zip((of_heads, elements), found, strict=True):
        moved(source, target)
    assert_close(*map(squares, found))


@pytest.mark.parametrize("head_rows", [2, None])
def test_tensors_without_rows_or_columns(head_rows):
    adamw, taken, back = run_of(0, NARROW), build(0, NARROW, head_rows=head_rows), build(0, NARROW)
    moved(adamw, taken)
    assert [tuple(v.shape) for v in squares(taken)] == [(), *[(4 // (head_rows or 4), 1)] * 2]
    assert moved(taken, back).tensors[0].notes["exp_avg"].startswith("exact")
    assert_close(squares(back)[:1], squares(adamw)[:1])
    rows = build("row", NARROW[1:], head_rows=head_rows)
    moved(run_of(0, NARROW[1:], head_rows=head_rows), rows)
    assert all(bool(v.isfinite().all()) for v in squares(rows))
