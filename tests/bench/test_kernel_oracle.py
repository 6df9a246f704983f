"""The kernel benchmark compares with float64 before it times: right results pass, and wrong ones are not timed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from bench.kernels import __main__ as kernels
from bench.kernels import oracle
from bench.kernels.cases import Case
from tests.support import interpreter
from tests.support.kernel_cases import CPU, HALF, SINGLE, TINY, error_of, quantized, run, step

pytestmark = pytest.mark.usefixtures("quick")


@pytest.mark.parametrize("data", [HALF, SINGLE, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(6, 64), (5, 37), (2, 3, 41)], ids=str)
@pytest.mark.parametrize("level", range(7))
def test_right_results_pass(level: int, shape: tuple[int, ...], data: torch.dtype) -> None:
    for moments in (SINGLE, HALF, torch.int8):
        for kernel in ("step", "step_limiter") if level else ("step",):
            assert 0 < error_of(Case(kernel, shape, level, data, moments)) <= 1
    for kernel in ("haar_dwt", "haar_idwt") if level else ():
        assert 0 < error_of(Case(kernel, shape, level, data, None)) <= 1


def test_chunks_of_the_comparison_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [
        step(limited=True, shape=(7, 37), data=HALF),
        quantized((70, 37), limited=True),
        Case("haar_idwt", (7, 37), 2, SINGLE, None),
    ]
    whole = [error_of(case) for case in cases]
    monkeypatch.setattr(oracle, "CHUNK", 75)  # two rows of 37, and one left over
    assert [error_of(case) for case in cases] == pytest.approx(whole)


@pytest.mark.parametrize("kernel", ["step", "step_limiter", "haar_dwt", "haar_idwt"])
@pytest.mark.parametrize("shape", [(6, 16), (5, 37)], ids=str)
def test_through_the_triton_kernels(kernel: str, shape: tuple[int, ...], device: torch.device) -> None:
    case = step(shape=shape)._replace(kernel=kernel)
    case = case if kernel.startswith("step") else case._replace(moments=None)
    with interpreter.like_a_gpu():
        result = kernels.measure(case, "", device, backend="triton", repetitions=2)
    assert result.note == ""
    assert result.seconds is not None


def scaled_wrong(**arguments: Any) -> None:
    """A step whose update is one per cent too large."""
    hypers = [hyper._replace(scale=1.01 * hyper.scale) for hyper in arguments.pop("hypers")]
    STEP(**arguments, hypers=hypers)


def forgets_the_limiter(**arguments: Any) -> None:
    """A step without limiter."""
    STEP(**(arguments | {"limiter_norms": [None]}))


def forgets_the_norm(**arguments: Any) -> None:
    """A step that limits but does not store the norm."""
    kept = [norm if norm is None else norm.clone() for norm in arguments["limiter_norms"]]
    STEP(**(arguments | {"limiter_norms": kept}))


def skips_the_last_element(**arguments: Any) -> None:
    """A step that leaves the last weight unchanged."""
    p = arguments["params"][0].view(-1)
    kept = p[-1].clone()
    STEP(**arguments)
    p[-1] = kept


def spoils_a_moment(**arguments: Any) -> None:
    """A step that makes one second moment NaN."""
    STEP(**arguments)
    arguments["exp_avg_sqs"][0].view(-1)[3] = float("nan")


def changes_the_gradient(**arguments: Any) -> None:
    """A step that scales the gradients in place afterwards."""
    STEP(**arguments)
    arguments["grads"][0].mul_(2)


STEP = oracle.gwt_adamw_


@pytest.mark.parametrize("data", [SINGLE, HALF], ids=str)
@pytest.mark.parametrize(
    "broken",
    [
        scaled_wrong,
        forgets_the_limiter,
        forgets_the_norm,
        skips_the_last_element,
        spoils_a_moment,
        changes_the_gradient,
    ],
)
def test_a_wrong_step_is_not_timed(
    broken: Any, data: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(oracle, "gwt_adamw_", broken)
    status, rows = run(
        tmp_path, *TINY, "--kernels", "step_limiter", "haar_dwt", "--weights", str(data).removeprefix("torch.")
    )
    assert status == 1
    for row in rows:
        if row["kernel"] == "step_limiter":
            assert (row["metric"], row["median"], row["samples"]) == ("time", None, 0)
            assert row["note"].startswith("not timed: differs from float64 by ")
    assert sum(row["kernel"] == "haar_dwt" and row["metric"] == "time" for row in rows) == 2  # the run continued
    assert all(row["median"] is not None for row in rows if row["kernel"] == "haar_dwt")


def test_a_wrong_transform_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = oracle.haar_dwt, oracle.haar_idwt

    def leaves_one_out(x: torch.Tensor, level: int, **options: Any) -> list[torch.Tensor]:
        bands = [torch.empty_like(band) for band in right[0](x, level, **options)]
        for band, exact in zip(bands, right[0](x, level, **options), strict=True):
            band.view(-1)[: band.numel() - 1].copy_(exact.view(-1)[: band.numel() - 1])
        return bands

    monkeypatch.setattr(oracle, "haar_dwt", leaves_one_out)
    monkeypatch.setattr(oracle, "haar_idwt", lambda *a, **k: right[1](*a, **k) * 1.00001)
    for kernel in ("haar_dwt", "haar_idwt"):
        result = kernels.measure(Case(kernel, (6, 16), 2, SINGLE, None), "", CPU, repetitions=2)
        assert result.failed
        assert result.seconds is None
    assert error_of(Case("haar_dwt", (6, 16), 2, SINGLE, None)) == float("inf")  # unwritten memory is NaN
