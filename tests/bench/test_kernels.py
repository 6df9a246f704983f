"""The kernel benchmark on tiny shapes: its cases, byte counts and rows, and buffers that take turns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from bench.kernels import __main__ as kernels
from bench.kernels import cases, oracle
from bench.kernels.cases import EXPERTS, MAX_SETS, Case, bytes_held, bytes_moved, obstacle, set_count
from bench.kernels.oracle import Buffers, bytes_needed
from tests.support.kernel_cases import CPU, HALF, SINGLE, TINY, quantized, run, step

pytestmark = pytest.mark.usefixtures("quick")


def test_from_command_line_to_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, rows = run(tmp_path, *TINY, "--levels", "0", "2", "--weights", "bfloat16", "float32")
    assert status == 0
    expected = {
        (kernel, shape, level, weights)
        for kernel in ("step", "step_limiter", "haar_dwt", "haar_idwt")
        for shape in ("6x16", "5x37")
        for level in (0, 2)
        for weights in ("bfloat16", "float32")
        if level or kernel == "step"  # level 0 has neither transform nor limiter
    }
    timed = [row for row in rows if row["metric"] == "time"]
    assert {(row["kernel"], row["shape"], row["level"], row["weights"]) for row in timed} == expected
    assert len(timed) == len(expected) == 20
    assert "20 of 20 cases timed, 0 failed, 0 left out for lack of time" in capsys.readouterr().out


def test_columns_of_rows(tmp_path: Path) -> None:
    _, rows = run(tmp_path, *TINY, "--kernels", "step_limiter", "haar_dwt")
    fields = {"commit", "date", "command", "device", "driver", "threads", "own_backend"}
    fields |= {"python", "torch", "triton"}
    fields |= {"kernel", "source", "shape", "elements", "width", "level", "weights", "moments", "sets"}
    fields |= {"metric", "unit", "median", "p20", "p80", "samples", "note"}
    assert all(set(row) == fields for row in rows)
    assert {row["commit"] for row in rows} == {"abc"}
    copied, *rest = rows
    assert (copied["metric"], copied["median"], copied["kernel"]) == ("copy_bandwidth", 1e9, None)
    found = {(row["kernel"], row["shape"], row["metric"]): row for row in rest}
    assert len(found) == len(rest) == 4 * 5
    for kernel in ("step_limiter", "haar_dwt"):
        for shape, width in (("6x16", "flat"), ("5x37", "odd")):
            time, moved, speed, fraction, error = (
                found[kernel, shape, metric]
                for metric in ("time", "bytes_moved", "bandwidth", "copy_bandwidth_fraction", "check_error")
            )
            assert time["width"] == width
            assert time["moments"] == ("float32" if kernel == "step_limiter" else None)
            assert 0 < time["p20"] <= time["median"] <= time["p80"]
            assert time["samples"] == 2
            assert speed["median"] == pytest.approx(moved["median"] / time["median"])
            assert speed["p20"] == pytest.approx(moved["median"] / time["p80"])
            assert fraction["median"] == pytest.approx(speed["median"] / 1e9)
            assert 0 < error["median"] <= 1


@pytest.mark.parametrize(
    ("case", "held", "moved"),
    [
        # 96 weights and gradients of 2 bytes; 24 blocks with two moments of 4: g + 2p + 2(m + v)
        (step(data=HALF), 2 * 192 + 192, 3 * 192 + 2 * 192),
        (step(data=HALF, limited=True), 2 * 192 + 192, 3 * 192 + 2 * 192 + 192 + 192),  # g, m, v once more
        (step(0), 2 * 384 + 768, 3 * 384 + 2 * 768),
        (step(2, shape=(5, 37)), 2 * 740 + 400, 3 * 740 + 2 * 400),  # 10 blocks per row, the last of one element
        (step(1, shape=(2, 3, 8))._replace(moments=HALF), 2 * 192 + 96, 3 * 192 + 2 * 96),
        # int8 moments, and one scale for up to 128 coefficients of each moment: 7.03 bytes per element.
        (quantized((6, 1024)), 2 * 12288 + 2 * (1536 + 12 * 4), 43200),
        (quantized((5, 37)), 2 * 370 + 2 * (50 + 4), 3 * 370 + 4 * (50 + 4)),
        (quantized((6, 1024), limited=True), 2 * 12288 + 2 * (1536 + 12 * 4), 43200 + 12288 + 2 * (1536 + 12 * 4)),
        # rows of 37 have bands of 10, 10 and 19
        (Case("haar_dwt", (5, 37), 2, SINGLE, None), 4 * 5 * (37 + 39), 4 * 5 * (37 + 39)),
        (Case("haar_idwt", (6, 16), 3, HALF, None), 2 * 2 * 96, 2 * 2 * 96),
    ],
    ids=str,
)
def test_bytes_held_and_moved(case: Case, held: int, moved: int) -> None:
    assert bytes_held(case) == held
    assert bytes_moved(case) == moved
    buffers = Buffers(case, CPU, None)
    if not case.is_step:
        buffers.run()
    tensors = [x for x in (*buffers.inputs, *buffers.outputs) if x.dim()]  # the limiter's norm is a scalar
    assert sum(x.nbytes for x in tensors) == held


def test_set_count_fills_the_cache_twice() -> None:
    case = step()  # 960 bytes
    assert set_count(case, 4800) == 1 + 10
    assert set_count(case, 4801) == 1 + 11
    assert set_count(case, 100) == 2  # the second set holds the values from before the step
    assert set_count(case, 2**40) == MAX_SETS


@pytest.mark.parametrize("kernel", ["step", "step_limiter", "haar_dwt", "haar_idwt"])
def test_buffers_take_turns(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = step()._replace(kernel=kernel) if kernel.startswith("step") else Case(kernel, (6, 16), 2, SINGLE, None)
    turns: list[tuple[int, int]] = []
    timed = 0
    original_run, original_clock = Buffers.run, kernels.clock

    def watch(self: Buffers) -> None:
        original_run(self)
        turns.append((self.inputs[0].data_ptr(), self.outputs[0].data_ptr()))

    def count(*arguments: Any) -> tuple[float, float]:
        nonlocal timed
        timed += 1
        return original_clock(*arguments)

    monkeypatch.setattr(Buffers, "run", watch)
    monkeypatch.setattr(kernels, "clock", count)
    result = kernels.measure(case, "", CPU, repetitions=40)
    assert result.seconds is not None
    assert result.seconds.samples == 40
    assert result.sets == set_count(case, 4096) > 2
    assert timed == 43
    read = [x for x, _ in turns[-43:]]
    assert len(set(read)) == result.sets
    assert all(len(set(read[i : i + result.sets])) == result.sets for i in range(43 - result.sets))
    written = [y for _, y in turns[-43:]]
    assert all(len(set(written[i : i + result.sets])) == result.sets for i in range(43 - result.sets))


def test_an_exception_becomes_a_row_and_the_run_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def throw(**_: Any) -> None:
        raise RuntimeError("no such\ninstruction")

    monkeypatch.setattr(oracle, "gwt_adamw_", throw)
    status, rows = run(tmp_path, *TINY, "--kernels", "step", "haar_idwt")
    assert status == 1
    assert {row["note"] for row in rows if row["kernel"] == "step"} == {"failed: RuntimeError: no such instruction"}
    assert sum(row["metric"] == "time" and row["median"] is not None for row in rows) == 2


def test_cases_too_large_for_memory_are_refused_before_allocation(monkeypatch: pytest.MonkeyPatch) -> None:
    case = step(shape=(2**30, 2**10))
    monkeypatch.setattr(kernels, "Buffers", lambda *_: pytest.fail("was allocated"))
    result = kernels.measure(case, "", CPU)
    assert result.note.startswith(f"does not fit: needs about {bytes_needed(case, 2) / 2**30:.1f} GiB, ")
    assert not result.failed


def test_estimate_covers_all_sets_and_a_comparison() -> None:
    sweep = step(data=HALF, shape=(2**19, 2**12))
    assert 2 * bytes_held(sweep) < bytes_needed(sweep, 2) < 2 * bytes_held(sweep) + 4 * 2**30
    transform = Case("haar_dwt", (2**19, 2**12), 2, HALF, None)
    assert bytes_needed(transform, 2) > 3 * bytes_held(transform)


def test_running_out_of_memory_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*_: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(kernels, "Buffers", exhausted)
    result = kernels.measure(step(), "", CPU)
    assert result.note.startswith("does not fit: out of memory with ")
    assert not result.failed


@pytest.mark.parametrize(
    ("case", "note"),
    [
        (step(data=torch.float64), "not supported: the kernels take bfloat16, float32, float16, not float64"),
        (step(data=torch.int8), "not supported: the kernels take bfloat16, float32, float16, not int8"),
        (step()._replace(moments=torch.uint8), "not supported: the kernels take .*, int8, not uint8"),
        (step(5, shape=(6, 16)), "not possible: level 5 is too deep for rows of 16"),
    ],
)
def test_notes_of_impossible_cases(case: Case, note: str) -> None:
    result = kernels.measure(case, "", CPU)
    assert result.seconds is None
    assert not result.failed
    with pytest.raises(AssertionError, match=note):
        raise AssertionError(result.note)


def test_a_missing_kernel_is_not_replaced_by_another_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    from gwt_kernels.backends import choice

    choice.triton_obstacle.cache_clear()
    why = obstacle(step(11, shape=(1, 2048)), torch.device("cuda"), None)
    choice.triton_obstacle.cache_clear()
    assert why is not None
    assert why.startswith("no kernel: level 11 is above 10")


def test_a_missing_device_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    status, rows = run(tmp_path, "--device", "cuda", "--shapes", "6x16")
    assert status == 1
    (row,) = rows
    assert row["median"] is None
    assert row["note"] == "no device: PyTorch finds no cuda:0 here, so nothing was measured"


def test_an_interrupted_run_keeps_its_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original, calls = kernels.measure, 0

    def interrupt(*arguments: Any, **options: Any) -> kernels.Result:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return original(*arguments, **options)

    monkeypatch.setattr(kernels, "measure", interrupt)
    status, rows = run(tmp_path, *TINY)
    assert status == 130
    assert [row["kernel"] for row in rows if row["metric"] == "time"] == ["step", "step_limiter"]
    assert "2 of 8 cases timed, 0 failed, 0 left out for lack of time" in capsys.readouterr().out


def test_cases_beyond_the_time_limit_become_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(0, 10**6, 60))  # each call of the clock advances it by a minute
    monkeypatch.setattr(kernels.time, "monotonic", lambda: next(now))
    status, rows = run(tmp_path, *TINY, "--minutes", "3")
    assert status == 0
    times = [row for row in rows if row["metric"] == "time"]
    assert [row["note"] for row in times] == [""] * 3 + ["left out: 3 minutes were used up"] * 5
    assert [row["median"] is None for row in times] == [False] * 3 + [True] * 5


def test_the_suite_of_a_gpu() -> None:
    cases = kernels.parse(["--device", "cuda"]).cases
    shapes = {case.shape for case in cases}
    for model in ((1376, 512), (2736, 1024), (2048, 5461), (11008, 4096), (8192, 28672), (1024, 8192)):
        assert model in shapes
    assert set(EXPERTS.values()) <= shapes
    assert {case.elements for case, source in cases.items() if "sizes" in source} == {2**e for e in range(16, 32)}
    for shape, width in (((4096, 4096), "flat"), ((2048, 5461), "odd")):
        here = [case for case in cases if case.shape == shape]
        assert {case.width for case in here if case.level} == {width}
        steps = {(case.kernel, case.level, case.data, case.moments) for case in here if case.is_step}
        moments = 7 + 6 + 6 + 7 + 7  # levels 0 to 6 of step, Adam-mini and Muon; the limiter and FOAM from 1 on
        assert len(steps) == moments * 3 * 3 + 7 * 3  # and Muon's last stage, which has no moments
        assert sum(not case.is_step for case in here) == 2 * 6 * 3
    embedding = {case for case in cases if case.shape == (32000, 4096)}
    assert {(case.kernel, case.level) for case in embedding} == {("step", 0)}
    assert cases[Case("step", (4096, 4096), 2, HALF, SINGLE)] == "llama_7b, sizes, grid"

    full = kernels.parse(["--device", "cuda", "--full"]).cases
    assert set(cases) <= set(full)
    assert Case("step_limiter", (8192, 28672), 6, torch.float16, HALF) in full


def test_options_select_cases() -> None:
    def chosen(*options: str) -> set[Case]:
        return set(kernels.parse(["--device", "cuda", *options]).cases)

    assert {case.kernel for case in chosen("--kernels", "haar_idwt")} == {"haar_idwt"}
    assert {case.width for case in chosen("--widths", "odd")} == {"odd"}
    assert {case.shape for case in chosen("--parts", "sizes", "--sizes", "20")} == {(256, 4096)}
    assert {case.shape[-1] for case in chosen("--parts", "matrices", "--models", "llama_1b")} == {2048, 5461}
    assert {case.level for case in chosen("--levels", "3")} == {3}
    assert {case.moments for case in chosen("--moments", "bfloat16")} == {HALF, None}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--repetitions", "-1"], "--repetitions -1: must be at least 1"),
        (["--minutes", "-1"], "--minutes -1.0: must be at least 0"),
        (["--levels", "-1"], "--levels -1: must be from 0 to 16"),
        (["--weights", "bf17"], "bf17: PyTorch has no such dtype"),
        (["--shapes", "0x3"], "0x3: sizes must be positive"),
        (["--models", "llama_9t"], "llama_9t: no such configuration"),
        (["--device", "meta"], "--device meta: must be cpu or cuda"),
        (["--levels", "0", "--kernels", "haar_dwt"], "nothing is left to measure"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        kernels.parse(["--device", "cpu", *arguments])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.gpu
def test_run_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases, "MAX_SETS", 8)  # a thousand of the smallest shape take a minute to build
    shapes = ["--shapes", "1024x1024", "2048x5461", "64x37"]
    dtypes = ["--levels", "0", "2", "5", "--weights", "bfloat16", "float32", "--moments", "float32", "bfloat16"]
    status, rows = run(tmp_path, "--device", "cuda", *shapes, *dtypes, "--repetitions", "3")
    assert status == 0
    assert all(row["median"] is not None for row in rows)
