"""Tests counts of executed instructions, sectors and dependent loads, on kernels whose counts are known by hand."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence

import pytest
import torch
from torch import Tensor

from tests.ptx.counts import CLASSES, LOOK_UPS, ExecutionCounter, Tally, Traffic, class_of
from tests.ptx.machine import Launch, Machine
from tests.ptx.memory import HostMemory
from tests.ptx.program import FORMS, JUMPS, Program
from tests.ptx.running import kernel
from tests.ptx.tensors import LiveTensors
from tests.ptx.types import PtxError

MEMORY = HostMemory(LiveTensors())


def count(
    body: str,
    tensors: Sequence[Tensor],
    arrays: Mapping[str, Sequence[Tensor]],
    *,
    awaited: str = "g",
    threads: int = 32,
    grid: int = 1,
    at_once: int | None = None,
    shared: int = 0,
) -> Tally:
    """Return the tally of a kernel whose parameters are the tensors."""
    program = Program(kernel(body, parameters=len(tensors), threads=threads))
    MEMORY.tensors.begin()
    words = [x.data_ptr() for x in tensors]
    launch = Launch(program, grid, struct.pack(f"<{len(words)}q", *words), shared, MEMORY)
    counter = ExecutionCounter(arrays, awaited)
    at_once = at_once or grid
    for first in range(0, grid, at_once):
        counter.machine(launch, first, min(at_once, grid - first)).run()
    return counter.of("test_kernel")


def aligned(n: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a tensor of ``n`` elements that begins at a multiple of 128 bytes."""
    x = torch.zeros(n * dtype.itemsize + 128, dtype=torch.uint8)
    off = -x.data_ptr() % 128
    return x[off : off + n * dtype.itemsize].view(dtype)


# Classes ---------------------------------------------------------------------------------------------------


def test_every_form_has_a_class() -> None:
    found = {class_of(form) for form in (*FORMS, *JUMPS)}
    assert found == set(CLASSES)
    with pytest.raises(PtxError, match=r"tanh\.approx\.f32 is of no class"):
        class_of("tanh.approx.f32")


@pytest.mark.parametrize(
    ("name", "opcodes"),
    [
        ("memory", "ld.global.b32 st.global.v4.b32 ld.shared.v2.b32 st.shared.b8 "
                   "ldmatrix.sync.aligned.m8n8.x4.shared.b16"),
        ("integer", "add.s32 mad.lo.s32 mul.wide.u32 and.b32 shl.b64 min.s32 prmt.b32 popc.b32 shf.l.wrap.b32"),
        ("float", "add.f32 fma.rn.f32 mul.f32 min.NaN.f32 neg.f64 abs.ftz.f32 sub.f64"),
        ("conversion", "cvt.rn.bf16x2.f32 cvt.u64.u32 cvt.rn.f32.s32"),
        ("special", "rcp.approx.f32 sqrt.rn.f32 div.rn.f32 div.s32 rem.u64 ex2.approx.f32 lg2.approx.f32"),
        ("shuffle", "shfl.sync.bfly.b32 redux.sync.add.s32"),
        ("other", "mov.b32 setp.lt.s32 selp.b32 and.pred not.pred bra bra.uni ret bar.sync ld.param.b64"),
    ],
)  # fmt: skip
def test_classes(name: str, opcodes: str) -> None:
    assert {opcode: class_of(opcode) for opcode in opcodes.split()} == dict.fromkeys(opcodes.split(), name)


# Instructions ----------------------------------------------------------------------------------------------

ONE_OF_EACH = """
    mov.u32 %r0, %tid.x;
    mul.wide.u32 %l1, %r0, 4;
    ld.param.b64 %l0, [p0];
    add.s64 %l2, %l0, %l1;
    ld.global.b32 %r1, [%l2];
    cvt.rn.f32.s32 %r2, %r1;
    add.f32 %r3, %r2, %r2;
    rcp.approx.f32 %r4, %r3;
    shfl.sync.bfly.b32 %r5, %r4, 1, 31, -1;
    setp.lt.u32 %p0, %r0, 8;
    @%p0 st.global.b32 [%l2], %r5;
"""


def test_each_class_is_counted() -> None:
    """Count 11 instructions and a return of 2 programs of 64 threads, 8 of which execute the store."""
    x = aligned(64)
    tally = count(ONE_OF_EACH, [x], {"g": [x]}, threads=64, grid=2)
    threads = tally.by_class(tally.threads)
    assert threads == {
        "memory": 128 + 16, "integer": 256, "float": 128, "conversion": 128, "special": 128, "shuffle": 128,
        "other": 4 * 128,
    }  # fmt: skip
    assert sum(threads.values()) == int(tally.threads.sum()) == 11 * 128 + 16
    # A warp issues the store even if its guard is false in all lanes.
    assert tally.by_class(tally.issued) == {
        "memory": 8, "integer": 8, "float": 4, "conversion": 4, "special": 4, "shuffle": 4, "other": 16,
    }  # fmt: skip
    assert tally.programs == 2
    assert tally.by_opcode()["st b32"] == 16
    assert tally.by_opcode()["cvt s32"] == 128


LOOP = """
    mov.u32 %r0, %tid.x;
    mov.u32 %r1, 0;
$again:
    add.s32 %r1, %r1, 1;
    setp.le.u32 %p0, %r1, %r0;
    @%p0 bra $again;
    bra.uni $end;
    add.s32 %r2, %r1, %r1;
$end:
"""


@pytest.mark.parametrize("at_once", [1, 3])
def test_loops_count_as_often_as_they_run(at_once: int) -> None:
    """Count a loop that thread t of 64 runs t + 1 times, and its warp as often as its last thread."""
    tally = count(LOOP, [], {}, threads=64, grid=3, at_once=at_once)
    rounds = 3 * sum(range(1, 65))
    assert tally.threads.tolist() == [192, 192, rounds, rounds, rounds, 192, 0, 192]
    assert tally.issued.tolist() == [6, 6, *[3 * (32 + 64)] * 3, 6, 0, 6]


def test_a_kernel_that_ends_without_a_return() -> None:
    program = Program(kernel("mov.u32 %r0, 1;").replace("ret;", ""))
    counter = ExecutionCounter({}, "g")
    counter.machine(Launch(program, 1, b"", 0, MEMORY), 0, 1).run()
    assert counter.of("test_kernel").threads.tolist() == [32]


def test_two_halves_of_a_warp_that_part() -> None:
    """Count both sides of a divergent branch: the warp issues each, and each lane executes one."""
    body = """
    mov.u32 %r0, %tid.x;
    setp.lt.u32 %p0, %r0, 20;
    @%p0 bra $few;
    add.s32 %r1, %r0, 1;
    bra.uni $end;
$few:
    mul.lo.s32 %r1, %r0, 2;
$end:
"""
    tally = count(body, [], {})
    assert tally.threads.tolist() == [32, 32, 32, 12, 12, 20, 32]
    assert tally.issued.tolist() == [1, 1, 1, 1, 1, 1, 1]


def test_counting_changes_no_result() -> None:
    x, y = aligned(64), aligned(64)
    x.copy_(torch.arange(64.0))
    y.copy_(x)
    count(ONE_OF_EACH, [x], {"g": [x]}, threads=64)
    launch = Launch(
        Program(kernel(ONE_OF_EACH, parameters=1, threads=64)), 1, struct.pack("<q", y.data_ptr()), 0, MEMORY
    )
    MEMORY.tensors.begin()
    Machine(launch, 0, 1).run()
    assert torch.equal(x.view(torch.int32), y.view(torch.int32))


# Sectors ---------------------------------------------------------------------------------------------------


def access(stride: int, off: int = 0, form: str = "b32", guard: str = "", register: str = "%r1") -> str:
    return f"""
    mov.u32 %r0, %tid.x;
    setp.lt.u32 %p0, %r0, 5;
    mul.wide.u32 %l1, %r0, {stride};
    ld.param.b64 %l0, [p0];
    add.s64 %l2, %l0, %l1;
    {guard} ld.global.{form} {register}, [%l2+{off}];
"""


@pytest.mark.parametrize(
    ("body", "sectors", "asked"),
    [
        (access(4), 4, 128),  # 32 neighbouring elements of 4 bytes
        (access(4, off=4), 5, 128),  # the same, not at the start of a sector
        (access(2, form="b16", register="%s1"), 2, 64),
        (access(16, form="v4.b32", register="{%r1, %r2, %r3, %r4}"), 16, 512),
        (access(32), 32, 128),  # each lane in a sector of its own
        (access(64), 32, 128),
        (access(0), 1, 128),  # all lanes at one address
        (access(4, guard="@%p0"), 1, 20),
        (access(32, guard="@%p0"), 5, 20),
        (access(4, guard="@!%p0"), 4, 108),
    ],
)
def test_sectors(body: str, sectors: int, asked: int) -> None:
    x = aligned(1024)
    assert count(body, [x], {"g": [x]}).traffic == {("g", "load"): Traffic(asked, sectors, sectors)}


def test_sectors_of_warps_and_programs_add_up() -> None:
    """Count sectors of 3 programs of two warps that read one number: one per warp, one distinct per program."""
    x = aligned(64)
    for at_once in (1, 3):
        tally = count(access(0), [x], {"g": [x]}, threads=64, grid=3, at_once=at_once)
        assert tally.traffic == {("g", "load"): Traffic(3 * 256, 6, 3)}


def test_an_address_that_no_thread_computes_for_itself() -> None:
    """Count loads from one address by all 64 threads, by the second warp only, and by program 1 only."""
    x = aligned(64)
    body = """
    mov.u32 %r0, %tid.x;
    mov.u32 %r1, %ctaid.x;
    setp.ge.u32 %p0, %r0, 32;
    setp.eq.u32 %p1, %r1, 1;
    ld.param.b64 %l0, [p0];
    ld.global.b32 %r2, [%l0];
    @%p0 ld.global.b32 %r3, [%l0+32];
    @%p1 ld.global.b32 %r4, [%l0+64];
"""
    tally = count(body, [x], {"g": [x]}, threads=64, grid=2)
    assert tally.traffic == {("g", "load"): Traffic(512 + 256 + 256, 4 + 2 + 2, 2 + 2 + 1)}


def test_a_sector_that_is_asked_for_again() -> None:
    """Check that a program's second load from a sector adds to ``sectors``, but not to ``distinct``."""
    x = aligned(64)
    body = access(4) + "ld.global.b32 %r2, [%l2+16];\nst.global.b32 [%l2], %r2;"
    tally = count(body, [x], {"g": [x]})
    assert tally.traffic == {("g", "load"): Traffic(256, 9, 5), ("g", "store"): Traffic(128, 4, 4)}
    assert tally.sectors() == 13
    assert tally.sectors(distinct=True) == 9


def test_traffic_is_told_apart_by_array() -> None:
    """Count an array of several tensors; a load outside all arrays is a look-up, not traffic of arrays."""
    table, one, other = aligned(32, torch.int64), aligned(32), aligned(32)
    table[0], table[1] = one.data_ptr(), other.data_ptr()
    body = """
    mov.u32 %r0, %tid.x;
    mov.u32 %r1, %ctaid.x;
    mul.wide.u32 %l1, %r1, 8;
    ld.param.b64 %l0, [p0];
    add.s64 %l2, %l0, %l1;
    ld.global.b64 %l3, [%l2];
    mul.wide.u32 %l4, %r0, 4;
    add.s64 %l5, %l3, %l4;
    ld.global.b32 %r2, [%l5];
"""
    tally = count(body, [table], {"g": [one, other]}, grid=2)
    assert tally.traffic == {(LOOK_UPS, "load"): Traffic(512, 2, 2), ("g", "load"): Traffic(256, 8, 8)}
    assert tally.sectors() == 8


def test_shared_memory_has_no_sectors() -> None:
    body = """
    mov.u32 %r0, %tid.x;
    shl.b32 %r1, %r0, 2;
    st.shared.b32 [%r1], %r0;
    bar.sync 0;
    ld.shared.b32 %r2, [%r1];
"""
    tally = count(body, [], {}, shared=128)
    assert tally.traffic == {}
    assert tally.by_class(tally.threads)["memory"] == 64


# Dependent loads -------------------------------------------------------------------------------------------

LAST = """
    ld.param.b64 %l9, [p1];
    add.s64 %l8, %l9, {offset};
    ld.global.b32 %r9, [%l8];
"""


def chain(body: str, offset: str = "0", **options: int) -> list[int]:
    """Return the programs' lengths of chains to a gradient's load after ``body``, in increasing order."""
    table, g = aligned(64, torch.int64), aligned(64)
    table[:] = 0
    start = "mov.u32 %r0, %tid.x;\nld.param.b64 %l0, [p0];\n"
    tally = count(start + body + LAST.format(offset=offset), [table, g], {"g": [g]}, **options)
    return sorted(tally.waits.elements())


def test_a_load_that_waits_for_none() -> None:
    assert chain("ld.global.b64 %l1, [%l0];") == [0]


def test_loads_side_by_side_are_one() -> None:
    assert chain("ld.global.b64 %l1, [%l0];\nld.global.b64 %l2, [%l0+8];\nadd.s64 %l3, %l1, %l2;", "%l3") == [1]


def test_loads_one_after_the_other() -> None:
    step = "ld.global.b64 %l1, [%l0];\nadd.s64 %l0, %l0, %l1;\n"
    assert chain(3 * step, "%l1") == [3]


def test_a_register_that_is_written_anew_waits_no_longer() -> None:
    assert chain("ld.global.b64 %l1, [%l0];\nmov.b64 %l1, 0;", "%l1") == [0]


def test_loops_lengthen_the_chain_each_time() -> None:
    """Check that chains of program k have k + 1 loads, whether programs run one by one or together."""
    body = """
    mov.u32 %r1, %ctaid.x;
    mov.u32 %r2, 0;
$again:
    ld.global.b64 %l1, [%l0];
    add.s64 %l0, %l0, %l1;
    add.s32 %r2, %r2, 1;
    setp.le.u32 %p0, %r2, %r1;
    @%p0 bra $again;
"""
    for at_once in (1, 4):
        assert chain(body, "%l1", grid=4, at_once=at_once) == [1, 2, 3, 4]


def test_what_is_issued_behind_a_jump_waits_for_it() -> None:
    body = "ld.global.b32 %r1, [%l0];\nsetp.ne.b32 %p0, %r1, 0;\n@%p0 bra $there;\n$there:\n"
    assert chain(body) == [1]


def test_a_guard_is_waited_for() -> None:
    table, g = aligned(64, torch.int64), aligned(64)
    table[:] = 0
    body = """
    ld.param.b64 %l0, [p0];
    ld.param.b64 %l9, [p1];
    ld.global.b32 %r1, [%l0];
    setp.eq.b32 %p0, %r1, 0;
    @%p0 ld.global.b32 %r9, [%l9];
"""
    assert count(body, [table, g], {"g": [g]}).waits == {1: 1}


def test_a_guard_that_holds_for_none_asks_for_nothing() -> None:
    g = aligned(64)
    body = "ld.param.b64 %l0, [p0];\nsetp.ne.b32 %p0, 0, 0;\n@%p0 ld.global.b32 %r9, [%l0];\n"
    assert not count(body, [g], {"g": [g]}).waits


def test_chains_go_through_lanes_and_shared_memory() -> None:
    body = """
    setp.eq.b32 %p0, %r0, 0;
    mov.b32 %r1, 0;
    @%p0 ld.global.b32 %r1, [%l0];
    shfl.sync.idx.b32 %r2, %r1, 0, 31, -1;
    st.shared.b32 [0], %r2;
    bar.sync 0;
    ld.shared.b32 %r3, [0];
    cvt.u64.u32 %l1, %r3;
    add.s64 %l2, %l0, %l1;
    ld.global.b64 %l3, [%l2];
"""
    assert chain(body, "%l3", shared=16, threads=64) == [2]


def test_the_first_gradient_counts_alone() -> None:
    assert chain(LAST.format(offset=0) + "ld.global.b64 %l1, [%l0];\n", "%l1") == [0]


def test_the_first_gradient_of_each_program() -> None:
    """Check that only the first gradient counts: program 0 loads one without waiting, then both one that waits."""
    table, g = aligned(64, torch.int64), aligned(64)
    table[:] = 0
    body = """
    mov.u32 %r0, %ctaid.x;
    setp.eq.u32 %p0, %r0, 0;
    ld.param.b64 %l0, [p0];
    ld.param.b64 %l1, [p1];
    @%p0 ld.global.b32 %r1, [%l1];
    ld.global.b64 %l2, [%l0];
    add.s64 %l3, %l1, %l2;
    ld.global.b32 %r2, [%l3];
"""
    assert count(body, [table, g], {"g": [g]}, grid=2).waits == {0: 1, 1: 1}


def test_a_kernel_that_did_not_run_is_named() -> None:
    counter = ExecutionCounter({}, "g")
    with pytest.raises(ValueError, match="one kernel 'step_kernel' is expected to have run, got 0 of none"):
        counter.of("step_kernel")


def test_lengths_of_arrays_are_bytes() -> None:
    x = aligned(4, torch.int16)
    counter = ExecutionCounter({"g": [x]}, "g")
    start = x.data_ptr()
    assert [counter.name_of(start + i) for i in (-1, 0, 7, 8)] == [LOOK_UPS, "g", "g", LOOK_UPS]
