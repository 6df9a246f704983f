"""Imports of package and benchmarks, read from their files: no circle, and only in the allowed directions."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

COMPONENTS = {  # a module belongs to the component that names it, or to the nearest package around it
    "face": "gwt_kernels",
    "command line": "gwt_kernels.__main__ gwt_kernels.cli gwt_kernels.doctor",
    "planner": "gwt_kernels.planner gwt_kernels.plan gwt_kernels.plan_sharded gwt_kernels.mesh",
    "migration": "gwt_kernels.migration",
    "integrations": "gwt_kernels.integrations",
    "models": "gwt_kernels.models",
    "optim": "gwt_kernels.optim gwt_kernels.optimizer gwt_kernels.release gwt_kernels.telemetry",
    "functional": "gwt_kernels.functional gwt_kernels.haar",
    "distributed": "gwt_kernels.distributed",
    "backends": "gwt_kernels.backends gwt_kernels.control",
    "rules": "gwt_kernels.rules",
    "formats": "gwt_kernels.formats",
    "core": "gwt_kernels.core",
}
OPTIM_AND_BELOW = {"optim", "functional", "distributed", "backends", "rules", "formats", "core"}
BELOW = {  # components that a component may import, in addition to itself
    "face": {"planner", "migration", "integrations"} | OPTIM_AND_BELOW,
    "command line": {"face", "planner", "migration", "models"} | OPTIM_AND_BELOW,
    "planner": {"models"} | OPTIM_AND_BELOW,
    "migration": {"models"} | OPTIM_AND_BELOW,
    "integrations": OPTIM_AND_BELOW,
    "models": set(),
    "optim": OPTIM_AND_BELOW,
    "functional": {"backends", "rules", "core"},
    "distributed": {"rules", "core"},
    "backends": {"rules", "formats", "core"},
    "rules": {"core"},
    "formats": {"core"},
    "core": set(),
}
Imports = Mapping[str, set[str]]


def files_of(package: str) -> dict[str, str]:
    """Return the source of a package's files by module name."""
    names = {path: path.relative_to(ROOT).with_suffix("").parts for path in (ROOT / package).rglob("*.py")}
    return {".".join(parts).removesuffix(".__init__"): path.read_text() for path, parts in names.items()}


def imports_of(sources: Mapping[str, str]) -> Imports:
    """Return the modules that each module imports, in functions and for type checkers too."""
    return {name: {*_imported(text, sources)} - {name} for name, text in sources.items()}


def _imported(text: str, modules: Mapping[str, str]) -> Iterator[str]:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno} imports relatively"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield from [whole] if whole in modules else [node.module] if node.module in modules else []


def circles_of(imports: Imports) -> list[set[str]]:
    """Return sets of modules that import each other in a circle, or themselves."""
    reached = {name: _reachable(name, imports) for name in imports}
    tied = {name: frozenset(n for n in found if name in reached[n]) for name, found in reached.items()}
    return [set(circle) for circle in {*tied.values()} if circle]


def _reachable(start: str, imports: Imports) -> set[str]:
    found, left = set(), [start]
    while left:
        new = imports[left.pop()] - found
        found |= new
        left += new
    return found


def component_of(module: str) -> str:
    """Return the component with the longest matching module name."""
    components = {name: component for component, names in COMPONENTS.items() for name in names.split()}
    parts = module.split(".")
    return next(component for n in range(len(parts), 0, -1) if (component := components.get(".".join(parts[:n]))))


def against(imports: Imports) -> set[tuple[str, str]]:
    """Return the imports against the allowed directions."""
    return {
        (name, other)
        for name, others in imports.items()
        for other in others
        if component_of(other) not in BELOW[component_of(name)] | {component_of(name)}
    }


@pytest.mark.parametrize("package", ["gwt_kernels", "bench"])
def test_no_modules_import_each_other_in_a_circle(package):
    assert circles_of(imports_of(files_of(package))) == []


def test_imports_run_from_commands_down_to_the_core():
    assert against(imports_of(files_of("gwt_kernels"))) == set()


def test_every_module_belongs_to_a_component():
    modules = set(files_of("gwt_kernels"))
    assert {name for name in modules - {"gwt_kernels"} if component_of(name) == "face"} == set()
    named = {name for names in COMPONENTS.values() for name in names.split()}
    assert named - modules == set(), "moved, renamed or gone: say where they are now"


def test_package_imports_neither_benchmarks_nor_tests():
    others = files_of("bench") | files_of("tests")
    found = {name: {*_imported(text, others)} for name, text in files_of("gwt_kernels").items()}
    assert {name: others for name, others in found.items() if others} == {}


MADE_UP = {
    "p": "from p.a import x",
    "p.a": "import sys",
    "p.b": "def f():\n    from p.c import g",
    "p.c": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import p.d",
    "p.d": "from p import a, b",
}


def test_imports_in_functions_and_for_type_checkers_close_a_circle():
    found = imports_of(MADE_UP)
    assert found == {"p": {"p.a"}, "p.a": set(), "p.b": {"p.c"}, "p.c": {"p.d"}, "p.d": {"p.a", "p.b"}}
    assert circles_of(found) == [{"p.b", "p.c", "p.d"}]
    assert circles_of({name: others - {"p.b"} for name, others in found.items()}) == []


def test_an_import_upwards_is_detected():
    up = {
        "gwt_kernels.core.hyper": {"gwt_kernels.optim.state"},
        "gwt_kernels.optim.adamw": {"gwt_kernels.core.hyper"},
    }
    assert against(up) == {("gwt_kernels.core.hyper", "gwt_kernels.optim.state")}
    assert against({"gwt_kernels.planner.plan": {"gwt_kernels.migration"}}) != set()
    assert component_of("gwt_kernels.backends.triton.step") == "backends"
