"""The page on machine code: loads, stores and resources of each kernel, and counts of executed instructions."""

from __future__ import annotations

from collections.abc import Sequence

from bench.report import executed
from bench.report.kernel_names import NAMES, has_usual_storage, is_usual, kernel_name
from bench.report.markdown import comma_separated, origin, table
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


BY_LEVEL = """\
Instructions are those of the code, which updates 16 elements a lane. Level 0 is AdamW; from level 4 on a block lies
in several lanes."""

TARGET = "sm_90"
"""The target whose kernels are shown, if it is recorded; the file lists the kernels of all targets."""

LISTING, EXECUTED = "data/machine_code.csv", "data/executed.csv"
"""Files that list every kernel, by paths relative to the page."""


def page(runs: Sequence[Run]) -> tuple[str, list[Plot]]:
    """Return the page, which has no plots."""
    parts = ["# Machine code", INTRODUCTION, *_resources(of(runs, "codegen"))]
    return "\n\n".join([*parts, *executed.section(of(runs, "executed"), EXECUTED)]) + "\n", []


def files(runs: Sequence[Run]) -> dict[str, str]:
    """Return the files that the page links to, by paths relative to it."""
    found = {}
    if codegen := of(runs, "codegen"):
        headings = ["target", "kernel", "weights", "moments", "path", "level", "loads", "stores", "registers"]
        headings += ["spills", "stack, bytes", "resident warps", "warps at most"]
        found[LISTING] = comma_separated(headings, map(_listed, _known(codegen[0])))
    if counted := of(runs, "executed"):
        found[EXECUTED] = executed.listing(counted[0])
    return found


def _known(run: Run) -> list[Row]:
    return [row for row in run.rows if row["kernel"] in NAMES]


def _resources(runs: Sequence[Run]) -> list[str]:
    """Return the section from the newest record."""
    parts = ["## Loads, stores and resources", ABOUT]
    if not runs:
        return [*parts, "Nothing is recorded yet: `python -m bench.codegen --record` compiles every variant."]
    known = _known(runs[0])
    targets = list(dict.fromkeys(row["target"] for row in known))
    headings = ["target", "kernels", "that spill", "most registers", "fewest resident warps"]
    parts += ["All kernels, by target:", table(headings, [_summary(target, known) for target in targets])]
    target = TARGET if TARGET in targets else targets[0]
    headings = ["kernel", "path", "level", "loads", "stores", "registers", "spills", "resident warps"]
    shown = [row for row in known if row["target"] == target and is_usual(row)]
    what = "bf16 weights and gradients, float32 moments, weights rounded to the nearest"
    parts.append(f"On {target} at level 2 and by rows, {what} ([every kernel]({LISTING})):")
    parts.append(table(headings, [_line(row, target) for row in shown], left=5))
    parts.append(f"The step by level, as above. {BY_LEVEL}")
    headings = ["kernel", "level", "instructions", "registers", "spills", "resident warps"]
    parts.append(table(headings, [_line_of_level(row, target) for row in known if _is_of_level(row, target)]))
    return [*parts, origin(runs[0])]


def _summary(target: str, known: Sequence[Row]) -> list[str]:
    own = [row for row in known if row["target"] == target]
    fewest = min(row["resident_warps"] for row in own)
    spilling = sum(bool(row["spills"] or row["stack"]) for row in own)
    return [target, *map(str, (len(own), spilling, max(row["registers"] for row in own))), _of_all(fewest, target)]


def _of_all(resident: int, target: str) -> str:
    return f"{resident} of {_most_warps(target)}"


def _most_warps(target: str) -> int:
    from bench.codegen.machine_code import LIMITS  # needs Triton, as did the rows of this table

    return LIMITS[target].warps


def _line(row: Row, target: str) -> list[str]:
    return [
        kernel_name(row),
        str(row["path"]),
        str(row["level"]),
        _accesses(row, "loads"),
        _accesses(row, "stores"),
        str(row["registers"]),
        str(row["spills"]) + (f", {row['stack']} bytes of stack" if row["stack"] else ""),
        _of_all(row["resident_warps"], target),
    ]


def _is_of_level(row: Row, target: str) -> bool:
    return (
        (row["target"], row["kernel"], row["path"], row["limited"]) == (target, "step_kernel", "flat", False)
        and row.get("rule") in ("gwt", "foam")
        and has_usual_storage(row)
    )


def _line_of_level(row: Row, target: str) -> list[str]:
    counts = [str(row[name]) for name in ("level", "instructions", "registers", "spills")]
    return [kernel_name(row), *counts, _of_all(row["resident_warps"], target)]


def _listed(row: Row) -> list[object]:
    what = (kernel_name(row), row["weights"], row["moments"] or "", row["path"], row["level"])
    used = (row["registers"], row["spills"], row["stack"], row["resident_warps"])
    accesses = (_accesses(row, "loads"), _accesses(row, "stores"))
    return [row["target"], *what, *accesses, *used, _most_warps(row["target"])]


def _accesses(row: Row, what: str) -> str:
    """Return the accesses of tensors: those that touch more than one element in the intermediate code."""
    texts = []
    for array, widths in row[what].items():
        if not row[f"tensor_{what}"].keys().isdisjoint(array.split("|")):  # "g|p": of one of the two
            counts = " ".join(f"{n}×{bits}" for bits, n in sorted(widths.items(), key=lambda item: int(item[0])))
            texts.append(f"{array.replace('|', ' or ')} {counts}")
    return ", ".join(texts) or "-"
