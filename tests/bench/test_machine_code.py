"""Readings of machine code: resident warps, names of accessed arrays, and places in the source."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs Triton: pip install triton")

from bench.codegen.access_names import Frame, array_name, parse_locations, places_of
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


PTX = """
	.loc	1 68 33                         // step.py:68:33
	.loc	2 29 13, function_name $L__info_string0, inlined_at 1 68 33 // tensors.py:29:13
	.loc	3 188 12, function_name $L__info_string1, inlined_at 2 29 13 // tiles.py:188:12
	.loc	1 70 4                          // step.py:70:4
	.loc	2 29 13, function_name $L__info_string0, inlined_at 1 70 4 // tensors.py:29:13
	.loc	3 188 12, function_name $L__info_string1, inlined_at 2 29 13 // tiles.py:188:12
	.file	1 "/a/step.py"
	.file	2 "/a/tensors.py"
	.file	3 "/a/tiles.py"
"""
"""Two calls of one function, whose lines name their callers as in Triton 3.9."""


def test_places_in_assembler_text_have_the_calls_around_them() -> None:
    one, other, helper, load = (
        Frame("step.py", 68, 33),
        Frame("step.py", 70, 4),
        Frame("tensors.py", 29, 13),
        Frame("tiles.py", 188, 12),
    )
    read = places_of(PTX)
    found = [read(line) for line in PTX.splitlines() if ".loc" in line]
    expected = [(one,), (helper, one), (load, helper, one), (other,), (helper, other), (load, helper, other)]
    assert found == expected
    in_comments = places_of("")
    assert in_comments("\t.loc\t1 70 4  // step.py:70:4") == (other,)
    assert in_comments("\t.loc\t2 29 13  // tensors.py:29:13 @[ step.py:68:33 ]") == (helper, one)
    assert in_comments("\t.loc\t2 29 13 is_stmt 0  ; tensors.py:29:13 @[ step.py:68:33 ]") == (helper, one)  # AMD


def test_places_in_intermediate_code() -> None:
    frames = (Frame("step.py", 209, 36), Frame("step.py", 68, 33))
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
