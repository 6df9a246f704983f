"""Readings of machine code: resident warps, names of accessed arrays, and places in the source."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs Triton: pip install triton")

from bench.codegen.access_names import Frame, array_name, parse_comment, parse_locations
from bench.codegen.machine_code import LIMITS, resident_warps
from gwt_kernels.backends.triton import step


@pytest.mark.parametrize("target", LIMITS)
def test_resident_warps(target: str) -> None:
    limits = LIMITS[target]
    assert resident_warps(limits, 8, 32, 0) == limits.warps
    assert resident_warps(limits, 8, 255, 0) == 8  # two warps for each of four schedulers
    assert resident_warps(limits, 4, 61, 0) == min(limits.warps, 32)  # 61 registers count as 64
    assert resident_warps(limits, 8, 65, 0) == 24  # 72: seven per scheduler, 28 in all, three programs
    assert resident_warps(limits, 1, 16, 0) == limits.programs
    assert resident_warps(limits, 4, 16, limits.shared // 2 - limits.shared_reserved) == 8
    assert resident_warps(limits, 4, 16, limits.shared // 2) == (8 if target == "gfx942" else 4)


def test_accesses_in_a_helper_are_named_after_its_caller() -> None:
    def place(text: str, file: str = "step.py") -> Frame:
        lines = Path(step.__file__).with_name(file).read_text().splitlines()
        line = next(i for i, content in enumerate(lines) if text in content)
        return Frame(file, line + 1, lines[line].index(text) + len(text) - 1)

    look_up = place("x = tl.load(ptr + places", "tiles.py")  # of `load_tile`
    assert array_name((place("tl.load(owners_ptr"),)) == "owners"
    assert array_name((look_up,)) == "ptr"
    assert array_name((look_up, place("load_tile(p_ptr"))) == "p"
    assert array_name((look_up, place("load_tile(low_ptr"))) == "low"
    assert array_name((place("tl.program_id(0)"),)) == "?"
    assert array_name((Frame("standard.py", 10, 4),)) == "?"
    assert array_name(()) == "?"


def test_source_locations_are_read_from_both_notations() -> None:
    frames = (Frame("step.py", 209, 36), Frame("step.py", 68, 33))
    assert parse_comment(" step.py:209:36 @[ step.py:68:33 ]") == frames
    module = """
#loc = loc("/a/step.py":209:36)
#loc1 = loc("/a/step.py":68:33)
#loc2 = loc("after"(#loc))
#loc3 = loc("i"(#loc1))
#loc4 = loc(callsite(#loc2 at #loc3))
#loc5 = loc(unknown)
"""
    assert parse_locations(module)("#loc4") == frames
    assert parse_locations(module)("#loc5") == parse_locations(module)("#loc9") == ()
