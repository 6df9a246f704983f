"""The gate on machine code: the flat path passes, known bad code fails, every target compiles."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import fcntl
import functools
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="needs Triton: pip install triton")

from bench.codegen import __main__ as codegen
from bench.codegen import machine_code
from bench.codegen.launches import (
    DWT,
    IDWT,
    KERNELS,
    LAUNCHED_FROM,
    LIMITER,
    NORM,
    NORMS,
    PANEL,
    ROW_NORM,
    ROW_STEP,
    SHARED_STEP,
    STEP,
    STEPS,
    kernel_of,
    rule_names,
)
from bench.codegen.machine_code import LIMITS
from bench.codegen.variant import Variant
from bench.codegen.variants import TARGETS, variants
from bench.common import records
from gwt_kernels import rules
from gwt_kernels.backends.triton import factored_launch, haar_launch, launch
from tests.ptx.plugin import CACHE

Row = dict[str, Any]
Run = Callable[..., tuple[int, list[Row], str]]


# Runs the given command lines one after the other, and reports the status and the output of each.
COMMANDS = """
import contextlib, gc, io, json, sys
from bench.codegen.__main__ import main
gc.freeze()  # no collection need look through the imports
for line in sys.stdin:
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        status = main(json.loads(line))
    print(json.dumps([status, printed.getvalue()]), flush=True)
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Return a function that runs the command in another process, since this process interprets kernels.

    Compiled kernels are cached in `build/triton` for later test runs. Workers of one test run share their results.
    One process runs all commands of a worker, and each has one job: starting takes longer than compiling five
    kernels.
    """
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(CACHE)

    def command(*arguments: str) -> tuple[int, list[Row], str]:
        name = hashlib.sha256(" ".join(arguments).encode()).hexdigest()
        path, out = folder / f"codegen_{name}_done.json", folder / f"codegen_{name}"
        with open(folder / f"codegen_{name}_lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                process = started()
                process.stdin.write(json.dumps(["--record", str(out), "--jobs", "1", *arguments]) + "\n")
                process.stdin.flush()
                answer = process.stdout.readline()
                files = list(out.glob("codegen_triton-*.json"))
                assert answer, errors.read_text()
                assert len(files) == 1, answer
                status, printed = json.loads(answer)
                path.write_text(json.dumps([status, records.rows_of(files[0], "codegen"), printed]))
        status, measured, text = json.loads(path.read_text())
        return status, measured, text

    errors = tmp_path_factory.mktemp("codegen") / "errors"
    with errors.open("w") as file, contextlib.ExitStack() as stack:

        @functools.cache
        def started() -> Any:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": file, "text": True}
            place = Path(__file__).parents[2]
            return stack.enter_context(
                subprocess.Popen([sys.executable, "-c", COMMANDS], cwd=place, env=environment, **pipes)
            )

        yield command


@pytest.fixture(scope="module")
def promised(run: Run, rule_rows: list[Row]) -> list[Row]:
    """Return the rows of variants that are promised to be one optimal pass."""
    status, rows, text = run(
        *("--target", "sm_90", "--kernel", STEP, NORM, "--path", "flat", "--levels", "1,5,10"),
        *("--weights", "bf16", "fp32", "--moments", "fp32", "--rule", "gwt", "foam"),
    )
    assert status == 0, text
    return [*rows, *at_level_2(rule_rows, "fp32")]


def at_level_2(rule_rows: list[Row], moments: str) -> list[Row]:
    """Return rows at level 2 with bf16 weights, of the rules and kernels with the most promises."""
    wanted = {"level": 2, "weights": "bf16", "moments": moments}
    return [
        row
        for row in rule_rows
        if wanted.items() <= row.items() and row["kernel"] in (STEP, NORM) and row["rule"] in (None, "gwt", "foam")
    ]


def test_flat_path_passes_the_gate(promised: list[Row]) -> None:
    options = ("kernel", "weights", "limited", "rule", "rounding", "level")
    found = {tuple(row[option] for option in options): codegen.violations(row) for row in promised}
    either = [(STEP, False, "gwt", "nearest"), (STEP, False, "foam", "nearest"), (STEP, True, "gwt", "nearest")]
    either.append((NORM, None, None, None))
    kernels = {"fp32": either}
    kernels["bf16"] = [*either, (STEP, False, "foam", "stochastic"), (STEP, False, "foam", "split")]
    assert found == {
        (kernel, weights, *rest, level): []
        for weights in kernels
        for kernel, *rest in kernels[weights]
        for level in ((1, 2, 5, 10) if weights == "bf16" else (1, 5, 10))
    }
    assert all(codegen.gated(row) for row in promised)


def test_every_access_is_attributed(promised: list[Row]) -> None:
    for row in promised:
        if row["kernel"] == STEP:
            factors = {"factors"} if row["limited"] else set()
            low = {"low"} if row["rounding"] == "split" else set()
            assert set(row["loads"]) == {*"pgmv", "layout", "owners", "pointers", "scalars"} | factors | low
            assert set(row["stores"]) == set("pmv") | low
            # The look-ups: four addresses, and all numbers but gamma, and but for the folded rule the detail scale;
            # the low bits' address; of random bits the key, and the step, of which the compiler loads only the
            # lower half.
            addresses = {"split": {"64": 5}, "stochastic": {"32": 1, "64": 5}}
            assert row["loads"]["pointers"] == addresses.get(row["rounding"], {"64": 4})
            assert row["loads"]["scalars"] == {"32": 9 if row["rule"] == "foam" else 8}


def test_worked_example(promised: list[Row]) -> None:
    """Check bf16 at level 2: 4096 weights of 2 bytes in 256 lanes are two words of 16 bytes per lane."""
    row = next(r for r in promised if (r["kernel"], r["weights"], r["level"]) == (STEP, "bf16", 2))
    assert (row["warps"], row["lanes"], row["constants"]["W"], row["constants"]["NB"]) == (8, 256, 4, 1024)
    assert row["loads"]["p"] == row["loads"]["g"] == row["stores"]["p"] == {"128": 2}
    assert row["loads"]["m"] == row["loads"]["v"] == row["stores"]["m"] == row["stores"]["v"] == {"64": 2}
    assert row["tensor_loads"] == {"p": 1, "g": 1, "m": 1, "v": 1}
    assert row["triton"]


@pytest.fixture(scope="module")
def int8_rows(run: Run, rule_rows: list[Row]) -> list[Row]:
    """Return the rows of int8 moments."""
    status, rows, text = run(
        *("--target", "sm_90", "--kernel", STEP, NORM, "--path", "flat", "--levels", "5"),
        *("--weights", "bf16", "fp32", "--moments", "int8", "--rule", "gwt", "foam"),
    )
    assert status == 0, text
    return [*rows, *at_level_2(rule_rows, "int8")]


def test_int8_moments_pass_the_gate(int8_rows: list[Row]) -> None:
    assert [codegen.violations(row) for row in int8_rows] == [[]] * (6 + 4 + 6)
    assert all(codegen.gated(row) for row in int8_rows)
    for row in int8_rows:
        blocks = max(1, 128 // {"bf16": 16, "fp32": 32}[row["weights"]] >> row["level"])  # per 16 bytes of weights
        assert set(row["loads"]["m"]) == set(row["loads"]["v"]) == {str(8 * blocks)}
        stored = dict.fromkeys(["p", "m", "v", "m_scale", "v_scale", *["low"] * (row["rounding"] == "split")], 1)
        assert row["tensor_stores"] == (stored if row["kernel"] == STEP else {})
        assert row["tensor_loads"]["m_scale"] == row["tensor_loads"]["v_scale"] == 1


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("loads in the intermediate code", lambda r: r["tensor_loads"].update(m_scale=2)),
        ("stores in the intermediate code", lambda r: r["tensor_stores"].pop("v_scale")),
        ("machine code stores", lambda r: r["stores"].pop("m_scale")),
        ("loads of m: 4x8 instead of x16", lambda r: r["loads"].update(m={"8": 4})),
        ("stores of v: 2x8 1x16 instead of x16", lambda r: r["stores"].update(v={"16": 1, "8": 2})),
        ("spills: 8 bytes", lambda r: r.update(stack=8)),
    ],
)
def test_each_promise_of_int8_moments_can_be_broken(
    int8_rows: list[Row], message: str, change: Callable[[Row], object]
) -> None:
    row = copy.deepcopy(next(r for r in int8_rows if (r["kernel"], r["weights"], r["level"]) == (STEP, "bf16", 2)))
    change(row)
    assert [text for text in codegen.violations(row) if text.startswith(message)]


def test_skippable_steps_are_one_optimal_pass_too(run: Run) -> None:
    status, rows, text = run(
        *("--target", "sm_90", "--kernel", STEP, NORM, "--path", "flat", "--levels", "2", "--can-skip"),
        *("--weights", "bf16", "--moments", "fp32", "--rule", "gwt", "foam"),
    )
    assert status == 0, text
    assert len(rows) == 6
    assert all(row["constants"]["CAN_SKIP"] and codegen.violations(row) == [] for row in rows)


def test_norms_with_gradient_statistics_read_gradients_once(run: Run) -> None:
    common = "--target", "sm_90", "--kernel", NORM, "--path", "flat", "--rule", "gwt", "--collect-grad-stats"
    for level, weights, moments in (
        (1, "bf16", "fp32"),
        (1, "fp32", "int8"),
        (5, "bf16", "int8"),
        (5, "fp32", "fp32"),
    ):
        status, rows, text = run(*common, "--levels", str(level), "--weights", weights, "--moments", moments)
        assert status == 0, text
        (row,) = rows
        assert (codegen.gated(row), codegen.violations(row)) == (True, [])
        assert row["stores"] == {"partials": {"32": 1}, "grad_stats": {"32": 2}}


def test_row_path_fails_the_gate(run: Run) -> None:
    status, rows, _ = run(
        *("--target", "sm_90", "--kernel", STEP, "--path", "row", "--levels", "2"),
        *("--weights", "bf16", "--moments", "fp32", "--rule", "foam"),
    )
    assert status == 0  # the variant has no promise
    assert len(rows) == 3
    for row in rows:
        assert not codegen.gated(row)
        wrong = [text.split(":")[0] for text in codegen.violations(row)]
        low = row["rounding"] == "split"
        loads, stores = (["g", "low", "p"], ["low", "p"]) if low else (["g", "p"], ["p"])
        # The code has one body for tiles within a row, and one for others.
        of_loads, of_stores = (
            [f"{what} of {name}" for name in own] for what, own in (("loads", loads), ("stores", stores))
        )
        assert wrong == [
            *("loads in the intermediate code", *of_loads, "stores in the intermediate code", *of_stores),
        ]


def test_transforms_of_rows_of_any_width_spill_nothing(run: Run) -> None:
    options = "--path", "row", "--levels", "5,9", "--weights", "bf16", "--moments", "fp32"
    status, rows, text = run("--target", "sm_90", "--kernel", DWT, IDWT, *options)
    assert status == 0, text
    assert [(row["kernel"], row["level"]) for row in rows] == [(DWT, 5), (DWT, 9), (IDWT, 5), (IDWT, 9)]
    assert all(row["spills"] == row["stack"] == 0 and row["registers"] <= 128 for row in rows)


def test_wrong_alignment_hint_fails_the_gate(run: Run) -> None:
    status, rows, text = run(
        *("--target", "sm_90", "--kernel", STEP, "--path", "flat", "--levels", "2", "--align", "2"),
        *("--weights", "bf16", "--moments", "fp32", "--rule", "gwt"),
    )
    assert status == 1
    assert len(rows) == 2
    for row in rows:
        assert row["constants"]["ALIGN"] == 2
        assert row["loads"]["p"] == row["loads"]["g"] == {"16": 16}
        assert row["violations"] == codegen.violations(row) != []
    assert "violated" in text


TAMPERED: dict[str, Callable[[Row], object]] = {
    "spills: 8 bytes": lambda r: r.update(stack=8),
    "products are contracted": lambda r: r.update(contracts=True),
    "spills: 0 bytes of stack, 2": lambda r: r.update(spills=2),
    "loads of p: 2x64 1x128": lambda r: r["loads"].update(p={"128": 1, "64": 2}),
    "loads of g: 3x128": lambda r: r["loads"].update(g={"128": 3}),
    "stores of p: 1x16 2x128": lambda r: r["stores"]["p"].update({"16": 1}),
    "loads in the intermediate code: .*'p': 2": lambda r: r["tensor_loads"].update(p=2),
    "loads in the intermediate code: .*'partials'": lambda r: r["tensor_loads"].update(partials=1),
    "stores in the intermediate code": lambda r: r["tensor_stores"].pop("v"),
    "machine code stores .*'g'": lambda r: r["stores"].update(g={"128": 2}),
    r"not told apart: \? 1x32": lambda r: r["loads"].update({"?": {"32": 1}}),
    r"not told apart: g\|scalars 9x32": lambda r: r["loads"].update({"g|scalars": {"32": 9}}),
}


@pytest.mark.parametrize("message", TAMPERED)
def test_each_promise_can_be_broken(promised: list[Row], message: str) -> None:
    row = copy.deepcopy(next(r for r in promised if (r["kernel"], r["weights"], r["level"]) == (STEP, "bf16", 2)))
    assert codegen.violations(row) == []
    TAMPERED[message](row)
    with pytest.raises(AssertionError, match=message):
        assert not codegen.violations(row), "\n".join(codegen.violations(row))


def test_every_kernel_compiles_for_every_target(run: Run, rule_rows: list[Row]) -> None:
    """Check all targets; for one of them each rule's steps and norms are compiled above."""
    rules = "gwt", "adafactor", "adam_mini"  # rules with all of their kernels
    options = "--path", "flat", "--weights", "bf16", "--moments", "bf16", "--rule", *rules
    others = [target for target in TARGETS if target != "sm_90"]
    rest = [kernel for kernel in KERNELS if kernel not in (*STEPS, *NORMS)]
    rows: list[Row] = []
    for targets, kernels in ((others, list(KERNELS)), (["sm_90"], rest)):
        status, found, text = run("--target", *targets, "--kernel", *kernels, "--levels", "3,row", *options)
        assert status == 0, text
        chosen = list(variants(targets, kernels, ["bf16"], ["bf16"], [3, "row"], ["flat"], rules))
        assert [Variant(*(row[field] for field in Variant._fields)) for row in found] == chosen
        rows += found
    every = [*rows, *rule_rows]
    assert {(row["target"], row["kernel"]) for row in every} == {(t, k) for t in TARGETS for k in KERNELS}
    for row in every:
        assert row["registers"] > 0
        assert row["stack"] == row["spills"] == 0
        assert row["contracts"] is False
        assert 0 < row["resident_warps"] <= LIMITS[row["target"]].warps
    for row in rows:
        if (row["target"], row["kernel"]) != ("gfx942", PANEL):  # its scalar loads have no source line
            names = "|".join([*row["loads"], *row["stores"]]).split("|")  # names of an unrolled loop are joined
            assert all(name.isidentifier() for name in names)
        if codegen.gated(row) or row["kernel"] in (STEP, NORM):
            assert codegen.violations(row) == []
        elif row["kernel"] in (DWT, IDWT):
            wide = row["loads"] if row["kernel"] == DWT else row["stores"]
            assert set(wide["x"]) == {"128"}


def test_every_kernel_that_is_launched_is_covered() -> None:
    modules = factored_launch, launch, haar_launch  # the first one also launches a kernel of the second
    launched = {name: module for module in modules for name in vars(module) if name.endswith("_kernel")}
    assert sorted(launched) == sorted(KERNELS)
    assert launched == LAUNCHED_FROM


@pytest.fixture(scope="module")
def rule_rows(run: Run) -> list[Row]:
    """Return rows of every rule at each kind of level, and in each storage at one; of one rule all of these."""
    common = "--target", "sm_90", "--path", "flat", "--kernel", *STEPS
    others = [name for name in rule_names() if name not in ("gwt", "foam")]
    with_moments = [name for name in rule_names() if rules.rule_of(name, 2).slots]
    chosen = (
        (*NORMS, "--weights", "bf16", "--moments", "fp32", "--levels", "0,2,row"),
        (*NORMS, "--weights", "bf16", "--moments", "int8", "--levels", "2", "--rule", *with_moments),
        ("--weights", "bf16", "--moments", "int8", "--levels", "0", "--rule", "gwt"),
        ("--weights", "fp32", "--moments", "fp32", "--levels", "2,row", "--rule", *others),
    )
    rows: list[Row] = []
    for options in chosen:
        status, found, text = run(*common, *options)
        assert status == 0, text
        rows += found
    return rows


def test_every_rule_of_the_registry_passes_the_gate(rule_rows: list[Row]) -> None:
    gated = [row for row in rule_rows if codegen.gated(row)]
    assert [text for row in gated for text in codegen.violations(row)] == []
    stated = {id(rules.rule_of(row["rule"], row["level"])) for row in rule_rows if row["kernel"] in STEPS}
    assert {id(rules.rule_of(name)) for name in rule_names()} <= stated
    assert {row["kernel"] for row in gated} == {*STEPS, *NORMS}


def test_a_new_rule_is_compiled_because_it_is_in_the_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    added = dataclasses.replace(rules.RULES["lion"], name="added")
    monkeypatch.setitem(rules.RULES, "added", added)
    monkeypatch.setattr(rules, "_BUCKETS", rules.RULES | {"orthogonal": rules.rule_of("orthogonal")})
    found = list(variants(["sm_90"], KERNELS, ["bf16"], ["fp32"], [0, 2, "row"], ["flat"]))
    own = [(v.kernel, v.level) for v in found if v.rule == "added"]
    assert own == [(STEP, 0), (STEP, 2), (ROW_STEP, "row")]


def test_kernels_of_rules() -> None:
    assert [kernel_of("gwt", level) for level in (0, 2, "row")] == [STEP, STEP, ROW_STEP]
    assert [kernel_of("foam", level) for level in (0, 2, "row")] == [
        None,
        STEP,
        ROW_STEP,
    ]  # AdamW at level 0, as gwt
    assert [kernel_of("adamw", level) for level in (0, 2, "row")] == [None, None, None]
    assert [kernel_of("adam_mini", level) for level in (0, 2, "row")] == [SHARED_STEP, SHARED_STEP, ROW_STEP]
    assert [kernel_of("adafactor", level) for level in (0, 2, "row")] == [STEP, STEP, None]


def test_kernels_that_take_rows_leave_room_for_warps(rule_rows: list[Row]) -> None:
    for name in (ROW_STEP, SHARED_STEP, ROW_NORM):
        rows = [row for row in rule_rows if row["kernel"] == name and row["level"] in (0, 2, "row")]
        assert rows
        assert min(row["resident_warps"] for row in rows) >= 32  # half of what a multiprocessor may hold


def test_the_narrower_of_two_dtypes_is_accessed_by_as_many_elements(rule_rows: list[Row]) -> None:
    """Check widths of accesses, so that each instruction of a warp accesses whole sectors of both."""

    def the(rule: str, weights: str, level: int) -> Row:
        wanted = {"kernel": STEP, "rule": rule, "weights": weights, "level": level, "rounding": "nearest"}
        rows = [row for row in rule_rows if wanted.items() <= row.items() and row["moments"] != "int8"]
        (row,) = rows
        return row

    first, last = the("muon", "fp32", 2), the("orthogonal", "fp32", 2)
    assert (first["loads"]["g"], first["stores"]["p"]) == ({"128": 4}, {"64": 4})
    assert (last["loads"]["g"], last["loads"]["p"], last["stores"]["p"]) == ({"64": 4}, {"128": 4}, {"128": 4})
    assert the("muon", "bf16", 2)["loads"]["g"] == the("orthogonal", "bf16", 2)["loads"]["g"] == {"128": 2}
    assert (first["shared"], first["barriers"], last["shared"], last["barriers"]) == (0, 0, 0, 0)
    row = copy.deepcopy(first)
    row["stores"]["p"] = {"128": 2}
    assert codegen.violations(row) == ["stores of p: 2x128 instead of 4x64"]


def test_interpreter_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert codegen.main([]) == 2
    assert "TRITON_INTERPRET is set" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["cuobjdump", "nvdisasm"])
def test_missing_disassembler_is_refused(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tool = machine_code.knobs.NvidiaTool
    present = tool.from_path
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(tool, "from_path", lambda path: None if Path(path).name == name else present(path))
    assert codegen.main(["--target", "sm_90", "--kernel", LIMITER]) == 2
    assert f"TRITON_{name.upper()}_PATH" in capsys.readouterr().err


def test_choice_without_variants_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert codegen.main(["--kernel", DWT, "--levels", "0"]) == 2
    assert "level 0" in capsys.readouterr().err
