"""Integer and logical instructions, comparisons, selections and moves."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from tests.ptx.forms import Execute, Mask, Operands, elementwise, forms, unknown_halves, vector
from tests.ptx.rounding import bit_length, clamp_integer, quotient, remainder
from tests.ptx.types import BITS, DTYPES, PRED, S32, S64, U32, U64, PtxError

if TYPE_CHECKING:
    from tests.ptx.machine import Machine

INTEGERS = "{s16,u16,s32,u32,s64,u64}"
WIDE = {t: DTYPES[f"{t[0]}{2 * int(t[1:])}"] for t in ("s16", "u16", "s32", "u32")}


def _alike(operands: Operands, kind: str, function: Callable[..., np.ndarray]) -> Execute:
    """Make an element-wise operation whose operands and result have one type."""
    dtype = DTYPES[kind]
    return elementwise(operands, function, dtype, [dtype] * (len(operands.text) - 1))


@forms(f"{{add,sub,min,max}}.{INTEGERS}", "{and,or,xor}.{b16,b32,b64,pred}", f"{{div,rem}}.{INTEGERS}")
def binary(operands: Operands, parts: list[str]) -> Execute:
    function = {
        "add": np.add,
        "sub": np.subtract,
        "min": np.minimum,
        "max": np.maximum,
        "and": np.bitwise_and,
        "or": np.bitwise_or,
        "xor": np.bitwise_xor,
        "div": quotient,
        "rem": remainder,
    }[parts[0]]
    operands.count(3)
    return _alike(operands, parts[1], function)


@forms("{add,sub}.sat.s32")
def saturated(operands: Operands, parts: list[str]) -> Execute:
    function = np.add if parts[0] == "add" else np.subtract
    operands.count(3)
    return _alike(operands, "s32", lambda a, b: clamp_integer(function(a.astype(S64), b), S32))


@forms("{add,addc,sub,subc}.cc.{s32,u32,s64,u64}", "{addc,subc}.{s32,u32,s64,u64}")
def carried(operands: Operands, parts: list[str]) -> Execute:
    """Make a part of a wide sum or difference, from and to the carry or borrow between its parts."""
    dtype = DTYPES[f"u{parts[-1][1:]}"]
    adds, reads, writes = parts[0].startswith("add"), parts[0].endswith("c"), "cc" in parts
    operands.count(3)
    target = operands.target(operands.text[0], dtype)
    a, b = (operands.source(text, dtype) for text in operands.text[1:])
    carry = operands.carry
    operands.sources += [carry] * reads
    operands.targets += [carry] * writes

    def execute(m: Machine, mask: Mask) -> None:
        x, y = m.read(a, dtype, mask), m.read(b, dtype, mask)
        result = x + y if adds else x - y
        left = result < x if adds else x < y
        if reads:
            before = m.read(carry, U32, mask).astype(dtype)
            left = left | (result > ~before if adds else result < before)
            result = result + before if adds else result - before
        m.write(target, result, mask)
        if writes:
            m.write(carry, left.astype(U32), mask)

    return execute


@forms("neg.{s16,s32,s64}", "abs.{s16,s32,s64}", "not.{b16,b32,b64,pred}")
def unary(operands: Operands, parts: list[str]) -> Execute:
    operands.count(2)
    return _alike(operands, parts[1], {"neg": np.negative, "abs": np.abs, "not": np.invert}[parts[0]])


@forms(f"mul.lo.{INTEGERS}")
def multiply(operands: Operands, parts: list[str]) -> Execute:
    operands.count(3)
    return _alike(operands, parts[2], np.multiply)


@forms("mul.hi.{s16,u16,s32,u32}")
def multiply_high(operands: Operands, parts: list[str]) -> Execute:
    dtype, wide = DTYPES[parts[2]], WIDE[parts[2]]
    bits = wide.type(8 * dtype.itemsize)
    operands.count(3)
    return _alike(operands, parts[2], lambda a, b: ((a.astype(wide) * b) >> bits).astype(dtype))


@forms("mul.hi.u64")
def multiply_high_of_64_bits(operands: Operands, parts: list[str]) -> Execute:
    operands.count(3)
    half, low = U64.type(32), U64.type(0xFFFFFFFF)

    def upper(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        (a1, a0), (b1, b0) = (a >> half, a & low), (b >> half, b & low)
        middle = a1 * b0 + (a0 * b0 >> half)
        return a1 * b1 + (middle >> half) + (a0 * b1 + (middle & low) >> half)

    return _alike(operands, "u64", upper)


@forms("mul.wide.{s16,u16,s32,u32}")
def multiply_wide(operands: Operands, parts: list[str]) -> Execute:
    dtype, wide = DTYPES[parts[2]], WIDE[parts[2]]
    return elementwise(operands, lambda a, b: a.astype(wide) * b, wide, [dtype, dtype])


@forms(f"mad.lo.{INTEGERS}")
def multiply_add(operands: Operands, parts: list[str]) -> Execute:
    operands.count(4)
    return _alike(operands, parts[2], lambda a, b, c: a * b + c)


@forms("mad.wide.{s16,u16,s32,u32}")
def multiply_add_wide(operands: Operands, parts: list[str]) -> Execute:
    dtype, wide = DTYPES[parts[2]], WIDE[parts[2]]
    return elementwise(operands, lambda a, b, c: a.astype(wide) * b + c, wide, [dtype, dtype, wide])


@forms("shl.{b16,b32,b64}")
def shift_left(operands: Operands, parts: list[str]) -> Execute:
    dtype = DTYPES[parts[1]]
    bits = np.uint32(8 * dtype.itemsize)

    def shift(a: np.ndarray, n: np.ndarray) -> np.ndarray:
        shifted = a << np.minimum(n, bits - np.uint32(1)).astype(dtype)
        return shifted if (n < bits).all() else np.where(n < bits, shifted, dtype.type(0))

    return elementwise(operands, shift, dtype, [dtype, U32])


@forms("shr.{b16,b32,b64,u16,u32,u64,s16,s32,s64}")
def shift_right(operands: Operands, parts: list[str]) -> Execute:
    """Shift right, arithmetically if the type is signed; a shift by all its bits or more leaves signs or zeros."""
    dtype = DTYPES[parts[1]]
    bits = np.uint32(8 * dtype.itemsize)

    def shift(a: np.ndarray, n: np.ndarray) -> np.ndarray:
        shifted = a >> np.minimum(n, bits - np.uint32(1)).astype(dtype)
        if dtype.kind == "i" or (n < bits).all():
            return shifted
        return np.where(n < bits, shifted, dtype.type(0))

    return elementwise(operands, shift, dtype, [dtype, U32])


@forms("shf.{l,r}.{wrap,clamp}.b32")
def funnel_shift(operands: Operands, parts: list[str]) -> Execute:
    """Return the upper, or lower, half of the 64 bits ``b:a`` shifted left, or right."""
    left, wrap = parts[1] == "l", parts[2] == "wrap"

    def shift(a: np.ndarray, b: np.ndarray, n: np.ndarray) -> np.ndarray:
        n = (n & np.uint32(31) if wrap else np.minimum(n, np.uint32(32))).astype(U64)
        both = (b.astype(U64) << np.uint64(32)) | a
        return ((both << n) >> np.uint64(32) if left else both >> n).astype(U32)

    return elementwise(operands, shift, U32, [U32] * 3)


@forms("bfe.{u32,s32,u64,s64}")
def extract_field(operands: Operands, parts: list[str]) -> Execute:
    """Extract ``c`` bits of ``a`` from bit ``b``, extended with the field's sign if the type is signed."""
    dtype = DTYPES[parts[1]]
    bits = BITS[dtype.itemsize]
    last, one = bits.type(8 * dtype.itemsize - 1), bits.type(1)

    def extract(a: np.ndarray, position: np.ndarray, length: np.ndarray) -> np.ndarray:
        position, length = ((x & np.uint32(255)).astype(bits) for x in (position, length))
        raw = a.view(bits)
        size = np.minimum(length, last + one)
        field = np.where(position > last, bits.type(0), raw >> np.minimum(position, last))
        kept = np.where(size > last, ~bits.type(0), (one << np.minimum(size, last)) - one)
        field = field & kept
        if dtype.kind == "i":
            top = np.where(length > 0, np.minimum(position + length - one, last), last)
            negative = ((raw >> top) & one) != 0
            valid = np.minimum(
                size, np.where(position > last, bits.type(0), last - np.minimum(position, last) + one)
            )
            outside = np.where(valid > last, bits.type(0), ~((one << np.minimum(valid, last)) - one))
            field = np.where(negative & (length > 0), field | outside, field)
        return field.view(dtype)

    return elementwise(operands, extract, dtype, [dtype, U32, U32])


@forms("bfi.{b32,b64}")
def insert_field(operands: Operands, parts: list[str]) -> Execute:
    """Replace ``d`` bits of ``b``, from bit ``c`` on, with the lowest bits of ``a``."""
    dtype = DTYPES[parts[1]]
    last, one = dtype.type(8 * dtype.itemsize - 1), dtype.type(1)

    def insert(a: np.ndarray, b: np.ndarray, position: np.ndarray, length: np.ndarray) -> np.ndarray:
        position, length = ((x & np.uint32(255)).astype(dtype) for x in (position, length))
        ones = np.where(length > last, ~dtype.type(0), (one << np.minimum(length, last)) - one)
        at = np.minimum(position, last)
        field = np.where(position > last, dtype.type(0), ones << at)
        return (b & ~field) | ((a << at) & field)

    return elementwise(operands, insert, dtype, [dtype, dtype, U32, U32])


@forms("lop3.b32")
def logic(operands: Operands, parts: list[str]) -> Execute:
    """Look up a function of three bits: bit ``4 a + 2 b + c`` of the last operand."""
    operands.count(5)
    table = int(operands.text[4], 0)
    operands.text = operands.text[:4]

    def look_up(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
        result = np.zeros(np.broadcast_shapes(a.shape, b.shape, c.shape), U32)
        for i in range(8):
            if table >> i & 1:
                result |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
        return result

    return elementwise(operands, look_up, U32, [U32] * 3)


@forms("{popc,clz}.{b32,b64}")
def count_bits(operands: Operands, parts: list[str]) -> Execute:
    dtype = DTYPES[parts[1]]
    bits = np.uint64(8 * dtype.itemsize)
    if parts[0] == "popc":
        return elementwise(operands, lambda a: np.bitwise_count(a).astype(U32), U32, [dtype])
    return elementwise(operands, lambda a: (bits - bit_length(a)).astype(U32), U32, [dtype])


@forms("prmt.b32")
def permute(operands: Operands, parts: list[str]) -> Execute:
    """Select four bytes of ``b:a``, each by three bits of ``c``; the fourth bit replicates the byte's sign."""

    def choose(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
        both = (b.astype(U64) << np.uint64(32)) | a
        result = np.uint32(0)
        for i in range(4):
            s = (selector >> np.uint32(4 * i)) & np.uint32(15)
            byte = ((both >> (np.uint64(8) * (s & np.uint32(7)))) & np.uint64(255)).astype(U32)
            sign = np.where(byte & np.uint32(128), np.uint32(255), np.uint32(0))
            result = result | (np.where(s & np.uint32(8), sign, byte) << np.uint32(8 * i))
        return result

    return elementwise(operands, choose, U32, [U32] * 3)


_ORDER = {
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "eq": np.equal,
    "ne": np.not_equal,
}


def _isnan(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.isnan(a) | np.isnan(b)


_FLOAT_ORDER: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    **{name: _ORDER[name] for name in ("lt", "le", "gt", "ge", "eq")},
    "ne": lambda a, b: (a != b) & ~_isnan(a, b),
    "num": lambda a, b: ~_isnan(a, b),
    "nan": _isnan,
}
for _name in ("lt", "le", "gt", "ge", "eq", "ne"):
    _FLOAT_ORDER[_name + "u"] = lambda a, b, order=_ORDER[_name]: order(a, b) | _isnan(a, b)


@forms(
    "setp.{eq,ne}.{b16,b32,b64}",
    "setp.{eq,ne,lt,le,gt,ge}.{s16,u16,s32,u32,s64,u64}",
    "setp.{eq,ne,lt,le,gt,ge,equ,neu,ltu,leu,gtu,geu,num,nan}.{f32,f64}",
)
def compare(operands: Operands, parts: list[str]) -> Execute:
    dtype = DTYPES[parts[-1]]
    order = (_FLOAT_ORDER if dtype.kind == "f" else _ORDER)[parts[1]]
    return elementwise(operands, order, PRED, [dtype, dtype])


@forms("selp.{b16,b32,b64,s16,s32,s64,u16,u32,u64,f32,f64}")
def select(operands: Operands, parts: list[str]) -> Execute:
    bits = BITS[DTYPES[parts[1]].itemsize]
    result = elementwise(operands, lambda a, b, p: np.where(p, a, b), bits, [bits, bits, PRED])
    a, b, p = (operands.source(text, t) for text, t in zip(operands.text[1:], (bits, bits, PRED), strict=True))

    def unknown(m: Machine, mask: Mask) -> np.ndarray | None:
        """Return where the selected operand, or the predicate, is unknown."""
        if not any(i in m.unknown for i in (a, b, p)):
            return None
        no = np.zeros((1, 1), np.uint8)
        return np.where(m.raw(p, mask), m.unknown.get(a, no), m.unknown.get(b, no)) | m.unknown.get(p, no)

    operands.unknown = unknown
    return result


@forms("mov.{b16,b32,b64,s16,s32,s64,u16,u32,u64,f32,f64,pred}")
def move(operands: Operands, parts: list[str]) -> Execute:
    operands.count(2)
    target, source = operands.text
    dtype = DTYPES[parts[1]]
    if target.startswith("{"):
        return _unpack(operands, dtype)
    if source.startswith("{"):
        return _pack(operands, dtype)
    bits = dtype if dtype == PRED else BITS[dtype.itemsize]
    d, s = operands.target(target, bits), operands.source(source, dtype)

    operands.unknown = unknown_halves([s])

    def execute(m: Machine, mask: Mask) -> None:
        m.write(d, m.raw(s, mask), mask)

    return execute


def _pieces(names: list[str], dtype: np.dtype) -> np.dtype:
    size, rest = divmod(dtype.itemsize, len(names))
    if rest or size not in BITS or size == dtype.itemsize:
        raise PtxError(f"{len(names)} registers do not make {8 * dtype.itemsize} bits")
    return BITS[size]


def _unpack(operands: Operands, dtype: np.dtype) -> Execute:
    """Split a register into pieces, the lowest first; ``_`` discards one."""
    names = vector(operands.text[0])
    piece = _pieces(names, dtype)
    source = operands.source(operands.text[1], dtype)
    bits = BITS[dtype.itemsize]
    targets = [(i, operands.target(name, piece)) for i, name in enumerate(names) if name != "_"]

    def execute(m: Machine, mask: Mask) -> None:
        x = m.read(source, bits, mask)
        unknown = m.unknown.get(source)
        for i, target in targets:
            m.write(target, (x >> bits.type(8 * piece.itemsize * i)).astype(piece), mask)
            if unknown is not None:
                m.forget([target], unknown >> np.uint8(2 * i // len(names)) & np.uint8(1), mask)

    operands.unknown = lambda m, mask: None  # execute marks each piece
    return execute


def _pack(operands: Operands, dtype: np.dtype) -> Execute:
    names = vector(operands.text[1])
    piece = _pieces(names, dtype)
    bits = BITS[dtype.itemsize]
    target = operands.target(operands.text[0], bits)
    sources = [operands.source(name, piece) for name in names]

    def execute(m: Machine, mask: Mask) -> None:
        result = m.read(sources[0], piece, mask).astype(bits)
        for i, source in enumerate(sources[1:], start=1):
            result = result | (m.read(source, piece, mask).astype(bits) << bits.type(8 * piece.itemsize * i))
        m.write(target, result, mask)

    def unknown(m: Machine, mask: Mask) -> np.ndarray | None:
        found = [
            (m.unknown[source] != 0) * np.uint8(1 << 2 * i // len(names))
            for i, source in enumerate(sources)
            if source in m.unknown
        ]
        return functools.reduce(np.bitwise_or, found) if found else None

    operands.unknown = unknown
    return execute
