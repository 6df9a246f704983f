"""What comes of a value that an instruction loads: where it may be stored, in the text of a kernel."""

from __future__ import annotations

from typing import NamedTuple

from tests.ptx.program import Program


class Outcome(NamedTuple):
    """Where a loaded value, or what is computed from it, may end up.

    Attributes:
        stores: Instructions that store it in global memory, at places or under conditions that it decides.
        spreads: Whether other lanes of the warp are told of it.
        escapes: Whether it goes to shared memory, or decides which way threads take.
    """

    stores: frozenset[int]
    spreads: bool
    escapes: bool


def outcome(program: Program, load: int) -> Outcome:
    """Follow what an instruction loads, whatever the order of instructions: more than may happen, never less."""
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
