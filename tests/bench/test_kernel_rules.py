"""The kernel benchmark of other rules' steps, and of GWT-Muon's stages before and after its matrix products."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from bench.kernels import __main__ as kernels
from bench.kernels import oracle
from bench.kernels.cases import RULE_KERNELS, Case, bytes_held, bytes_moved, obstacle
from bench.kernels.oracle import Buffers
from tests.support import interpreter
from tests.support.kernel_cases import CPU, HALF, SINGLE, TINY, error_of, run

pytestmark = pytest.mark.usefixtures("quick")


@pytest.mark.parametrize(
    ("kernel", "data", "moments", "held", "moved"),
    [
        # 96 elements, 24 blocks. Matrices are bf16: written in place of weights, then read in place of gradients.
        ("step_foam", HALF, SINGLE, 2 * 192 + 192, 3 * 192 + 2 * 192),
        ("step_adam_mini", HALF, SINGLE, 2 * 192 + 96 + 24, 3 * 192 + 2 * (96 + 24)),
        ("step_muon", HALF, SINGLE, 2 * 192 + 96, 2 * 192 + 2 * 96),
        ("step_muon", SINGLE, torch.int8, 384 + 192 + 24 + 4, 384 + 192 + 2 * 28),
        ("step_orthogonal", HALF, None, 2 * 192, 3 * 192),
        ("step_orthogonal", SINGLE, None, 384 + 192, 2 * 384 + 192),
    ],
)
def test_bytes_of_rules(kernel: str, data: torch.dtype, moments: torch.dtype | None, held: int, moved: int) -> None:
    case = Case(kernel, (6, 16), 2, data, moments)
    assert (bytes_held(case), bytes_moved(case)) == (held, moved)
    assert sum(x.nbytes for x in (*Buffers(case, CPU, None).inputs, *Buffers(case, CPU, None).outputs)) == held


@pytest.mark.parametrize("data", [HALF, SINGLE, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(6, 64), (5, 37), (2, 3, 41)], ids=str)
@pytest.mark.parametrize("kernel", RULE_KERNELS)
def test_right_results_of_rules_pass(kernel: str, shape: tuple[int, ...], data: torch.dtype) -> None:
    for level in (0, 1, 2, 4) if kernel != "step_foam" else (1, 2, 4):
        for moments in (SINGLE, HALF, torch.int8):
            case = Case(kernel, shape, level, data, moments)
            case = case if case.rule.slots else case._replace(moments=None)
            if obstacle(case, CPU, None) is None:
                assert 0 < error_of(case) <= 1, case


@pytest.mark.parametrize("data", [SINGLE, HALF], ids=str)
@pytest.mark.parametrize("kernel", RULE_KERNELS)
def test_a_wrong_rule_is_not_timed(kernel: str, data: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(kernel, (6, 64), 2, data, None if kernel == "step_orthogonal" else SINGLE)
    right = oracle.prepare

    def spoiled(change: Any) -> Any:
        class Wrong:
            def __init__(self, bucket: Any, backend: Any) -> None:
                self.bucket, self.runner = bucket, right(bucket, backend)

            def apply(self, inputs: Any) -> None:
                self.runner.apply(inputs)
                change(self.bucket)

        return lambda bucket, backend: right(bucket, backend) if backend == "torch" else Wrong(bucket, backend)

    def weight(bucket: Any) -> None:
        bucket.params[0].view(-1)[-1] += 1.0

    def moment(bucket: Any) -> None:
        bucket.exp_avgs[0].view(-1)[3] *= 1.001

    assert not kernels.measure(case, "", CPU, repetitions=1).failed
    for change in (weight, moment) if case.rule.slots else (weight,):
        monkeypatch.setattr(oracle, "prepare", spoiled(change))
        result = kernels.measure(case, "", CPU, repetitions=1)
        assert result.failed
        assert result.note.startswith("not timed: differs from float64 by ")


def test_rules_through_the_triton_kernels(device: torch.device) -> None:
    for kernel in RULE_KERNELS:
        for shape in ((6, 16), (5, 37)):
            case = Case(kernel, shape, 2, HALF, None if kernel == "step_orthogonal" else SINGLE)
            with interpreter.like_a_gpu():
                result = kernels.measure(case, "", device, backend="triton", repetitions=1)
            assert (result.note, result.failed) == ("", False)


def test_rules_are_chosen_by_name_on_a_cpu(tmp_path: Path) -> None:
    status, rows = run(tmp_path, *TINY, "--kernels", *RULE_KERNELS, "--levels", "0", "2", "--moments", "int8")
    assert status == 0
    timed = [
        (row["kernel"], row["level"], row["moments"]) for row in rows if row["metric"] == "time" and row["median"]
    ]
    assert sorted(set(timed)) == [
        ("step_foam", 2, "int8"), ("step_muon", 0, "int8"), ("step_muon", 2, "int8"),
        ("step_orthogonal", 0, None), ("step_orthogonal", 2, None),
    ]  # fmt: skip
    assert {row["note"] for row in rows if row["kernel"] == "step_adam_mini"} == {
        "not possible: step_adam_mini knows no int8 moments"
    }
