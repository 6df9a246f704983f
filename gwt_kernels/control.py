"""The module by which ``control_`` is documented."""

from gwt_kernels.backends.step_decision import control_

__all__ = ["control_"]
