"""Tests floating-point arithmetic bit for bit against exact numbers, and approximations against their errors."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest

from tests.ptx.exact import FORMATS, rounded, to_bits, value
from tests.ptx.running import apply, bits

SPECIAL = [0.0, -0.0, 1.0, -1.5, math.inf, -math.inf, math.nan]
F32 = [
    *SPECIAL,
    2.0**-149,
    -(2.0**-149),
    2.0**-126,
    3.4028234663852886e38,
    -3.4028234663852886e38,
    16777216.0,
    1 / 3,
]
F64 = [*SPECIAL, 2.0**-1074, 2.0**-1022, 1.7976931348623157e308, 9007199254740992.0, 1 / 3]


def samples(kind: str, n: int = 40) -> list[int]:
    """Return the bits of floats: special values, and others of any exponent."""
    some = random.Random(kind)
    own = [to_bits(x, "f32") for x in F32] if kind == "f32" else [to_bits(x, "f64") for x in F64]
    width = 32 if kind == "f32" else 64
    return (
        own + [some.getrandbits(width) for _ in range(n)] + [to_bits(some.uniform(-4, 4), "f32") for _ in range(n)]
    )


def run(form: str, kind: str, rows: list[tuple[int, ...]]) -> list[int]:
    unsigned = kind.replace("f", "u")
    columns = [(unsigned, column) for column in zip(*rows, strict=True)]
    return apply(form, columns, unsigned).tolist()


def signed_zero(kind: str, x: int) -> bool:
    return bool(x & FORMATS[kind].sign)


def flushed(x: int) -> int:
    """Return the bits of a float32, those of a zero if it is subnormal."""
    return x if x & 0x7F800000 else x & 0x80000000


def saturated(x: int) -> int:
    number = value(x, "f32")
    if number != number or number <= 0:
        return 0
    return rounded(Fraction(1), "f32") if number > 1 else x


def add(kind: str, a: int, b: int) -> int:
    x, y = value(a, kind), value(b, kind)
    if isinstance(x, float) or isinstance(y, float):
        return rounded(float(x) + float(y), kind)
    negative = signed_zero(kind, a) and signed_zero(kind, b) and x == 0
    return rounded(x + y, kind, negative_zero=negative)


def negate(kind: str, a: int) -> int:
    return FORMATS[kind].nan if value(a, kind) != value(a, kind) else a ^ FORMATS[kind].sign


def multiply(kind: str, a: int, b: int) -> int:
    x, y = value(a, kind), value(b, kind)
    negative = signed_zero(kind, a) != signed_zero(kind, b)
    if isinstance(x, float) or isinstance(y, float):
        if x != x or y != y or x == 0 or y == 0:
            return FORMATS[kind].nan
        return rounded(-math.inf if negative else math.inf, kind)
    return rounded(x * y, kind, negative_zero=negative)


def fused(kind: str, a: int, b: int, c: int) -> int:
    x, y, z = (value(each, kind) for each in (a, b, c))
    if isinstance(x, float) or isinstance(y, float):
        product = multiply(kind, a, b)
        infinite = value(product, kind)
        if infinite != infinite or z != z or (isinstance(z, float) and z != infinite):
            return FORMATS[kind].nan
        return product
    if isinstance(z, float):
        return rounded(z, kind)
    negative_product = signed_zero(kind, a) != signed_zero(kind, b)
    negative = negative_product and signed_zero(kind, c) if x * y == 0 or z == 0 else False
    return rounded(x * y + z, kind, negative_zero=negative)


def divide(kind: str, a: int, b: int) -> int:
    x, y = value(a, kind), value(b, kind)
    negative = signed_zero(kind, a) != signed_zero(kind, b)
    if x != x or y != y or (isinstance(x, float) and isinstance(y, float)) or (x == 0 and y == 0):
        return FORMATS[kind].nan
    if isinstance(x, float) or y == 0:
        return rounded(-math.inf if negative else math.inf, kind)
    return rounded(Fraction(0) if isinstance(y, float) else x / y, kind, negative_zero=negative)


def root(kind: str, a: int) -> int:
    x = value(a, kind)
    if x != x or x < 0:
        return FORMATS[kind].nan
    if isinstance(x, float) or x == 0:
        return a
    # 140 bits of the root, and one more that is set if the root is inexact
    shift = 140 + (x.denominator.bit_length() - 1) // 2 * 2
    whole = math.isqrt(x.numerator * 4**shift // x.denominator)
    inexact = Fraction(whole * whole, 4**shift) != x
    return rounded(Fraction(2 * whole + inexact, 2 ** (shift + 1)), kind)


Reference = Callable[..., int]
BINARY: dict[str, Reference] = {
    "add": add,
    "sub": lambda kind, a, b: add(kind, a, negate(kind, b)),
    "mul": multiply,
}


@pytest.mark.parametrize("kind", ["f32", "f64"])
@pytest.mark.parametrize("rn", ["", ".rn"])
@pytest.mark.parametrize("name", BINARY)
def test_arithmetic(name: str, rn: str, kind: str) -> None:
    rows = [(a, b) for a in samples(kind, 4) for b in samples(kind, 4)]
    assert run(f"{name}{rn}.{kind}", kind, rows) == [BINARY[name](kind, a, b) for a, b in rows]


@pytest.mark.parametrize("modifiers", [".ftz", ".sat", ".ftz.sat"])
@pytest.mark.parametrize("rn", ["", ".rn"])
@pytest.mark.parametrize("name", BINARY)
def test_modifiers(name: str, rn: str, modifiers: str) -> None:
    rows = [(a, b) for a in samples("f32", 4) for b in samples("f32", 4)]

    def expected(a: int, b: int) -> int:
        if "ftz" not in modifiers:
            return saturated(BINARY[name]("f32", a, b))
        result = flushed(BINARY[name]("f32", flushed(a), flushed(b)))
        return saturated(result) if "sat" in modifiers else result

    assert run(f"{name}{rn}{modifiers}.f32", "f32", rows) == [expected(a, b) for a, b in rows]


@pytest.mark.parametrize("kind", ["f32", "f64"])
def test_fused(kind: str) -> None:
    own = samples(kind, 0)[:12]
    some = random.Random(1)
    rows = [(a, b, c) for a in own for b in own[:8] for c in own[:8]]
    width = 32 if kind == "f32" else 64
    rows += [tuple(some.getrandbits(width) for _ in range(3)) for _ in range(100)]
    exponent = 1 << (23 if kind == "f32" else 52)
    one = to_bits(1.0, kind)
    for _ in range(100):  # sums that nearly cancel
        a, b = one + some.randrange(exponent), one + some.randrange(exponent)
        rows.append((a, b, negate(kind, multiply(kind, a, b))))
    assert run(f"fma.rn.{kind}", kind, rows) == [fused(kind, *row) for row in rows]


def test_fused_is_rounded_once() -> None:
    """Check sums near a point halfway between two float32, to which float64 would round them."""
    a, c = 1 + 2.0**-23, 2.0**-60
    got = apply("fma.rn.f32", [("f32", [a, a]), ("f32", [1 + 2.0**-1, 1.5]), ("f32", [c, -c])], "f32")
    exact = [rounded(Fraction(a) * Fraction(1.5) + Fraction(x), "f32") for x in (c, -c)]
    assert bits(got) == exact
    assert exact[0] != exact[1]
    tiny = 2.0**-149
    rows = [
        (to_bits(x, "f32"), to_bits(0.5, "f32"), to_bits(z, "f32")) for x in (tiny, 3 * tiny) for z in (0.0, tiny)
    ]
    assert run("fma.rn.f32", "f32", rows) == [0, 2, 2, 2]  # ties of subnormal numbers, to even


@pytest.mark.parametrize("modifiers", [".ftz", ".sat", ".ftz.sat"])
def test_modifiers_of_fused(modifiers: str) -> None:
    own = samples("f32", 0)
    rows = [(a, b, c) for a in own for b in own[::2] for c in own[::3]]

    def expected(*row: int) -> int:
        result = fused("f32", *map(flushed, row) if "ftz" in modifiers else row)
        result = flushed(result) if "ftz" in modifiers else result
        return saturated(result) if "sat" in modifiers else result

    assert run(f"fma.rn{modifiers}.f32", "f32", rows) == [expected(*row) for row in rows]


@pytest.mark.parametrize("kind", ["f32", "f64"])
def test_quotients_and_roots(kind: str) -> None:
    own = samples(kind, 8)
    rows = [(a, b) for a in own for b in own]
    one = to_bits(1.0, kind)
    single = [(a,) for a in samples(kind)]
    assert run(f"div.rn.{kind}", kind, rows) == [divide(kind, a, b) for a, b in rows]
    assert run(f"rcp.rn.{kind}", kind, single) == [divide(kind, one, a) for (a,) in single]
    assert run(f"sqrt.rn.{kind}", kind, single) == [root(kind, a) for (a,) in single]
    if kind == "f32":
        expected = [flushed(divide(kind, flushed(a), flushed(b))) for a, b in rows]
        assert run("div.rn.ftz.f32", kind, rows) == expected
        assert run("rcp.rn.ftz.f32", kind, single) == [flushed(divide(kind, one, flushed(a))) for (a,) in single]
        assert run("sqrt.rn.ftz.f32", kind, single) == [flushed(root(kind, flushed(a))) for (a,) in single]


def lesser(kind: str, least: bool, strict: bool, *values: int) -> int:
    numbers = [x for x in values if value(x, kind) == value(x, kind)]
    if len(numbers) < len(values) and (strict or not numbers):
        return FORMATS[kind].nan
    ordered = sorted(numbers, key=lambda x: (value(x, kind), not signed_zero(kind, x)))
    return ordered[0 if least else -1]


@pytest.mark.parametrize("name", ["min", "max"])
@pytest.mark.parametrize("modifiers", ["", ".ftz", ".NaN", ".ftz.NaN"])
def test_extremes(name: str, modifiers: str) -> None:
    own = samples("f32", 3)
    for n in (2, 3):
        rows = (
            [(a, b) for a in own for b in own]
            if n == 2
            else [(a, b, c) for a in own[:10] for b in own[:8] for c in own[:8]]
        )
        expected = []
        for row in rows:
            row = tuple(map(flushed, row)) if "ftz" in modifiers else row
            expected.append(lesser("f32", name == "min", "NaN" in modifiers, *row))
        assert run(f"{name}{modifiers}.f32", "f32", rows) == expected
    if not modifiers:
        rows = [(a, b) for a in samples("f64", 3) for b in samples("f64", 3)]
        expected = [lesser("f64", name == "min", False, *row) for row in rows]
        assert run(f"{name}.f64", "f64", rows) == expected


@pytest.mark.parametrize("kind", ["f32", "f64"])
def test_signs(kind: str) -> None:
    rows = [(a,) for a in samples(kind)]
    sign, nan = FORMATS[kind].sign, FORMATS[kind].nan

    def expected(a: int, changed: int) -> int:
        return nan if value(a, kind) != value(a, kind) else changed

    assert run(f"neg.{kind}", kind, rows) == [expected(a, a ^ sign) for (a,) in rows]
    assert run(f"abs.{kind}", kind, rows) == [expected(a, a & ~sign) for (a,) in rows]
    if kind == "f32":
        assert run("neg.ftz.f32", kind, rows) == [expected(a, flushed(a) ^ sign) for (a,) in rows]
        assert run("abs.ftz.f32", kind, rows) == [expected(a, flushed(a) & ~sign) for (a,) in rows]
    both = [(a, b) for a, _ in zip(samples(kind, 3), range(9), strict=False) for b in samples(kind, 3)]
    assert run(f"copysign.{kind}", kind, both) == [a & sign | b & ~sign for a, b in both]


@pytest.mark.parametrize("rn", ["", ".rn"])
@pytest.mark.parametrize("ftz", ["", ".ftz"])
@pytest.mark.parametrize("name", ["add", "sub", "mul", "fma"])
def test_pairs(name: str, ftz: str, rn: str) -> None:
    """Check arithmetic on registers of 64 bits whose halves are two float32."""
    own = samples("f32", 4)
    rows = [(a, b, c) for a in own for b in own[::3] for c in (own[::5] if name == "fma" else own[:1])]
    rows = rows if name == "fma" else [row[:2] for row in rows]
    rows = rows[: len(rows) // 2 * 2]
    reference = fused if name == "fma" else BINARY[name]

    def expected(*row: int) -> int:
        return flushed(reference("f32", *map(flushed, row))) if ftz else reference("f32", *row)

    halves = list(zip(rows[::2], rows[1::2], strict=True))
    columns = [("u64", [low[i] | high[i] << 32 for low, high in halves]) for i in range(len(rows[0]))]
    got = apply(f"{name}{rn}{ftz}.f32x2", columns, "u64").tolist()
    assert got == [expected(*low) | expected(*high) << 32 for low, high in halves]


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_mixed(kind: str) -> None:
    """Check sums of a 16-bit float, which is exact in float32, and a float32, and fused multiply-adds."""
    some = random.Random(2)
    narrow = [0, 0x8000, 1, 0x3C00, 0x7F80, 0x7C00, 0xFC01, *(some.getrandbits(16) for _ in range(20))]
    wide = [rounded(value(a, kind), "f32", negative_zero=a == 0x8000) for a in narrow]
    rows = [(i, c) for i in range(len(narrow)) for c in samples("f32", 4)]
    for rn in ("", ".rn"):
        for name in ("add", "sub"):
            got = apply(
                f"{name}{rn}.f32.{kind}",
                [("u16", [narrow[i] for i, _ in rows]), ("u32", [c for _, c in rows])],
                "u32",
            )
            assert got.tolist() == [BINARY[name]("f32", wide[i], c) for i, c in rows]
    columns = [
        ("u16", [narrow[i] for i, _ in rows]),
        ("u16", [narrow[-1 - i] for i, _ in rows]),
        ("u32", [c for _, c in rows]),
    ]
    got = apply(f"fma.rn.f32.{kind}", columns, "u32")
    assert got.tolist() == [fused("f32", wide[i], wide[-1 - i], c) for i, c in rows]


# Approximations -------------------------------------------------------------------------------------------

APPROXIMATE: dict[str, tuple[Callable[..., float], int]] = {
    "div.full": (lambda a, b: a / b, 2),
    "div.approx": (lambda a, b: a / b, 2),
    "sqrt.approx": (math.sqrt, 1),
    "rcp.approx": (lambda a: 1 / a, 1),
    "rsqrt.approx": (lambda a: 1 / math.sqrt(a), 1),
    "ex2.approx": (lambda a: 2.0**a, 2),
    "lg2.approx": (math.log2, 1),
}


@pytest.mark.parametrize("ftz", ["", ".ftz"])
@pytest.mark.parametrize("name", APPROXIMATE)
def test_approximations(name: str, ftz: str) -> None:
    """Check correct rounding by default, and with ``disturb`` all errors within the documented bound, no others."""
    function, ulps = APPROXIMATE[name]
    some = random.Random(3)
    rows = [tuple(some.uniform(0.7, 9) for _ in range(2 if "div" in name else 1)) for _ in range(300)]
    columns = [("f32", column) for column in zip(*rows, strict=True)]
    tensor_steps = list(zip(*(np.array(column, np.float32).tolist() for _, column in columns), strict=True))
    exact = np.array([function(*row) for row in tensor_steps], np.float32)
    assert apply(f"{name}{ftz}.f32", columns, "f32").tolist() == exact.tolist()
    off = np.array(bits(apply(f"{name}{ftz}.f32", columns, "f32", disturb=0))) - np.array(bits(exact))
    assert set(off.tolist()) == set(range(-ulps, ulps + 1))
    assert np.array_equal(*(apply(f"{name}{ftz}.f32", columns, "f32", disturb=0) for _ in range(2)))
    assert not np.array_equal(*(apply(f"{name}{ftz}.f32", columns, "f32", disturb=seed) for seed in (0, 1)))


def test_special_values_are_not_disturbed() -> None:
    special = [0.0, -0.0, math.inf, -math.inf, math.nan]
    for seed in range(4):
        got = apply("rcp.approx.f32", [("f32", special)], "f32", disturb=seed)
        assert bits(got) == [0x7F800000, 0xFF800000, 0, 0x80000000, 0x7FFFFFFF]
        got = apply("sqrt.approx.f32", [("f32", [0.0, math.inf, -1.0])], "f32", disturb=seed)
        assert bits(got) == [0, 0x7F800000, 0x7FFFFFFF]


def test_subnormal_numbers_of_approximations() -> None:
    tiny = 2.0**-140
    assert apply("rcp.approx.ftz.f32", [("f32", [tiny, -tiny])], "f32").tolist() == [math.inf, -math.inf]
    assert apply("sqrt.approx.ftz.f32", [("f32", [tiny])], "f32").tolist() == [0.0]
    assert apply("sqrt.approx.f32", [("f32", [tiny])], "f32").tolist() == [2.0**-70]
    assert apply("ex2.approx.ftz.f32", [("f32", [-130.0])], "f32").tolist() == [0.0]
    assert apply("ex2.approx.f32", [("f32", [-130.0])], "f32").tolist() == [2.0**-130]
    assert apply("div.full.ftz.f32", [("f32", [1.0]), ("f32", [tiny])], "f32").tolist() == [math.inf]


def test_division_by_huge_numbers() -> None:
    huge = 2.0**127
    got = apply("div.approx.f32", [("f32", [huge, -1.0, math.inf]), ("f32", [huge] * 3)], "f32")
    assert bits(got) == [0, 0x80000000, 0x7FFFFFFF]
    assert apply("div.full.f32", [("f32", [huge]), ("f32", [huge])], "f32").tolist() == [1.0]


@pytest.mark.parametrize("name", ["rcp", "rsqrt"])
def test_approximations_of_float64(name: str) -> None:
    """Check float64 approximations with 20 bits of the fraction, from operand to result."""
    some = random.Random(4)
    values = [some.uniform(0.1, 10) for _ in range(64)]
    got = apply(f"{name}.approx.ftz.f64", [("f64", values)], "f64")
    assert not any(x & 0xFFFFFFFF for x in bits(got))
    exact = np.array([1 / x if name == "rcp" else 1 / math.sqrt(x) for x in values])
    assert (np.abs(got / exact - 1) < 3 * 2.0**-20).all()
    disturbed = apply(f"{name}.approx.ftz.f64", [("f64", values)], "f64", disturb=0)
    steps = (np.array(bits(disturbed), np.int64) - np.array(bits(got), np.int64)) >> 32
    assert set(steps.tolist()) == {-1, 0, 1}
    special = apply(f"{name}.approx.ftz.f64", [("f64", [0.0, math.inf, math.nan, 2.0**-1070])], "f64")
    assert bits(special) == [0x7FF << 52, 0, 0x7FFFFFFFFFFFFFFF, 0x7FF << 52]
