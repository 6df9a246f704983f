"""Compile every kernel variant without a GPU, show its machine code's costs, and gate the flat path.

With --executed, execute variants instead; count dependent loads, and instructions and memory sectors per element.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.codegen.launches import (
    DTYPES,
    DWT,
    IDWT,
    KERNELS,
    MOMENTS,
    NORMS,
    PANEL,
    ROW_NORM,
    ROW_STEP,
    SHARED_STEP,
    STEPS,
    data_of,
    rule_names,
)
from bench.codegen.machine_code import LIMITS, Accesses, find_tools, read
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
from bench.codegen.variants import PATHS, TARGETS, compile_variant, variants
from bench.common import records
from gwt_kernels.backends.choice import MAX_TRITON_LEVEL
from gwt_kernels.core.level import ROW, Level, depth_of
from gwt_kernels.rules import rule_of

# Arrays that the gate knows; everything else that a kernel accesses is a table, or one number per tensor or row.
ARRAYS = ("p", "g", "m", "v", "low", "m_scale", "v_scale")
GATED = ("sm_80", "sm_90", "sm_100")
WIDE = 128


def gated(row: dict[str, Any]) -> bool:
    """Return whether the gate requires that :func:`violations` finds nothing in a row."""
    return (
        row["target"] in GATED
        and row["kernel"] in (*STEPS, *NORMS)
        and row["path"] == "flat"
        and row["weights"] in ("bf16", "fp32")
        and (row["level"] == ROW or 1 <= row["level"] <= MAX_TRITON_LEVEL or row["moments"] is None)
    )


def passes(row: dict[str, Any]) -> dict[str, dict[str, int]]:
    """Return how often a row's kernel loads and stores a tile of each array, in the intermediate code.

    A kernel for rows reads gradients twice, for sums over the row and for its update, unless the rule has no
    moments. The norm of Adafactor's update reads no first moment.
    """
    rule = rule_of(row["rule"] or "gwt", row["level"])
    step = row["kernel"] in STEPS
    state = [*"mv"[: len(rule.slots)], *(["low"] if row["rounding"] == "split" else [])]
    if row["moments"] == "int8":
        state += [f"{name}_scale" for name in "mv"[: len(rule.slots)]]
    factors = dict.fromkeys(("row", "col") if rule.is_factored else (), 1)
    if not step:
        return {"loads": dict.fromkeys(["g", *([] if rule.is_factored else state)], 1) | factors, "stores": {}}
    twice = row["kernel"] in (ROW_STEP, SHARED_STEP) and rule.slots
    loads = dict.fromkeys([*state, *(["p"] if rule.reads_weights else [])], 1) | {"g": 2 if twice else 1} | factors
    return {"loads": loads, "stores": dict.fromkeys([*state, "p"], 1)}


def violations(row: dict[str, Any]) -> list[str]:
    """Return the reasons why a row of a step or norm is not one optimal pass.

    Weights, low bits and gradients must be accessed by 128-bit instructions only, as many as a tile has 128-bit
    words (or more, in a loop over a row's tiles, which may be unrolled). Of two dtypes, this holds for the wider;
    accesses of the narrower have as many elements. Accesses of int8 moments must be as wide as the moments of the
    blocks in 16 bytes of weights. Nothing may spill, and no product may be contracted with a sum. The intermediate
    code must load and store each array as often as :func:`passes` says.
    """
    found = []
    if row["stack"] or row["spills"]:
        found.append(f"spills: {row['stack']} bytes of stack, {row['spills']} instructions")
    if row["contracts"]:
        found.append("products are contracted with sums: launch with UNFUSED of backends/triton/compiling.py")
    looped = row["kernel"] in (ROW_STEP, ROW_NORM, SHARED_STEP)
    sizes = {name: dtype.itemsize for name, dtype in data_of(Variant(*(row[x] for x in Variant._fields))).items()}
    for what, times in passes(row).items():
        accesses, in_code = row[what], row[f"tensor_{what}"]
        expected = set(times) & set(ARRAYS)
        if in_code != times:
            found.append(f"{what} in the intermediate code: {in_code} instead of {times}")
        if looped:  # if it is unrolled, instructions of one line may be counted for several arrays together
            accesses = _apart(accesses)
        strange = [name for name in accesses if not name.isidentifier()]
        if strange:
            found.append(f"{what} of arrays that are not told apart: {_text(accesses, strange)}")
        touched = set(accesses) & set(ARRAYS)
        if touched != expected:
            found.append(f"machine code {what} {sorted(touched)} instead of {sorted(expected)}")
        if row["moments"] == "int8":
            coded = str(8 * row["constants"]["MOMENT_ALIGN"])
            narrow = [name for name in sorted(expected & {"m", "v"}) if set(accesses.get(name, {})) != {coded}]
            found += [
                f"{what} of {name}: {_widths([accesses.get(name, {})])} instead of x{coded}" for name in narrow
            ]
        for name in sorted(expected & {"p", "g", "low"}):
            # The tile's elements over those of one instruction of all lanes: 16 bytes of the wider dtype.
            tile = row["constants"].get("TILE") or row["constants"]["W"] * row["constants"]["NB"]
            widest = max(sizes["g"], sizes["p"] if row["kernel"] in STEPS else 0)
            needed, bits = (
                times[name] * tile * widest // (16 * row["lanes"]),
                str(WIDE * sizes.get(name, 2) // widest),
            )
            given = accesses.get(name, {})
            if set(given) != {bits} or given[bits] < needed or (given[bits] > needed and not looped):
                found.append(f"{what} of {name}: {_widths([given])} instead of {needed}x{bits}")
    return found


def _apart(accesses: Accesses) -> Accesses:
    """Count accesses that belong to several known arrays together as accesses of each."""
    found: Accesses = {}
    for names, widths in accesses.items():
        together = names.split("|")
        for name in together if set(together) <= set(ARRAYS) else [names]:
            own = found.setdefault(name, {})
            own.update({bits: own.get(bits, 0) + n for bits, n in widths.items()})
    return found


def measure(variant: Variant, overrides: dict[str, Any] | None = None) -> dict[str, Any]:
    """Compile a variant and return its row: its options, its constants and what :func:`read` finds.

    Raises:
        VariantError: it does not compile.
    """
    try:
        kernel, constants = compile_variant(variant, overrides)
    except Exception as error:  # a compiler raises anything
        raise VariantError(f"does not compile: {variant}\n  {error}") from error
    row = {**variant._asdict(), "constants": constants, **read(kernel, variant.target)}
    return {**row, "lanes": row["warps"] * TARGETS[variant.target].warp_size}


def table(target: str, rows: Iterable[dict[str, Any]]) -> Table:
    """Lay out the rows of one target."""
    result = Table(title=f"{target}: {LIMITS[target]}", title_justify="left", caption_justify="left")
    for head in ("kernel", "weights", "moments", "path", "limited", "rule", "rounding", "level"):
        result.add_column(head)
    for head in ("warps", "regs", "stack", "spills", "shared", "barriers", "instr", "resident"):
        result.add_column(head, justify="right")
    for head in ("loads", "stores", "look-ups"):
        result.add_column(head, no_wrap=True)
    previous = None
    for row in rows:
        if previous is not None and row["kernel"] != previous:
            result.add_section()
        previous = row["kernel"]
        tensors = {**row["tensor_loads"], **row["tensor_stores"]}
        look_ups = [widths for name, widths in row["loads"].items() if name not in tensors]
        options = ("kernel", "weights", "moments", "path", "limited", "rule", "rounding", "level")
        result.add_row(
            *("" if row[k] is None else str(row[k]).removesuffix("_kernel") for k in options),
            *(str(row[k]) for k in ("warps", "registers", "stack", "spills", "shared", "barriers", "instructions")),
            f"{row['resident_warps']} ({row['resident_warps'] / LIMITS[target].warps:.0%})",
            _text(row["loads"], row["tensor_loads"]),
            _text(row["stores"], row["stores"]),
            _widths(look_ups),
        )
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return 1 if a variant fails the gate or to compile, 2 if nothing can be measured."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = _parse(arguments)
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        return refuse("TRITON_INTERPRET is set, so Triton interprets kernels and compiles none: unset it")
    if options.executed:
        from bench.codegen.executed_command import execute  # needs tests/, which the rest does not

        return execute(options, arguments)
    if options.gate:
        return refuse("--gate chooses among executed variants: add --executed")
    asked = options.target, options.kernel, options.weights, options.moments, options.levels, options.path
    chosen = list(variants(*asked, options.rule))
    if not chosen:
        return refuse(NOTHING)
    overrides: dict[str, Any] = {} if options.align is None else {"ALIGN": options.align}
    overrides |= {name: True for name in ("CAN_SKIP", "COLLECT_GRAD_STATS") if getattr(options, name.lower())}
    try:
        if any(TARGETS[v.target].backend == "cuda" for v in chosen):
            find_tools()
    except RuntimeError as error:
        return refuse(str(error))
    rows, failures = measure_all([functools.partial(measure, v, overrides) for v in chosen], options.jobs)

    console = wide_console()
    for target in options.target:
        if of_target := [row for row in rows if row["target"] == target]:
            console.print(table(target, of_target))
    console.print(
        "loads, stores: instructions x bits a lane, by array; look-ups: the same for tables and single numbers; "
        "spills: instructions\nresident: warps on a multiprocessor at once, by registers, shared memory and warps"
    )
    for row in rows:
        row["violations"] = violations(row) if row["kernel"] in (*STEPS, *NORMS) else None
    record(rows, "codegen", arguments, options.record, console)
    report_failures(failures, console)
    return max(_report_gate(rows, console), int(bool(failures)))


def _report_gate(rows: list[dict[str, Any]], console: Console) -> int:
    promised = [row for row in rows if gated(row)]
    broken = report_violations(promised, lambda row: row["violations"], console)
    if not promised:
        console.print("gate: none of these variants is promised anything")
    elif not broken:
        console.print(f"gate: passed by all {len(promised)} variants of the flat path on {', '.join(GATED)}")
    return broken


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.codegen", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    text = "execute variants and count, instead of reading their machine code"
    parser.add_argument("--executed", action="store_true", help=text)
    executed = parser.parse_known_args(arguments)[0].executed
    text = "with --executed: those variants alone whose counts are limited"
    parser.add_argument("--gate", action="store_true", help=text)
    usual = {"moments": ["fp32", "bf16", "int8"]}
    if executed:
        usual |= {"target": ["sm_90"], "kernel": [*STEPS, *NORMS, PANEL, DWT, IDWT], "weights": ["bf16", "fp32"]}
    for name, values, description in (
        ("target", TARGETS, "architectures"),
        ("kernel", KERNELS, "kernels"),
        ("weights", DTYPES, "dtypes of weights and gradients"),
        ("moments", MOMENTS, "dtypes of exp_avg and exp_avg_sq"),
        ("path", PATHS, "where a block's elements lie"),
        ("rule", rule_names(), "rules of steps and norms"),
    ):
        default = usual.get(name, list(values))
        text = f"{description} (default: {' '.join(default)})"
        parser.add_argument(f"--{name}", nargs="+", choices=list(values), default=default, help=text)
    levels = "0,2,4,row" if executed else f"0-{MAX_TRITON_LEVEL},row"
    text = f"levels, such as 2 or 0,1,4-6,row (default: {levels})"
    parser.add_argument("--levels", type=_levels, default=levels, help=text)
    parser.add_argument("--can-skip", action="store_true", help="as under clipping: what the device may skip")
    parser.add_argument("--collect-grad-stats", action="store_true", help="as under skip_nonfinite")
    parser.add_argument("--align", type=int, choices=(2, 4, 8, 16), help="replace the ALIGN hint, to see its worth")
    text = "also write a record of one row a variant into FOLDER (default: bench/results)"
    parser.add_argument("--record", nargs="?", type=Path, const=records.RESULTS, metavar="FOLDER", help=text)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="variants compiled at once")
    return parser.parse_args(arguments)


def _levels(text: str) -> list[Level]:
    levels: set[Level] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        levels.update([ROW] if part == ROW else range(int(first), int(last or first) + 1))
    return sorted(levels, key=depth_of)


def _text(accesses: Accesses, names: Iterable[str]) -> str:
    return "  ".join(f"{name} {_widths([accesses[name]])}" for name in names if name in accesses)


def _widths(counts: Iterable[dict[str, int]]) -> str:
    total: dict[int, int] = {}
    for widths in counts:
        for bits, n in widths.items():
            total[int(bits)] = total.get(int(bits), 0) + n
    return " ".join(f"{n}x{bits}" for bits, n in sorted(total.items()))


if __name__ == "__main__":
    sys.exit(main())
