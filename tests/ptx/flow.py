"""Data flow from a load, in the text of a kernel: the stores that the loaded value may reach."""

from __future__ import annotations

from typing import NamedTuple

from tests.ptx.program import Program


class Outcome(NamedTuple):
    """Uses of a loaded value, or of values computed from it.

    Attributes:
        stores: Stores to global memory that have it as value, address or guard.
        spreads: Whether it is passed to other lanes of the warp.
        escapes: Whether it is stored in shared memory, or is the guard of a jump.
    """

    stores: frozenset[int]
    spreads: bool
    escapes: bool


def outcome(program: Program, load: int) -> Outcome:
    """Return the uses of what an instruction loads, in any order of instructions: too many rather than too few."""
    found = program.outcomes.get(load)
    if found is None:
        found = program.outcomes[load] = _follow(program, load)
    return found


def _follow(program: Program, load: int) -> Outcome:
    steps = [step for block in program.blocks for step in block.steps]
    known = {i for step in steps if step.instruction == load for i in step.targets}
    before = -1
    while len(known) > before:
        before = len(known)
        for step in steps:
            if not known.isdisjoint(step.sources):
                known.update(step.targets)
    opcode = {step.instruction: program.kernel.instructions[step.instruction].opcode for step in steps}
    reached = [opcode[step.instruction] for step in steps if not known.isdisjoint(step.sources)]
    return Outcome(
        frozenset(
            step.instruction
            for step in steps
            if opcode[step.instruction].startswith("st.global") and not known.isdisjoint(step.sources)
        ),
        any(each.startswith(("shfl", "redux")) for each in reached),
        any(each.startswith(("st.shared", "stmatrix")) for each in reached)
        or any(block.guard in known for block in program.blocks),
    )
