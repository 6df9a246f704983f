"""Tests of exchanges between threads: shuffles, reductions of a warp, barriers, matrices moved by a warp."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.ptx.running import apply, execute, kernel

LANES = list(range(32))


def shuffle(mode: str, by: int, clamp: int, values: list[int] | None = None) -> list[int]:
    """Return a shuffle's result in two warps, whose default values are the lanes, plus 100 in the second warp."""
    held = [*LANES, *(100 + lane for lane in LANES)] if values is None else values
    got = apply(f"shfl.sync.{mode}.b32", [("u32", held)], "u32", extra=[str(by), str(clamp), "-1"])
    return got.tolist()


@pytest.mark.parametrize("by", [1, 2, 4, 8, 16])
def test_butterflies(by: int) -> None:
    assert shuffle("bfly", by, 31) == [lane ^ by for lane in LANES] + [100 + (lane ^ by) for lane in LANES]


@pytest.mark.parametrize("by", [0, 1, 5, 31])
def test_shifts(by: int) -> None:
    """Check that a lane whose source would be outside the warp keeps its value."""
    assert shuffle("down", by, 31)[:32] == [lane + by if lane + by < 32 else lane for lane in LANES]
    assert shuffle("up", by, 0)[:32] == [lane - by if lane >= by else lane for lane in LANES]


def test_any_lane() -> None:
    assert shuffle("idx", 7, 31) == [7] * 32 + [107] * 32
    assert shuffle("idx", 39, 31)[:32] == [7] * 32  # only five bits count


def test_segments() -> None:
    """Check segments of 8 lanes: bits 8 to 12 select the bits of the lane index that a segment shares."""
    segment = 0b11000 << 8
    assert shuffle("idx", 3, segment | 31)[:32] == [lane // 8 * 8 + 3 for lane in LANES]
    assert shuffle("down", 5, segment | 31)[:32] == [lane + 5 if lane % 8 < 3 else lane for lane in LANES]
    assert shuffle("up", 5, segment)[:32] == [lane - 5 if lane % 8 >= 5 else lane for lane in LANES]
    assert shuffle("bfly", 4, segment | 31)[:32] == [lane ^ 4 for lane in LANES]


def test_lanes_may_ask_differently() -> None:
    wanted = [(3 * lane + 1) % 32 for lane in LANES]
    got = apply(
        "shfl.sync.idx.b32", [("u32", [10 * lane for lane in LANES]), ("u32", wanted)], "u32", extra=["31", "-1"]
    )
    assert got.tolist() == [10 * lane for lane in wanted]


def test_a_predicate_tells_whether_the_source_is_inside() -> None:
    out = torch.zeros(32, dtype=torch.int32)
    body = """
        mov.u32 %r0, %tid.x;
        shfl.sync.up.b32 %r1|%p0, %r0, 3, 0, -1;
        selp.b32 %r2, 1, 0, %p0;
        ld.param.b64 %l0, [p0];
        mad.wide.u32 %l1, %r0, 4, %l0;
        st.global.b32 [%l1], %r2;"""
    execute(kernel(body, parameters=1), [out])
    assert out.tolist() == [0, 0, 0, *[1] * 29]


@pytest.mark.parametrize(
    ("form", "kind", "expected"),
    [
        ("add.s32", "s32", [-16, 1040]),
        ("min.s32", "s32", [-16, 17]),
        ("max.s32", "s32", [15, 48]),
        ("add.u32", "u32", [2**32 - 16, 1040]),
        ("min.u32", "u32", [0, 17]),
        ("max.u32", "u32", [2**32 - 1, 48]),
        ("and.b32", "u32", [0, 0]),
        ("or.b32", "u32", [2**32 - 1, 63]),
        ("xor.b32", "u32", [0, 32]),
    ],
)
def test_reductions(form: str, kind: str, expected: list[int]) -> None:
    """Check reductions of -16 to 15 in the first warp, and of 17 to 48 in the second."""
    values = [*range(-16, 16), *range(17, 49)]
    if form == "xor.b32":
        x = 0
        for v in range(17, 49):
            x ^= v
        y = 0
        for v in range(-16, 16):
            y ^= v & 0xFFFFFFFF
        expected = [y, x]
    got = apply(f"redux.sync.{form}", [(kind, values)], kind, extra=["-1"])
    assert got.tolist() == [expected[0]] * 32 + [expected[1]] * 32


@pytest.mark.parametrize(
    ("modifiers", "least", "largest"),
    [("", -5.0, 26.0), (".abs", 0.0, 26.0), (".NaN", None, None), (".abs.NaN", None, None)],
)
def test_reductions_of_floats(modifiers: str, least: float | None, largest: float | None) -> None:
    """Check reductions of -5 to 26, one of which is replaced by a NaN."""
    values = [float("nan") if lane == 20 else lane - 5.0 for lane in LANES]
    for name, expected in (("min", least), ("max", largest)):
        got = apply(f"redux.sync.{name}{modifiers}.f32", [("f32", values)], "f32", extra=["-1"])
        assert np.isnan(got).all() if expected is None else got.tolist() == [expected] * 32


@pytest.mark.parametrize("form", ["bar.sync", "barrier.sync", "barrier.sync.aligned"])
def test_barriers(form: str) -> None:
    """Check that threads of several warps can exchange values through shared memory."""
    out = torch.zeros(128, dtype=torch.int32)
    body = f"""
        mov.u32 %r0, %tid.x;
        mov.u32 %r1, %ctaid.x;
        mov.u32 %r2, %ntid.x;
        mad.lo.s32 %r3, %r1, %r2, %r0;
        shl.b32 %r4, %r0, 2;
        st.shared.b32 [%r4], %r3;
        {form} 0;
        xor.b32 %r5, %r0, 63;
        shl.b32 %r5, %r5, 2;
        ld.shared.b32 %r6, [%r5];
        ld.param.b64 %l0, [p0];
        mad.wide.u32 %l1, %r3, 4, %l0;
        st.global.b32 [%l1], %r6;"""
    execute(kernel(body, parameters=1, threads=64), [out], grid=2, shared=256)
    assert out.tolist() == [*range(63, -1, -1), *range(127, 63, -1)]


def test_barriers_of_a_warp() -> None:
    """Check that lanes of a warp can exchange values through shared memory with a barrier of the warp."""
    out = torch.zeros(64, dtype=torch.int32)
    body = """
        mov.u32 %r0, %tid.x;
        shl.b32 %r4, %r0, 2;
        st.shared.b32 [%r4], %r0;
        bar.warp.sync -1;
        xor.b32 %r5, %r4, 124;
        ld.shared.b32 %r6, [%r5];
        ld.param.b64 %l0, [p0];
        mad.wide.u32 %l1, %r0, 4, %l0;
        st.global.b32 [%l1], %r6;"""
    execute(kernel(body, parameters=1, threads=64), [out], shared=256)
    assert out.tolist() == [*range(31, -1, -1), *range(63, 31, -1)]


def matrices(n: int, trans: str, cta: str) -> tuple[str, str]:
    """Return kernels that load, and that store, matrices, whose row i lies at byte 16 i."""
    registers = "{" + ", ".join(f"%r{10 + i}" for i in range(n)) + "}"
    place = """
        mov.u32 %r0, %tid.x;
        ld.param.b64 %l0, [p0];
        ld.param.b64 %l1, [p1];
        shl.b32 %r1, %r0, 4;"""
    # shared memory has the 16-bit numbers 0, 1, ..., 64 n - 1; each thread stores its registers
    fill = "".join(
        f"""
        add.s32 %r2, %r0, {32 * i};
        shl.b32 %r3, %r2, 2;
        cvt.u64.u32 %l2, %r3;
        add.s64 %l3, %l0, %l2;
        ld.global.b32 %r4, [%l3];
        st.shared.b32 [%r3], %r4;"""
        for i in range(n)
    )
    keep = "".join(
        f"""
        mad.lo.s32 %r5, %r0, {n}, {i};
        mad.wide.u32 %l4, %r5, 4, %l1;
        st.global.b32 [%l4], %r{10 + i};"""
        for i in range(n)
    )
    given = "".join(
        f"""
        mad.lo.s32 %r5, %r0, {n}, {i};
        mad.wide.u32 %l4, %r5, 4, %l0;
        ld.global.b32 %r{10 + i}, [%l4];"""
        for i in range(n)
    )
    drain = "".join(
        f"""
        add.s32 %r2, %r0, {32 * i};
        shl.b32 %r3, %r2, 2;
        cvt.u64.u32 %l2, %r3;
        add.s64 %l3, %l1, %l2;
        ld.shared.b32 %r4, [%r3];
        st.global.b32 [%l3], %r4;"""
        for i in range(n)
    )
    own = f"sync.aligned.m8n8.x{n}{trans}.shared{cta}.b16"
    limit = f"min.u32 %r1, %r1, {128 * n - 16};"  # keeps in range the addresses that no matrix uses
    load = kernel(f"{place}{limit}{fill}\nbar.sync 0;\nldmatrix.{own} {registers}, [%r1];{keep}", parameters=2)
    store = kernel(f"{place}{limit}{given}\nstmatrix.{own} [%r1], {registers};\nbar.sync 0;{drain}", parameters=2)
    return load, store


@pytest.mark.parametrize("cta", ["", "::cta"])
@pytest.mark.parametrize("trans", ["", ".trans"])
@pytest.mark.parametrize("n", [1, 2, 4])
def test_matrices(n: int, trans: str, cta: str) -> None:
    """Check that lane l holds elements 2 (l % 4) and the next of row l / 4, or of this column if transposed."""
    memory = torch.arange(64 * n, dtype=torch.int16)
    held = torch.zeros(32, n, 2, dtype=torch.int16)
    load, store = matrices(n, trans, cta)
    execute(load, [memory, held], shared=128 * n)
    for lane in LANES:
        for i in range(n):
            for half in range(2):
                row, column = lane // 4, 2 * (lane % 4) + half
                row, column = (column, row) if trans else (row, column)
                assert held[lane, i, half] == 64 * i + 8 * row + column
    back = torch.zeros_like(memory)
    execute(store, [held, back], shared=128 * n)
    assert torch.equal(back, memory)
