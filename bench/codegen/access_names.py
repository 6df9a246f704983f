"""Names of the arrays that instructions access, found from the source lines that these were compiled from."""

from __future__ import annotations

import ast
import functools
import itertools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import gwt_kernels

_SOURCES = Path(gwt_kernels.__file__).parent / "backends" / "triton"


class Frame(NamedTuple):
    """A place in a source file: line from 1 (0: none), column from 0, as Triton writes them."""

    file: str
    line: int
    column: int


Frames = tuple[Frame, ...]  # innermost first: a place, and the calls that were inlined to get there


_PLACE = r"(\d+)\s+(\d+)\s+(\d+)"
_LOC = re.compile(rf"\s*\.loc\s+{_PLACE}(?:, function_name \S+, inlined_at {_PLACE})?")


def places_of(code: str) -> Callable[[str], Frames]:
    """Return a function from a ``.loc`` line of assembler text to its place; call it for each line, in their order.

    Until Triton 3.8, and for AMD, a comment has the calls: ``.loc 3 209 36 // step.py:209:36 @[ step.py:68:33 ]``.
    Since Triton 3.9, PTX has the innermost one, whose own line comes before:
    ``.loc 3 209 36, function_name L, inlined_at 1 68 33 // step.py:209:36``.
    """
    files = {n: Path(path).name for n, path in re.findall(r'^\s*\.file\s+(\d+)\s+"([^"]*)"', code, re.MULTILINE)}
    calls: dict[tuple[str, ...], Frames] = {}

    def place(line: str) -> Frames:
        found = _LOC.match(line)
        if found is None or found[4] is None:
            frames = tuple(Frame(f, int(n), int(c)) for f, n, c in re.findall(r"([\w.]*):(\d+):(\d+)", line))
        else:
            own, caller = found.groups()[:3], found.groups()[3:]
            frames = (_frame(own), *calls.get(caller, (_frame(caller),)))
        if found is not None:
            calls[found.groups()[:3]] = frames
        return frames

    def _frame(numbers: tuple[str, ...]) -> Frame:
        return Frame(files.get(numbers[0], ""), int(numbers[1]), int(numbers[2]))

    return place


def parse_locations(module: str) -> Callable[[str], Frames]:
    """Return a function from an MLIR location's alias (``#loc12``) to its place, for a module's text."""
    bodies = dict(re.findall(r"^(#loc\d*) = loc\((.*)\)$", module, re.MULTILINE))

    @functools.cache
    def frames(alias: str) -> Frames:
        body = bodies.get(alias, "unknown")
        if found := re.fullmatch(r'"([^"]*)":(\d+):(\d+)', body):
            return (Frame(Path(found[1]).name, int(found[2]), int(found[3])),)
        # A named location wraps one; a call site joins callee and caller.
        return tuple(frame for inner in re.findall(r"#loc\d*", body) for frame in frames(inner))

    return frames


@functools.cache
def array_name(frames: Frames) -> str:
    """Name the array that a load or store at a place accesses, as the kernel calls it; "?" where none is found.

    The name is the first one in the pointer's expression, without ``_ptr``. A helper function's own parameter is
    followed to the caller's argument.
    """
    if not frames or (tree := _tree(frames[0].file)) is None:
        return "?"
    call = _innermost(tree, frames[0], lambda c: ast.unparse(c.func) in ("tl.load", "tl.store"))
    name = call and _leading_name(call.args[0])
    for inner, outer in itertools.pairwise(frames):
        function = _function(inner)
        parameters = [a.arg for a in function.args.args] if function else []
        if function is None or name not in parameters or (tree := _tree(outer.file)) is None:
            break
        names = _names_of(tree, function.name)
        call = _innermost(tree, outer, lambda c, names=names: ast.unparse(c.func) in names)  # type: ignore[misc]
        if call is None:
            return "?"
        given = dict(zip(parameters, call.args, strict=False)) | {str(k.arg): k.value for k in call.keywords}
        name = _leading_name(given[name])
    return re.sub(r"_ptrs?$", "", name) if name else "?"


@functools.cache
def _tree(file: str) -> ast.Module | None:
    path = _SOURCES / file
    return ast.parse(path.read_text()) if file and path.is_file() else None


def _innermost(tree: ast.Module, frame: Frame, wanted: Callable[[ast.Call], bool]) -> ast.Call | None:
    """Return the innermost wanted call around a place; Triton locates a call at one of its arguments."""
    place = (frame.line, frame.column)
    around = [
        node
        for node in _calls(tree)
        if (node.lineno, node.col_offset) <= place < (node.end_lineno or 0, node.end_col_offset or 0)
        and wanted(node)
    ]
    return max(around, key=lambda node: (node.lineno, node.col_offset), default=None)


@functools.cache
def _calls(tree: ast.Module) -> list[ast.Call]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call)]


def _names_of(tree: ast.Module, function: str) -> set[str]:
    """Return the names of a function in a file: its own, and aliases that it is imported as."""
    imported = [name for node in tree.body if isinstance(node, ast.ImportFrom) for name in node.names]
    return {function} | {str(name.asname) for name in imported if name.name == function and name.asname}


def _function(frame: Frame) -> ast.FunctionDef | None:
    functions: Iterator[ast.FunctionDef] = (
        node
        for node in getattr(_tree(frame.file), "body", [])
        if isinstance(node, ast.FunctionDef) and node.lineno <= frame.line <= (node.end_lineno or 0)
    )
    return next(functions, None)


def _leading_name(node: ast.AST) -> str | None:
    while not isinstance(node, ast.Name):
        inner = next((getattr(node, field) for field in ("left", "value", "func") if hasattr(node, field)), None)
        if not isinstance(inner, ast.AST):
            return None
        node = inner
    return node.id
