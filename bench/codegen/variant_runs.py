"""Measurement of many variants in several processes; printing, recording and gating of their rows."""

from __future__ import annotations

import contextlib
import multiprocessing
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import triton
from rich.console import Console
from rich.progress import Progress

from bench.codegen.variant import Variant
from bench.common import records
from bench.common.measure import facts

NOTHING = "no kernel has such a variant: level 0 has no transform kernel, and AdamW there no limiter"
WIDTH = 220  # columns of the table where no terminal sets them


class VariantError(Exception):
    """Error of a variant that does not compile or cannot be executed; the message names it and says why."""


def measure_all(
    work: list[Callable[[], dict[str, Any]]], jobs: int
) -> tuple[list[dict[str, Any]], list[VariantError]]:
    """Return the rows of all variants that do not fail, in order, and the errors of the others.

    With one job, everything runs in this process, where later compilations are then faster.
    """
    rows, failures = [], []
    with contextlib.ExitStack() as stack:
        results: list[Callable[[], dict[str, Any]]] = work
        if jobs > 1:
            # Forked workers need no second import of torch; forking is safe, as nothing here has started a thread.
            pool = ProcessPoolExecutor(min(jobs, len(work)), multiprocessing.get_context("fork"))
            stack.callback(pool.shutdown, cancel_futures=True)
            results = [pool.submit(each).result for each in work]
        progress = stack.enter_context(Progress(console=Console(stderr=True), transient=True))
        for result in progress.track(results, description=f"triton {triton.__version__}"):
            try:
                rows.append(result())
            except VariantError as error:
                failures.append(error)
    return rows, failures


def record(
    rows: list[dict[str, Any]], benchmark: str, arguments: Sequence[str], folder: Path | None, console: Console
) -> None:
    """Add their origin to the rows, and write them to a record if a folder is given."""
    origin = facts(torch.device("cpu"), "bench.codegen", arguments)
    for row in rows:
        row |= origin
    if folder and rows:
        # Machine code depends on the compiler, not on this machine, so the file is named by the compiler.
        path = records.new_path(benchmark, origin | {"device": f"triton {triton.__version__}"}, folder)
        records.append(path, benchmark, rows)
        console.print(f"raw measurements: {path.name}", highlight=False)


def report_failures(failures: Iterable[VariantError], console: Console) -> None:
    """Print the error of each variant that failed."""
    for failure in failures:
        console.print(str(failure), style="red", markup=False, highlight=False)


def report_violations(
    rows: list[dict[str, Any]], find: Callable[[dict[str, Any]], list[str]], console: Console
) -> int:
    """Print the violations found in each row; return 1 if there are any."""
    broken = [(row, found) for row in rows if (found := find(row))]
    for row, found in broken:
        name = Variant(*(row[field] for field in Variant._fields))
        console.print(f"[bold red]violated[/] {name}\n  " + "\n  ".join(found), highlight=False)
    return int(bool(broken))


def wide_console() -> Console:
    """Return a console for tables, which is as wide as they are if there is no terminal."""
    terminal = Console()
    return terminal if terminal.is_terminal else Console(width=WIDTH)


def refuse(message: str) -> int:
    """Print why nothing can be measured, and return the status that says so."""
    print(f"bench.codegen: {message}", file=sys.stderr)
    return 2
