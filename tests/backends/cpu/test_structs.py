"""Structs and enums that the step in C shares with Python: names, types, order and sizes."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

from gwt_kernels.backends.cpu import build, step
from gwt_kernels.backends.cpu.adafactor import FACTORS, TABLE_ROW
from tests.support.native import needs_step_in_c

pytestmark = needs_step_in_c


def without_comments(path: Path) -> str:
    return re.sub(r"/\*.*?\*/", "", path.read_text(), flags=re.DOTALL)


def fields_of(struct_name: str, source: str) -> list[tuple[str, str]]:
    """Return names of a struct of C and their formats in the struct module."""
    kinds = {"uint64_t": "Q", "uint32_t": "I", "int64_t": "q", "int32_t": "i", "float": "f", "double": "d"}
    fields = {}
    for line in re.search(r"typedef struct \{([^{}]*)\} " + struct_name, source)[1].split(";"):
        kind, _, names = line.strip().removeprefix("const ").partition(" ")
        for name in filter(None, names.split(", ")):
            format_ = "qqq" if kind == "gwt_span" else "P" if "*" in name else kinds[kind]
            fields[name.strip("*").removesuffix("[SUMS]")] = format_ * (4 if name.endswith("[SUMS]") else 1)
    return list(fields.items())


def test_struct_layouts_are_those_of_c():
    """Compare names and types in order; a wrong size would shift the fields after it."""
    folder = build.SOURCES[0].parent
    source = without_comments(folder / "step.h")
    for name, path, fields, size in (
        ("gwt_step", "step.h", step.FIELDS, step.STEP.size),
        ("gwt_factors", "factors.c", FACTORS, TABLE_ROW.size),
    ):
        assert fields_of(name, without_comments(folder / path)) == list(fields.items())
        assert ctypes.c_int64.in_dll(build.library(), f"{name}_size").value == size
    enums = re.findall(r"enum \{ ([\w, ]*) \}", source)
    names = {"PUBLISHED": "gwt", "FOLDED": "foam", "SIGNED": "lion", "FACTORED": "adafactor", "MOMENTUM": "muon"}
    assert [step.RULES[names.get(x, x.lower())] for x in enums[3].split(", ")] == list(range(6))
    assert enums[0].split(", ") == ["FLOAT32", "BFLOAT16", "FLOAT16", "INT8"]
    assert enums[1].lower().split(", ") == list(step.ROUNDINGS)
    assert enums[-1].lower().split(", ")[:-1] == list(step.Result._fields[-4:])
