"""The command that executes variants and shows their counts: ``python -m bench.codegen --executed``."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence
from typing import Any

from bench.codegen import executed
from bench.codegen.execution_limits import LIMITS, excesses, limit_of
from bench.codegen.variant import Variant
from bench.codegen.variant_runs import (
    NOTHING,
    VariantError,
    measure_all,
    record,
    refuse,
    report_failures,
    report_violations,
    wide_console,
)
from bench.codegen.variants import variants


def execute(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    """Execute the requested variants and print their counts.

    Return 1 if one fails or exceeds its limit, 2 if none can be executed.
    """
    if given := [
        name for name in ("align", "can-skip", "collect-grad-stats") if getattr(options, name.replace("-", "_"))
    ]:
        return refuse(f"--executed runs launches as they are: leave out --{' --'.join(given)}")
    if unknown := [name for name in options.target if name not in executed.CHIPS]:
        return refuse(f"--executed knows {', '.join(executed.CHIPS)}, not {', '.join(unknown)}")
    if unknown := [name for name in options.kernel if name not in executed.COUNTED]:
        return refuse(
            f"--executed counts by element, and {', '.join(unknown)} passes over none: "
            f"give {', '.join(executed.COUNTED)}"
        )
    chosen = [limit.variant for limit in LIMITS if _asked_for(limit.variant, options)]
    if not options.gate:
        asked = options.target, options.kernel, options.weights, options.moments, options.levels, options.path
        chosen = list(dict.fromkeys([*variants(*asked, options.rule), *chosen]))
    work = [functools.partial(count, v, width) for v in chosen for width in executed.widths(v)]
    if not work:
        return refuse("none of these variants is limited" if options.gate else NOTHING)
    rows, failures = measure_all(work, options.jobs)
    console = wide_console()
    for target in options.target:
        if of_target := [row for row in rows if row["target"] == target]:
            console.print(executed.table(target, of_target))
    console.print(executed.ABOUT, highlight=False)
    record(rows, "executed", arguments, options.record, console)
    report_failures(failures, console)
    limited = [row for row in rows if limit_of(row)]
    console.print(f"gate: {len(limited)} of these variants are limited in what they may execute")
    return max(report_violations(limited, excesses, console), int(bool(failures)))


def _asked_for(variant: Variant, options: argparse.Namespace) -> bool:
    return (
        variant.target in options.target
        and variant.kernel in options.kernel
        and variant.weights in options.weights
        and variant.moments in (*options.moments, None)
        and variant.level in options.levels
        and variant.path in options.path
        and variant.rule in (*options.rule, None)
    )


def count(variant: Variant, width: int) -> dict[str, Any]:
    """Execute a variant and return its row.

    Raises:
        VariantError: it does not compile, or faults.
    """
    try:
        return executed.count(variant, width)
    except Exception as error:  # a compiler raises anything
        raise VariantError(f"cannot be executed: {variant}, rows of {width}\n  {error}") from error
