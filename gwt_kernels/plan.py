"""The planner's interface: what a model costs under ``GWTAdamW``, before a byte is allocated."""

from gwt_kernels.planner.bandwidth import measure_bandwidth, parse_bandwidth
from gwt_kernels.planner.plan import Cost, Entry, Plan
from gwt_kernels.planner.planning import plan, predicted_state_bytes

__all__ = ["Cost", "Entry", "Plan", "measure_bandwidth", "parse_bandwidth", "plan", "predicted_state_bytes"]
