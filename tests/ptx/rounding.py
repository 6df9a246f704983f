"""Arithmetic that NumPy lacks: fused multiply-add, bfloat16, rounding towards zero, saturation."""

from __future__ import annotations

import ctypes
import ctypes.util
import zlib

import numpy as np

from tests.ptx.types import BITS, F16, F32, F64, NAN16, S64, U16, U32, U64

_HALF = np.uint64(1 << 28)  # the low bits of a float64 halfway between two float32
_BEYOND = np.uint64((1 << 29) - 1)
_SMALLEST = 2.0**-126  # the smallest normal float32
_fma = ctypes.CDLL(ctypes.util.find_library("m")).fma
_fma.argtypes, _fma.restype = [ctypes.c_double] * 3, ctypes.c_double
_FUSED = np.frompyfunc(_fma, 3, 1)


def fma32(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Return ``a * b + c`` in float32, rounded once.

    The product is exact in float64. Rounding the sum to float64 and then to float32 errs only if the first rounding
    reaches a point halfway between two float32 numbers. Such sums, and subnormal ones, are first rounded to odd.
    """
    product = a.astype(F64) * b
    total = product + c
    result = total.astype(F32)
    halfway = (total.view(U64) & _BEYOND) == _HALF
    if halfway.any() or np.abs(result).min() < _SMALLEST:
        halfway |= (np.abs(total) < _SMALLEST) & (total != 0)
        product, addend = (np.broadcast_to(x, total.shape)[halfway] for x in (product, c))
        result[halfway] = _to_odd(product, addend.astype(F64)).astype(F32)
    return result


def _to_odd(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return ``a + b`` in float64 rounded to odd: to the neighbour whose last bit is 1, unless it is exact.

    Rounding that again, to at most 51 bits, gives the sum rounded once.
    """
    total = a + b
    other = total - a
    error = (a - (total - other)) + (b - other)
    bits = total.view(U64)
    inexact = np.isfinite(error) & (error != 0) & (bits & np.uint64(1) == 0)
    outwards = (error > 0) == (total > 0)
    moved = np.where(outwards, bits + np.uint64(1), bits - np.uint64(1))
    return np.where(inexact, moved, bits).view(F64)


def fma64(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Return ``a * b + c`` in float64, rounded once, by the C library, one element at a time."""
    return _FUSED(a, b, c).astype(F64)


def flush(x: np.ndarray) -> np.ndarray:
    """Replace subnormal float32 by zeros of their sign, as ``.ftz`` does."""
    return np.where(np.abs(x) < F32.type(_SMALLEST), np.copysign(F32.type(0), x), x) if x.dtype == F32 else x


def saturate_unit(x: np.ndarray) -> np.ndarray:
    """Clamp to [0, 1], NaN to 0: ``.sat`` of a float."""
    return np.where(np.isnan(x), x.dtype.type(0), np.clip(x, 0, 1)) + x.dtype.type(0)  # + 0 makes -0 positive


def to_bf16(x: np.ndarray, nearest: bool = True) -> np.ndarray:
    """Return the bits of float32 rounded to bfloat16, to nearest even or towards zero."""
    raw = x.view(U32)
    if nearest:
        raw = raw + (np.uint32(0x7FFF) + ((raw >> np.uint32(16)) & np.uint32(1)))
    return np.where(np.isnan(x), NAN16, (raw >> np.uint32(16)).astype(U16))


def to_f16(x: np.ndarray, nearest: bool = True) -> np.ndarray:
    """Return the bits of float32 rounded to float16, to nearest even or towards zero."""
    half = x.astype(F16)
    bits = half.view(U16)
    if not nearest:
        bits = np.where(np.abs(half.astype(F32)) > np.abs(x), bits - np.uint16(1), bits)
    return np.where(np.isnan(x), NAN16, bits)


def from_bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(U32) << np.uint32(16)).view(F32)


def to_f32(x: np.ndarray, nearest: bool = True) -> np.ndarray:
    """Round float64 to float32, to nearest even or towards zero."""
    result = x.astype(F32)
    if not nearest:
        outside = np.abs(result.astype(F64)) > np.abs(x)
        result = np.where(outside, (result.view(U32) - np.uint32(1)).view(F32), result)
    return result


def integer_to_float(x: np.ndarray, dtype: np.dtype, nearest: bool = True) -> np.ndarray:
    """Convert an integer to a float, rounded once; for rounding towards zero, drop bits that do not fit first."""
    if nearest:
        return x.astype(dtype)
    kept = np.uint64(np.finfo(dtype).nmant + 1)
    magnitude = np.where(x < 0, np.uint64(0) - x.astype(U64), x.astype(U64))
    length = bit_length(magnitude)
    drop = np.where(length > kept, length - kept, np.uint64(0))
    result = ((magnitude >> drop) << drop).astype(dtype)
    return np.where(x < 0, -result, result)


def bit_length(x: np.ndarray) -> np.ndarray:
    """Return the number of an integer's bits, without leading zeros, as uint64."""
    x = x.astype(U64)
    for shift in (1, 2, 4, 8, 16, 32):
        x = x | (x >> np.uint64(shift))
    return np.bitwise_count(x).astype(U64)


def float_to_integer(x: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Convert a float without fraction to an integer, clamped to the type's range, NaN to 0."""
    low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
    x = x.astype(F64)
    above, below = x >= float(high), x <= float(low)
    result = np.where(np.isnan(x) | above | below, 0.0, x).astype(dtype)
    return np.where(above, dtype.type(high), np.where(below, dtype.type(low), result))


def clamp_integer(x: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Convert an integer to another type, clamped to its range: ``.sat`` of a conversion."""
    info, own = np.iinfo(dtype), np.iinfo(x.dtype)
    low, high = max(info.min, own.min), min(info.max, own.max)
    return np.clip(x, x.dtype.type(low), x.dtype.type(high)).astype(dtype)


def quotient(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Divide integers towards zero; PTX does not specify a division by zero, which gives all ones here."""
    zero = b == 0
    b = np.where(zero, b.dtype.type(1), b)
    if a.dtype.kind == "u":
        result = a // b
    else:
        result = a // b
        result = result + ((result * b != a) & ((a < 0) != (b < 0)))
    return np.where(zero, ~a.dtype.type(0), result).astype(a.dtype)


def remainder(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the remainder of ``a / b``, with the sign of ``a``; ``a`` if ``b`` is zero."""
    zero = b == 0
    return np.where(zero, a, np.fmod(a, np.where(zero, b.dtype.type(1), b)))


def errors(seed: int, name: str, size: int, *values: np.ndarray) -> np.ndarray:
    """Return errors from ``-size`` to ``size``, by a hash of the seed, the instruction's name and its operands."""
    state = np.uint64((seed << 32 | zlib.crc32(name.encode())) & 0xFFFFFFFFFFFFFFFF)
    for x in values:
        state = _mixed(x.view(BITS[x.dtype.itemsize]).astype(U64) ^ state)
    return (state % np.uint64(2 * size + 1)).astype(S64) - size


def _mixed(x: np.ndarray) -> np.ndarray:
    """Hash ``x`` with the finalizer of SplitMix64: every bit of the result depends on every bit of ``x``."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def disturbed(x: np.ndarray, off: np.ndarray) -> np.ndarray:
    """Move float32 by ``off`` units in the last place; numbers below 2**-125, infinities and NaN stay."""
    moved = (x.view(U32) + off.astype(U32)).view(F32)
    movable = np.isfinite(x) & (np.abs(x) >= F32.type(2 * _SMALLEST)) & np.isfinite(moved)
    return np.where(movable, moved, x)
