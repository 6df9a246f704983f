"""Counts of executed instructions: the promised variants keep their limits, and the counts are right."""

from __future__ import annotations

import copy
import fcntl
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton: pip install triton")

from bench.codegen import __main__ as codegen
from bench.codegen import executed, executed_command, machine_code
from bench.codegen.bounds import INTEGER, RATES, SHUFFLE, SLOTS, SPECIAL, demands, shares
from bench.codegen.execution_limits import LIMITS, excesses, limit_of
from bench.codegen.launches import DTYPES, DWT, IDWT, LIMITER, MOMENTS, NORM, PANEL, ROW_STEP, STEP, arrays_of
from bench.codegen.variant import Variant
from bench.codegen.variant_runs import VariantError
from bench.common import records
from bench.kernels import cases as kernel_cases
from bench.report.executed import CLASSES as SHOWN
from bench.report.executed import bound, listing, section
from bench.report.rows import Run
from tests.ptx.counts import CLASSES
from tests.ptx.plugin import CACHE

Row = dict[str, Any]


@pytest.fixture(scope="module")
def gated(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    """Return the rows of all limited variants, counted once by one of the workers of this test run."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(CACHE)
    done, out = folder / "executed_done.json", folder / "executed"
    with open(folder / "executed_lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            command = ["-m", "bench.codegen", "--executed", "--gate", "--jobs", "2", "--record"]
            run = subprocess.run(
                [sys.executable, *command, str(out)],
                capture_output=True,
                text=True,
                cwd=Path(__file__).parents[2],
                env=environment,
                timeout=500,
            )
            assert run.returncode == 0, run.stdout + run.stderr
            (path,) = out.glob("executed_triton-*.json")
            done.write_text(json.dumps([records.rows_of(path, "executed"), run.stdout]))
    rows, text = json.loads(done.read_text())
    assert (
        "132 x 4 x 32 instructions of a thread a cycle, at 1.7 GHz, of which 132 x 64 of the integer unit" in text
    )
    return rows


def the(rows: list[Row], **wanted: Any) -> Row:
    wanted = {"kernel": STEP, "rule": "gwt", "level": 2, **wanted}
    (row,) = [row for row in rows if all(row[k] == value for k, value in wanted.items())]
    return row


def test_limits_are_kept(gated: list[Row]) -> None:
    assert [limit_of(row) for row in gated] == list(LIMITS)
    assert [excesses(row) for row in gated] == [[] for _ in LIMITS]


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("1000 instructions an element instead of at most", lambda r: r.update(executed=1000.0)),
        ("1.001 sectors over bytes that must move instead of at most 1", lambda r: r.update(requested=1.001)),
        ("30 dependent loads instead of at most", lambda r: r.update(dependent_loads=30)),
    ],
)
def test_each_limit_can_be_exceeded(gated: list[Row], message: str, change: Callable[[Row], object]) -> None:
    row = copy.deepcopy(the(gated, weights="bf16", moments="fp32", path="flat", rounding="nearest"))
    change(row)
    (found,) = excesses(row)
    assert found.startswith(message)
    assert excesses(row | {"level": 3}) == []  # the variant has no promise


def test_counts_of_classes_add_up(gated: list[Row]) -> None:
    assert SHOWN == CLASSES
    for row in gated:
        assert list(row["instructions"]) == list(CLASSES)
        assert sum(row["instructions"].values()) == pytest.approx(row["executed"], rel=1e-12)
        assert row["slots"] >= row["executed"]
        assert sum(row["dominant"].values()) <= row["executed"]


def test_flat_step_counted_by_hand(gated: list[Row]) -> None:
    """Count 16 tensors of 16,384 elements at level 2 in tiles of 4,096: 16 elements, 4 blocks, per thread."""
    row = the(gated, weights="bf16", moments="fp32", path="flat", rounding="nearest")
    assert (row["elements"], row["programs"]) == (16 * 16384, 64)
    assert row["bytes"] == 10.0
    own = {
        "p load": 2.0,
        "g load": 2.0,
        "p store": 2.0,
        **dict.fromkeys(("m load", "v load", "m store", "v store"), 1.0),
    }
    assert {name: n for name, n in row["sectors"].items() if name != "look-ups load"} == own
    assert row["requested"] == row["distinct"] == 1.0
    assert row["instructions"]["special"] == (4 + 4) / 16  # a root and a division for each block
    assert row["instructions"]["shuffle"] == 0.0  # a thread has whole blocks
    assert 0.5 < row["machine_ratio"] < 3
    wide = the(gated, weights="fp32", path="flat", moments="fp32")
    assert (wide["bytes"], wide["requested"]) == (16.0, 1.0)


def test_row_step_requests_shared_sectors_more_than_once(gated: list[Row]) -> None:
    row = the(gated, weights="bf16", path="row", rounding="nearest")
    blocks = -(-5461 // 4)
    assert row["bytes"] == pytest.approx((3 * 2 * 5461 + 4 * 4 * blocks) / 5461, rel=1e-12)
    assert row["elements"] == 16 * 5 * 5461
    assert 1.0 <= row["distinct"] <= row["requested"]


def test_bytes_of_int8_moments_and_their_scales(gated: list[Row]) -> None:
    row = the(gated, moments="int8")
    assert row["bytes"] == 3 * 2 + 2 * 2 * (1 / 4 + 4 / 128 / 4)
    assert set(row["sectors"]) >= {"m_scale load", "v_scale load", "m_scale store", "v_scale store"}


def test_stages_of_muon_counted_by_hand(gated: list[Row]) -> None:
    """Count stages: the first writes matrices in place of weights, unread; the last one has no moments."""
    first = the(gated, rule="muon", weights="bf16", moments="fp32", path="flat")
    assert {name: n for name, n in first["sectors"].items() if name != "look-ups load"} == {
        "g load": 2.0, "m load": 1.0, "m store": 1.0, "p store": 2.0
    }  # fmt: skip
    last = the(gated, rule="orthogonal", level=0, weights="fp32")
    assert {name: n for name, n in last["sectors"].items() if name != "look-ups load"} == {
        "p load": 4.0, "g load": 2.0, "p store": 4.0
    }  # fmt: skip
    assert (first["bytes"], last["bytes"]) == (6.0, 10.0)
    assert first["requested"] == last["requested"] == 1.0
    assert first["instructions"]["special"] == last["instructions"]["special"] == 0.0
    assert max(first["executed"], last["executed"]) < 30


def test_rows_are_programs(gated: list[Row]) -> None:
    rows = [row for row in gated if row["level"] == "row" and row["kernel"] == ROW_STEP]
    assert len(rows) > 4
    for row in rows:
        assert row["programs"] == row["elements"] / row["width"]
        assert 1.0 <= row["distinct"] < 1.1


def test_norm_for_the_clip_reads_gradients_alone(gated: list[Row]) -> None:
    rows = [the(gated, kernel=NORM, rule="adafactor", path=path) for path in ("flat", "row")]
    rows += [the(gated, kernel=PANEL, rule="adafactor", path=path) for path in ("flat", "row")]
    for row in rows:
        assert {name for name in row["sectors"] if not name.startswith("look-ups")} == {"g load"}
        assert row["bytes"] == 2.0


def test_derived_shares_follow_from_the_counts(gated: list[Row]) -> None:
    for row in gated:
        moving, cycle = row["bytes"] / 3.0e12, 132 * 1.7e9
        needed = {name: n / RATES[name] / cycle / moving for name, n in row["units"].items()}
        needed[SLOTS] = row["slots"] / 128 / cycle / moving
        longest = max(needed.values())
        assert needed[row["busiest"]] == longest
        assert row["issue_share"] == pytest.approx(min(1, longest), rel=1e-9)
        assert row["bandwidth_share"] == pytest.approx(min(1, 1 / longest), rel=1e-9)
        machine = row["machine_ratio"] * needed[SLOTS]
        assert row["machine_demand"] == pytest.approx(max(machine, longest), rel=1e-9)
        assert max(row["issue_share"], row["bandwidth_share"]) == 1


def test_units_take_part_of_what_is_issued(gated: list[Row]) -> None:
    """Check units: a full warp's instruction is 32 of a unit's; comparisons and selections are of class *other*."""
    for row in gated:
        counts, units = row["instructions"], row["units"]
        assert list(units) == [INTEGER, SPECIAL, SHUFFLE]
        assert sum(units.values()) < row["slots"]
        assert units[INTEGER] >= counts["integer"] + counts["conversion"]
        assert units[SPECIAL] >= counts["special"]
        assert units[SHUFFLE] >= counts["shuffle"]
    row = the(gated, weights="bf16", moments="fp32", path="flat", rounding="nearest")
    assert row["units"][SPECIAL] == row["instructions"]["special"]


@pytest.mark.parametrize(
    ("unit", "opcodes"),
    [
        (
            INTEGER,
            "add.s32 and.b32 shl.b64 mad.lo.s32 setp.lt.f32 selp.b32 max.f32 min.s32 cvt.rn.bf16.f32 prmt.b32",
        ),
        (SPECIAL, "div.rn.f32 sqrt.approx.f32 rcp.rn.f32"),
        (SHUFFLE, "shfl.sync.bfly.b32"),
        (None, "add.f32 fma.rn.f32 mov.b32 ld.global.v4.b32 and.pred bra bar.sync st.global.b32"),
    ],
)
def test_units_of_instructions(unit: str | None, opcodes: str) -> None:
    assert [executed.unit_of(opcode) for opcode in opcodes.split()] == [unit] * len(opcodes.split())


def test_bound_of_a_kernel() -> None:
    lanes = {SLOTS: 95.744, INTEGER: 95.744 / 4, SPECIAL: 95.744 / 8, SHUFFLE: 0.0}
    found = {SLOTS: 1.0, INTEGER: 0.5, SPECIAL: 1.0, SHUFFLE: 0.0}
    assert demands(lanes, 10.0) == pytest.approx(found)
    assert shares(0.5) == (0.5, 1.0)
    assert shares(2.0) == (1.0, 0.5)
    cases = [(0.3, 0.9, "bandwidth"), (0.3, 1.1, "either"), (1.0, 1.2, INTEGER)]
    for issue, machine, text in cases:
        assert bound({"issue_share": issue, "machine_demand": machine, "busiest": INTEGER}) == text


def test_shards_of_columns_draw_by_whole_calls() -> None:
    """Check shards of half of each row: a step looks up the position of each call's 8 weights, not of each one."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {
        "TRITON_CACHE_DIR": str(CACHE)
    }
    run = subprocess.run(
        [sys.executable, "-m", "tests.support.counted_shards"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        env=environment,
        timeout=500,
    )
    assert run.returncode == 0, run.stderr
    whole, columns = json.loads(run.stdout)
    assert whole <= 56.1
    assert columns <= 61.7


# What is counted -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", range(7))
@pytest.mark.parametrize("kernel", [STEP, DWT])
def test_shapes_take_their_path(kernel: str, level: int) -> None:
    """Check that the flat path takes whole blocks and a multiple of 8 elements, the row path all other shapes."""
    for path in ("flat", "row"):
        variant = Variant("sm_90", kernel, "bf16", None, level, path)
        for width in executed.widths(variant):
            for rows, columns in executed.shapes_of(variant, width):
                flat = columns % 2**level == 0 and rows * columns % 8 == 0
                assert flat == (path == "flat")


def test_row_widths_of_variants() -> None:
    found = [executed.widths(Variant("sm_90", STEP, "bf16", "fp32", level, "row")) for level in (0, 2, 3, 4, 6)]
    assert found == [[5461], [5461], [5461], [5461, 1000], [5461, 1000]]


def moved(variant: Variant, width: int = 100, rows: int = 3) -> int:
    arrays = arrays_of(variant, [(rows, width)] * 2, torch.device("cpu"))
    return executed.bytes_that_move(variant, arrays, width)


@pytest.mark.parametrize("level", [0, 2, 3])
@pytest.mark.parametrize("moments", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("weights", ["bf16", "fp32"])
def test_bytes_equal_those_of_the_roofline(weights: str, moments: str, level: int) -> None:
    case = kernel_cases.Case("step", (3, 100), level, DTYPES[weights], MOMENTS[moments])
    step = Variant("sm_90", STEP, weights, moments, level, "row", False, "gwt", "nearest")
    assert moved(step) == 2 * kernel_cases.bytes_moved(case)
    assert moved(step._replace(kernel=NORM)) == 2 * kernel_cases.bytes_read_twice(
        case._replace(kernel="step_limiter")
    )
    if weights == "bf16":
        assert moved(step._replace(rounding="split")) == moved(step) + 2 * 2 * 2 * 300
    for kernel in (DWT, IDWT) if level else ():
        case = kernel_cases.Case("haar_dwt", (3, 100), level, DTYPES[weights], None)
        assert moved(Variant("sm_90", kernel, weights, None, level, "row")) == 2 * kernel_cases.bytes_moved(case)


SASS = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 FADD R2, R3, R4 ;
        /*0020*/                   EXIT ;
        /*0030*/                   NOP ;
        .weak           $__internal_0_$__cuda_sm20_div_s64
$__internal_0_$__cuda_sm20_div_s64:
        /*0040*/                   MOV R1, R2 ;
"""


def test_rare_branches_of_machine_code_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_code, "_run", lambda *command: SASS)
    assert machine_code.body_instructions(b"") == 3
    monkeypatch.setattr(machine_code, "_run", lambda *command: "nothing")
    with pytest.raises(RuntimeError, match="printed no instruction"):
        machine_code.body_instructions(b"")


# The command -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--executed --align 2 --collect-grad-stats", "leave out --align --collect-grad-stats"),
        ("--executed --target sm_90 gfx942", "not gfx942"),
        (f"--executed --kernel {STEP} {LIMITER}", f"{LIMITER} passes over none"),
        (f"--executed --kernel {DWT} --levels 0", "level 0"),
        ("--executed --gate --levels 5", "none of these variants is limited"),
        ("--gate", "add --executed"),
    ],
)
def test_variants_that_cannot_be_executed_are_refused(
    arguments: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert codegen.main(arguments.split()) == 2
    assert message in capsys.readouterr().err


def test_a_variant_that_fails_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(variant: Variant, width: int) -> Row:
        raise ValueError("out of everything")

    monkeypatch.setattr(executed, "count", fail)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(VariantError, match=r"(?s)step_kernel, sm_90.*rows of 5461.*out of everything"):
        executed_command.count(LIMITS[2].variant, 5461)
    command = f"--executed --gate --path row --weights fp32 --jobs 1 --record {tmp_path}"
    assert codegen.main(command.split()) == 1
    assert not list(tmp_path.iterdir())


def test_a_limit_that_is_exceeded_fails_the_command(
    monkeypatch: pytest.MonkeyPatch, gated: list[Row], capsys: pytest.CaptureFixture[str]
) -> None:
    row = the(gated, weights="fp32", path="row") | {"executed": 1e4}
    monkeypatch.setattr(executed, "count", lambda variant, width: row)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert codegen.main(["--executed", "--gate", "--path", "row", "--weights", "fp32", "--jobs", "1"]) == 1
    assert "1e+04 instructions an element instead of at most" in capsys.readouterr().out


def test_every_level_is_listed(gated: list[Row]) -> None:
    """Check that the file lists every level; the page lists level 2, and numbers of kernels by bound."""
    flat = the(gated, weights="bf16", moments="fp32", path="flat", rounding="nearest")
    deeper = flat | {"level": 4, "executed": 123.0, "issue_share": 1.0}
    run = Run("file.json", "executed", "none", [*gated, deeper])
    text, listed = "\n".join(section([run], "all.csv")), listing(run)
    assert "](all.csv)" in text
    assert "| step | flat | 2 | 22.5 |" in text
    assert "123" not in text
    assert len(listed.splitlines()) == 1 + len(run.rows)
    assert "sm_90,step,bf16,fp32,flat,4096,2,22.50," in listed
    assert "sm_90,step,bf16,fp32,flat,4096,4,123.00," in listed
    counts = re.findall(r"^\| \w+/[\w-]+ \|((?: \d+ \|)+)$", text, re.MULTILINE)
    assert sum(int(n) for line in counts for n in re.findall(r"\d+", line)) == len(run.rows)
