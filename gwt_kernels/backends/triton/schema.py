"""Columns of the tables that the host packs and kernels read."""

from __future__ import annotations

import triton.language as tl

from gwt_kernels.core.notes import COLUMNS as TELEMETRY


def _indices(columns: tuple[str, ...]) -> list[tl.constexpr]:
    return [tl.constexpr(i) for i in range(len(columns))]


# Addresses of a tensor's arrays, and integers: int64 [columns, n]; only the leading columns that are read are sent.
POINTERS = (
    "p", "g", "m", "v", "norm", "key", "low", "m_scales", "v_scales", "step",
    "weights_first", "weights_run", "weights_pitch", "moments_first", "moments_run", "moments_pitch",
)  # fmt: skip
(
    P_PTR, G_PTR, M_PTR, V_PTR, NORM_PTR, KEY, LOW_PTR, M_SCALES_PTR, V_SCALES_PTR, STEP,
    WEIGHTS_SPAN, _, _, MOMENTS_SPAN, _, _,
) = _indices(POINTERS)  # fmt: skip

# Scalars of a step: float32 [n, columns].
SCALARS = (
    "b1", "rest1", "b2", "rest2", "eps", "decay", "step_size", "gamma", "grad_scale", "taken",
    "detail_scale", "spare",  # an even number, as rows are sent in words of 8 bytes
)  # fmt: skip
B1, REST1, B2, REST2, EPS, DECAY, STEP_SIZE, GAMMA, GRAD_SCALE, TAKEN, DETAIL_SCALE, _ = _indices(SCALARS)
N_SCALARS = tl.constexpr(len(SCALARS))

# Constants from which rows_kernel computes the scalars: float64 [n, columns].
CONSTANTS = ("lr", "b1", "b2", "eps", "weight_decay", "scale", "gamma", "sign", "corrects_bias", "detail_scale")
LR_C, B1_C, B2_C, EPS_C, WEIGHT_DECAY_C, SCALE_C, GAMMA_C, SIGN_C, CORRECTS_BIAS_C, DETAIL_SCALE_C = _indices(
    CONSTANTS
)
N_CONSTANTS = tl.constexpr(len(CONSTANTS))

# Addresses of scalars on the device, sent before the constants: int64 [columns, n].
DEVICE_SCALARS = ("count", "lr")

# Layout of a tensor's tiles: int64 [n, columns]. See tiles.py.
LAYOUT = ("first_program", "n_blocks", "width", "row_blocks", "padded", "reciprocal", "row_length", "first_row")
FIRST_PROGRAM, N_BLOCKS, WIDTH, ROW_BLOCKS, PADDED, RECIPROCAL, ROW_LENGTH, FIRST_ROW = _indices(LAYOUT)
N_LAYOUT = tl.constexpr(len(LAYOUT))

# Record of a tensor whose second moment is factored; its address replaces that of ``v``: int64 [columns].
FACTORS = ("row_gains", "col_gains", "rows", "columns")
ROW_GAINS_PTR, COL_GAINS_PTR, MATRIX_ROWS, MATRIX_COLUMNS = _indices(FACTORS)

# Panels of such a tensor, and positions of its sums, factors, gains and partial sums: int64 [n, columns].
PANELS = (
    "first_program", "rows", "columns", "width", "row_chunks", "col_chunks", "chunk_rows", "row_parts", "col_parts",
    "weight_parts", "first_block", "matrices", "first_matrix", "sums", "row", "col", "row_gains", "col_gains",
)  # fmt: skip
(
    FIRST_PANEL, PANEL_ROWS, PANEL_COLUMNS, PANEL_WIDTH, ROW_CHUNKS, COL_CHUNKS, CHUNK_ROWS, ROW_PARTS, COL_PARTS,
    WEIGHT_PARTS, FIRST_FACTORS, MATRICES, FIRST_MATRIX, SUMS, ROW_PTR, COL_PTR, ROW_GAINS, COL_GAINS,
) = _indices(PANELS)  # fmt: skip
N_PANELS = tl.constexpr(len(PANELS))

# Numbers of such a tensor's step that depend on options only: float64 [n, columns].
FACTOR_NUMBERS = (
    "eps", "clip_threshold", "least_rms", "decay_rate", "largest_rate", "rate_grows", "whole_rows", "whole_columns",
    "whole_moments", "whole_weights",
)  # fmt: skip
(
    FACTOR_EPS, CLIP_THRESHOLD, LEAST_RMS, DECAY_RATE, LARGEST_RATE, RATE_GROWS, WHOLE_ROWS, WHOLE_COLUMNS,
    WHOLE_MOMENTS, WHOLE_WEIGHTS,
) = _indices(FACTOR_NUMBERS)  # fmt: skip
N_FACTOR_NUMBERS = tl.constexpr(len(FACTOR_NUMBERS))

# Telemetry of a tensor: float64 [columns].
DETAILS, APPROXIMATION, UPDATE, LIMIT, NONFINITE, STEPS = _indices(TELEMETRY)
