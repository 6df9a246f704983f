"""Execute programs of a launch together: registers are arrays, and diverged threads run one block at a time.

A register is an array ``[programs, threads]``, with size 1 for a dimension along which all values are equal, so
that a value that is common to all threads, or to all programs, is computed once. Arrays are never modified in
place: an instruction replaces them.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from tests.ptx.checks import SHARED, Access, check_races
from tests.ptx.forms import ALL, ONES, ZEROS, Mask
from tests.ptx.memory import HostMemory, SharedMemory
from tests.ptx.program import Block, Program, Step
from tests.ptx.types import S64, U32, WARP, Fault, bits_of

_END = np.iinfo(np.int32).max  # the block of threads that have ended


class Launch(NamedTuple):
    """Data common to all programs of a launch.

    Attributes:
        grid: Number of programs.
        parameters: The kernel's parameters, as bytes.
        shared: Bytes of shared memory per program.
        disturb: Seed of errors of approximations; None leaves them correctly rounded.
    """

    program: Program
    grid: int
    parameters: bytes
    shared: int
    memory: HostMemory
    disturb: int | None = None


class Machine:
    """Execution of ``count`` programs of a launch, from ``first`` on.

    Attributes:
        unknown: By register, in which threads it is unwritten, or computed from unwritten data: 1 for the lower
            half of its bits, 2 for the upper, 3 for both. Threads may compute with unknown values, as those do
            whose part of a sum is not used; but no guard, address or value stored in global memory may be unknown.
    """

    def __init__(self, launch: Launch, first: int, count: int) -> None:
        self.launch, self.program = launch, launch.program
        self.memory, self.parameters, self.disturb = launch.memory, launch.parameters, launch.disturb
        self.first, self.programs = first, count
        self.threads, self.warps = self.program.threads, self.program.threads // WARP
        self.shape = (count, self.threads)
        self.shared = SharedMemory(count, launch.shared)
        self.log: dict[str, list[Access]] = {"global": [], "shared": []}
        self.instruction = 0
        self._registers: list[np.ndarray | None] = [None] * len(self.program.widths)
        self.unknown: dict[int, np.ndarray] = {}
        self._late = False  # whether the current step has read an unwritten register
        self._phase = self._meeting = np.zeros((1, 1), S64)
        self._where: np.ndarray | None = None  # the block of each thread while threads are diverged
        for register, value in self.program.operands.initial.items():
            self._registers[register] = value
        self._set_special()

    def _set_special(self) -> None:
        thread = np.arange(self.threads, dtype=U32)[None]
        program = np.arange(self.first, self.first + self.programs, dtype=U32)[:, None]
        one = np.ones((1, 1), U32)
        special = {
            "%tid.x": thread,
            "%laneid": thread % np.uint32(WARP),
            "%warpid": thread // np.uint32(WARP),
            "%ctaid.x": program,
            "%ntid.x": one * np.uint32(self.threads),
            "%nctaid.x": one * np.uint32(self.launch.grid),
            **dict.fromkeys(ZEROS, one * np.uint32(0)),
            **dict.fromkeys(ONES, one),
        }
        index = self.program.operands.index
        for name, value in special.items():
            if name in index:
                self._registers[index[name]] = value

    # Registers ---------------------------------------------------------------------------------------------

    def raw(self, register: int, mask: Mask) -> np.ndarray:
        """Return a register's values, in the type in which they were written."""
        x = self._registers[register]
        return self._unwritten(register) if x is None else x

    def read(self, register: int, dtype: np.dtype, mask: Mask) -> np.ndarray:
        """Return a register's values as a type of its size."""
        x = self._registers[register]
        if x is None:
            x = self._unwritten(register)
        if x.dtype is dtype:
            return x
        if x.dtype.kind == "f":
            x = self._registers[register] = bits_of(x)
        return x.view(dtype)

    def write(self, register: int, value: np.ndarray, mask: Mask) -> None:
        """Write the values of active threads to a register."""
        if mask is None:
            self._registers[register] = value
            return
        old = self._registers[register]
        if old is None:
            self._registers[register] = value
            self.forget([register], ~mask, None)
            return
        if old.dtype is not value.dtype:
            old, value = bits_of(old), bits_of(value)
        self._registers[register] = np.where(mask, value, old)

    def forget(self, registers: list[int], unknown: np.ndarray | None, mask: Mask) -> None:
        """Mark registers as unknown in those of the ``unknown`` threads that are active."""
        if unknown is not None:
            unknown = (unknown if mask is None else unknown & mask) * ALL
            for register in registers:
                before = self.unknown.get(register)
                self.unknown[register] = unknown if before is None else unknown | before

    def full(self, x: np.ndarray) -> np.ndarray:
        """Broadcast to one element for each thread."""
        return x if x.shape == self.shape else np.broadcast_to(x, self.shape)

    def _unwritten(self, register: int) -> np.ndarray:
        """Return zeros for a register that no thread has written, and mark it as unknown."""
        x = self._registers[register] = np.zeros((1, 1), self.program.widths[register])
        self.unknown[register] = np.full((1, 1), ALL)
        self._late = True
        return x

    def _name(self, register: int) -> str:
        return next(name for name, i in self.program.operands.index.items() if i == register)

    def _trace_unknown(self, step: Step, mask: Mask) -> None:
        """Check that a step's sinks are known, and mark the targets that it computes from unknown sources.

        Raises:
            Fault: an address, or a value stored in global memory, is unknown.
        """
        for register in step.sinks:
            self._check_known(register, mask)
        unknown = step.unknown(self, mask)
        for register in step.targets:
            before = self.unknown.get(register)
            if before is not None and mask is not None:
                before = before * ~mask
                after = before if unknown is None else before | (unknown * mask)
            elif unknown is not None:
                after = unknown if mask is None else unknown * mask
            elif before is None:
                continue
            else:
                after = None
            if after is not None and after.any():
                self.unknown[register] = after
            else:
                self.unknown.pop(register, None)

    def _check_known(self, register: int, mask: Mask) -> None:
        unknown = self.unknown.get(register)
        if unknown is not None:
            unknown = unknown if mask is None else unknown * mask
            if unknown.any():
                raise Fault(f"what {self._name(register)} holds comes of what nothing has written", unknown != 0)

    # Threads together --------------------------------------------------------------------------------------

    def barrier(self, mask: Mask) -> None:
        """Check that all threads of a program are here, except those that have ended, and begin a phase."""
        if mask is not None:
            active = self.full(mask)
            alive = np.ones(self.shape, bool) if self._where is None else self.full(self._where) != _END
            missing = active.any(axis=1, keepdims=True) & alive & ~active
            if missing.any():
                raise Fault("a barrier that not all threads of the program reach: it waits for", missing)
        self._phase = self._phase + (1 if mask is None else self.full(mask))

    def meet(self, members: np.ndarray, mask: Mask) -> None:
        """Check that exactly the lanes of a warp that an instruction names are here, and count the meeting."""
        if mask is not None:
            active = self.full(mask).reshape(self.programs, self.warps, WARP)
            wrong = active.any(axis=2, keepdims=True) & (active != members)
        else:
            wrong = np.broadcast_to(~members, (self.programs, self.warps, WARP))
        if wrong.any():
            raise Fault(
                "lanes of a warp that should be here and are not, or the other way round", wrong.reshape(self.shape)
            )
        self._meeting = self._meeting + (1 if mask is None else self.full(mask))

    def note(self, space: str, address: np.ndarray, size: int, mask: Mask, values: list[np.ndarray] | None) -> None:
        """Record an access, for the check for races."""
        self.log[space].append(
            Access(
                space,
                address,
                size,
                mask,
                self._phase,
                self._meeting,
                values,
                self.instruction,
                self.first,
                self.shape,
            )
        )

    # Control -----------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Run all programs to their end.

        Raises:
            Fault: an error, or undefined behaviour, on a GPU; the message names kernel, instruction and threads.
        """
        try:
            with np.errstate(all="ignore"):
                self._run()
        except Fault as fault:
            text = self.program.text(self.instruction)
            threads = "" if fault.threads is None else f", by {self._threads_text(fault.threads)}"
            if "waits for" in str(fault):
                threads = threads.replace(", by", "")
            raise Fault(f"{self.program.name}: {text}: {fault}{threads}", fault.threads) from None
        check_races(self.program, self.log[SHARED], SHARED)

    def _run(self) -> None:
        blocks, at, mask = self.program.blocks, 0, None
        while True:
            block = blocks[at]
            self._steps(block, mask)
            at, mask = self._next(block, at, mask)
            if at == _END:
                return

    def _steps(self, block: Block, mask: Mask) -> None:
        for step in block.steps:
            self.instruction = step.instruction
            active = mask
            if step.guard is not None:
                active = self._guarded(step, mask)
                if not active.any():
                    continue
                active = mask if active.all() else active
            if self.unknown:
                self._trace_unknown(step, active)
            try:
                step.execute(self, active)
            finally:  # an unknown value explains a fault better
                if self._late:
                    self._late = False
                    self._trace_unknown(step, active)

    def _guarded(self, step: Step | Block, mask: Mask) -> np.ndarray:
        """Return the active threads whose guard is true."""
        holds = self.raw(step.guard, mask)
        if self.unknown:
            self._check_known(step.guard, mask)
        holds = ~holds if step.negated else holds
        return holds if mask is None else holds & mask

    def _next(self, block: Block, at: int, mask: Mask) -> tuple[int, Mask]:
        """Return the next block to run, the first in the text with waiting threads, and these threads."""
        if block.jump is None:
            if mask is None:
                return at + 1, None
            return self._move(np.where(mask, at + 1, self._where))
        jump = _END if block.jump < 0 else block.jump
        if block.guard is None:
            if mask is None:
                return jump, None
            return self._move(np.where(mask, jump, self._where))
        self.instruction = block.instruction
        taken = self._guarded(block, mask)
        if mask is not None:
            return self._move(np.where(mask, np.where(taken, jump, at + 1), self._where))
        if taken.all():
            return jump, None
        if not taken.any():
            return at + 1, None
        return self._move(np.where(taken, jump, at + 1))

    def _move(self, where: np.ndarray) -> tuple[int, Mask]:
        at = int(where.min())
        mask = where == at
        if mask.all():
            self._where = None
            return at, None
        self._where = where
        return at, mask

    def _threads_text(self, threads: np.ndarray) -> str:
        """Return the first few threads, and the number in other programs, as text."""
        program, thread = np.nonzero(self.full(threads))
        first = thread[program == program[0]]
        some = ", ".join(map(str, first[:8])) + (", ..." if len(first) > 8 else "")
        more = "" if len(first) == len(thread) else f" and {len(thread) - len(first)} of other programs"
        return f"{'threads' if len(first) > 1 else 'thread'} {some} of program {program[0] + self.first}{more}"
