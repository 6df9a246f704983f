"""Tests integer, logical, comparison and move instructions against Python's own integers."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator

import pytest
import torch

from tests.ptx.forms import expand
from tests.ptx.running import apply, execute, kernel

TYPES = ("s16", "u16", "s32", "u32", "s64", "u64")


def limits(kind: str) -> tuple[int, int]:
    bits = int(kind[1:])
    return (-(1 << bits - 1), (1 << bits - 1) - 1) if kind[0] == "s" else (0, (1 << bits) - 1)


def wrap(x: int, kind: str) -> int:
    """Return an integer wrapped to a type's range."""
    low, high = limits(kind)
    return (x - low) % (high - low + 1) + low


def samples(kind: str) -> list[int]:
    low, high = limits(kind)
    return sorted({low, low + 1, -7 if low else 7, -2 if low else 2, 0, 1, 3, 100, high // 3, high - 1, high})


def pairs(kind: str) -> Iterator[tuple[int, int]]:
    return ((a, b) for a in samples(kind) for b in samples(kind))


def check(
    form: str, kinds: list[str], result: str, rows: list[tuple[int, ...]], expected: Callable[..., int]
) -> None:
    columns = list(zip(*rows, strict=True))
    got = apply(form, list(zip(kinds, columns, strict=True)), result)
    assert got.tolist() == [expected(*row) for row in rows], form


def quotient(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


BINARY: dict[str, Callable[[int, int], int]] = {
    "add": operator.add,
    "sub": operator.sub,
    "min": min,
    "max": max,
    "mul.lo": operator.mul,
    "div": quotient,
    "rem": lambda a, b: a - b * quotient(a, b),
}


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("name", BINARY)
def test_arithmetic(name: str, kind: str) -> None:
    rows = [row for row in pairs(kind) if row[1] or name not in ("div", "rem")]
    check(f"{name}.{kind}", [kind, kind], kind, rows, lambda a, b: wrap(BINARY[name](a, b), kind))


@pytest.mark.parametrize(
    ("form", "kind", "a", "b", "expected"),
    [
        ("add.s32", "s32", 2147483647, 1, -2147483648),
        ("add.u32", "u32", 4294967295, 2, 1),
        ("sub.s16", "s16", -32768, 1, 32767),
        ("sub.u64", "u64", 0, 1, 18446744073709551615),
        ("min.s32", "s32", -1, 1, -1),
        ("min.u32", "u32", -1, 1, 1),
        ("max.s64", "s64", -1, 1, 1),
        ("max.u64", "u64", -1, 1, 18446744073709551615),
        ("mul.lo.s32", "s32", 65536, 65537, 65536),
        ("mul.hi.u32", "u32", 4294967295, 4294967295, 4294967294),
        ("mul.hi.s32", "s32", -1, 1, -1),
        ("mul.hi.u64", "u64", -1, -1, 18446744073709551614),
        ("mul.hi.u64", "u64", 1 << 33, 3 << 32, 6),
        ("div.s32", "s32", -7, 2, -3),
        ("div.u32", "u32", -7, 2, 2147483644),
        ("rem.s32", "s32", -7, 2, -1),
        ("add.sat.s32", "s32", 2147483647, 1, 2147483647),
        ("sub.sat.s32", "s32", -2147483648, 1, -2147483648),
        ("add.sat.s32", "s32", 5, -7, -2),
    ],
)
def test_by_hand(form: str, kind: str, a: int, b: int, expected: int) -> None:
    assert apply(form, [(kind, [a]), (kind, [b])], kind).tolist() == [expected]


@pytest.mark.parametrize("name", ["add", "sub"])
def test_saturation(name: str) -> None:
    low, high = limits("s32")
    rows = list(pairs("s32"))
    check(f"{name}.sat.s32", ["s32", "s32"], "s32", rows, lambda a, b: min(max(BINARY[name](a, b), low), high))


def test_upper_halves_of_128_bits() -> None:
    check("mul.hi.u64", ["u64", "u64"], "u64", list(pairs("u64")), lambda a, b: (a * b) >> 64)


@pytest.mark.parametrize("kind", ["s32", "u32", "s64", "u64"])
@pytest.mark.parametrize("name", ["add", "sub"])
def test_wide_sums(name: str, kind: str) -> None:
    """Check sums and differences of three words, with carries through none, one or two of them."""
    size, high = int(kind[1:]) // 8, limits(f"u{kind[1:]}")[1]
    words = [
        (0, 0, 0),
        (1, 0, 0),
        (high, high, high),
        (high, high, 1),
        (0, high, 5),
        (high, 0, 0),
        (7, 1, high),
        (0, 1, 0),
    ]
    rows = [(a, b) for a in words for b in words]

    def whole(parts: tuple[int, ...]) -> int:
        return sum(x << 8 * size * i for i, x in enumerate(parts))

    r = "r" if size == 4 else "l"
    loads = "".join(f"ld.global.b{8 * size} %{r}{i}, [%l31+{i * size}];\n" for i in range(6))
    stores = "".join(f"st.global.b{8 * size} [%l30+{i * size}], %{r}{10 + i};\n" for i in range(3))
    body = f"""
        mov.u32 %r31, %tid.x;
        ld.param.b64 %l28, [p0];
        ld.param.b64 %l29, [p1];
        mad.wide.u32 %l31, %r31, {6 * size}, %l28;
        mad.wide.u32 %l30, %r31, {3 * size}, %l29;
        {loads}
        {name}.cc.{kind} %{r}10, %{r}0, %{r}3;
        {name}c.cc.{kind} %{r}11, %{r}1, %{r}4;
        {name}c.{kind} %{r}12, %{r}2, %{r}5;
        {stores}
    """
    given = b"".join(x.to_bytes(size, "little") for a, b in rows for x in (*a, *b))
    source = torch.frombuffer(bytearray(given), dtype=torch.uint8)
    out = torch.full((len(rows), 3 * size), 0x55, dtype=torch.uint8)
    execute(kernel(body, parameters=2, threads=len(rows)), [source, out])
    got = [int.from_bytes(bytes(row), "little") for row in out.tolist()]
    assert got == [BINARY[name](whole(a), whole(b)) % (1 << 24 * size) for a, b in rows]


@pytest.mark.parametrize("kind", ["s16", "u16", "s32", "u32"])
def test_wide_products(kind: str) -> None:
    wide = f"{kind[0]}{2 * int(kind[1:])}"
    rows = list(pairs(kind))
    check(f"mul.wide.{kind}", [kind, kind], wide, rows, operator.mul)
    check(f"mul.hi.{kind}", [kind, kind], kind, rows, lambda a, b: (a * b) >> int(kind[1:]))
    added = [(a, b, c) for a, b in rows for c in (0, limits(wide)[1])]
    check(f"mad.wide.{kind}", [kind, kind, wide], wide, added, lambda a, b, c: wrap(a * b + c, wide))


@pytest.mark.parametrize("kind", TYPES)
def test_products_and_sums(kind: str) -> None:
    rows = [(a, b, c) for a, b in pairs(kind) for c in (1, limits(kind)[1])]
    check(f"mad.lo.{kind}", [kind] * 3, kind, rows, lambda a, b, c: wrap(a * b + c, kind))


@pytest.mark.parametrize("kind", ["s16", "s32", "s64"])
def test_signs(kind: str) -> None:
    rows = [(a,) for a in samples(kind)]
    check(f"neg.{kind}", [kind], kind, rows, lambda a: wrap(-a, kind))
    check(f"abs.{kind}", [kind], kind, rows, lambda a: wrap(abs(a), kind))


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_logic(bits: int) -> None:
    kind, own = f"u{bits}", f"b{bits}"
    rows = list(pairs(kind))
    for name, function in (("and", operator.and_), ("or", operator.or_), ("xor", operator.xor)):
        check(f"{name}.{own}", [kind, kind], kind, rows, function)
    check(f"not.{own}", [kind], kind, [(a,) for a in samples(kind)], lambda a: a ^ limits(kind)[1])


def test_logic_of_predicates() -> None:
    rows = [(0, 0), (0, 1), (1, 0), (1, 1)]
    for name, function in (("and", operator.and_), ("or", operator.or_), ("xor", operator.xor)):
        check(f"{name}.pred", ["pred", "pred"], "pred", rows, function)
    check("not.pred", ["pred"], "pred", [(0,), (1,)], lambda a: not a)


@pytest.mark.parametrize("kind", ["b16", "b32", "b64", "u16", "u32", "u64", "s16", "s32", "s64"])
def test_shifts(kind: str) -> None:
    """Check shifts, also by the type's number of bits and by more."""
    bits = int(kind[1:])
    own = kind.replace("b", "u")
    rows = [(a, n) for a in samples(own) for n in (0, 1, bits - 1, bits, bits + 1, 2**32 - 1)]
    check(f"shr.{kind}", [own, "u32"], own, rows, lambda a, n: a >> min(n, bits))
    if kind[0] == "b":
        check(f"shl.{kind}", [own, "u32"], own, rows, lambda a, n: wrap(a << n, own) if n < bits else 0)


@pytest.mark.parametrize("mode", ["wrap", "clamp"])
def test_funnel_shifts(mode: str) -> None:
    rows = [(a, b, n) for a in (0, 0x12345678) for b in (0x9ABCDEF0, 1) for n in (0, 4, 31, 32, 33, 60)]

    def by(n: int) -> int:
        return n & 31 if mode == "wrap" else min(n, 32)

    def left(a: int, b: int, n: int) -> int:
        return ((b << 32 | a) << by(n)) >> 32 & 0xFFFFFFFF

    check(f"shf.l.{mode}.b32", ["u32"] * 3, "u32", rows, left)
    check(f"shf.r.{mode}.b32", ["u32"] * 3, "u32", rows, lambda a, b, n: (b << 32 | a) >> by(n) & 0xFFFFFFFF)
    assert apply("shf.l.wrap.b32", [("u32", [0x80000000]), ("u32", [1]), ("u32", [1])], "u32").tolist() == [3]


@pytest.mark.parametrize("kind", ["u32", "s32", "u64", "s64"])
def test_fields(kind: str) -> None:
    """Check bit fields against the documentation's definition, bit by bit."""
    n = int(kind[1:])
    positions = (0, 1, 5, n - 1, n, 255)
    rows = [(a, at, size) for a in samples(kind) for at in positions for size in (0, 1, 7, n - 1, n, 255)]

    def extract(a: int, at: int, size: int) -> int:
        fill = a >> min(at + size - 1, n - 1) & 1 if kind[0] == "s" and size else 0
        found = [a >> at + i & 1 if i < size and at + i < n else fill for i in range(n)]
        return wrap(sum(bit << i for i, bit in enumerate(found)), kind)

    check(f"bfe.{kind}", [kind, "u32", "u32"], kind, rows, extract)
    if kind[0] == "u":
        both = [(a, b, at, size) for a, at, size in rows for b in (0, limits(kind)[1])]

        def insert(a: int, b: int, at: int, size: int) -> int:
            for i in range(size):
                if at + i < n:
                    b = b & ~(1 << at + i) | (a >> i & 1) << at + i
            return b

        check(f"bfi.b{n}", [kind, kind, "u32", "u32"], kind, both, insert)


def test_fields_by_hand() -> None:
    assert apply("bfe.s32", [("s32", [0xF80]), ("u32", [7]), ("u32", [5])], "s32").tolist() == [-1]
    assert apply("bfe.u32", [("u32", [0xABCD]), ("u32", [4]), ("u32", [8])], "u32").tolist() == [0xBC]
    inserted = apply("bfi.b32", [("u32", [0xF]), ("u32", [0]), ("u32", [8]), ("u32", [4])], "u32")
    assert inserted.tolist() == [0xF00]


@pytest.mark.parametrize("table", [0x80, 0xFE, 0x96, 0xE8, 0x1D])
def test_functions_of_three_bits(table: int) -> None:
    a, b, c = 0xF0F0F0F0, 0xCCCCCCCC, 0xAAAAAAAA  # all eight combinations of three bits
    got = apply("lop3.b32", [("u32", [a]), ("u32", [b]), ("u32", [c])], "u32", extra=[str(table)])
    assert got.tolist() == [table * 0x01010101]


@pytest.mark.parametrize("bits", [32, 64])
def test_counts_of_bits(bits: int) -> None:
    kind = f"u{bits}"
    rows = [(a,) for a in (*samples(kind), 2**31, 2**20 + 1, 2 ** (bits - 1))]
    check(f"popc.b{bits}", [kind], "u32", rows, lambda a: a.bit_count())
    check(f"clz.b{bits}", [kind], "u32", rows, lambda a: bits - a.bit_length())


def test_bytes_are_permuted() -> None:
    a, b = 0x83828180, 0x07060504
    for selector, expected in (
        (0x3210, a),
        (0x7654, b),
        (0x0123, 0x80818283),
        (0x5410, 0x05048180),
        (0xBFA8, 0xFF00FFFF),
    ):
        got = apply("prmt.b32", [("u32", [a]), ("u32", [b]), ("u32", [selector])], "u32")
        assert got.tolist() == [expected], hex(selector)


ORDER = {
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
}


@pytest.mark.parametrize("name", ORDER)
@pytest.mark.parametrize("kind", ["b16", "b32", "b64", *TYPES])
def test_comparisons(kind: str, name: str) -> None:
    if kind[0] == "b" and name not in ("eq", "ne"):
        return
    own = kind.replace("b", "u")
    check(f"setp.{name}.{kind}", [own, own], "pred", list(pairs(own)), ORDER[name])


@pytest.mark.parametrize("kind", ["f32", "f64"])
def test_comparisons_of_floats(kind: str) -> None:
    values = [-math.inf, -1.5, -0.0, 0.0, 1e-40, 1.5, math.inf, math.nan]
    rows = [(a, b) for a in values for b in values]

    def unordered(a: float, b: float) -> bool:
        return math.isnan(a) or math.isnan(b)

    for name, order in ORDER.items():
        check(
            f"setp.{name}.{kind}", [kind, kind], "pred", rows, lambda a, b, o=order: o(a, b) and not unordered(a, b)
        )
        check(f"setp.{name}u.{kind}", [kind, kind], "pred", rows, lambda a, b, o=order: o(a, b) or unordered(a, b))
    check(f"setp.nan.{kind}", [kind, kind], "pred", rows, unordered)
    check(f"setp.num.{kind}", [kind, kind], "pred", rows, lambda a, b: not unordered(a, b))


@pytest.mark.parametrize("form", expand("selp.{b16,b32,b64,s16,s32,s64,u16,u32,u64,f32,f64}"))
def test_selections(form: str) -> None:
    """Check that selection copies bits unchanged, the payload of a NaN too."""
    kind = f"u{form.split('.')[1][1:]}"
    a, b = limits(kind)[1] - 5, 7  # the first, as a float, is a NaN
    assert apply(form, [(kind, [a, a]), (kind, [b, b]), ("pred", [1, 0])], kind).tolist() == [a, b]


@pytest.mark.parametrize("form", expand("mov.{b16,b32,b64,s16,s32,s64,u16,u32,u64,f32,f64}"))
def test_moves(form: str) -> None:
    kind = f"u{form.split('.')[1][1:]}"
    assert apply(form, [(kind, samples(kind))], kind).tolist() == samples(kind)


def test_moves_of_predicates() -> None:
    assert apply("mov.pred", [("pred", [1, 0])], "pred").tolist() == [True, False]


def test_moves_of_pieces() -> None:
    assert [x.tolist() for x in apply("mov.b32", [("u32", [0x12345678])], ["u16", "u16"])] == [[0x5678], [0x1234]]
    assert [x.tolist() for x in apply("mov.b64", [("u64", [1 << 40])], ["u32", "u32"])] == [[0], [256]]
    four = apply("mov.b64", [("u64", [0x0123456789ABCDEF])], ["u16"] * 4)
    assert [x.tolist() for x in four] == [[0xCDEF], [0x89AB], [0x4567], [0x0123]]
