"""Public names: imports and commands on the pages, and classes named by older pickles."""

from __future__ import annotations

import importlib
import importlib.util
import pickle
import re
from pathlib import Path

import gwt_kernels
from gwt_kernels import GWTAdamW

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "Makefile", *sorted((ROOT / "docs").glob("*.md"))]
BENCHMARKS = {
    *("codegen", "codes", "gpu", "host", "kernels", "memory", "optimizers", "pretrain", "release", "report"),
    *("roundings", "scaling"),
}


def text_of_pages() -> str:
    return "\n".join(page.read_text(encoding="utf-8") for page in PAGES)


def test_imports_on_pages_exist():
    lines = re.findall(r"^ *from (gwt_kernels[\w.]*) import ([\w, ]+)$", text_of_pages(), re.MULTILINE)
    names = {(module, name) for module, names in lines for name in re.findall(r"\w+", names)}
    assert ("gwt_kernels.plan_sharded", "plan_sharded") in names
    for module, name in names:
        assert hasattr(importlib.import_module(module), name), f"from {module} import {name}"


def test_names_in_the_reference_exist():
    names = re.findall(r"^::: ([\w.]+)$", (ROOT / "docs" / "reference.md").read_text(), re.MULTILINE)
    assert len(names) > 20
    for whole in names:
        module, _, name = whole.rpartition(".")
        assert callable(getattr(importlib.import_module(module), name)), whole


def is_command(module: str) -> bool:
    """Return whether ``python -m`` runs the module: a package with ``__main__``, or a script."""
    spec = importlib.util.find_spec(module)
    if spec is not None and spec.submodule_search_locations is not None:
        spec = importlib.util.find_spec(f"{module}.__main__")
    return spec is not None and 'if __name__ == "__main__":' in Path(spec.origin).read_text()


def test_the_commands_of_the_pages_run():
    found = set(re.findall(r"-m ((?:bench|tests|gwt_kernels)\b[\w.]*\b)", text_of_pages()))
    assert len(found) > 10
    assert {module for module in found if not is_command(module)} == set()


def test_benchmarks_keep_their_command_names():
    assert {name for name in BENCHMARKS if not is_command(f"bench.{name}")} == set()


def test_modules_that_are_no_commands_are_detected():
    assert not is_command("bench.report.rows")
    assert not is_command("gwt_kernels.integrations")


def test_older_pickles_find_the_optimizer():
    assert pickle.loads(b"cgwt_kernels.optimizer\nGWTAdamW\n.") is GWTAdamW


def test_importing_the_planner_changes_no_public_names():
    importlib.import_module("gwt_kernels.plan")
    assert callable(gwt_kernels.migrate)
    assert gwt_kernels.plan.plan.__module__.startswith("gwt_kernels.plan")
