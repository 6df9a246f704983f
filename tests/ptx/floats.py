"""Floating-point arithmetic in float32 and float64: rounded to nearest, or approximate with a documented error."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from tests.ptx.forms import Execute, Mask, Operands, elementwise, forms, unknown_halves
from tests.ptx.rounding import disturbed, errors, flush, fma32, fma64, from_bf16, saturate_unit
from tests.ptx.types import DTYPES, F16, F32, F64, U16, U32, U64, PtxError, bits_of

if TYPE_CHECKING:
    from tests.ptx.machine import Machine

Function = Callable[..., np.ndarray]
_SMALLEST64 = 2.0**-1022  # the smallest normal float64


def _exact(operands: Operands, parts: list[str], function: Function, n: int) -> Execute:
    """Make a correctly rounded operation of ``n`` operands, with the modifiers of its form."""
    dtype = DTYPES[parts[-1]]
    flushed, saturated = "ftz" in parts, "sat" in parts

    def modified(*values: np.ndarray) -> np.ndarray:
        result = function(*map(flush, values)) if flushed else function(*values)
        result = flush(result) if flushed else result
        return saturate_unit(result) if saturated else result

    return elementwise(operands, modified if flushed or saturated else function, dtype, [dtype] * n)


@forms("{add,sub,mul}{,.rn}{,.ftz}{,.sat}.f32", "{add,sub,mul}{,.rn}.f64")
def arithmetic(operands: Operands, parts: list[str]) -> Execute:
    return _exact(operands, parts, {"add": np.add, "sub": np.subtract, "mul": np.multiply}[parts[0]], 2)


@forms("fma.rn{,.ftz}{,.sat}.f32", "fma.rn.f64")
def fused(operands: Operands, parts: list[str]) -> Execute:
    return _exact(operands, parts, fma32 if parts[-1] == "f32" else fma64, 3)


@forms("{add,sub}{,.rn}.f32.{f16,bf16}", "fma.rn.f32.{f16,bf16}")
def mixed(operands: Operands, parts: list[str]) -> Execute:
    """Compute in mixed precision, as sm_100 does: all operands but the last have 16 bits."""
    widen = from_bf16 if parts[-1] == "bf16" else lambda x: x.view(F16).astype(F32)
    if parts[0] == "fma":
        return elementwise(operands, lambda a, b, c: fma32(widen(a), widen(b), c), F32, [U16, U16, F32])
    function = np.add if parts[0] == "add" else np.subtract
    return elementwise(operands, lambda a, c: function(widen(a), c), F32, [U16, F32])


@forms("{add,sub,mul,fma}{,.rn}{,.ftz}.f32x2")
def packed(operands: Operands, parts: list[str]) -> Execute:
    """Compute with two float32 in each 64-bit register, as sm_100 does."""
    n = 3 if parts[0] == "fma" else 2
    function = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "fma": fma32}[parts[0]]
    flushed = "ftz" in parts

    def both(*values: np.ndarray) -> np.ndarray:
        pairs = [np.ascontiguousarray(x).view(F32).reshape(*x.shape, 2) for x in values]
        result = function(*map(flush, pairs)) if flushed else function(*pairs)
        bits = np.ascontiguousarray(bits_of(flush(result) if flushed else result))
        return bits.view(U64).reshape(bits.shape[:-1])

    result = elementwise(operands, both, U64, [U64] * n)
    operands.unknown = unknown_halves(operands.sources)
    return result


@forms("div.rn{,.ftz}.f32", "div.rn.f64")
def divide(operands: Operands, parts: list[str]) -> Execute:
    return _exact(operands, parts, np.divide, 2)


def _inverse(x: np.ndarray) -> np.ndarray:
    return np.divide(x.dtype.type(1), x)


@forms("{sqrt,rcp}.rn{,.ftz}.f32", "{sqrt,rcp}.rn.f64")
def root(operands: Operands, parts: list[str]) -> Execute:
    return _exact(operands, parts, np.sqrt if parts[0] == "sqrt" else _inverse, 1)


def _lesser(a: np.ndarray, b: np.ndarray, a_first: np.ndarray) -> np.ndarray:
    """Return ``a`` where ``a_first`` holds or ``b`` is NaN, else ``b``: of a NaN and a number, the number."""
    return np.where(np.isnan(b) | a_first, a, b)


def _minimum(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return _lesser(a, b, (a < b) | ((a == b) & np.signbit(a)))


def _maximum(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return _lesser(a, b, (a > b) | ((a == b) & ~np.signbit(a)))


@forms("{min,max}{,.ftz}{,.NaN}.f32", "{min,max}.f64")
def extreme(operands: Operands, parts: list[str]) -> Execute:
    """Compute the minimum or maximum of two or three; NaN are ignored without ``.NaN``; -0 is less than 0."""
    n = len(operands.text) - 1
    if n not in (2, 3):
        raise PtxError("two or three operands are expected")
    of_two = _minimum if parts[0] == "min" else _maximum

    def function(*values: np.ndarray) -> np.ndarray:
        return functools.reduce(of_two, values)

    if "NaN" not in parts:
        return _exact(operands, parts, function, n)

    def propagating(*values: np.ndarray) -> np.ndarray:
        missing = functools.reduce(np.logical_or, map(np.isnan, values))
        return np.where(missing, F32.type(np.nan), function(*values))

    return _exact(operands, parts, propagating, n)


@forms("{neg,abs}{,.ftz}.f32", "{neg,abs}.f64")
def sign(operands: Operands, parts: list[str]) -> Execute:
    return _exact(operands, parts, np.negative if parts[0] == "neg" else np.abs, 1)


def _double(function: Function) -> Function:
    """Return a function that computes in float64 and rounds to float32."""
    return lambda *values: function(*[x.astype(F64) for x in values]).astype(F32)


def _divide_approximately(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Divide; a finite divisor above 2**126 in magnitude gives 0, or NaN for an infinite dividend."""
    huge = (np.abs(b) > F32.type(2.0**126)) & np.isfinite(b)
    zero = np.where(np.isinf(a), F32.type(np.nan), np.copysign(F32.type(0), np.sign(a) * np.sign(b)))
    return np.where(huge, zero, np.divide(a, b))


_APPROXIMATIONS: dict[str, tuple[Function, int]] = {
    "div.full": (np.divide, 2),
    "div.approx": (_divide_approximately, 2),
    "sqrt.approx": (np.sqrt, 1),
    "rcp.approx": (_inverse, 1),
    "rsqrt.approx": (_double(lambda x: 1 / np.sqrt(x)), 1),
    "ex2.approx": (_double(np.exp2), 2),
    "lg2.approx": (_double(np.log2), 1),
}
"""The exact function, and the documented bound on the error, in units in the last place."""


@forms("{div.full,div.approx,sqrt.approx,rcp.approx,rsqrt.approx,ex2.approx,lg2.approx}{,.ftz}.f32")
def approximate(operands: Operands, parts: list[str]) -> Execute:
    """Compute the rounded result, with errors within the documented bound if the machine has ``disturb``."""
    function, ulps = _APPROXIMATIONS[".".join(parts[:2])]
    flushed = "ftz" in parts
    n = 2 if parts[0] == "div" else 1
    operands.count(n + 1)
    target = operands.target(operands.text[0], F32)
    sources = [operands.source(text, F32) for text in operands.text[1:]]

    def execute(m: Machine, mask: Mask) -> None:
        values = [m.read(i, F32, mask) for i in sources]
        values = list(map(flush, values)) if flushed else values
        result = function(*values)
        if m.disturb is not None:
            result = disturbed(result, errors(m.disturb, parts[0], ulps, *values))
        m.write(target, flush(result) if flushed else result, mask)

    return execute


@forms("{rcp,rsqrt}.approx.ftz.f64")
def approximate_double(operands: Operands, parts: list[str]) -> Execute:
    """Compute the upper 32 bits of the result from the operand's upper 32 bits; the lower bits are 0."""
    operands.count(2)
    target, source = operands.target(operands.text[0], F64), operands.source(operands.text[1], F64)
    upper = np.uint64(0xFFFFFFFF << 32)

    def execute(m: Machine, mask: Mask) -> None:
        x = (m.read(source, U64, mask) & upper).view(F64)
        x = np.where(np.abs(x) < _SMALLEST64, np.copysign(0.0, x), x)
        exact = 1 / (x if parts[0] == "rcp" else np.sqrt(x))
        result = exact.view(U64)
        if m.disturb is not None:
            off = errors(m.disturb, parts[0], 1, x).astype(U64) << np.uint64(32)
            result = np.where(np.isfinite(exact) & (np.abs(exact) > 2 * _SMALLEST64), result + off, result)
        result = (result & upper).view(F64)
        m.write(target, np.where(np.abs(result) < _SMALLEST64, np.copysign(0.0, result), result), mask)

    return execute


@forms("copysign.{f32,f64}")
def copy_sign(operands: Operands, parts: list[str]) -> Execute:
    """Combine the magnitude of the second operand with the sign of the first."""
    dtype = DTYPES[parts[1]]
    bits = U32 if dtype == F32 else U64
    top = bits.type(1 << (8 * bits.itemsize - 1))
    return elementwise(operands, lambda a, b: (a & top) | (b & ~top), bits, [bits, bits])
