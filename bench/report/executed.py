"""Tables of what each kernel executes, requests and waits for, and of its bound."""

from __future__ import annotations

from collections.abc import Sequence

from bench.codegen.bounds import (
    BANDWIDTH,
    CLOCK,
    INTEGER,
    LANES,
    MULTIPROCESSORS,
    RATES,
    SCHEDULERS,
    SHUFFLE,
    SLOTS,
    SPECIAL,
)
from bench.report.kernel_names import kernel_name
from bench.report.markdown import details, number, origin, percent, table
from bench.report.rows import Row, Run
from gwt_kernels.core.level import ROW, depth_of

CLASSES = ("memory", "integer", "float", "conversion", "special", "shuffle", "other")

ABOUT = f"""\
**Counts and a bound; nothing here is a measurement.** The kernels are compiled for a GPU, and their PTX (NVIDIA's
assembly language, from which machine code is made) is executed on a CPU and counted, over 16 tensors (transforms:
one), so that the look-up of a tile's tensor is a real one: 4 rows of 4,096 on the flat path, 5 of 5,461 (the width
of LLaMA-1B's MLP) or 16 of 1,000 on the row path.

- *instructions*: PTX instructions that threads execute, over elements. The classes add up to it; *special* is
  divisions, roots and reciprocals, *other* is comparisons, selections, moves, parameters, barriers and jumps.
- *slots*: {LANES} for each instruction that a warp ({LANES} threads, its lanes) issues, however few of them take
  part, over elements.
- *sectors*: the sectors of 32 bytes that instructions of warps request of weights, gradients, moments, scales and
  low halves, over the bytes that must move of them (1.00 is ideal); *apart*: each sector of a program counted once.
- *waits*: the longest chain of dependent loads that the first load of a gradient waits for.
- *issue*, *bandwidth*: an H100 issues {MULTIPROCESSORS} × {SCHEDULERS} × {LANES} lanes' instructions a cycle at
  {CLOCK / 1e9:.1f} GHz, and its memory is taken to move {BANDWIDTH / 1e12:.1f} TB/s (its data sheet says 3.35). Of
  the {SCHEDULERS * LANES} of a multiprocessor at most {RATES[INTEGER]} are of the *{INTEGER}* (arithmetic, logic
  and shifts of integers, comparisons, minima, maxima, conversions and, as is assumed, selections), {RATES[SPECIAL]}
  *{SPECIAL}* and {RATES[SHUFFLE]} *{SHUFFLE}* (CUDA C++ Programming Guide, arithmetic instructions, compute
  capability 9.0), where each instruction of PTX is taken to be one of its unit's. Time to compute is the longest of
  the times to issue the slots and to do each unit's work. The longer of the times to compute and to move the bytes
  bounds the kernel: its share is 100 %, and the other's is its time over the longer one.
- *machine code*: the time to compute over the time to move, if the machine code issues as many more instructions
  than PTX as there are in its text, without the subroutines of rare numbers: a division is one instruction of PTX
  and some ten of the machine's. *bound* is `bandwidth` where this too is below 100 %, `{SLOTS}` or the busiest unit
  where PTX's count alone suffices, and `either` between the two."""


def section(runs: Sequence[Run]) -> list[str]:
    """Return the section from the newest record."""
    parts = ["## Executed instructions", ABOUT]
    if not runs:
        return [*parts, "Nothing is recorded yet: `python -m bench.codegen --executed --record` counts them."]
    run = runs[0]
    for target in dict.fromkeys(row["target"] for row in run.rows):
        every = [row for row in run.rows if row["target"] == target]
        # At the levels that the project promises counts of, in full; of the others what costs most.
        rows = [row for row in every if row["level"] in (2, ROW)]
        what = ["kernel", "dtypes", "path", "level"]
        headings = [
            *what,
            "instructions",
            "bytes",
            "sectors",
            "apart",
            "waits",
            "issue",
            "bandwidth",
            "machine code",
        ]
        parts.append(f"### On {target}, level 2 and rows")
        usual = [row for row in rows if "," not in kernel_name(row)] or rows
        others = [row for row in rows if row not in usual]
        bounds = [
            table([*headings, "bound"], [[*_what(row), *_bound(row)] for row in shown], left=4)
            for shown in (usual, others)
        ]
        parts.append(bounds[0])
        if others:
            parts.append(
                details(f"{target}, level 2 and rows, other rules and roundings ({len(others)} kernels)", bounds[1])
            )
        headings = [*what, *CLASSES, "instructions", "slots", "look-ups, bytes"]
        classes = table(headings, [[*_what(row), *_classes(row)] for row in rows], left=4)
        parts.append(details(f"{target}, level 2 and rows, instructions by class ({len(rows)} kernels)", classes))
        if len(every) > len(rows):
            parts.append(details(f"{target}, every level ({len(every)} kernels)", _by_level(every)))
    return [*parts, origin(run)]


def _by_level(rows: Sequence[Row]) -> str:
    """Lay out one line a kernel, with instructions and sectors at each level."""
    levels = sorted({row["level"] for row in rows}, key=depth_of)
    lines: dict[tuple[str, ...], dict[int, str]] = {}
    for row in rows:
        text = f"{number(row['executed'])} · {row['requested']:.2f}"
        cell = text if bound(row) == "bandwidth" else f"**{text}**"
        lines.setdefault(tuple(_what(row)[:3]), {})[row["level"]] = cell
    headings = ["kernel", "dtypes", "path", *(f"level {level}" for level in levels)]
    note = "Instructions · sectors over bytes; bold where bandwidth does not bound the kernel for certain."
    body = [[*what, *(cells.get(level, "") for level in levels)] for what, cells in lines.items()]
    return f"{note}\n\n{table(headings, body, left=3)}"


def bound(row: Row) -> str:
    """Return which of the bounds limits a kernel."""
    if row["issue_share"] >= 1:
        return str(row.get("busiest", SLOTS))
    return "bandwidth" if row["machine_demand"] < 1 else "either"


def _what(row: Row) -> list[str]:
    path = "flat" if row["path"] == "flat" else f"row, {row['width']:,}"
    return [kernel_name(row), f"{row['weights']}/{row['moments'] or '-'}", path, str(row["level"])]


def _bound(row: Row) -> list[str]:
    return [
        number(row["executed"]),
        number(row["bytes"]),
        f"{row['requested']:.2f}",
        f"{row['distinct']:.2f}",
        str(row["dependent_loads"]),
        *(percent(row[name]) for name in ("issue_share", "bandwidth_share", "machine_demand")),
        bound(row),
    ]


def _classes(row: Row) -> list[str]:
    counts = [*(row["instructions"][name] for name in CLASSES), row["executed"], row["slots"]]
    return [*(f"{n:.1f}" for n in counts), number(row["sectors"].get("look-ups load", 0.0))]
