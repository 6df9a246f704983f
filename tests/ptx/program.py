"""A kernel prepared for execution: its instructions as functions, in basic blocks."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from tests.ptx import accesses, conversions, exchange, floats, integers
from tests.ptx.forms import FORMS, Execute, Operands, Unknown, any_unknown
from tests.ptx.parser import Instruction, Kernel, parse
from tests.ptx.types import PRED, WARP, PtxError

if TYPE_CHECKING:
    from tests.ptx.flow import Outcome

__all__ = ["FORMS", "Block", "Program", "accesses", "conversions", "exchange", "floats", "integers"]

JUMPS = ("bra", "bra.uni", "ret", "exit")


class Step(NamedTuple):
    """An instruction that is not a jump: see :class:`tests.ptx.forms.Operands`."""

    execute: Execute
    guard: int | None
    negated: bool
    instruction: int
    sources: list[int]
    targets: list[int]
    sinks: list[int]
    unknown: Unknown


class Block(NamedTuple):
    """A basic block, entered only at the top: steps that run one after the other, and a jump at the end.

    Attributes:
        jump: The block to which threads jump whose guard is true; -1 if they end there; None for no jump.
        guard: The predicate of the jump; None if all threads jump.
    """

    steps: list[Step]
    jump: int | None
    guard: int | None
    negated: bool
    instruction: int


class Program:
    """A kernel that :class:`tests.ptx.machine.Machine` runs.

    Raises:
        PtxError: an instruction has a form that is not known, or is not understood.
    """

    def __init__(self, ptx: str) -> None:
        self.kernel: Kernel = parse(ptx)
        self.name, self.threads = self.kernel.name, self.kernel.threads
        if self.threads % WARP:
            raise PtxError(f"{self.name}: {self.threads} threads are no whole warps")
        self.operands = Operands(self.kernel)
        self.forms = Counter(i.opcode for i in self.kernel.instructions)
        self.blocks = self._blocks()
        self.outcomes: dict[int, Outcome] = {}

    @property
    def widths(self) -> list[np.dtype]:
        return self.operands.widths

    def text(self, instruction: int) -> str:
        return str(self.kernel.instructions[instruction])

    def _blocks(self) -> list[Block]:
        code = self.kernel.instructions
        starts = (
            {0, len(code)}
            | {i + 1 for i, x in enumerate(code) if x.opcode in JUMPS}
            | set(self.kernel.labels.values())
        )
        order = sorted(starts)
        number = {start: i for i, start in enumerate(order)}
        blocks = []
        for start, end in itertools.pairwise(order):
            last = code[end - 1]
            jumps = last.opcode in JUMPS
            steps = [self._step(i) for i in range(start, end - jumps)]
            guard, negated = self._guard(last) if jumps else (None, False)
            jump = self._target(last, number) if jumps else None
            blocks.append(Block(steps, jump, guard, negated, end - 1))
        blocks.append(Block([], -1, None, False, len(code) - 1))  # after the end
        return blocks

    def _step(self, i: int) -> Step:
        instruction = self.kernel.instructions[i]
        guard, negated = self._guard(instruction)
        execute, operands = self.operands.make(instruction), self.operands
        own = list(operands.sources)  # a copy, to which the guard of a jump is not appended later
        unknown = operands.unknown or any_unknown(own)
        sources = own if guard is None else [*own, guard]
        return Step(execute, guard, negated, i, sources, operands.targets, operands.sinks, unknown)

    def _guard(self, instruction: Instruction) -> tuple[int | None, bool]:
        if instruction.guard is None:
            return None, False
        name, negated = instruction.guard
        try:
            return self.operands.source(name, PRED), negated
        except PtxError as error:
            raise PtxError(f"{self.name}: {instruction}: {error}") from error

    def _target(self, instruction: Instruction, number: dict[int, int]) -> int:
        if instruction.opcode in ("ret", "exit"):
            return -1
        label = instruction.operands[0] if instruction.operands else ""
        if label not in self.kernel.labels:
            raise PtxError(f"{self.name}: {instruction}: {label!r} is no label")
        return number[self.kernel.labels[label]]
