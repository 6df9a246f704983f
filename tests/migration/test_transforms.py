"""Migrated states between wavelets, boundaries and kinds of bias correction, against runs from the start."""

from __future__ import annotations

import pytest

from gwt_kernels import migrate
from tests.migration.test_states import assert_close, build, entries, loaded, of_adamw, run_of
from tests.support.runs import assert_same_bits, parameters_of, results


@pytest.mark.parametrize(
    "kind",
    [
        {"wavelet": "bior2.2"},
        {"wavelet": "rbio1.3", "boundary": "periodic"},
        {"wavelet": "db2", "boundary": "symmetric"},
        {"boundary": "reflect"},
    ],
    ids=str,
)
def test_deeper_levels_continue_the_same_transform(kind):
    shapes = [(3, 40), (2, 29)]
    whole = run_of(shapes=shapes, level=3, **kind)
    for source in (of_adamw(shapes=shapes), *(run_of(shapes=shapes, level=k, **kind) for k in (1, 2))):
        taken = loaded(source.state_dict(), build(shapes, level=3, **kind))
        assert_close(entries(taken, "exp_avg"), entries(whole, "exp_avg"))
        assert all((v >= 0).all() for v in entries(taken, "exp_avg_sq"))
    migration = migrate(whole.state_dict(), build(shapes, level=3, **kind))
    assert migration.is_exact
    assert_same_bits(migration.state_dict["state"], whole.state_dict()["state"])
    boundary = kind.get("boundary", "zero")
    assert ("boundary" in str(migration)) == (boundary != "zero")


def test_boundary_is_irrelevant_for_rows_of_whole_blocks():
    shapes, odd = [(3, 40), (2, 8)], [(3, 40), (2, 6)]
    for old, new in (("zero", "reflect"), ("symmetric", "zero"), ("periodic", "constant")):
        source = run_of(shapes=shapes, level=2, boundary=old)
        migration = migrate(source.state_dict(), build(shapes, level=2, boundary=new))
        assert migration.is_exact
        taken = build(shapes, level=2, boundary=new)
        taken.load_state_dict(migration.state_dict)
        assert_same_bits(results(taken)["state"], results(source)["state"])
        for source in (
            run_of(shapes=odd, level=2, boundary=old),
            run_of(shapes=[(3, 40), (2, 5)], level=1, boundary=old),
        ):
            build_odd = build([tuple(p.shape) for p in parameters_of(source)], level=2, boundary=new)
            with pytest.raises(ValueError, match="build the optimizer with the state's wavelet and boundary"):
                migrate(source.state_dict(), build_odd)
    # One level of whole blocks, the next one with rows that continue beyond their ends.
    whole = run_of(shapes=odd, level=2, boundary="reflect")
    taken = loaded(run_of(shapes=odd, level=1).state_dict(), build(odd, level=2, boundary="reflect"))
    assert_close(entries(taken, "exp_avg"), entries(whole, "exp_avg"))
    folded = run_of(shapes=odd, level=1, rule="foam").state_dict()  # averages of block means, not of coefficients
    taken = loaded(folded, build(odd, level=2, boundary="reflect"))
    assert_close(entries(taken, "exp_avg"), entries(whole, "exp_avg"))


@pytest.mark.parametrize("level", [0, 2])
def test_bias_correction_does_not_change_the_moments(level):
    source = run_of(level=level)
    migration = migrate(source.state_dict(), build(level=level, correct_bias=False))
    assert migration.is_exact
    taken = build(level=level, correct_bias=False)
    taken.load_state_dict(migration.state_dict)
    assert_same_bits(results(taken)["state"], results(source)["state"])
    assert taken.param_groups[0]["correct_bias"] is False


def test_a_state_of_an_older_version_has_zero_boundaries():
    """Check such a state against optimizers of any boundary."""
    source = run_of(shapes=[(3, 13)], level=2).state_dict()
    for group in source["param_groups"]:
        del group["boundary"], group["correct_bias"]
    assert migrate(source, build([(3, 13)], level=2)).is_exact
    with pytest.raises(ValueError, match="gwt level 2, float64, of which those of gwt level 2, reflect boundary"):
        migrate(source, build([(3, 13)], level=2, boundary="reflect"))
