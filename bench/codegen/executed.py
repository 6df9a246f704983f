"""Execute kernel variants without a GPU: count dependent loads, and instructions and sectors per element."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from rich.table import Table

from bench.codegen.bounds import ARITHMETIC, INTEGER, LANES, SHUFFLE, SLOTS, SPECIAL, demands, shares
from bench.codegen.launches import (
    DWT,
    IDWT,
    NORMS,
    PANEL,
    STEPS,
    Arrays,
    arrays_of,
    launch_variant,
    rule_of_variant,
)
from bench.codegen.machine_code import body_instructions
from bench.codegen.variant import Variant
from gwt_kernels.core.level import ROW
from tests.ptx.counts import CLASSES, LOOK_UPS, SECTOR, ExecutionCounter, Tally, class_of
from tests.ptx.driver import CHIPS, Driver, Options

__all__ = ["ABOUT", "CHIPS", "COUNTED", "bytes_that_move", "count", "shapes_of", "table", "widths"]

COUNTED = (*STEPS, *NORMS, PANEL, DWT, IDWT)
"""Kernels that pass over tensors; the others pass over one number per tile, row or tensor."""
TENSORS = 16
"""Tensors in one launch: several, so that finding a tile's tensor is a real look-up, but no more than needed."""
FLAT_SHAPE = 4, 4096
ODD_WIDTH = 5461
"""Width of LLaMA-1B's MLP, whose last block of a row is cut short at every level."""
EVEN_WIDTH = 1000
"""A multiple of 8 but not of 16, so that blocks of 16 and more are cut short."""
ROWS = {ODD_WIDTH: 5, EVEN_WIDTH: 16}
"""Number of rows by width: tiles across rows are full, except for one in a hundred; 5 * 5461 is odd."""


def widths(variant: Variant) -> list[int]:
    """Return the row widths that a variant is executed with."""
    if variant.path == "flat":
        return [FLAT_SHAPE[1]]
    level = variant.level or 0
    return [ODD_WIDTH] + [EVEN_WIDTH] * (level != ROW and EVEN_WIDTH % 2**level > 0)


def shapes_of(variant: Variant, width: int) -> list[tuple[int, int]]:
    """Return the shapes of the tensors of one launch: a bucket, or the one tensor of a transform."""
    rows = FLAT_SHAPE[0] if variant.path == "flat" else ROWS[width]
    if variant.kernel not in (DWT, IDWT):
        return [(rows, width)] * TENSORS
    return [(16 * rows + (variant.path == "row"), width)]


def count(variant: Variant, width: int) -> dict[str, Any]:
    """Execute a variant on rows of a width, which fill its tiles, and return its row of the record.

    Raises:
        Fault: the kernel does something that would stop a GPU, or that is undefined.
    """
    shapes = shapes_of(variant, width)
    arrays = arrays_of(variant, shapes, torch.device("cpu"))
    awaited = {DWT: "x", IDWT: "coefficients"}.get(variant.kernel, "g")
    # A transform has no look-ups, so accesses outside the arrays made here are accesses of its result.
    others = "result" if variant.kernel in (DWT, IDWT) else LOOK_UPS
    counter = ExecutionCounter(arrays, awaited, others)
    with Driver(variant.target, Options(races=False, counter=counter, machine_code=True)) as driver:
        launch_variant(variant, arrays, width)
    tally = counter.of(variant.kernel)
    machine = body_instructions(driver.counts.machine_code[tally.program])
    elements, moved = sum(rows * n for rows, n in shapes), bytes_that_move(variant, arrays, width)
    return {**variant._asdict(), "width": width, **_numbers(tally, machine, elements, moved)}


def bytes_that_move(variant: Variant, arrays: Arrays, width: int) -> int:
    """Return the bytes that a launch must move: each input read once, and each changed tensor written once.

    A step reads gradients, and reads and writes weights, moments, scales and low halves; matrices in place of
    weights are only written. The norm reads gradients, moments and scales. The norm for Adafactor's clip and its
    sums of squares read gradients only. A transform reads its tensor and writes the coefficients; its inverse does
    the reverse.
    """
    size = {name: sum(x.numel() * x.element_size() for x in own) for name, own in arrays.items()}
    if variant.kernel not in (DWT, IDWT):
        rule = rule_of_variant(variant)
        state = sum(size[name] for name in ("m", "v", "low", "m_scale", "v_scale") if name in size)
        if variant.kernel in STEPS:
            return size["g"] + size["p"] * (1 + rule.reads_weights) + 2 * state
        return size["g"] + (0 if rule.is_factored else state)
    level = variant.level if isinstance(variant.level, int) else 0
    bands = [level, *range(level, 0, -1)]
    if variant.kernel == IDWT:
        return size["coefficients"] + sum(
            x.shape[0] * width * x.element_size() for x in arrays["coefficients"][:: 1 + level]
        )
    coefficients = sum(x.shape[0] * -(-width // 2**band) * x.element_size() for x in arrays["x"] for band in bands)
    return size["x"] + coefficients


def _numbers(tally: Tally, machine: int, elements: int, moved: int) -> dict[str, Any]:
    """Return a tally's counts per element; ``machine`` is the number of instructions of the machine code."""
    instructions = tally.by_class(tally.threads)
    size = moved / elements
    units = _units(tally, elements)
    needed = demands(units, size)
    busiest = max(needed, key=lambda name: needed[name])
    text = len(tally.program.kernel.instructions)
    return {
        "elements": elements,
        "programs": tally.programs,
        "instructions": {name: n / elements for name, n in instructions.items()},
        "executed": sum(instructions.values()) / elements,
        "slots": units[SLOTS],
        "units": {name: n for name, n in units.items() if name != SLOTS},
        "machine_ratio": machine / text,
        "dominant": {name: n / elements for name, n in tally.by_opcode().most_common(12)},
        "bytes": size,
        "sectors": {
            f"{name} {kind}": SECTOR * own.sectors / elements for (name, kind), own in tally.traffic.items()
        },
        "requested": SECTOR * tally.sectors() / moved,
        "distinct": SECTOR * tally.sectors(distinct=True) / moved,
        "dependent_loads": max(tally.waits, default=None),
        "busiest": busiest,
        **{f"{name}_share": share for name, share in shares(needed[busiest])._asdict().items()},
        "machine_demand": max(needed[busiest], needed[SLOTS] * machine / text),
    }


def unit_of(opcode: str) -> str | None:
    """Return the unit that an instruction needs, among those that are slower than issue slots; None for none."""
    of_class = {"integer": INTEGER, "conversion": INTEGER, "special": SPECIAL, "shuffle": SHUFFLE}
    if opcode.split(".")[0] in ("setp", "selp", "min", "max") and not opcode.endswith(".pred"):
        return INTEGER
    return of_class.get(class_of(opcode))


def _units(tally: Tally, elements: int) -> dict[str, float]:
    """Return instructions of lanes per element, in total and by unit: 32 for each that a warp issues."""
    found = dict.fromkeys((SLOTS, INTEGER, SPECIAL, SHUFFLE), 0.0)
    for instruction, n in zip(tally.program.kernel.instructions, tally.issued.tolist(), strict=True):
        for name in (SLOTS, unit_of(instruction.opcode)):
            if name is not None:
                found[name] += LANES * n / elements
    return found


ABOUT = f"""\
by class: executed PTX instructions of threads, an element; slots: 32 x instructions that warps issue, an element
bytes: that must move, of an element; req.: 32-byte sectors of each warp's instruction over these; dist.: those of
each program; look: bytes of tables and single numbers, an element; waits: loads that the first gradient's waits for
issue, memory: shares of bandwidth and of the busiest of issue slots and units where one of both is used to the
full; machine: time to issue over time to move if executed machine code has to PTX the proportion that it has in the
text, or of the busiest unit where that is longer
{ARITHMETIC}"""


def table(target: str, rows: Iterable[dict[str, Any]]) -> Table:
    """Lay out the rows of one target."""
    result = Table(title=f"{target}: counts and a bound, no measurement", title_justify="left")
    options = ("kernel", "weights", "moments", "path", "width", "limited", "rule", "rounding", "level")
    for head in options:
        result.add_column(HEADS.get(head, head))
    for head in (*CLASSES, "all", "slots", "bytes", "requested", "distinct", "look-ups", "waits"):
        result.add_column(HEADS.get(head, head), justify="right")
    for head in ("issue", "memory", "machine"):
        result.add_column(head, justify="right")
    for row in rows:
        look_ups = row["sectors"].get(f"{LOOK_UPS} load", 0.0)
        result.add_row(
            *("" if row[k] is None else str(row[k]).removesuffix("_kernel") for k in options),
            *(f"{row['instructions'][name]:.1f}" for name in CLASSES),
            *(f"{row[k]:.1f}" for k in ("executed", "slots", "bytes")),
            *(f"{x:.2f}" for x in (row["requested"], row["distinct"], look_ups)),
            "" if row["dependent_loads"] is None else str(row["dependent_loads"]),
            *(f"{row[k]:.0%}" for k in ("issue_share", "bandwidth_share", "machine_demand")),
        )
    return result


HEADS = {
    "weights": "p, g", "moments": "m, v", "memory": "mem", "integer": "int", "conversion": "cvt", "special": "spec",
    "shuffle": "shfl", "requested": "req.", "distinct": "dist.", "look-ups": "look", "width": "row",
}  # fmt: skip
