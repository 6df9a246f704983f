"""Names of kernels on the pages."""

from __future__ import annotations

from bench.report.rows import Row
from gwt_kernels.core.level import ROW

NAMES = {
    "step_kernel": "step",
    "row_step_kernel": "step by rows",
    "shared_step_kernel": "step of shared rows",
    "norm_kernel": "norm",
    "row_norm_kernel": "norm by rows",
    "panel_kernel": "sums of panels",
    "dwt_kernel": "Haar",
    "idwt_kernel": "inverse Haar",
}


def kernel_name(row: Row) -> str:
    """Format a kernel's name with its unusual options."""
    kernel = NAMES[row["kernel"]] + (" after limiter" if row["limited"] else "")
    usual = ("gwt", "nearest", None)
    return ", ".join([kernel, *(row[k] for k in ("rule", "rounding") if row.get(k) not in usual)])


def is_usual(row: Row) -> bool:
    """Return whether the page shows a kernel: level 2 or rows, and the usual storage."""
    return row["level"] in (2, ROW) and has_usual_storage(row)


def has_usual_storage(row: Row) -> bool:
    """Return whether a kernel takes bf16 weights, rounded to the nearest, and float32 moments."""
    return (
        row["moments"] in ("fp32", None) and row.get("rounding") in ("nearest", None) and row["weights"] == "bf16"
    )
