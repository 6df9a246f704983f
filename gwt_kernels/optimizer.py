"""The module by which older pickles know ``GWTAdamW``."""

from gwt_kernels.optim.adamw import GWTAdamW

__all__ = ["GWTAdamW"]
