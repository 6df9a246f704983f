"""Parse the text of a kernel: its parameters, registers, labels, and instructions with their lines."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import PurePath

from tests.ptx.types import DTYPES, PtxError

SHARED = "global_smem"
"""Triton's name for the shared memory of a program."""


@dataclass(frozen=True)
class Instruction:
    """One instruction as written.

    Attributes:
        opcode: The opcode with all of its modifiers: ``"fma.rn.f32"``. ``.shared::cta`` becomes ``.shared``.
        operands: The operands as text; a vector in braces, or an address in brackets, is one operand.
        guard: The predicate under which it runs, and whether that is negated.
        line: Line of the PTX, from 1.
        source: The line of Python that it was compiled from: ``"step.py:116"``.
    """

    opcode: str
    operands: tuple[str, ...]
    guard: tuple[str, bool] | None
    line: int
    source: str

    def __str__(self) -> str:
        guard = "" if self.guard is None else f"@{'!' if self.guard[1] else ''}{self.guard[0]} "
        place = f"line {self.line}" + (f", {self.source}" if self.source else "")
        return f"`{guard}{self.opcode} {', '.join(self.operands)}`".replace(" `", "`") + f" ({place})"


@dataclass(frozen=True)
class Parameter:
    """Offset of a kernel's parameter among the bytes of all parameters, and its type."""

    offset: int
    kind: str

    @property
    def size(self) -> int:
        return DTYPES[self.kind].itemsize


@dataclass(frozen=True)
class Kernel:
    """A parsed kernel.

    Attributes:
        threads: Threads of one program.
        registers: Types of registers by name.
        labels: Index of the instruction that follows each label.
    """

    name: str
    threads: int
    parameters: dict[str, Parameter]
    registers: dict[str, str]
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]

    @property
    def parameter_bytes(self) -> int:
        return max((p.offset + p.size for p in self.parameters.values()), default=0)


_ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\((.*?)\)(.*?)\{", re.DOTALL)
_PARAMETER = re.compile(r"\.param\s+\.(\w+)\s+(?:\.ptr\b(?:\s+\.\w+)*?(?:\s+\.align\s+\d+)?\s+)?([\w$]+)\s*$")
_FILE = re.compile(r'^\s*\.file\s+(\d+)\s+"([^"]*)"(?:\s+"([^"]*)")?', re.MULTILINE)
_TOKEN = re.compile(
    r"\s*(?:(?P<loc>\.loc\s+(?P<file>\d+)\s+(?P<row>\d+)[^\n]*)|(?P<label>\$?[\w$]+):|(?P<brace>[{}])|(?P<text>[^;]+);)"
)
_INSTRUCTION = re.compile(r"(?:@(!?)(%?[\w$]+(?:@\d+)?)\s+)?([\w.:]+)\s*(.*)", re.DOTALL)
_REGISTERS = re.compile(r"\.reg\s+\.(\w+)\s+(.*)", re.DOTALL)
_REGISTER = re.compile(r"\s*(%?[\w$]+)(?:<(\d+)>)?\s*$")


def parse(ptx: str) -> Kernel:
    """Parse the text of a kernel.

    Raises:
        PtxError: the text does not have exactly one kernel, or a part of it is not understood.
    """
    files = {number: PurePath(b or a).name for number, a, b in _FILE.findall(ptx)}
    text = re.sub(r"//[^\n]*", "", ptx)  # lines keep their numbers
    entries = list(_ENTRY.finditer(text))
    if len(entries) != 1:
        raise PtxError(f"a text with one kernel is expected, got {len(entries)}")
    name, parameters, directives = entries[0].groups()
    reader = _Reader(text, entries[0].end(), files, name)
    reader.read()
    return Kernel(
        name,
        _threads(directives, name),
        _parameters(parameters),
        reader.registers,
        tuple(reader.instructions),
        reader.labels,
    )


class _Reader:
    """Parser of a kernel's body, from its opening brace to its closing one."""

    def __init__(self, text: str, start: int, files: dict[str, str], kernel: str) -> None:
        self.text, self.at, self.files, self.kernel = text, start, files, kernel
        self.registers: dict[str, str] = {}
        self.instructions: list[Instruction] = []
        self.labels: dict[str, int] = {}
        self.line, self.counted = text.count("\n", 0, start) + 1, start
        self.source = ""
        self.scopes: list[dict[str, str]] = [{}]  # names of registers; inline assembly has scopes of its own

    def read(self) -> None:
        while self.scopes:
            found = _TOKEN.match(self.text, self.at)
            if found is None:
                raise PtxError(f"{self.kernel}: the text ends, or is not understood, after line {self.line}")
            self.at = found.end()
            start = found.start(found.lastgroup) if found.lastgroup else found.start()
            self.line += self.text.count("\n", self.counted, start)
            self.counted = start
            self._take(found)

    def _take(self, found: re.Match[str]) -> None:
        if found["loc"]:
            self.source = f"{self.files.get(found['file'], '?')}:{found['row']}" if found["row"] != "0" else ""
        elif found["label"]:
            self.labels[found["label"]] = len(self.instructions)
        elif found["brace"] == "{":
            self.scopes.append({})
        elif found["brace"]:
            self.scopes.pop()
        elif found["text"].startswith(".reg"):
            self._declare(found["text"])
        elif found["text"].startswith(".pragma"):
            pass  # advice to the assembler, such as not to unroll a loop
        elif found["text"].startswith("."):
            raise PtxError(f"{self.kernel}, line {self.line}: {found['text'].split()[0]} is not known")
        else:
            self.instructions.append(self._instruction(found["text"].strip()))

    def _declare(self, text: str) -> None:
        found = _REGISTERS.match(text)
        if found is None or found[1] not in DTYPES:
            raise PtxError(f"{self.kernel}, line {self.line}: {text!r} is not understood")
        for each in found[2].split(","):
            register = _REGISTER.match(each)
            if register is None:
                raise PtxError(f"{self.kernel}, line {self.line}: {text!r} is not understood")
            base, count = register.groups()
            for name in [base] if count is None else [f"{base}{i}" for i in range(int(count))]:
                own = name if len(self.scopes) == 1 else f"{name}@{self.line}"
                self.scopes[-1][name] = own
                self.registers[own] = found[1]

    def _instruction(self, text: str) -> Instruction:
        if len(self.scopes) > 1:
            text = re.sub(r"%?[\w$]+", lambda name: self._own(name[0]), text)
        found = _INSTRUCTION.fullmatch(text)
        if found is None:
            raise PtxError(f"{self.kernel}, line {self.line}: {text!r} is not understood")
        negated, guard, opcode, rest = found.groups()
        own = None if guard is None else (guard, bool(negated))
        opcode = opcode.replace(".shared::cta", ".shared")  # two names of the program's own shared memory
        return Instruction(opcode, _operands(rest), own, self.line, self.source)

    def _own(self, name: str) -> str:
        return next((scope[name] for scope in reversed(self.scopes) if name in scope), name)


def _operands(text: str) -> tuple[str, ...]:
    """Split at commas outside of braces and brackets."""
    found, depth, last = [], 0, 0
    for i, c in enumerate(text):
        depth += (c in "{[") - (c in "}]")
        if c == "," and not depth:
            found.append(text[last:i].strip())
            last = i + 1
    return (*found, text[last:].strip()) if text.strip() else ()


def _threads(directives: str, name: str) -> int:
    found = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)(?:\s*,\s*1)*\s*(?:\.|$|\n)", directives)
    if found is None:
        raise PtxError(f"{name}: the number of threads is not given, or is in more than one dimension")
    return int(found[1])


def _parameters(text: str) -> dict[str, Parameter]:
    result, offset = {}, 0
    for each in text.split(",") if text.strip() else []:
        found = _PARAMETER.match(each.strip())
        if found is None or found[1] not in DTYPES:
            raise PtxError(f"the parameter {each.strip()!r} is not understood")
        size = DTYPES[found[1]].itemsize
        offset = -(-offset // size) * size
        result[found[2]] = Parameter(offset, found[1])
        offset += size
    return result
