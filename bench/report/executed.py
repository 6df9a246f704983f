"""Tables of the instructions, sectors and waits of each kernel, and of its bound."""

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
from bench.report.kernel_names import is_usual, kernel_name
from bench.report.markdown import comma_separated, number, origin, percent, table
from bench.report.rows import Row, Run

CLASSES = ("memory", "integer", "float", "conversion", "special", "shuffle", "other")

ABOUT = f"""\
**Counts and a bound; nothing here is a measurement.** The kernels are compiled for a GPU, and their PTX (NVIDIA's
assembly language, from which machine code is made) is executed on a CPU and counted, over 16 tensors (transforms:
one), so that the look-up of a tile's tensor is a real one: 4 rows of 4,096 on the flat path, 5 of 5,461 (the width
of LLaMA-1B's MLP) or 16 of 1,000 on the row path.

- *instructions*: PTX instructions that threads execute, over elements. The classes in the file add up to it;
  *special* is divisions, roots and reciprocals, *other* is comparisons, selections, moves, parameters, barriers and
  jumps.
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


def section(runs: Sequence[Run], file: str) -> list[str]:
    """Return the section from the newest record; `file` is the path of its `listing`, relative to the page."""
    parts = ["## Executed instructions", ABOUT]
    if not runs:
        return [*parts, "Nothing is recorded yet: `python -m bench.codegen --executed --record` counts them."]
    run = runs[0]
    for target in dict.fromkeys(row["target"] for row in run.rows):
        every = [row for row in run.rows if row["target"] == target]
        parts += [f"### On {target}", "All kernels, by what bounds them, weights and moments:", _by_bound(every)]
        headings = ["kernel", "path", "level", "instructions", "bytes", "sectors", "apart", "waits", "issue"]
        headings += ["bandwidth", "machine code", "bound"]
        rows = [[kernel_name(row), _path(row), str(row["level"]), *_bound(row)] for row in every if is_usual(row)]
        words = "Level 2 and rows, bf16 weights and gradients, float32 moments, weights rounded to the nearest"
        parts += [f"{words} ([every kernel, by class of instruction too]({file})):", table(headings, rows, left=3)]
    return [*parts, origin(run)]


def listing(run: Run) -> str:
    """Return every kernel of a run as comma-separated values; shares are fractions."""
    headings = ["target", "kernel", "weights", "moments", "path", "width", "level", "instructions", "bytes"]
    headings += ["sectors", "apart", "waits", "issue", "bandwidth", "machine code", "bound"]
    headings += [*(f"{name} instructions" for name in CLASSES), "slots", "look-ups, bytes"]
    return comma_separated(headings, map(_listed, run.rows))


def _listed(row: Row) -> list[object]:
    what = (row["target"], kernel_name(row), row["weights"], row["moments"] or "", row["path"], row["width"])
    counts = (row["executed"], row["bytes"], row["requested"], row["distinct"])
    shares = (row["issue_share"], row["bandwidth_share"], row["machine_demand"])
    classes = [
        *(row["instructions"][name] for name in CLASSES),
        row["slots"],
        row["sectors"].get("look-ups load", 0),
    ]
    numbers = [f"{each:.2f}" for each in (*counts, *shares, *classes)]
    return [*what, row["level"], *numbers[:4], row["dependent_loads"], *numbers[4:7], bound(row), *numbers[7:]]


def _by_bound(rows: Sequence[Row]) -> str:
    """Count the kernels of each combination of dtypes by what bounds them."""
    bounds = list(dict.fromkeys(["bandwidth", "either", *map(bound, rows)]))
    counts: dict[str, dict[str, int]] = {}
    for row in rows:
        own = counts.setdefault(f"{row['weights']}/{row['moments'] or '-'}", dict.fromkeys(bounds, 0))
        own[bound(row)] += 1
    lines = [[dtypes, *(str(own[each]) for each in bounds)] for dtypes, own in counts.items()]
    return table(["weights/moments", *bounds], lines)


def bound(row: Row) -> str:
    """Return which of the bounds limits a kernel."""
    if row["issue_share"] >= 1:
        return str(row.get("busiest", SLOTS))
    return "bandwidth" if row["machine_demand"] < 1 else "either"


def _path(row: Row) -> str:
    return "flat" if row["path"] == "flat" else f"row, {row['width']:,}"


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
