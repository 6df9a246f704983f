"""The module by which ``telemetry.read`` is documented."""

from gwt_kernels.optim.telemetry import read

__all__ = ["read"]
