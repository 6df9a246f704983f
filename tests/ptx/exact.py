"""Exact numbers rounded to floats with Python's integers only, as a reference for the interpreter's arithmetic."""

from __future__ import annotations

import math
import struct
from fractions import Fraction
from typing import NamedTuple


class Format(NamedTuple):
    """Bits of the exponent and of the fraction of a float."""

    exponent: int
    fraction: int

    @property
    def bias(self) -> int:
        return (1 << self.exponent - 1) - 1

    @property
    def infinity(self) -> int:
        return ((1 << self.exponent) - 1) << self.fraction

    @property
    def sign(self) -> int:
        return 1 << self.exponent + self.fraction

    @property
    def nan(self) -> int:
        return self.sign - 1


FORMATS = {"f16": Format(5, 10), "bf16": Format(8, 7), "f32": Format(8, 23), "f64": Format(11, 52)}


def value(bits: int, kind: str) -> Fraction | float:
    """Return the exact number that bits represent; an infinity or a NaN as a Python float."""
    f = FORMATS[kind]
    negative, rest = bool(bits & f.sign), bits & f.sign - 1
    exponent, fraction = rest >> f.fraction, rest & (1 << f.fraction) - 1
    if exponent == (1 << f.exponent) - 1:
        return math.nan if fraction else (-math.inf if negative else math.inf)
    whole = fraction + (1 << f.fraction if exponent else 0)
    number = whole * Fraction(2) ** (max(exponent, 1) - f.bias - f.fraction)
    return -number if negative else number


def rounded(x: Fraction | float, kind: str, how: str = "rn", *, negative_zero: bool = False) -> int:
    """Return the bits of a number rounded to a float: to nearest even (``"rn"``), otherwise towards zero."""
    f = FORMATS[kind]
    if isinstance(x, float):
        if math.isnan(x):
            return f.nan
        return f.infinity | (f.sign if x < 0 else 0)
    sign = f.sign if x < 0 or (x == 0 and negative_zero) else 0
    x = abs(x)
    if x == 0:
        return sign
    exponent = x.numerator.bit_length() - x.denominator.bit_length()
    exponent -= x < Fraction(2) ** exponent  # so that 2**exponent <= x < 2**(exponent + 1)
    unit = Fraction(2) ** (max(exponent, 1 - f.bias) - f.fraction)
    whole, rest = divmod(x, unit)
    if how == "rn":
        whole += rest * 2 > unit or (rest * 2 == unit and whole & 1)
    scaled = max(exponent + f.bias, 1) - 1  # a carry, or the leading bit of a normal number, adds one to it
    bits = (scaled << f.fraction) + int(whole)
    if bits >= f.infinity:
        bits = f.infinity if how == "rn" else f.infinity - 1
    return sign | bits


def to_bits(x: float, kind: str) -> int:
    """Return the bits of a Python float that is exact in float32 or float64."""
    return int.from_bytes(struct.pack(">f" if kind == "f32" else ">d", x))
