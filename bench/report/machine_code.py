"""The page on machine code: loads, stores and resources of each kernel, and what it executes."""

from __future__ import annotations

from collections.abc import Sequence

from bench.report import executed
from bench.report.kernel_names import NAMES, kernel_name
from bench.report.markdown import details, origin, table
from bench.report.plots import Plot
from bench.report.rows import Row, Run, of

INTRODUCTION = "What the compiler made of each Triton kernel; no GPU is needed for it, and nothing here is a time."

ABOUT = """\
Read from the machine code. Loads and stores are instructions × bits a lane, by array: g gradients, p weights, m
and v moments, low the lower halves of split weights; *g or p* are of one of the two. Look-ups in tables and single
numbers are left out. What is one element after another is best moved 128 bits at a time. *flat*: blocks lie end to
end; *row*: the last block of each row is cut short ([both](algorithm.md#how-a-launch-covers-a-model)). *foam*: the
folded rule; *muon* and *orthogonal*: GWT-Muon before and after its matrix products; *stochastic*, *split*: how the
weights round, where not to the nearest. A *step by rows* takes each row as a block, a *step of shared rows* has
one second moment for several rows. Resident are the warps that registers and shared memory leave room for on one
multiprocessor, of those that it can hold."""


def page(runs: Sequence[Run]) -> tuple[str, list[Plot]]:
    """Return the page, which has no plots."""
    parts = ["# Machine code", INTRODUCTION, *_resources(of(runs, "codegen"))]
    return "\n\n".join([*parts, *executed.section(of(runs, "executed"))]) + "\n", []


def _resources(runs: Sequence[Run]) -> list[str]:
    """Return the section from the newest record."""
    parts = ["## Loads, stores and resources", ABOUT]
    if not runs:
        return [*parts, "Nothing is recorded yet: `python -m bench.codegen --record` compiles every variant."]
    run = runs[0]
    for target in dict.fromkeys(row["target"] for row in run.rows):
        rows = [row for row in run.rows if row["target"] == target and row["kernel"] in NAMES]
        dtypes = len({(row["weights"], row["moments"]) for row in rows if row["moments"]}) > 1
        headings = ["kernel", *(["dtypes"] if dtypes else []), "path", "level", "loads", "stores"]
        headings += ["registers", "spills", "resident warps"]
        lines = [_line(row, target, dtypes) for row in rows]
        parts.append(details(f"{target} ({len(lines)} kernels)", table(headings, lines, left=5 + dtypes)))
    weights = sorted({row["weights"] for row in run.rows if row["weights"]})
    moments = sorted({row["moments"] for row in run.rows if row["moments"]})
    parts.append(f"Weights and gradients: {', '.join(weights)}; moments: {', '.join(moments)}.")
    return [*parts, origin(run)]


def _line(row: Row, target: str, dtypes: bool) -> list[str]:
    from bench.codegen.machine_code import LIMITS  # needs Triton, as did the rows of this table

    resident = f"{row['resident_warps']} of {LIMITS[target].warps}"
    return [
        kernel_name(row),
        *([f"{row['weights']}/{row['moments'] or '-'}"] if dtypes else []),
        str(row["path"]),
        str(row["level"]),
        _accesses(row, "loads"),
        _accesses(row, "stores"),
        str(row["registers"]),
        str(row["spills"]) + (f", {row['stack']} bytes of stack" if row["stack"] else ""),
        resident,
    ]


def _accesses(row: Row, what: str) -> str:
    """Return the accesses of tensors: those that touch more than one element in the intermediate code."""
    texts = []
    for array, widths in row[what].items():
        if not row[f"tensor_{what}"].keys().isdisjoint(array.split("|")):  # "g|p": of one of the two
            counts = " ".join(f"{n}×{bits}" for bits, n in sorted(widths.items(), key=lambda item: int(item[0])))
            texts.append(f"{array.replace('|', ' or ')} {counts}")
    return ", ".join(texts) or "-"
