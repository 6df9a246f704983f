"""PTX's types as NumPy's, and the errors: PTX that is not understood, and faults of a running kernel."""

from __future__ import annotations

import numpy as np

WARP = 32

U8, U16, U32, U64 = (np.dtype(f"uint{bits}") for bits in (8, 16, 32, 64))
S8, S16, S32, S64 = (np.dtype(f"int{bits}") for bits in (8, 16, 32, 64))
F16, F32, F64 = (np.dtype(f"float{bits}") for bits in (16, 32, 64))
PRED = np.dtype(bool)

DTYPES = {
    **{f"b{8 * t.itemsize}": t for t in (U8, U16, U32, U64)},
    **{f"u{8 * t.itemsize}": t for t in (U8, U16, U32, U64)},
    **{f"s{8 * t.itemsize}": t for t in (S8, S16, S32, S64)},
    **{f"f{8 * t.itemsize}": t for t in (F16, F32, F64)},
    "bf16": U16,  # as bits, since NumPy has no bfloat16
    "pred": PRED,
}
BITS = {t.itemsize: t for t in (U8, U16, U32, U64)}

NAN16 = np.uint16(0x7FFF)  # of bfloat16 and of float16
NAN = {F32: np.uint32(0x7FFFFFFF), F64: np.uint64(0x7FFFFFFFFFFFFFFF)}
"""The bits of the only NaN that a GPU's arithmetic returns."""


class PtxError(ValueError):
    """PTX that this interpreter does not understand."""


class Fault(Exception):
    """An error, or undefined behaviour, of a kernel on a GPU.

    Attributes:
        threads: Mask ``[programs, threads]`` of the threads at fault; None if unknown, or named in the message.
    """

    def __init__(self, message: str, threads: np.ndarray | None = None) -> None:
        super().__init__(message)
        self.threads = threads


def bits_of(values: np.ndarray) -> np.ndarray:
    """Return the bits of a register's values, with a GPU's NaN for the host's."""
    if values.dtype.kind != "f":
        return values.view(BITS[values.dtype.itemsize]) if values.dtype != PRED else values
    bits = values.view(BITS[values.dtype.itemsize])
    if np.isnan(np.vdot(values, values)):  # the quickest check: a sum of squares is NaN only if a value is
        bits = np.where(np.isnan(values), NAN[values.dtype], bits)
    return bits
