"""Timing a candidate: wrong, missing or too large ones become rows without a time, and the others continue."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from bench.common.bandwidth import StepBandwidth
from bench.common.measure import Spread
from bench.optimizers import __main__ as optimizers
from bench.optimizers import timing
from bench.optimizers.candidate import Candidate, Likeness, gwt
from bench.optimizers.timing import Result
from gwt_kernels import GWTAdamW
from tests.support.candidates import BANDWIDTH, CPU, HALF, SHAPES, SINGLE, ScaledWrong


def measured(candidates: list[Candidate], repetitions: int = 2) -> list[Result]:
    return timing.measure("tiny", candidates, SHAPES, CPU, repetitions=repetitions, bandwidth=BANDWIDTH)


class NotANumber(GWTAdamW):
    """GWTAdamW that makes one weight of each tensor NaN."""

    def step(self, closure: None = None) -> None:
        super().step()
        for group in self.param_groups:
            for p in group["params"]:
                p.data.view(-1)[-1] = float("nan")


class ForgetsToStoreMoments(GWTAdamW):
    """GWTAdamW whose second moment never changes."""

    def step(self, closure: None = None) -> None:
        kept = {p: state["exp_avg_sq"].clone() for p, state in self.state.items()}
        super().step()
        for p, value in kept.items():
            self.state[p]["exp_avg_sq"].copy_(value)


@pytest.mark.parametrize("dtype", [SINGLE, HALF], ids=str)
@pytest.mark.parametrize(
    "broken",
    [ScaledWrong, NotANumber, ForgetsToStoreMoments, lambda groups: GWTAdamW(groups, norm_growth_limit=None)],
    ids=["scale", "nan", "moments", "no limiter"],
)
def test_a_wrong_result_is_not_timed(broken: type[GWTAdamW], dtype: torch.dtype) -> None:
    good = gwt(2, dtype, limiter=True)
    right, wrong = measured([good, good._replace(name="broken", build=broken)])
    assert right.seconds is not None
    assert not wrong.metrics
    assert wrong.seconds is None
    assert wrong.note.startswith("not timed: differs from float64 by ")
    assert wrong.note in optimizers.table([right, wrong])
    assert wrong.failed
    (row,) = optimizers.rows(wrong, {})
    assert (row["metric"], row["median"], row["note"]) == ("step_time", None, wrong.note)


def test_every_step_gets_equal_gradients() -> None:
    """Check gradients, since some optimizers overwrite them, and steps on zeros or infinities take another time."""

    class Spoiling(GWTAdamW):
        def step(self, closure: None = None) -> None:
            super().step()
            for group in self.param_groups:
                for p in group["params"]:
                    p.grad.fill_(float("inf"))

    candidate = gwt(2, SINGLE, limiter=False)._replace(build=lambda groups: Spoiling(groups))
    (result,) = measured([candidate._replace(oracle=None, likeness=Likeness(-2.0, 0.0, 1e9))])
    assert result.seconds is not None, result.note


def test_an_exception_becomes_a_row_and_the_others_continue() -> None:
    def absent(groups: list[dict]) -> None:
        import a_package_that_nobody_has  # noqa: F401

    class StopsLater(GWTAdamW):
        def step(self, closure: None = None) -> None:
            super().step()
            if self.state[self.param_groups[0]["params"][0]]["step"] > 4:
                raise ValueError("no\nmore")

    good = gwt(2, SINGLE, limiter=True)
    missing = good._replace(name="missing", build=absent, peer="other")
    stopping = good._replace(name="stopping", build=StopsLater)
    results = measured([missing, stopping, good])
    assert [bool(result.metrics) for result in results] == [False, False, True]
    assert results[0].note == ("cannot run here: ModuleNotFoundError: No module named 'a_package_that_nobody_has'")
    assert results[1].note == "cannot run here: ValueError: no more"
    assert [result.failed for result in results] == [False, True, False]  # only this package has to run


def test_earlier_metrics_stay_if_a_later_measurement_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no counters")

    monkeypatch.setattr(timing, "kernel_launches", broken)
    (result,) = measured([gwt(2, SINGLE, limiter=True)])
    assert result.seconds is not None
    rows = optimizers.rows(result, {})
    assert {"step_time", "state_bytes"} <= {row["metric"] for row in rows}
    assert {row["note"] for row in rows} == {"cannot run here: RuntimeError: no counters"}


def test_a_candidate_too_large_becomes_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "available_bytes", lambda device: 1000)
    monkeypatch.setattr(timing, "build", lambda *_: pytest.fail("allocated"))
    (result,) = measured([gwt(2, SINGLE, limiter=True)])
    assert not result.metrics
    assert result.note.startswith("does not fit: needs about 0.0 GiB")
    assert optimizers.rows(result, {})[0]["note"] == result.note
    assert not result.failed


def test_running_out_of_memory_becomes_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*_: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(timing, "build", exhausted)
    (result,) = measured([gwt(2, SINGLE, limiter=True)])
    assert result.note.startswith("does not fit: out of memory")
    assert not result.failed


def test_a_roofline_is_drawn_from_the_bandwidth_of_the_same_round(monkeypatch: pytest.MonkeyPatch) -> None:
    class Halving(StepBandwidth):
        """Bandwidth that halves in each round."""

        rounds = 0

        def now(self) -> float:
            self.rounds += 1
            return 1e9 / 2**self.rounds

    def one_second(work: Callable[[], object], device: torch.device) -> tuple[float, float]:
        work()
        return 1.0, 1.0

    bandwidth = Halving(CPU, size=1 << 12, repetitions=1)
    before = bandwidth.rounds
    monkeypatch.setattr(timing, "clock", one_second)
    candidates = [gwt(2, SINGLE, limiter=False)]
    (result,) = timing.measure("tiny", candidates, SHAPES, CPU, repetitions=3, bandwidth=bandwidth)
    assert bandwidth.rounds - before == timing.WARM_UP + 3
    found = {metric.name: metric.spread for metric in result.metrics if not metric.clipped}
    seconds = [found["bytes_moved"].median / (1e9 / 2**each) for each in range(before + 4, bandwidth.rounds + 1)]
    assert found["roofline_time"].median == seconds[1]
    assert found["in_place_bandwidth_fraction"] == pytest.approx(Spread.of(seconds))
