"""Tests conversions between all types bit for bit: ties, infinities, NaN, subnormal numbers, and overflow."""

from __future__ import annotations

import math
import random
from fractions import Fraction

import pytest

from tests.ptx.exact import FORMATS, rounded, to_bits, value
from tests.ptx.running import apply
from tests.ptx.test_integers import limits, samples, wrap

INTEGERS = ("s8", "u8", "s16", "u16", "s32", "u32", "s64", "u64")
WHOLE = {
    "rni": lambda x: Fraction(round(x)),  # Python rounds ties to even, too
    "rzi": lambda x: Fraction(math.trunc(x)),
    "rmi": lambda x: Fraction(math.floor(x)),
    "rpi": lambda x: Fraction(math.ceil(x)),
}


def register(kind: str) -> str:
    """Return the type of a register for a type: 8-bit values are in 16-bit registers."""
    return kind.replace("s8", "s16").replace("u8", "u16")


def floats(kind: str) -> list[int]:
    f, some = FORMATS[kind], random.Random(kind)
    halves = [rounded(Fraction(n, 2), kind) for n in (*range(-9, 10), 255, 511, 65535, 131071)]
    limited = [2.0**n + d for n in (7, 8, 15, 16, 31, 32, 63, 64) for d in (-1, 0, 1)]
    powers = [rounded(Fraction(sign * x), kind) for x in limited for sign in (1, -1)]
    special = [0, f.sign, 1, f.sign | 1, f.infinity, f.sign | f.infinity, f.infinity + 1, f.nan, f.infinity - 1]
    width = 1 + f.exponent + f.fraction
    return [*special, *halves, *powers, *(some.getrandbits(width) for _ in range(30))]


def flushed(x: int) -> int:
    return x if x & 0x7F800000 else x & 0x80000000


def saturated(x: int, kind: str) -> int:
    number = value(x, kind)
    if number != number or number <= 0:
        return 0
    return rounded(Fraction(1), kind) if number > 1 else x


@pytest.mark.parametrize("sat", ["", ".sat"])
@pytest.mark.parametrize("source", INTEGERS)
@pytest.mark.parametrize("target", INTEGERS)
def test_integers(target: str, source: str, sat: str) -> None:
    """Check that narrow results are extended by their type's rule, and sources are read in their own bits only."""
    values = samples(source if int(source[1:]) > 8 else source.replace("8", "16"))
    low, high = limits(target)

    def expected(x: int) -> int:
        x = wrap(x, source)
        return min(max(x, low), high) if sat else wrap(x, target)

    got = apply(f"cvt{sat}.{target}.{source}", [(register(source), values)], register(target)).tolist()
    assert got == [expected(x) for x in values]


@pytest.mark.parametrize("how", ["rn", "rz"])
@pytest.mark.parametrize("source", INTEGERS)
@pytest.mark.parametrize("target", ["f32", "f64"])
def test_integers_to_floats(target: str, source: str, how: str) -> None:
    low, high = limits(source)
    values = [*samples(register(source)), low, high]
    values += [x for n in (24, 25, 31, 53, 54, 62) for d in (-3, -1, 0, 1, 2, 3) if low <= (x := 2**n + d) <= high]
    values += [-x for x in values if low <= -x <= high]
    got = apply(f"cvt.{how}.{target}.{source}", [(register(source), values)], target.replace("f", "u")).tolist()
    assert got == [rounded(Fraction(wrap(x, source)), target, how) for x in values]


@pytest.mark.parametrize("target", INTEGERS)
@pytest.mark.parametrize("how", WHOLE)
@pytest.mark.parametrize("source", ["f16", "f32", "f64"])
def test_floats_to_integers(source: str, how: str, target: str) -> None:
    """Check that results are clamped, and a NaN becomes 0, with and without ``.sat``."""
    values, (low, high) = floats(source), limits(target)

    def expected(x: int) -> int:
        number = value(x, source)
        if isinstance(number, float):
            return 0 if number != number else (high if number > 0 else low)
        return min(max(int(WHOLE[how](number)), low), high)

    def run(modifiers: str) -> list[int]:
        return apply(
            f"cvt.{how}{modifiers}.{target}.{source}", [(source.replace("f", "u"), values)], register(target)
        ).tolist()

    assert run("") == [expected(x) for x in values]
    if source != "f16":
        assert run(".sat") == [expected(x) for x in values]
        own = flushed if source == "f32" else lambda x: x
        for modifiers in (".ftz", ".ftz.sat"):
            assert run(modifiers) == [expected(own(x)) for x in values]


@pytest.mark.parametrize("how", WHOLE)
@pytest.mark.parametrize("kind", ["f32", "f64"])
def test_whole_floats(kind: str, how: str) -> None:
    values = floats(kind)

    def expected(x: int) -> int:
        number = value(x, kind)
        if isinstance(number, float):
            return rounded(number, kind)
        return rounded(WHOLE[how](number), kind, negative_zero=bool(x & FORMATS[kind].sign))

    unsigned = kind.replace("f", "u")
    for modifiers in ("", ".sat", *((".ftz", ".ftz.sat") if kind == "f32" else ())):
        own = [flushed(x) if "ftz" in modifiers else x for x in values]
        got = apply(f"cvt.{how}{modifiers}.{kind}.{kind}", [(unsigned, values)], unsigned).tolist()
        assert got == [saturated(expected(x), kind) if "sat" in modifiers else expected(x) for x in own]


@pytest.mark.parametrize(("target", "source"), [("f32", "f16"), ("f32", "bf16"), ("f64", "f16"), ("f64", "bf16")])
def test_narrow_floats_are_exact_in_wider_ones(target: str, source: str) -> None:
    values = [*floats(source), *range(0, 1 << 16, 97)]
    got = apply(f"cvt.{target}.{source}", [("u16", values)], target.replace("f", "u")).tolist()
    sign = FORMATS[source].sign
    assert got == [rounded(value(x, source), target, negative_zero=x == sign) for x in values]


@pytest.mark.parametrize(("target", "source"), [("f32", "f32"), ("f64", "f32"), ("f64", "f64")])
@pytest.mark.parametrize("modifiers", ["", ".ftz", ".sat", ".ftz.sat"])
def test_floats_to_as_wide_ones(target: str, source: str, modifiers: str) -> None:
    if "ftz" in modifiers and source == "f64":
        return
    values = floats(source)
    own = [flushed(x) if "ftz" in modifiers else x for x in values]
    sign = FORMATS[source].sign
    expected = [rounded(value(x, source), target, negative_zero=x == sign) for x in own]
    expected = [saturated(x, target) if "sat" in modifiers else x for x in expected]
    got = apply(f"cvt{modifiers}.{target}.{source}", [(source.replace("f", "u"), values)], target.replace("f", "u"))
    assert got.tolist() == expected


@pytest.mark.parametrize("how", ["rn", "rz"])
@pytest.mark.parametrize("modifiers", ["", ".ftz", ".sat", ".ftz.sat"])
def test_float64_to_float32(how: str, modifiers: str) -> None:
    """Check ties of normal and of subnormal results, and overflow."""
    some = random.Random(5)
    numbers = [
        1 + 2.0**-24,
        1 + 3 * 2.0**-24,
        2.0**-150,
        3 * 2.0**-150,
        2.0**128,
        3.4028235677973366e38,
        -(2.0**-1000),
    ]
    numbers += [some.uniform(-2, 2) * 2.0 ** some.randrange(-152, 129) for _ in range(100)]
    values = [*floats("f64"), *(to_bits(x, "f64") for x in numbers)]

    def expected(x: int) -> int:
        result = rounded(value(x, "f64"), "f32", how, negative_zero=x == 1 << 63)
        result = flushed(result) if "ftz" in modifiers else result
        return saturated(result, "f32") if "sat" in modifiers else result

    got = apply(f"cvt.{how}{modifiers}.f32.f64", [("u64", values)], "u32").tolist()
    assert got == [expected(x) for x in values]


def near_halves(kind: str) -> list[int]:
    """Return float32 at, just below and just above points halfway between two narrower floats, of all exponents."""
    f = FORMATS[kind]
    some = random.Random(kind)
    found = []
    for _ in range(60):
        exponent = some.randrange(-f.bias - f.fraction - 1, f.bias + 1)
        halfway = Fraction(2 * some.getrandbits(f.fraction) + 1, 2 << f.fraction) + 1
        x = rounded(halfway * Fraction(2) ** exponent, "f32")
        found += [x - 1, x, x + 1]
    return found


@pytest.mark.parametrize("how", ["rn", "rz"])
@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_float32_to_narrow_floats(kind: str, how: str) -> None:
    values = [*floats("f32"), *near_halves(kind)]
    values += [to_bits(x, "f32") for x in (65504.0, 65519.0, 65520.0, 3.3961e38, 2.0**-24, 2.0**-25, 2.0**-26)]
    values += [0x00000001, 0x00008000, 0x00008001, 0x00018000, 0x7F7FFFFF, 0x7F7F8000, 0x7F7F7FFF]

    def expected(x: int) -> int:
        return rounded(value(x, "f32"), kind, how, negative_zero=x == 1 << 31)

    assert apply(f"cvt.{how}.{kind}.f32", [("u32", values)], "u16").tolist() == [expected(x) for x in values]
    others = values[::-1]
    got = apply(f"cvt.{how}.{kind}x2.f32", [("u32", values), ("u32", others)], "u32").tolist()
    assert got == [expected(a) << 16 | expected(b) for a, b in zip(values, others, strict=True)]


@pytest.mark.parametrize(
    ("form", "source", "bits", "result", "expected"),
    [
        ("cvt.rn.bf16.f32", "u32", 0x3F808000, "u16", 0x3F80),  # a tie, to even
        ("cvt.rn.bf16.f32", "u32", 0x3F818000, "u16", 0x3F82),
        ("cvt.rn.bf16.f32", "u32", 0x7F7FFFFF, "u16", 0x7F80),  # the largest float32, to infinity
        ("cvt.rz.bf16.f32", "u32", 0x7F7FFFFF, "u16", 0x7F7F),
        ("cvt.rn.bf16.f32", "u32", 0xFFC00001, "u16", 0x7FFF),  # NaN
        ("cvt.rn.bf16.f32", "u32", 0x00008001, "u16", 0x0001),  # subnormal
        ("cvt.rn.f16.f32", "u32", 0x33000000, "u16", 0x0000),  # half of the smallest float16
        ("cvt.rn.f16.f32", "u32", 0x33000001, "u16", 0x0001),
        ("cvt.rn.f16.f32", "u32", 0x477FF000, "u16", 0x7C00),  # 65520
        ("cvt.f32.bf16", "u16", 0x0001, "u32", 0x00010000),
        ("cvt.f32.f16", "u16", 0x0001, "u32", 0x33800000),
        ("cvt.f32.f16", "u16", 0xFC00, "u32", 0xFF800000),
        ("cvt.rzi.s32.f32", "u32", 0xCF000000, "s32", -(2**31)),
        ("cvt.rzi.s32.f32", "u32", 0x4F000000, "s32", 2**31 - 1),
        ("cvt.rzi.u32.f32", "u32", 0xBF800000, "u32", 0),
        ("cvt.rni.s32.f32", "u32", 0x40200000, "s32", 2),  # 2.5
        ("cvt.rni.s32.f32", "u32", 0x40600000, "s32", 4),  # 3.5
        ("cvt.rmi.f32.f32", "u32", 0xBF000000, "u32", 0xBF800000),
        ("cvt.sat.u8.s32", "s32", 300, "u16", 255),
        ("cvt.sat.s8.s32", "s32", -300, "s16", -128),
        ("cvt.u8.s32", "s32", 300, "u16", 44),
        ("cvt.rn.f32.s32", "s32", 16777217, "u32", 0x4B800000),
        ("cvt.rn.f32.u64", "u64", 2**64 - 1, "u32", 0x5F800000),
        ("cvt.rz.f32.u64", "u64", 2**64 - 1, "u32", 0x5F7FFFFF),
    ],
)
def test_by_hand(form: str, source: str, bits: int, result: str, expected: int) -> None:
    assert apply(form, [(source, [bits])], result).tolist() == [expected]
