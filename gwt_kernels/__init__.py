"""Adam with moments on the wavelet approximation of each gradient (GWT), fused into one pass per step."""

from gwt_kernels.haar import operators as _haar_operators  # noqa: F401 - registers them
from gwt_kernels.haar.transform import haar_dwt, haar_idwt
from gwt_kernels.migration.states import migrate
from gwt_kernels.optim.adafactor import GWTAdafactor
from gwt_kernels.optim.adam_mini import GWTAdamMini
from gwt_kernels.optim.adamw import GWTAdamW
from gwt_kernels.optim.gradient_release import release_gradients
from gwt_kernels.optim.lion import GWTLion
from gwt_kernels.optim.muon import GWTMuon
from gwt_kernels.optim.param_groups import gwt_param_groups

__version__ = "0.1.0"

__all__ = [
    "GWTAdafactor",
    "GWTAdamMini",
    "GWTAdamW",
    "GWTLion",
    "GWTMuon",
    "__version__",
    "gwt_param_groups",
    "haar_dwt",
    "haar_idwt",
    "migrate",
    "release_gradients",
]
