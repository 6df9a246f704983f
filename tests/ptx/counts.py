"""Count what launches execute: instructions by class, sectors of global memory, chains of dependent loads."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from torch import Tensor

from tests.ptx.checks import GLOBAL
from tests.ptx.forms import Mask
from tests.ptx.machine import Launch, Machine
from tests.ptx.program import Block, Program, Step
from tests.ptx.types import S64, WARP, PtxError

CLASSES = ("memory", "integer", "float", "conversion", "special", "shuffle", "other")
"""Classes that :func:`class_of` returns: each instruction has one of them."""
SECTOR = 32
"""Bytes of a sector, the unit in which global memory is moved."""
LOOK_UPS = "look-ups"
"""Name of accesses outside all arrays that a counter is given: tables, and scalars of tensors."""

_FLOATS = ("f16", "f16x2", "bf16", "bf16x2", "f32", "f64")
_ARITHMETIC = re.compile(
    "addc?|subc?|mul|mad|fma|min|max|neg|abs|copysign|and|or|xor|not|shl|shr|shf|bfe|bfi|lop3|popc|clz|prmt"
)
_CLASS = {
    **dict.fromkeys(("ld", "st", "ldmatrix", "stmatrix"), "memory"),
    "cvt": "conversion",
    **dict.fromkeys(("div", "rem", "rcp", "sqrt", "rsqrt", "ex2", "lg2"), "special"),
    **dict.fromkeys(("shfl", "redux"), "shuffle"),
    **dict.fromkeys(("setp", "selp", "mov", "bar", "barrier", "bra", "ret", "exit"), "other"),
}


def class_of(opcode: str) -> str:
    """Return the class of an instruction.

    ``memory`` accesses global or shared memory. ``special`` runs on the special function unit or in a subroutine,
    as integer division does too. ``other`` is control: comparisons, selections, logic of predicates, moves,
    parameters (which a GPU reads as constants), barriers and jumps.

    Raises:
        PtxError: the opcode is unknown.
    """
    name, *modifiers = opcode.split(".")
    if modifiers[:1] == ["param"] or modifiers[-1:] == ["pred"]:
        return "other"
    if _ARITHMETIC.fullmatch(name):
        return "float" if modifiers[-1] in _FLOATS else "integer"
    if name not in _CLASS:
        raise PtxError(f"{opcode} is of no class that is known")
    return _CLASS[name]


@dataclass
class Traffic:
    """Loads from one array, or stores to it.

    Attributes:
        bytes: Bytes that all active threads access.
        sectors: Distinct sectors of each warp's instruction, summed.
        distinct: Distinct sectors of each program, summed over programs.
    """

    bytes: int = 0
    sectors: int = 0
    distinct: int = 0


class _Kinds(NamedTuple):
    """Indices of the instructions that need their own treatment in chains of dependent loads."""

    loads: frozenset[int]
    shared_loads: frozenset[int]
    shared_stores: frozenset[int]


@dataclass
class Tally:
    """Counts of what one kernel has executed.

    Attributes:
        threads: By instruction, the threads whose guard was true; for a jump, all threads that reached it.
        issued: By instruction, the warps that reached it with any thread, whether its guard was true or not: each
            takes an issue slot, however many lanes are active.
        traffic: Traffic by array and by ``"load"`` or ``"store"``.
        waits: Number of programs by the length of the longest chain of dependent global loads, from tables too,
            that their first load of the awaited array waits for.
    """

    program: Program
    programs: int = 0
    waits: Counter[int] = field(default_factory=Counter)
    traffic: dict[tuple[str, str], Traffic] = field(default_factory=dict)

    def __post_init__(self) -> None:
        opcodes = [i.opcode for i in self.program.kernel.instructions]
        self.threads, self.issued = np.zeros((2, len(opcodes)), S64)
        self.classes = [class_of(opcode) for opcode in opcodes]

        def starting(*words: str) -> frozenset[int]:
            return frozenset(i for i, opcode in enumerate(opcodes) if opcode.startswith(words))

        shared = starting("ld.shared", "ldmatrix"), starting("st.shared", "stmatrix")
        self.kinds = _Kinds(starting("ld.global"), *shared)

    def by_class(self, of: np.ndarray) -> dict[str, int]:
        """Return the sum of ``threads`` or ``issued`` for each class."""
        return {name: int(sum(n for n, c in zip(of, self.classes, strict=True) if c == name)) for name in CLASSES}

    def by_opcode(self) -> Counter[str]:
        """Return instructions executed, counted per thread, by the opcode's first and last part: ``"mul u64"``."""
        found: Counter[str] = Counter()
        for instruction, n in zip(self.program.kernel.instructions, self.threads, strict=True):
            first, *others = instruction.opcode.split(".")
            found[" ".join([first, *others[-1:]])] += int(n)
        return found

    def sectors(self, *, distinct: bool = False) -> int:
        """Return the sectors of all arrays that the counter was given, without look-ups."""
        own = [traffic for (name, _), traffic in self.traffic.items() if name != LOOK_UPS]
        return sum(each.distinct if distinct else each.sectors for each in own)


class ExecutionCounter:
    """Counter of what a driver runs, by kernel.

    Args:
        arrays: Tensors by name; traffic is counted for each name.
        awaited: The name of the array whose first load ends the chain of dependent loads.
        others: The name of accesses outside all these arrays.
    """

    def __init__(self, arrays: Mapping[str, Sequence[Tensor]], awaited: str, others: str = LOOK_UPS) -> None:
        ranges = sorted(
            (x.data_ptr(), x.data_ptr() + x.numel() * x.element_size(), name)
            for name, tensors in arrays.items()
            for x in tensors
        )
        self._starts = np.array([start for start, _, _ in ranges], S64)
        self._ends = np.array([end for _, end, _ in ranges], S64)
        self._names = [name for _, _, name in ranges]
        self.awaited, self.others = awaited, others
        self.tallies: dict[Program, Tally] = {}

    def of(self, kernel: str) -> Tally:
        """Return the tally of the only kernel with that name.

        Raises:
            ValueError: no such kernel has run, or several have.
        """
        found = [tally for program, tally in self.tallies.items() if program.name == kernel]
        if len(found) != 1:
            names = ", ".join(sorted(program.name for program in self.tallies)) or "none"
            raise ValueError(f"one kernel {kernel!r} is expected to have run, got {len(found)} of {names}")
        return found[0]

    def machine(self, launch: Launch, first: int, count: int) -> Machine:
        """Return a machine that runs ``count`` programs of a launch from ``first`` on, and counts."""
        if launch.program not in self.tallies:
            self.tallies[launch.program] = Tally(launch.program)
        tally = self.tallies[launch.program]
        tally.programs += count
        return _CountingMachine(self, tally, launch, first, count)

    def name_of(self, address: int) -> str:
        """Return the name of the array that contains an address."""
        i = int(np.searchsorted(self._starts, address, "right")) - 1
        return self._names[i] if i >= 0 and address < self._ends[i] else self.others


class _CountingMachine(Machine):
    """A machine that counts, and records no accesses: finding races takes three times as long as running.

    A depth is the length of a chain of dependent global loads, for each program.

    A register's depth is the largest depth of the values that it was computed from, in any lane of the program,
    through registers, shared memory and jumps. A global load adds one. All that follows a jump waits for its guard.
    """

    def __init__(self, counter: ExecutionCounter, tally: Tally, launch: Launch, first: int, count: int) -> None:
        super().__init__(launch, first, count)
        self._counter, self._tally = counter, tally
        self._seen: dict[tuple[str, str], list[np.ndarray]] = {}  # sectors, combined with program indices
        self._depths: dict[int, np.ndarray] = {}
        none = np.zeros(count, S64)
        self._jumps = self._exchanged = self._depth = none  # of jumps, of shared memory, of the current step
        self._arrived = none - 1  # the depth of the first load of the awaited array

    def run(self) -> None:
        super().run()
        for key, parts in self._seen.items():
            self._tally.traffic[key].distinct += len(np.unique(np.concatenate(parts)))
        for depth in self._arrived[self._arrived >= 0].tolist():
            self._tally.waits[depth] += 1

    def _steps(self, block: Block, mask: Mask) -> None:
        for step in block.steps:
            active = mask if step.guard is None else self._guarded(step, mask)
            self._count(step.instruction, active, mask)
            tracing = (self._arrived < 0).any()
            if tracing:
                self._depth = self._depth_of(step)
            super()._steps(Block([step], None, None, False, step.instruction), mask)
            if tracing:
                self._settle(step, active)

    def _next(self, block: Block, at: int, mask: Mask) -> tuple[int, Mask]:
        if block.jump is not None and at < len(self.program.blocks) - 1:  # the last block is empty
            self._count(block.instruction, mask, mask)  # all threads that reach a jump execute it
            if block.guard is not None:
                there = self._some(mask)
                self._jumps = np.where(there, np.maximum(self._jumps, self._at(block.guard)), self._jumps)
        return super()._next(block, at, mask)

    # Instructions ------------------------------------------------------------------------------------------

    def _count(self, instruction: int, active: Mask, mask: Mask) -> None:
        self._tally.threads[instruction] += self._threads_in(active)
        self._tally.issued[instruction] += (
            self.programs * self.warps if mask is None else np.count_nonzero(self._warps_of(mask).any(axis=2))
        )

    def _threads_in(self, mask: Mask) -> int:
        every = self.programs * self.threads
        return every if mask is None else np.count_nonzero(mask) * (every // mask.size)

    def _warps_of(self, x: np.ndarray) -> np.ndarray:
        return self.full(x).reshape(self.programs, self.warps, WARP)

    # Memory ------------------------------------------------------------------------------------------------

    def note(self, space: str, address: np.ndarray, size: int, mask: Mask, values: list[np.ndarray] | None) -> None:
        if space == GLOBAL:
            self._count_access(address, size, mask, "load" if values is None else "store")

    def _count_access(self, address: np.ndarray, size: int, mask: Mask, kind: str) -> None:
        taken = np.ones((1, 1), bool) if mask is None else mask
        if not taken.any():
            return
        own = np.broadcast_to(address, np.broadcast_shapes(address.shape, taken.shape))
        name = self._counter.name_of(int(own[np.broadcast_to(taken, own.shape)][0]))
        seen = self._seen.setdefault((name, kind), [])
        traffic = self._tally.traffic.setdefault((name, kind), Traffic())
        traffic.bytes += size * int(self._threads_in(mask))
        # Accesses are aligned to their sizes, so each lies in one sector.
        sectors, program = own // SECTOR, np.arange(self.programs)[:, None]
        if own.shape[1] == 1:  # all threads of a program at one address
            taken, sectors = (np.broadcast_to(x, (self.programs, 1)) for x in (taken, sectors))
            traffic.sectors += self.warps * int(np.count_nonzero(taken))
            seen.append((sectors * self.programs + program)[taken])
        else:
            sectors = np.sort(np.where(self._warps_of(taken), self._warps_of(sectors), -1), axis=2)
            new = np.diff(sectors, axis=2, prepend=-1) != 0
            traffic.sectors += int(np.count_nonzero(new))
            seen.append((sectors * self.programs + program[:, :, None])[new])
        if kind == "load" and name == self._counter.awaited:
            self._arrived = np.where((self._arrived < 0) & self._some(mask), self._depth, self._arrived)

    # Dependence --------------------------------------------------------------------------------------------

    def _some(self, mask: Mask) -> np.ndarray:
        """Return in which programs any thread is active."""
        return np.ones(self.programs, bool) if mask is None else self.full(mask).any(axis=1)

    def _at(self, register: int) -> np.ndarray:
        return self._depths.get(register, np.zeros(self.programs, S64))

    def _depth_of(self, step: Step) -> np.ndarray:
        depth = np.maximum.reduce([self._jumps, *(self._depths[i] for i in step.sources if i in self._depths)])
        return np.maximum(depth, self._exchanged) if step.instruction in self._tally.kinds.shared_loads else depth

    def _settle(self, step: Step, active: Mask) -> None:
        """Give the step's depth to its targets; where only some threads were active, the larger of old and new."""
        kinds, some = self._tally.kinds, self._some(active)
        depth = self._depth + (step.instruction in kinds.loads)
        if step.instruction in kinds.shared_stores:
            self._exchanged = np.where(some, np.maximum(self._exchanged, depth), self._exchanged)
        if active is not None:
            every = self.full(active).all(axis=1)
        for register in step.targets:
            if active is None:
                self._depths[register] = depth
            else:
                before = self._at(register)
                self._depths[register] = np.where(every, depth, np.where(some, np.maximum(before, depth), before))
