"""The module by which ``GradientRelease`` is documented."""

from gwt_kernels.optim.gradient_release import GradientRelease, release_gradients

__all__ = ["GradientRelease", "release_gradients"]
