"""Tests that every form in the table is executed by another test in this folder."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.ptx import (
    program,
    running,
    test_accesses,
    test_control,
    test_conversions,
    test_exchange,
    test_floats,
    test_integers,
)
from tests.ptx.forms import FORMS, expand

MODULES = (test_accesses, test_control, test_conversions, test_exchange, test_floats, test_integers)


def test_patterns() -> None:
    assert expand("add.{s32,u32}") == ["add.s32", "add.u32"]
    assert expand("cvt{,.sat}.{s8,u8}.s16") == ["cvt.s8.s16", "cvt.u8.s16", "cvt.sat.s8.s16", "cvt.sat.u8.s16"]
    assert expand("bar.sync") == ["bar.sync"]


def cases(test: Callable[..., None]) -> Iterator[dict[str, Any]]:
    """Yield the arguments of each case of a test, as pytest makes them."""
    columns = []
    for mark in getattr(test, "pytestmark", []):
        names = mark.args[0] if isinstance(mark.args[0], (list, tuple)) else mark.args[0].split(", ")
        columns.append([dict(zip(names, row if len(names) > 1 else [row], strict=True)) for row in mark.args[1]])
    for parts in itertools.product(*columns):
        yield {name: value for part in parts for name, value in part.items()}


def test_every_form_is_tested(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the tests of instructions again, and collect the forms in kernels that run to their end."""
    tested: set[str] = set()

    class Recorded(running.Machine):
        def run(self) -> None:
            super().run()
            tested.update(self.program.forms)

    for module in (running, test_accesses):
        monkeypatch.setattr(module, "Machine", Recorded)
    for module in MODULES:
        for name, test in inspect.getmembers(module, inspect.isfunction):
            if name.startswith("test_") and test.__module__ == module.__name__:
                for arguments in cases(test):
                    test(**arguments)
    assert set(FORMS) - tested == set()
    assert tested - set(FORMS) == set(program.JUMPS)
