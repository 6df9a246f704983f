"""Tests loads, stores and parameters of every width, sign and number of registers, in both memories."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import torch

from tests.ptx.machine import Launch, Machine
from tests.ptx.memory import HostMemory
from tests.ptx.program import Program
from tests.ptx.running import execute, kernel
from tests.ptx.tensors import LiveTensors

KINDS = ("b8", "b16", "b32", "b64", "u8", "u16", "u32", "u64", "s8", "s16", "s32", "s64", "f32", "f64")
REGISTERS = {8: "%s", 16: "%s", 32: "%r", 64: "%l"}


def names(kind: str, n: int) -> str:
    registers = [f"{REGISTERS[int(kind[1:])]}{10 + i}" for i in range(n)]
    return registers[0] if n == 1 else "{" + ", ".join(registers) + "}"


@pytest.mark.parametrize("space", ["global", "shared", "shared::cta"])
@pytest.mark.parametrize(
    ("kind", "n"), [(kind, n) for kind in KINDS for n in (1, 2, 4) if int(kind[1:]) * n <= 128]
)
def test_copies(kind: str, n: int, space: str) -> None:
    """Each of 64 threads copies its own elements, from the second half of memory to the first."""
    size = int(kind[1:]) // 8 * n
    form = f"{space}{'' if n == 1 else f'.v{n}'}.{kind}"
    x = torch.from_numpy(np.random.default_rng(0).integers(0, 256, 128 * size, np.uint8))
    before = x.clone()
    body = f"""
        mov.u32 %r0, %tid.x;
        mul.lo.s32 %r1, %r0, {size};
        ld.param.b64 %l0, [p0];
        cvt.u64.u32 %l1, %r1;
        add.s64 %l2, %l0, %l1;"""
    if space == "global":
        body += f"ld.{form} {names(kind, n)}, [%l2+{64 * size}];\nst.{form} [%l2], {names(kind, n)};"
    else:  # through shared memory and back
        for i in range(size):
            body += f"ld.global.b8 %s0, [%l2+{64 * size + i}];\nst.shared.b8 [%r1+{i}], %s0;"
        body += f"ld.{form} {names(kind, n)}, [%r1];\nst.{form} [%r1+{64 * size}], {names(kind, n)};"
        for i in range(size):
            body += f"ld.shared.b8 %s0, [%r1+{64 * size + i}];\nst.global.b8 [%l2+{i}], %s0;"
    execute(kernel(body, parameters=1, threads=64), [x], shared=128 * size)
    assert torch.equal(x[: 64 * size], before[64 * size :])
    assert torch.equal(x[64 * size :], before[64 * size :])


@pytest.mark.parametrize("space", ["global", "shared", "param"])
@pytest.mark.parametrize(
    ("kind", "register", "stored", "expected"),
    [
        ("s8", "%s10", "b16", 0xFF80),
        ("u8", "%s10", "b16", 0x0080),
        ("b8", "%s10", "b16", 0x0080),
        ("s8", "%r10", "b32", 0xFFFFFF80),
        ("s8", "%l10", "b64", 0xFFFFFFFFFFFFFF80),
        ("s16", "%r10", "b32", 0xFFFFC080),
        ("u16", "%r10", "b32", 0x0000C080),
        ("s32", "%l10", "b64", 0xFFFFFFFFE0A0C080),
        ("u32", "%l10", "b64", 0x00000000E0A0C080),
    ],
)
def test_extension(space: str, kind: str, register: str, stored: str, expected: int) -> None:
    """Check that values narrower than their registers are sign-extended if their type is signed."""
    given, out = torch.tensor([0xE0A0C080 - 2**32]), torch.zeros(1, dtype=torch.int64)
    load = {
        "global": f"ld.global.{kind} {register}, [%l0];",
        "shared": f"ld.global.b64 %l2, [%l0];\nst.shared.b64 [0], %l2;\nld.shared.{kind} {register}, [0];",
        "param": f"ld.param.{kind} {register}, [p2];",
    }[space].replace("[0]", "[global_smem]")
    body = f"""
        ld.param.b64 %l0, [p0];
        ld.param.b64 %l1, [p1];
        mov.u32 %r0, %tid.x;
        setp.eq.b32 %p0, %r0, 0;
        @!%p0 ret;
        {load}
        st.global.{stored} [%l1], {register};"""
    execute(kernel(body, parameters=3), [given, out, int(given)], shared=16)
    assert int(out) & 0xFFFFFFFFFFFFFFFF == expected


@pytest.mark.parametrize("kind", KINDS)
def test_parameters(kind: str) -> None:
    """Check that parameters lie one after the other, each at a multiple of its size."""
    size = int(kind[1:]) // 8
    store = {8: "st.global.b64", 4: "st.global.b32", 2: "st.global.b16", 1: "st.global.b8"}[size]
    register = f"{REGISTERS[8 * size]}10"
    ptx = kernel(
        f"""
        ld.param.b64 %l0, [out];
        mov.u32 %r0, %tid.x;
        setp.ne.b32 %p0, %r0, 0;
        @%p0 ret;
        ld.param.{kind} {register}, [x];
        {store} [%l0], {register};"""
    ).replace(
        "test_kernel(\n", f"test_kernel(.param .u8 first, .param .{kind} x, .param .u64 .ptr .global .align 1 out"
    )
    out = torch.zeros(8, dtype=torch.uint8)
    program = Program(ptx)
    data = bytearray(program.kernel.parameter_bytes)
    pattern = bytes(range(1, size + 1))
    data[size : 2 * size] = pattern
    struct.pack_into("<Q", data, len(data) - 8, out.data_ptr())
    Machine(Launch(program, 1, bytes(data), 0, HostMemory(LiveTensors())), 0, 1).run()
    assert bytes(out.tolist()[:size]) == pattern
    assert not out[size:].any()


def test_offsets_of_parameters() -> None:
    out = torch.zeros(1, dtype=torch.int32)
    body = """
        ld.param.b64 %l0, [p0];
        ld.param.b32 %r1, [p1+4];
        st.global.b32 [%l0], %r1;"""
    execute(kernel(body, parameters=2), [out, 7 << 32])
    assert int(out) == 7


def test_offsets_wrap_addresses_of_shared_memory() -> None:
    out = torch.zeros(1, dtype=torch.int32)
    body = """
        ld.param.b64 %l0, [p0];
        mov.u32 %r0, %tid.x;
        setp.ne.b32 %p0, %r0, 0;
        @%p0 ret;
        mov.u32 %r1, 8;
        mov.u32 %r2, -16;
        mov.u32 %r3, 7;
        st.shared.b32 [%r1+-4], %r3;
        ld.shared.b32 %r4, [%r2+20];
        st.global.b32 [%l0], %r4;"""
    execute(kernel(body, parameters=1), [out], shared=16)
    assert int(out) == 7


def test_special_registers() -> None:
    out = torch.zeros(3, 64, 6, dtype=torch.int32)
    listed = ("%tid.x", "%ctaid.x", "%ntid.x", "%nctaid.x", "%laneid", "%warpid")
    body = """
        mov.u32 %r0, %tid.x;
        mov.u32 %r1, %ctaid.x;
        mad.lo.s32 %r2, %r1, 64, %r0;
        ld.param.b64 %l0, [p0];
        mad.wide.u32 %l1, %r2, 24, %l0;"""
    for i, name in enumerate(listed):
        body += f"mov.u32 %r3, {name};\nst.global.b32 [%l1+{4 * i}], %r3;"
    execute(kernel(body, parameters=1, threads=64), [out], grid=3, at_once=2)
    for program in range(3):
        for thread in range(64):
            assert out[program, thread].tolist() == [thread, program, 64, 3, thread % 32, thread // 32]


def test_pieces_are_put_together() -> None:
    out = torch.zeros(3, dtype=torch.int64)
    body = """
        ld.param.b64 %l0, [p0];
        mov.b16 %s0, 0x1234;
        mov.b16 %s1, -2;
        mov.b32 %r0, {%s0, %s1};
        cvt.u64.u32 %l1, %r0;
        st.global.b64 [%l0], %l1;
        mov.b64 %l2, {%r0, %r0};
        st.global.b64 [%l0+8], %l2;
        mov.b32 {_, %s2}, %r0;
        cvt.s64.s16 %l3, %s2;
        st.global.b64 [%l0+16], %l3;"""
    execute(kernel(body, parameters=1), [out])
    assert out.tolist() == [0xFFFE1234, 0xFFFE1234FFFE1234 - 2**64, -2]
