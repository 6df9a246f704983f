"""The page on speed that leads to the others: how times are measured, and what has run on a GPU."""

from __future__ import annotations

from collections.abc import Sequence

from bench.report.markdown import cell, number, origin, table
from bench.report.plots import Plot
from bench.report.rows import Run, of
from bench.report.sections import ROOFLINE

INTRODUCTION = f"""\
{ROOFLINE}

Before a kernel or a step is timed, its result is compared with a float64 [oracle](glossary.md#oracle); what
differs by more than rounding is not timed. The raw rows are in `bench/results/`, one file a run, with commit,
device, versions and the exact command; the pages show the newest run of each setting."""

NO_GPU = """\
**No GPU was at hand, so no time on a GPU is known yet.** On a CUDA machine `make bench-gpu` checks and measures
everything here, and the next report shows it by device. Until then the [machine
code](performance_machine_code.md) of the kernels stands in its place: what each would load, store and occupy, and
what they execute."""

SECTIONS = """\
## Optimizer step

`step()` alone beside AdamW and the optimizers of other packages: [optimizer step](performance_optimizers.md).

## Kernels

Each kernel on one tensor, by level, dtype and size: [kernels](performance_kernels.md).

## Host time

What a step costs in Python and in launches, whatever the size of the tensors: [host time](performance_host.md).

## Machine code

Loads, stores, registers and spills of every kernel variant, compiled without a GPU:
[machine code](performance_machine_code.md#loads-stores-and-resources).

## Executed instructions

Instructions, sectors and waits, counted while the kernels' PTX runs on a CPU, and the bound that follows:
[executed instructions](performance_machine_code.md#executed-instructions)."""


def page(runs: Sequence[Run]) -> tuple[str, list[Plot]]:
    """Return the page, which has no plots."""
    parts = ["# Performance", INTRODUCTION]
    if not any(run.cuda for run in runs if run.benchmark in ("optimizers", "kernels")):
        parts.append(NO_GPU)
    return "\n\n".join([*parts, SECTIONS, *_checks(of(runs, "gpu"))]) + "\n", []


def _checks(runs: Sequence[Run]) -> list[str]:
    if not runs:
        return []
    parts = ["## Runs of `make bench-gpu`", "Correctness comes first: where a test fails, nothing is timed."]
    for run in runs:
        lines = [
            [cell(row["part"]), "finished" if row["finished"] else cell(row["note"]), number(row["median"])]
            for row in run.rows
        ]
        parts += [f"**{run.device}**", table(["part", "outcome", "seconds"], lines, left=2), origin(run)]
    return parts
