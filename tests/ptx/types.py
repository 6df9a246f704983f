"""PTX's types as NumPy's, and what goes wrong: text that is not understood, and faults of a kernel that runs."""

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
    "bf16": U16,  # NumPy has none: its bits
    "pred": PRED,
}
BITS = {t.itemsize: t for t in (U8, U16, U32, U64)}

NAN16 = np.uint16(0x7FFF)  # of bfloat16 and of float16
NAN = {F32: np.uint32(0x7FFFFFFF), F64: np.uint64(0x7FFFFFFFFFFFFFFF)}
"""The bits of the one NaN that a GPU's arithmetic makes."""


class PtxError(ValueError):
    """PTX that this interpreter does not understand."""


class Fault(Exception):
    """What a GPU would stop at, or leave undefined.

    Attributes:
        threads: Which threads, as booleans ``[programs, threads]`` of the machine; None where the text says it.
    """

    def __init__(self, message: str, threads: np.ndarray | None = None) -> None:
        super().__init__(message)
        self.threads = threads


def bits_of(values: np.ndarray) -> np.ndarray:
    """The bits of a register's values; a NaN that arithmetic has made is a GPU's."""
    if values.dtype.kind != "f":
        return values.view(BITS[values.dtype.itemsize]) if values.dtype != PRED else values
    bits = values.view(BITS[values.dtype.itemsize])
    if np.isnan(np.vdot(values, values)):  # the quickest way to see that there is none: no sum of squares is one
        bits = np.where(np.isnan(values), NAN[values.dtype], bits)
    return bits
