"""The planner's interface: what each of many processes holds of a plan, sends and waits for."""

from gwt_kernels.planner.bandwidth import parse_seconds
from gwt_kernels.planner.matrix_work import MatrixWork
from gwt_kernels.planner.sharded_plan import Collective, Held, ShardedPlan
from gwt_kernels.planner.sharded_planning import HOST_TIME, LATENCY, LINK_BANDWIDTH, MATRIX_FLOPS, plan_sharded

__all__ = [
    "HOST_TIME",
    "LATENCY",
    "LINK_BANDWIDTH",
    "MATRIX_FLOPS",
    "Collective",
    "Held",
    "MatrixWork",
    "ShardedPlan",
    "parse_seconds",
    "plan_sharded",
]
