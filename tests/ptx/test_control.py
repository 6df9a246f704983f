"""Tests of control flow: predicates, divergent branches, loops and early ends; and of PTX that is refused."""

from __future__ import annotations

import pytest
import torch

from tests.ptx.forms import FORMS
from tests.ptx.parser import parse
from tests.ptx.program import Program
from tests.ptx.running import execute, kernel
from tests.ptx.types import PtxError

START = """
    mov.u32 %r0, %tid.x;
    mov.u32 %r1, %ctaid.x;
    mov.u32 %r2, %ntid.x;
    mad.lo.s32 %r3, %r1, %r2, %r0;
    ld.param.b64 %l0, [p0];
    mad.wide.u32 %l1, %r3, 4, %l0;
"""


def run(body: str, *, grid: int = 1, threads: int = 32, at_once: int | None = None) -> list[int]:
    """Return the ``%r10`` that each thread stores; ``%r3`` holds its index in the grid."""
    out = torch.full((grid * threads,), -1, dtype=torch.int32)
    execute(kernel(START + body, parameters=1, threads=threads), [out], grid=grid, at_once=at_once)
    return out.tolist()


STORE = "st.global.b32 [%l1], %r10;\n"


def test_predicates() -> None:
    """Check that an instruction whose predicate is false changes neither its target nor memory."""
    body = """
        mov.b32 %r10, 7;
        setp.lt.s32 %p0, %r0, 5;
        @%p0 mov.b32 %r10, 8;
        @!%p0 add.s32 %r10, %r10, %r0;
        setp.ne.b32 %p1, %r0, 3;
        @%p1 st.global.b32 [%l1], %r10;"""
    expected = [8 if i < 5 else 7 + i for i in range(32)]
    expected[3] = -1
    assert run(body) == expected


def test_predicates_that_all_or_no_threads_meet() -> None:
    body = (
        """
        mov.b32 %r10, 1;
        setp.lt.s32 %p0, %r0, 100;
        @%p0 mov.b32 %r10, 2;
        @!%p0 mov.b32 %r10, 3;"""
        + STORE
    )
    assert run(body) == [2] * 32


def test_both_ways_of_a_branch() -> None:
    body = (
        """
        and.b32 %r4, %r0, 1;
        setp.eq.b32 %p0, %r4, 0;
        @%p0 bra $EVEN;
        mul.lo.s32 %r10, %r0, 100;
        bra.uni $DONE;
    $EVEN:
        neg.s32 %r10, %r0;
    $DONE:
        add.s32 %r10, %r10, 1;"""
        + STORE
    )
    assert run(body) == [100 * i + 1 if i % 2 else 1 - i for i in range(32)]


@pytest.mark.parametrize("at_once", [1, 2, 5])
def test_loops_of_different_lengths(at_once: int) -> None:
    """Check that each thread runs as many iterations as its index, and that all meet after the loop."""
    body = (
        """
        mov.b32 %r10, 0;
        mov.b32 %r4, 0;
        setp.eq.b32 %p0, %r3, 0;
        @%p0 bra $DONE;
    $LOOP:
        add.s32 %r4, %r4, 1;
        add.s32 %r10, %r10, %r4;
        setp.lt.s32 %p1, %r4, %r3;
        @%p1 bra $LOOP;
    $DONE:
        bar.sync 0;"""
        + STORE
    )
    assert run(body, grid=5, at_once=at_once) == [i * (i + 1) // 2 for i in range(160)]


def test_loops_of_whole_programs() -> None:
    """Check a loop that each program runs a different number of times, with all its threads together."""
    body = (
        """
        mov.b32 %r10, 1;
        mov.b32 %r4, 0;
    $LOOP:
        shl.b32 %r10, %r10, 1;
        add.s32 %r4, %r4, 1;
        setp.le.s32 %p1, %r4, %r1;
        @%p1 bra $LOOP;
        bar.sync 0;"""
        + STORE
    )
    assert run(body, grid=4) == [2 << program for program in range(4) for _ in range(32)]


def test_branches_within_branches() -> None:
    body = (
        """
        mov.b32 %r10, 0;
        setp.ge.s32 %p0, %r0, 16;
        @%p0 bra $HIGH;
        setp.ge.s32 %p1, %r0, 8;
        @%p1 bra $MIDDLE;
        mov.b32 %r10, 1;
        bra.uni $DONE;
    $MIDDLE:
        mov.b32 %r10, 2;
        bra.uni $DONE;
    $HIGH:
        setp.ge.s32 %p2, %r0, 24;
        @!%p2 bra $DONE;
        mov.b32 %r10, 3;
    $DONE:"""
        + STORE
    )
    assert run(body) == [1] * 8 + [2] * 8 + [0] * 8 + [3] * 8


@pytest.mark.parametrize("end", ["ret", "exit"])
def test_threads_that_end_early(end: str) -> None:
    """Check that threads do nothing after their end, and that a barrier does not wait for them."""
    body = (
        f"""
        setp.ge.s32 %p0, %r0, 10;
        @%p0 {end};
        bar.sync 0;
        mov.b32 %r10, %r0;"""
        + STORE
    )
    assert run(body) == [*range(10), *[-1] * 22]


def test_programs_that_end_early() -> None:
    body = (
        """
        setp.eq.b32 %p0, %r1, 1;
        @%p0 ret;
        mov.b32 %r10, %r1;
        bar.sync 0;"""
        + STORE
    )
    assert run(body, grid=3) == [0] * 32 + [-1] * 32 + [2] * 32


def test_registers_of_inline_assembly() -> None:
    """Check that registers declared in an inner scope hide those of the same name."""
    body = (
        """
        mov.b32 %r4, 5;
        {
            .reg .b32 %r4;
            .reg .pred hidden;
            mov.b32 %r4, 9;
            setp.eq.b32 hidden, %r4, 9;
            @hidden mov.b32 %r10, %r4;
        }
        add.s32 %r10, %r10, %r4;"""
        + STORE
    )
    assert run(body) == [14] * 32


def test_a_register_that_is_its_own_source() -> None:
    body = "mov.b32 %r10, %r0;\nadd.s32 %r10, %r10, %r10;\nsub.s32 %r10, 1, %r10;\n" + STORE
    assert run(body) == [1 - 2 * i for i in range(32)]


# PTX that is refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("sin.approx.f32 %r1, %r2;", ["sin.approx.f32", "not known", "line 2"]),
        ("fma.rz.f32 %r1, %r2, %r3, %r4;", ["fma.rz.f32", "not known"]),
        ("add.s32 %r1, %r2;", ["add.s32", "3 operands"]),
        ("add.s32 %r1, %r2, %r99;", ["%r99", "no operand"]),
        ("add.s64 %r1, %l2, %l3;", ["%r1 has 32 bits"]),
        ("add.s32 %r1, %s2, %r3;", ["%s2 has 16 bits"]),
        ("add.s32 1, %r2, %r3;", ["'1' is no register"]),
        ("setp.eq.s32 %r1, %r2, %r3;", ["%r1 has 32 bits"]),
        ("@%r1 mov.b32 %r1, 1;", ["%r1 has 32 bits"]),
        ("@%p99 mov.b32 %r1, 1;", ["%p99"]),
        ("bra $NOWHERE;", ["$NOWHERE", "no label"]),
        ("ld.global.b32 %r1, %l1;", ["no address"]),
        ("ld.global.v2.b32 %r1, [%l1];", ["2 registers"]),
        ("ld.global.b32 %r1, [%r2];", ["%r2 has 32 bits"]),
        ("ld.global.v4.b64 {%l1, %l2, %l3, %l4}, [%l1];", ["not known"]),
        ("ld.param.b32 %r1, [p9];", ["p9 is no parameter"]),
        ("mov.b64 {%s1, %s2, %s3}, %l1;", ["3 registers do not make 64 bits"]),
        ("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%r1}, [%r2];", ["2 registers"]),
        ("bar.sync 1;", ["barrier 0"]),
        ("bar.sync 0, 64;", ["barrier 0"]),
        ("max.f32 %r1, %r2;", ["two or three operands"]),
        (".local .b32 x;", [".local", "not known"]),
        (".reg .b31 %q;", [".reg .b31"]),
        (".reg .b32 %q<;", ["not understood"]),
        ("+ 1;", ["not understood"]),
    ],
)
def test_what_is_refused_when_a_kernel_is_read(line: str, words: list[str]) -> None:
    text = kernel("", parameters=1).replace("    ret;", f"    {line}\n    ret;")
    with pytest.raises(PtxError) as caught:
        Program(text)
    for word in ("test_kernel", *words[:1], *(w for w in words[1:] if not w.startswith("line"))):
        assert word in str(caught.value)
    assert "line " in str(caught.value)


def test_advice_is_left_alone() -> None:
    assert run('.pragma "nounroll";\nmov.b32 %r10, 3;\n' + STORE) == [3] * 32


def test_texts_that_hold_no_kernel_or_several() -> None:
    one = kernel("")
    for text, n in (("", 0), (one + one, 2)):
        with pytest.raises(PtxError, match=f"one kernel is expected, got {n}"):
            Program(text)
    with pytest.raises(PtxError, match="the text ends"):
        Program(one[: one.rindex("}")])


@pytest.mark.parametrize("directive", ["", ".reqntid 8, 8, 1", ".reqntid 48"])
def test_threads_that_are_no_whole_warps(directive: str) -> None:
    with pytest.raises(PtxError, match="threads"):
        Program(kernel("").replace(".reqntid 32", directive))


def test_parameters_of_unknown_types() -> None:
    with pytest.raises(PtxError, match=r"x\[128\]"):
        Program(kernel("").replace("test_kernel(\n", "test_kernel(.param .align 64 .b8 x[128]"))


def test_lines_and_sources_are_told() -> None:
    text = kernel(
        """
    .loc 1 12 3 // step.py:12:3
        mov.b32 %r1, 1;
    .loc 2 7 0, function_name $L__info_string0, inlined_at 1 5 1
        mov.b32 %r2, 2; mov.b32 %r3, 3;"""
    )
    text += '\n.file 1 "/somewhere/step.py"\n.file 2 "/somewhere" "tiles.py"\n'
    code = parse(text).instructions
    assert [x.source for x in code] == ["step.py:12", "tiles.py:7", "tiles.py:7", "tiles.py:7"]
    lines = text.splitlines()
    assert ["mov.b32 %r1" in lines[code[0].line - 1], "mov.b32 %r2" in lines[code[1].line - 1]] == [True, True]
    assert str(code[0]) == f"`mov.b32 %r1, 1` (line {code[0].line}, step.py:12)"


def test_no_form_is_entered_twice() -> None:
    from tests.ptx.forms import forms

    form = next(iter(FORMS))
    with pytest.raises(ValueError, match="already"):
        forms(form)(FORMS[form])
