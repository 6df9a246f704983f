"""Conversions between types: widths, signs, roundings and saturation."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from tests.ptx import rounding
from tests.ptx.forms import Execute, Mask, Operands, elementwise, forms
from tests.ptx.types import BITS, DTYPES, F32, U32

if TYPE_CHECKING:
    from tests.ptx.machine import Machine

INTEGERS = "{s8,u8,s16,u16,s32,u32,s64,u64}"
WHOLE = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def _convert(operands: Operands, target: str, source: str, function: Callable[[np.ndarray], np.ndarray]) -> Execute:
    """Make ``d = function(a)``; a register wider than its type holds the value in its lower bits.

    A result narrower than its register is sign-extended if its type is signed, else zero-extended.
    """
    operands.count(2)
    to, of = DTYPES[target], DTYPES[source]
    d = operands.target(operands.text[0], to, wider=True)
    s = operands.source(operands.text[1], of, wider=True)
    register, given = operands.widths[d], operands.widths[s]
    bits = BITS[of.itemsize]

    def execute(m: Machine, mask: Mask) -> None:
        x = m.read(s, given, mask)
        if given.itemsize != of.itemsize:
            x = x.astype(bits)
        result = function(x.view(of))
        if result.dtype.itemsize != register.itemsize:
            result = result.astype(register)
        m.write(d, result, mask)

    return execute


@forms(f"cvt{{,.sat}}.{INTEGERS}.{INTEGERS}")
def integer(operands: Operands, parts: list[str]) -> Execute:
    dtype = DTYPES[parts[-2]]
    if "sat" in parts:
        return _convert(operands, parts[-2], parts[-1], lambda x: rounding.clamp_integer(x, dtype))
    return _convert(operands, parts[-2], parts[-1], lambda x: x.astype(dtype))


@forms(f"cvt.{{rn,rz}}.{{f32,f64}}.{INTEGERS}")
def from_integer(operands: Operands, parts: list[str]) -> Execute:
    dtype, nearest = DTYPES[parts[-2]], parts[1] == "rn"
    return _convert(operands, parts[-2], parts[-1], lambda x: rounding.integer_to_float(x, dtype, nearest))


@forms(
    f"cvt.{{rni,rzi,rmi,rpi}}{{,.ftz}}{{,.sat}}.{INTEGERS}.{{f32,f64}}", f"cvt.{{rni,rzi,rmi,rpi}}.{INTEGERS}.f16"
)
def to_integer(operands: Operands, parts: list[str]) -> Execute:
    """Convert floats to integers, clamped with and without ``.sat``; a NaN becomes 0."""
    dtype, whole, flushed = DTYPES[parts[-2]], WHOLE[parts[1]], "ftz" in parts

    def convert(x: np.ndarray) -> np.ndarray:
        return rounding.float_to_integer(whole(rounding.flush(x) if flushed else x), dtype)

    return _convert(operands, parts[-2], parts[-1], convert)


@forms("cvt.{rni,rzi,rmi,rpi}{,.ftz}{,.sat}.f32.f32", "cvt.{rni,rzi,rmi,rpi}{,.sat}.f64.f64")
def to_whole(operands: Operands, parts: list[str]) -> Execute:
    whole, flushed, saturated = WHOLE[parts[1]], "ftz" in parts, "sat" in parts

    def convert(x: np.ndarray) -> np.ndarray:
        result = whole(rounding.flush(x) if flushed else x)
        return rounding.saturate_unit(result) if saturated else result

    return _convert(operands, parts[-2], parts[-1], convert)


@forms("cvt{,.ftz}{,.sat}.f32.f32", "cvt{,.ftz}{,.sat}.f64.f32", "cvt{,.sat}.f64.f64")
def wider(operands: Operands, parts: list[str]) -> Execute:
    dtype, flushed, saturated = DTYPES[parts[-2]], "ftz" in parts, "sat" in parts

    def convert(x: np.ndarray) -> np.ndarray:
        result = (rounding.flush(x) if flushed else x).astype(dtype)
        return rounding.saturate_unit(result) if saturated else result

    return _convert(operands, parts[-2], parts[-1], convert)


@forms("cvt.{f32,f64}.{f16,bf16}")
def from_half(operands: Operands, parts: list[str]) -> Execute:
    dtype = DTYPES[parts[1]]
    widen = rounding.from_bf16 if parts[2] == "bf16" else lambda x: x.astype(F32)
    return _convert(operands, parts[1], parts[2], lambda x: widen(x).astype(dtype))


@forms("cvt.{rn,rz}{,.ftz}{,.sat}.f32.f64")
def narrower(operands: Operands, parts: list[str]) -> Execute:
    nearest, flushed, saturated = parts[1] == "rn", "ftz" in parts, "sat" in parts

    def convert(x: np.ndarray) -> np.ndarray:
        result = rounding.to_f32(x, nearest)
        result = rounding.flush(result) if flushed else result
        return rounding.saturate_unit(result) if saturated else result

    return _convert(operands, "f32", "f64", convert)


NARROW = {"bf16": rounding.to_bf16, "f16": rounding.to_f16}


@forms("cvt.{rn,rz}.{bf16,f16}.f32")
def to_half(operands: Operands, parts: list[str]) -> Execute:
    narrow, nearest = NARROW[parts[2]], parts[1] == "rn"
    return _convert(operands, "b16", "f32", lambda x: narrow(x, nearest))


@forms("cvt.{rn,rz}.{bf16x2,f16x2}.f32")
def to_halves(operands: Operands, parts: list[str]) -> Execute:
    """Convert two operands into the halves of one register, the first into the upper half."""
    narrow, nearest = NARROW[parts[2][:-2]], parts[1] == "rn"

    def convert(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (narrow(a, nearest).astype(U32) << np.uint32(16)) | narrow(b, nearest)

    return elementwise(operands, convert, U32, [F32, F32])
