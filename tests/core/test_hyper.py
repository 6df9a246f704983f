"""The factor on the update: Adam's bias correction, exact where rounding would cancel digits."""

from fractions import Fraction

import pytest

from gwt_kernels.functional import Hyper


@pytest.mark.parametrize("step", [1, 2, 10, 1000, 10**6])
@pytest.mark.parametrize(("beta1", "beta2"), [(0.9, 0.999), (0.0, 0.5), (0.5, 0.0), (0.9999, 0.999999)])
def test_step_size_is_exact(beta1, beta2, step):
    """Compare in rational arithmetic, and squared, since a root is irrational."""

    def correction(beta: float) -> Fraction:
        # The exact power of a late step is too long a fraction; its double is exact enough beside 1.
        return 1 - Fraction(beta) ** step if step <= 1000 else 1 - Fraction(beta**step)

    hyper = Hyper(lr=0.02, beta1=beta1, beta2=beta2, scale=0.25)
    squared = Fraction(hyper.lr) ** 2 * correction(beta2) / correction(beta1) ** 2
    assert hyper.step_size(step, 0) ** 2 == pytest.approx(float(squared), rel=1e-14)
    assert hyper.step_size(step, 2) == hyper.step_size(step, 0) * 0.25


def test_the_first_step_undoes_the_decay():
    """Check the step size at t = 1: lr * sqrt(1 - b2) / (1 - b1)."""
    assert Hyper(lr=1.0, beta1=0.75, beta2=0.9375).step_size(1, 0) == pytest.approx(1, rel=1e-15)
    assert Hyper(lr=1.0, beta1=0.75, beta2=0.9375, scale=8.0).step_size(1, 1) == pytest.approx(8, rel=1e-15)
    assert Hyper(lr=0.0).step_size(1, 1) == 0.0
    for step in (1, 10**9):
        assert Hyper(lr=0.5, correct_bias=False).step_size(step, 0) == 0.5
        assert Hyper(lr=0.5, scale=0.25, correct_bias=False).step_size(step, 2) == 0.125


def test_hyper_is_plain_numbers():
    """A NamedTuple, which pickles, compares by value and is immutable."""
    assert Hyper() == Hyper(lr=1e-3)
    with pytest.raises(AttributeError):
        Hyper().lr = 1.0
