"""Adam with moments on the wavelet approximation of each gradient (GWT), fused into one pass per step."""

from gwt_kernels import haar_operators as _haar_operators  # noqa: F401 - registers them
from gwt_kernels.haar import haar_dwt, haar_idwt
from gwt_kernels.migration import migrate
from gwt_kernels.optimizer import GWTAdamW
from gwt_kernels.param_groups import gwt_param_groups
from gwt_kernels.release import release_gradients

__version__ = "0.1.0"

__all__ = ["GWTAdamW", "__version__", "gwt_param_groups", "haar_dwt", "haar_idwt", "migrate", "release_gradients"]
