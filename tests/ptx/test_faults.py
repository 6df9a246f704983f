"""Tests that faults are reported, each in a kernel that is correct but for one change."""

from __future__ import annotations

import re

import pytest
import torch

from tests.ptx.running import execute, kernel
from tests.ptx.types import Fault

# Two warps reverse their elements of x through shared memory, add those of neighbouring lanes, and store y.
RIGHT = """
    mov.u32 %r0, %tid.x;
    mov.u32 %r1, %ctaid.x;
    mad.lo.s32 %r2, %r1, 64, %r0;
    ld.param.b64 %l0, [p0];
    ld.param.b64 %l1, [p1];
    mad.wide.u32 %l2, %r2, 4, %l0;
    ld.global.b32 %r3, [%l2];
    shl.b32 %r4, %r0, 2;
    st.shared.b32 [%r4], %r3;
    bar.sync 0;
    xor.b32 %r5, %r4, 252;
    ld.shared.b32 %r6, [%r5];
    shfl.sync.bfly.b32 %r7, %r6, 1, 31, -1;
    add.s32 %r8, %r6, %r7;
    mad.wide.u32 %l3, %r2, 4, %l1;
    st.global.b32 [%l3], %r8;
"""


def run(body: str, *, grid: int = 3, shared: int = 256, at_once: int | None = None) -> torch.Tensor:
    x = torch.arange(64 * grid, dtype=torch.int32)
    y = torch.full_like(x, -1)
    execute(kernel(body, parameters=2, threads=64), [x, y], grid=grid, shared=shared, at_once=at_once)
    return y


def fault(old: str, new: str, **options: int) -> str:
    """Return the report of the fault after a part of the kernel has been replaced."""
    assert RIGHT.count(old) == 1
    with pytest.raises(Fault) as caught:
        run(RIGHT.replace(old, new), **options)
    return str(caught.value)


def check(text: str, *words: str) -> None:
    for word in ("test_kernel", *words):
        assert word in text


@pytest.mark.parametrize("at_once", [1, 2, 3])
def test_the_kernel_is_right(at_once: int) -> None:
    x = torch.arange(192, dtype=torch.int32).view(3, 64)
    turned = x.flip(1)
    assert torch.equal(run(RIGHT, at_once=at_once).view(3, 64), turned + turned.view(3, 32, 2).flip(2).view(3, 64))


# Accesses -------------------------------------------------------------------------------------------------


def test_misaligned_accesses_of_global_memory() -> None:
    text = fault("ld.global.b32 %r3, [%l2];", "ld.global.b32 %r3, [%l2+2];")
    check(
        text,
        "`ld.global.b32 %r3, [%l2+2]` (line ",
        "4 bytes",
        "no multiple of 4",
        "threads 0, 1, 2",
        "of program 0",
    )
    wide = fault("ld.global.b32 %r3, [%l2];", "ld.global.v2.b32 {%r3, %r9}, [%l2];")
    check(wide, "8 bytes", "no multiple of 8", "threads 1, 3, 5")


def test_misaligned_accesses_of_shared_memory() -> None:
    check(fault("st.shared.b32 [%r4], %r3;", "st.shared.b32 [%r4+1], %r3;"), "`st.shared", "no multiple of 4")


def test_misaligned_rows_of_matrices() -> None:
    text = fault("ld.shared.b32 %r6, [%r5];", "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r6}, [%r5];")
    check(text, "ldmatrix", "no multiple of 16")


def test_accesses_outside_of_shared_memory() -> None:
    text = fault("st.shared.b32 [%r4], %r3;", "st.shared.b32 [%r4+16], %r3;")
    check(text, "outside of the program's 256 bytes", "threads 60, 61, 62, 63 of program 0", "8 of other programs")


@pytest.mark.parametrize(("offset", "threads"), [(4, "thread 63 of program 2"), (-4, "thread 0 of program 0")])
def test_accesses_outside_of_every_tensor(offset: int, threads: str) -> None:
    """Check that the report names the tensor nearest to the address, by its key in a dictionary."""
    n = 64 * 3
    memory = torch.zeros(3 * 4096, dtype=torch.uint8)  # else the allocator may place tensors side by side
    del memory
    state = {"exp_avg": torch.zeros(n, dtype=torch.int32), "exp_avg_sq": torch.zeros(1 << 20)}
    y = torch.zeros(n + 32, dtype=torch.int32)
    ptx = kernel(
        RIGHT.replace("ld.global.b32 %r3, [%l2];", f"ld.global.b32 %r3, [%l2+{offset}];"), parameters=2, threads=64
    )
    with pytest.raises(Fault) as caught:
        execute(ptx, [state["exp_avg"], y], grid=3, shared=256)
    where = "0 bytes past the end of" if offset > 0 else "4 bytes before"
    check(
        str(caught.value),
        "outside of every tensor",
        f"{where} 'exp_avg', the int32 tensor of shape (192,)",
        threads,
    )


# Unwritten data -------------------------------------------------------------------------------------------


def test_registers_that_nothing_has_written() -> None:
    text = fault("add.s32 %r8, %r6, %r7;", "add.s32 %r8, %r6, %r9;")
    check(text, "`st.global.b32 [%l3], %r8`", "what %r8 holds comes of what nothing has written", "threads 0, 1, 2")
    check(fault("bar.sync 0;", "@%p3 bar.sync 0;"), "`@%p3 bar.sync 0`", "what %p3 holds comes of what nothing")
    check(fault("ld.global.b32 %r3, [%l2];", "ld.global.b32 %r3, [%l9];"), "what %l9 holds")


@pytest.mark.parametrize(
    ("line", "use"),
    [
        ("@%p0 mov.b32 %r9, 1;", "add.s32 %r8, %r6, %r9;"),
        ("@%p0 mov.b32 %r9, 1;", "mov.b32 %r8, %r9;"),
        ("@%p0 ld.global.b32 %r9, [%l2];", "shfl.sync.bfly.b32 %r8, %r9, 1, 31, -1;"),
        ("@%p0 mov.b32 %r9, 1;", "redux.sync.add.s32 %r8, %r9, -1;"),
        ("@%p0 mov.b32 %r9, 1;", "selp.b32 %r8, %r9, %r6, %p1;"),
        ("@%p0 cvt.u64.u32 %l9, %r0;", "{ .reg .b32 t; mov.b64 {t, %r8}, %l9; }"),
    ],
)
def test_registers_that_some_threads_have_not_written(line: str, use: str) -> None:
    """Check that computing with an unwritten register is no fault, but storing the result is one."""
    before = f"setp.lt.s32 %p0, %r0, 33;\nsetp.lt.s32 %p1, %r0, 64;\n{line}\n"
    text = fault("add.s32 %r8, %r6, %r7;", before + use)
    check(text, "`st.global.b32 [%l3], %r8`", "comes of what nothing has written", "of program 0")
    assert re.search(r"by threads? (3[2-9]|[45]\d|6[0-3])", text)


@pytest.mark.parametrize(
    "use",
    [
        "selp.b32 %r8, %r9, %r6, %p0;",  # not selected
        "add.s32 %r10, %r9, 1;\nmov.b32 %r8, %r0;\n@%p0 mov.b32 %r8, %r10;",  # computed, but not used
        "mov.b32 %r9, 5;\nmov.b32 %r8, %r9;",  # written before it is read
        "shfl.sync.idx.b32 %r8, %r9, 0, 31, -1;",  # from a lane that has written it
    ],
)
def test_registers_that_some_threads_have_not_written_and_do_not_use(use: str) -> None:
    before = "and.b32 %r11, %r0, 31;\nsetp.lt.s32 %p0, %r11, 3;\n@%p0 mov.b32 %r9, 1;\n"
    run(RIGHT.replace("add.s32 %r8, %r6, %r7;", before + use))


def test_shared_memory_that_nothing_has_written() -> None:
    text = fault("st.shared.b32 [%r4], %r3;", "setp.ne.b32 %p0, %r0, 9;\n@%p0 st.shared.b32 [%r4], %r3;")
    check(text, "`st.global.b32 [%l3], %r8`", "comes of what nothing has written", "threads 54, 55 of program 0")


def test_what_is_unknown_stays_so_in_shared_memory() -> None:
    before = "setp.lt.s32 %p0, %r0, 63;\n@%p0 mov.b32 %r9, 1;\nst.shared.b32 [%r4], %r9;"
    text = fault("st.shared.b32 [%r4], %r3;", before)
    check(text, "comes of what nothing has written", "threads 0, 1 of program 0")


@pytest.mark.parametrize(
    ("use", "words"),
    [
        ("add.s32 %r12, %r9, %r4;\nld.shared.b32 %r8, [%r12];", "%r12 holds"),
        ("setp.eq.b32 %p2, %r9, 1;\nmov.b32 %r8, 1;\n@%p2 mov.b32 %r8, 2;", "%p2 holds"),
        ("setp.eq.b32 %p2, %r9, 1;\nmov.b32 %r8, 1;\n@%p2 bra $ON;\n$ON:", "%p2 holds"),
    ],
)
def test_what_is_unknown_must_not_decide(use: str, words: str) -> None:
    before = "setp.lt.s32 %p0, %r0, 63;\n@%p0 mov.b32 %r9, 0;\n"
    check(fault("add.s32 %r8, %r6, %r7;", before + use), words, "thread 63 of program 0")


def test_halves_of_registers() -> None:
    """Check that each of two numbers in one register can be unknown on its own."""
    old = "add.s32 %r8, %r6, %r7;"
    pair = "mov.b64 %l9, {%r6, %r9};\nadd.rn.f32x2 %l9, %l9, %l9;\nmov.b64 %l10, %l9;\nmov.b64 {%r8, %r10}, %l10;"
    run(RIGHT.replace(old, pair))
    check(fault(old, f"{pair}\nmov.b32 %r8, %r10;"), "comes of what nothing has written")
    check(fault(old, f"{pair}\nshr.u64 %l10, %l10, 1;\nmov.b64 {{%r8, _}}, %l10;"), "comes of what nothing")
    quarter = "mov.b64 %l9, {%s1, %s2, %s2, %s2};\nmov.b64 {_, _, _, %s3}, %l9;\ncvt.u32.u16 %r8, %s3;"
    run(RIGHT.replace(old, f"mov.b16 %s2, 1;\n{quarter}"))


# Threads together -----------------------------------------------------------------------------------------


def test_barriers_that_not_all_threads_reach() -> None:
    text = fault("bar.sync 0;", "setp.lt.s32 %p0, %r0, 62;\n@%p0 bar.sync 0;")
    check(text, "`@%p0 bar.sync 0`", "not all threads of the program reach", "threads 62, 63 of program 0")
    text = fault("bar.sync 0;", "setp.eq.b32 %p0, %r0, 5;\n@%p0 bra $ON;\nbar.sync 0;\n$ON:")
    check(text, "waits for thread 5 of program 0")


def test_barriers_of_programs_that_are_elsewhere() -> None:
    """Check that a barrier does not wait for other programs."""
    run(
        RIGHT.replace(
            "bar.sync 0;",
            "setp.eq.b32 %p0, %r1, 1;\n@%p0 bra $ON;\nbar.sync 0;\nbra.uni $ON2;\n$ON:\nbar.sync 0;\n$ON2:",
        )
    )


@pytest.mark.parametrize(
    "exchange", ["shfl.sync.bfly.b32 %r7, %r6, 1, 31, -1;", "redux.sync.add.s32 %r7, %r6, -1;", "bar.warp.sync -1;"]
)
def test_exchanges_that_not_all_lanes_reach(exchange: str) -> None:
    old = "shfl.sync.bfly.b32 %r7, %r6, 1, 31, -1;"
    text = fault(old, f"mov.b32 %r7, 0;\nsetp.ne.b32 %p0, %r0, 40;\n@%p0 {exchange}")
    check(text, exchange.rstrip(";"), "lanes of a warp that should be here", "thread 40 of program 0")
    text = fault(old, f"mov.b32 %r7, 0;\n{exchange.replace('-1;', '65535;')}")
    check(text, "lanes of a warp", "threads 16, 17")


def test_exchanges_of_half_a_warp() -> None:
    """Check that only the lanes of the member mask need to arrive, and that others must not be read."""
    half = """
        mov.b32 %r7, 0;
        and.b32 %r9, %r0, 31;
        setp.lt.s32 %p0, %r9, 16;
        @%p0 shfl.sync.bfly.b32 %r7, %r6, {}, 31, 65535;"""
    old = "shfl.sync.bfly.b32 %r7, %r6, 1, 31, -1;"
    run(RIGHT.replace(old, half.format(8)))
    check(fault(old, half.format(16)), "takes no part is asked for its value")


def test_lanes_that_name_others_differently() -> None:
    old = "shfl.sync.bfly.b32 %r7, %r6, 1, 31, -1;"
    check(fault(old, "sub.s32 %r9, 0, %r0;\nshfl.sync.bfly.b32 %r7, %r6, 1, 31, %r9;"), "different lanes")


# Races ----------------------------------------------------------------------------------------------------


def test_shared_memory_without_a_barrier() -> None:
    text = fault("bar.sync 0;", "bar.warp.sync -1;")
    check(text, "a race in shared memory at 0x", "written by `st.shared.b32 [%r4], %r3`", "read by `ld.shared")
    assert re.search(r"in thread \d+ of program 0, and .* in thread \d+ of program 0", text)


def test_shared_memory_that_is_written_again_too_early() -> None:
    """Check that overwriting data that other warps may still read is a race."""
    after = "ld.shared.b32 %r6, [%r5];"
    check(fault(after, f"{after}\nst.shared.b32 [%r4], %r6;"), "a race in shared memory")
    run(RIGHT.replace(after, f"{after}\nbar.sync 0;\nst.shared.b32 [%r4], %r6;"))


def test_shared_memory_within_a_warp() -> None:
    """Check that only an instruction of the whole warp orders the accesses of two lanes."""
    swap = "xor.b32 %r9, %r4, 4;\nst.shared.b32 [%r4], %r6;\n{}\nld.shared.b32 %r6, [%r9];\n"
    old = "shfl.sync.bfly.b32 %r7, %r6, 1, 31, -1;"
    run(RIGHT.replace(old, "bar.sync 0;\n" + swap.format("bar.warp.sync -1;") + old))
    check(fault(old, "bar.sync 0;\n" + swap.format("") + old), "a race in shared memory")


def test_shared_memory_written_alike() -> None:
    """Check that threads that write equal values do not race, and those that write different ones do."""
    old = "bar.sync 0;"
    run(
        RIGHT.replace(old, f"{old}\nst.shared.b32 [256], %r1;\n")
        .replace("[256]", "[%r20]")
        .replace("    mov.u32 %r0", "    mov.b32 %r20, 256;\n    mov.u32 %r0"),
        shared=512,
    )
    check(
        fault(old, f"mov.b32 %r20, 256;\nst.shared.b32 [%r20], %r0;\n{old}", shared=512),
        "a race in shared memory at 0x100",
        "written by",
        "and written by",
    )


def test_races_of_threads_in_global_memory() -> None:
    """Check stores of different values to one address by two threads of a program."""
    text = fault("mad.wide.u32 %l3, %r2, 4, %l1;", "shr.u32 %r9, %r2, 2;\nmad.wide.u32 %l3, %r9, 4, %l1;")
    check(
        text,
        "a race in global memory at 0x",
        "int32 tensor of shape (192,)",
        "written by `st.global.b32 [%l3], %r8`",
    )


@pytest.mark.parametrize("at_once", [1, 3])
def test_races_of_programs(at_once: int) -> None:
    """Check races of two programs, even of programs that the machine does not run together."""
    text = fault("mad.wide.u32 %l3, %r2, 4, %l1;", "mad.wide.u32 %l3, %r0, 4, %l1;", at_once=at_once)
    check(text, "a race in global memory", "of program 0", "of program 1")
    reads = "ld.global.b32 %r3, [%l2];"
    body = RIGHT.replace("mad.wide.u32 %l3, %r2, 4, %l1;", "mad.wide.u32 %l3, %r2, 4, %l0;")
    run(body, at_once=at_once)  # the control: each program updates its own elements in place
    with pytest.raises(Fault, match=r"a race in global memory .* read by .* of program \d"):
        run(body.replace(reads, f"mad.wide.u32 %l2, %r0, 4, %l0;\n{reads}"), at_once=at_once)


def test_races_of_narrow_and_wide_accesses() -> None:
    """Check a wide load of elements that other threads store one by one."""
    old = "st.global.b32 [%l3], %r8;"
    wide = f"""{old}
        and.b32 %r9, %r2, -4;
        mad.wide.u32 %l4, %r9, 4, %l1;
        ld.global.v4.b32 {{%r10, %r11, %r12, %r13}}, [%l4];
        st.global.b32 [%l3], %r11;"""
    check(fault(old, wide), "a race in global memory", "ld.global.v4.b32")


COPIES = """
    shr.u32 %r9, %r2, {};
    mad.wide.u32 %l5, %r9, 4, %l0;
    ld.global.b32 %r10, [%l5];
    add.s32 %r10, %r10, 1;
    and.b32 %r11, %r2, {};
    setp.eq.b32 %p5, %r11, 0;
    @%p5 st.global.b32 [%l5], %r10;
"""


def test_copies_that_come_to_nothing() -> None:
    """Check that threads may load copies of a number that one of them updates, if the copies are not used."""
    out = "st.global.b32 [%l3], %r8;"
    start = RIGHT[: RIGHT.index("    mad.wide.u32 %l2")]
    for shift, mask in ((1, 1), (6, 63)):  # copies in one warp, and in two
        run(start + COPIES.format(shift, mask))
        use = "mad.wide.u32 %l3, %r2, 4, %l1;\nst.global.b32 [%l3], %r10;"
        with pytest.raises(Fault, match=r"a race in global memory .* written by .* read by"):
            run(start + COPIES.format(shift, mask) + use)  # now each copy is stored
    told = (
        "shfl.sync.down.b32 %r12, %r10, 1, 31, -1;\nmad.wide.u32 %l3, %r2, 4, %l1;\n@%p5 st.global.b32 [%l3], %r12;"
    )
    copies = COPIES.format(1, 1).replace("and.b32 %r11", "and.b32 %r11").split("    @%p5 st.global")[0]
    with pytest.raises(Fault, match="a race in global memory"):
        run(start + COPIES.format(1, 1) + told)  # a lane stores what another lane loaded
    run(start + copies + told)  # nothing is stored in place
    assert out in RIGHT


def test_faults_name_kernel_instruction_and_threads() -> None:
    # At addresses that no tensor can have: at a fixed distance from one tensor there may be another.
    text = fault("mad.wide.u32 %l2, %r2, 4, %l0;", "mul.wide.u32 %l2, %r2, 4;")
    assert re.fullmatch(
        r"test_kernel: `ld\.global\.b32 %r3, \[%l2\]` \(line \d+\): global access of 4 bytes at "
        r"0x[0-9a-f]+, outside of every tensor: .*, by threads 0, 1, 2, 3, 4, 5, 6, 7, \.\.\. of program 0 "
        r"and 128 of other programs",
        text,
    )


def test_what_other_threads_have_not_written_yet_is_not_unknown() -> None:
    """Check that a jump and a shuffle of one warp may use registers that the other warp has not written yet."""
    body = """
    mov.u32 %r0, %tid.x;
    setp.lt.s32 %p0, %r0, 32;
    @%p0 bra $LATE;
$USE:
    mov.b32 %r1, 1;
    shfl.sync.bfly.b32 %r2, %r0, %r1, 31, -1;
    ld.param.b64 %l0, [p0];
    mad.wide.u32 %l1, %r0, 4, %l0;
    setp.lt.s32 %p1, %r0, 64;
    @%p1 bra $STORE;
    bra.uni $END;
$LATE:
    bra.uni $USE;
$STORE:
    st.global.b32 [%l1], %r2;
$END:
"""
    x = torch.zeros(64, dtype=torch.int32)
    execute(kernel(body, parameters=1, threads=64), [x])
    assert x.tolist() == [i ^ 1 for i in range(64)]
