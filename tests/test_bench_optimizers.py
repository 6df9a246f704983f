"""The optimizer benchmark on tiny shapes: what it counts, what it refuses to time, and what it writes."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from bench import optimizers, records, timing
from bench.checks import check
from bench.measure import Spread, facts, held_bytes, plain_tensors
from bench.timing import Result
from bench.trial import (
    WEIGHT_DECAY,
    Candidate,
    Likeness,
    Shape,
    adamw,
    build,
    bytes_moved,
    gwt,
    ptwt,
    shapes_of,
)
from gwt_kernels import GWTAdamW

needs_ptwt = pytest.mark.skipif(importlib.util.find_spec("ptwt") is None, reason="ptwt is not installed")

CPU = torch.device("cpu")
SINGLE, HALF = torch.float32, torch.bfloat16
SHAPES = [
    Shape("wide", (6, 16), True, True),
    Shape("odd", (5, 37), True, True),
    Shape("embedding", (8, 16), False, True),
    Shape("norm", (16,), False, False),
]


def measured(candidates: list[Candidate], repetitions: int = 2) -> list[Result]:
    return timing.measure("tiny", candidates, SHAPES, CPU, repetitions=repetitions, bandwidth=1e9)


@pytest.fixture
def tiny_model(tmp_path: Path) -> str:
    """A configuration file of a model with two layers and odd MLP widths."""
    config = {
        "vocab_size": 32,
        "hidden_size": 16,
        "intermediate_size": 37,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "tie_word_embeddings": False,
    }
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(config))
    return str(path)


@needs_ptwt
def test_from_command_line_to_rows(tiny_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "results"
    arguments = ["--device", "cpu", "--models", tiny_model, "--repetitions", "2", "--commit", "abc"]
    assert optimizers.main([*arguments, "--peers", "gwt", "torch", "ptwt", "--out", str(out)]) == 0

    printed = capsys.readouterr().out
    assert "times as fast as the ptwt step" in printed
    assert "aim: at least 10" in printed
    assert "times as long as AdamW(foreach=False)" in printed
    assert "aim: at most 1.2" in printed

    (path,) = out.iterdir()
    _, rows = records.read(path)
    fields = set(rows[0])
    origin = {"commit", "date", "device", "driver", "torch", "triton", "command", "python", "threads"}
    place = {"model", "optimizer", "peer", "weights", "level", "limiter", "clipped", "check"}
    place |= {"layers", "embeddings", "parameters"}
    assert origin | place | {"metric", "unit", "median", "p20", "p80", "samples", "note"} == fields
    assert all(set(row) == fields for row in rows)
    assert all(row[key] not in (None, "") for row in rows for key in origin)
    assert {row["commit"] for row in rows} == {"abc"}

    names = ["GWTAdamW level 2, limiter", "GWTAdamW level 2", "ptwt level 2, limiter"]
    names += [f"AdamW({how}=True)" for how in ("foreach", "fused")] + ["AdamW(foreach=False)"]
    times = {"step_time", "host_time", "wall_time"}
    metrics = times | {"bytes_moved", "roofline_time", "copy_bandwidth_fraction"}
    metrics |= {"state_bytes", "state_bytes_per_parameter", "check_error"}
    found = {(row["optimizer"], row["metric"], row["clipped"]) for row in rows if row["optimizer"]}
    assert found == {(name, metric, False) for name in names for metric in metrics} | {
        (name, metric, True) for name in names for metric in times
    }
    assert [row["metric"] for row in rows if not row["optimizer"]] == ["copy_bandwidth", "ratio", "ratio"]
    assert all(0 < row["p20"] <= row["median"] <= row["p80"] for row in rows if row["metric"] == "step_time")
    assert all(row["samples"] == 2 for row in rows if row["metric"] == "step_time")
    assert {row["check"] for row in rows if row["optimizer"]} == {"oracle"}


class ScaledWrong(GWTAdamW):
    """GWTAdamW with an update one per cent too large."""

    def __init__(self, params: list[dict]) -> None:
        super().__init__(params, scale=0.2525)


class NotANumber(GWTAdamW):
    """GWTAdamW that spoils one weight of each tensor."""

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
def test_a_wrong_result_gets_no_time(broken: type[GWTAdamW], dtype: torch.dtype) -> None:
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


def test_a_failed_check_fails_the_run(
    tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = gwt(2, SINGLE, limiter=True)._replace(build=ScaledWrong)
    monkeypatch.setattr(optimizers, "suite", lambda *_: [broken, adamw(SINGLE, foreach=False)])
    arguments = [
        "--device",
        "cpu",
        "--models",
        tiny_model,
        "--repetitions",
        "1",
        "--out",
        str(tmp_path / "out"),
    ]
    assert optimizers.main(arguments) == 1
    assert "times as long as" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "candidate",
    [
        *(gwt(level, dtype, limiter=level == 2) for level in range(4) for dtype in (SINGLE, HALF)),
        *(gwt(2, dtype, limiter=False, rule="foam") for dtype in (SINGLE, HALF)),
        *(gwt(2, HALF, limiter=on, moments=moments) for on in (False, True) for moments in (HALF, torch.int8)),
        adamw(SINGLE, foreach=True),
        *(adamw(HALF, **how) for how in ({"fused": True}, {"foreach": True}, {"foreach": False})),
        *(pytest.param(ptwt(3, dtype), marks=needs_ptwt) for dtype in (SINGLE, HALF)),
    ],
    ids=lambda candidate: f"{candidate.name} {candidate.dtype}",
)
def test_right_results_pass_the_check(candidate: Candidate) -> None:
    error = check(build(candidate, SHAPES, CPU))
    assert 0 < error <= 1


def test_clipping_is_part_of_the_timed_step() -> None:
    trial = build(gwt(2, SINGLE, limiter=False), SHAPES, CPU)
    steps = []
    trial.optimizer.register_step_pre_hook(
        lambda *_: steps.append(sum(float(p.grad.square().sum()) for p in trial.tensors))
    )
    trial.optimizer.step()
    trial.clipped_step()
    assert steps[0] > 100
    assert steps[1] == pytest.approx(1, rel=1e-4)


def test_every_step_gets_the_same_gradients() -> None:
    """As some optimizers overwrite theirs, and a step on zeros or infinities takes another time."""

    class Spoiling(GWTAdamW):
        def step(self, closure: None = None) -> None:
            super().step()
            for group in self.param_groups:
                for p in group["params"]:
                    p.grad.fill_(float("inf"))

    candidate = gwt(2, SINGLE, limiter=False)._replace(build=lambda groups: Spoiling(groups))
    (result,) = measured([candidate._replace(oracle=None, likeness=Likeness(-2.0, 0.0, 1e9))])
    assert result.seconds is not None, result.note


def test_an_exception_becomes_a_row_and_the_others_go_on() -> None:
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


def test_times_stay_where_a_later_measurement_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no counters")

    monkeypatch.setattr(timing, "kernel_launches", broken)
    (result,) = measured([gwt(2, SINGLE, limiter=True)])
    assert result.seconds is not None
    rows = optimizers.rows(result, {})
    assert {"step_time", "state_bytes"} <= {row["metric"] for row in rows}
    assert {row["note"] for row in rows} == {"cannot run here: RuntimeError: no counters"}


def test_an_interrupted_run_keeps_what_it_had(
    tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(groups: list[dict]) -> None:
        raise KeyboardInterrupt

    good, loop = gwt(2, SINGLE, limiter=True), adamw(SINGLE, foreach=False)
    last = good._replace(name="last", peer="other", build=interrupt)
    monkeypatch.setattr(optimizers, "suite", lambda *_: [good, loop, last])
    arguments = ["--device", "cpu", "--models", tiny_model, "--repetitions", "1", "--out", str(tmp_path / "out")]
    with pytest.raises(KeyboardInterrupt):
        optimizers.main(arguments)
    (path,) = (tmp_path / "out").iterdir()
    _, rows = records.read(path)
    assert {row["optimizer"] for row in rows} == {None, good.name, loop.name}
    assert sum(row["metric"] == "step_time" for row in rows) == 4
    assert [row["metric"] for row in rows if row["optimizer"] is None] == ["copy_bandwidth", "ratio"]


def test_what_the_minutes_do_not_reach_becomes_rows(
    tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(optimizers, "suite", lambda *_: [gwt(2, SINGLE, limiter=True)])
    arguments = ["--device", "cpu", "--models", tiny_model, "--minutes", "1e-9", "--out", str(tmp_path / "out")]
    assert optimizers.main(arguments) == 0
    (path,) = (tmp_path / "out").iterdir()
    _, rows = records.read(path)
    assert [row["note"] for row in rows if row["optimizer"]] == ["left out: --minutes 1e-09 were over"]
    assert "left out" in capsys.readouterr().out


def test_what_does_not_fit_becomes_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
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


@pytest.mark.parametrize(
    ("candidate", "per_parameter"),
    [
        (adamw(HALF, fused=True), 14),  # g 2, p 4, m and v 8
        (adamw(SINGLE, fused=True), 28),
        (
            gwt(2, HALF, limiter=False),
            10,
        ),  # g 2, p 4, float32 m and v read and written for each four elements 4
        (gwt(2, HALF, limiter=True), 14),  # g, m and v once more
        (gwt(0, HALF, limiter=False), 22),
        (gwt(3, SINGLE, limiter=False), 14),
    ],
    ids=lambda value: value.name if isinstance(value, Candidate) else str(value),
)
def test_bytes_that_must_move(candidate: Candidate, per_parameter: int) -> None:
    trial = build(candidate, SHAPES[:1], CPU)
    assert bytes_moved(trial) == per_parameter * 6 * 16


def test_held_bytes() -> None:
    trial = build(gwt(2, SINGLE, limiter=True), SHAPES[1:2], CPU)
    (p,) = trial.tensors
    moments_and_scalars = 2 * 5 * 10 * 4 + 8 + 4  # moments of ceil(37/4) columns; step and limiter norm
    assert held_bytes(trial.optimizer, [p, p.grad]) == moments_and_scalars
    assert held_bytes(trial.optimizer, [p]) >= moments_and_scalars


def test_held_bytes_are_those_of_wrappers_too() -> None:
    class Wrapped(torch.Tensor):
        """A tensor that claims 4 bytes an element and holds one, as quantised states do."""

        @staticmethod
        def __new__(cls, codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
            return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=SINGLE)

        def __init__(self, codes: torch.Tensor, scale: torch.Tensor) -> None:
            self.codes, self.scale = codes, scale

        def __tensor_flatten__(self) -> tuple[list[str], None]:
            return ["codes", "scale"], None

        @classmethod
        def __torch_dispatch__(cls, *_: object) -> None:
            pytest.fail("its bytes are counted without an operation")

    class Object:
        def __init__(self, *parts: object) -> None:
            self.parts = parts

    shared = torch.zeros(50, dtype=torch.uint8)
    wrapped = Wrapped(torch.zeros(100, dtype=torch.uint8), torch.zeros(2))
    cyclic: list[object] = [shared[10:]]
    cyclic.append(cyclic)
    holder = {"a": Object(wrapped, [shared]), "b": cyclic, "c": torch.nn.Linear, "d": None}
    assert held_bytes(holder) == 100 + 8 + 50
    assert len(list(plain_tensors(holder))) == 4
    assert held_bytes(holder, [shared]) == 108


@needs_ptwt
@pytest.mark.parametrize("level", [0, 1, 2, 3])
@pytest.mark.parametrize("width", [16, 37, 41])
@pytest.mark.parametrize("gamma", [1.01, None])
def test_the_ptwt_step_is_the_folded_step(level: int, width: int, gamma: float | None) -> None:
    from bench.ptwt_step import LiteralGWTAdamW

    torch.manual_seed(level * width)
    start = torch.randn(4, width, dtype=torch.float64)
    literal, folded = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    options = {"lr": 0.1, "weight_decay": WEIGHT_DECAY, "level": level, "norm_growth_limit": gamma}
    steps = [LiteralGWTAdamW([literal], **options), GWTAdamW([folded], **options)]
    for growth in (1.0, 3.0, 0.2, 5.0):  # the limiter acts on a growing gradient
        grad = growth * torch.randn_like(start)
        for p, optimizer in zip((literal, folded), steps, strict=True):
            p.grad = grad.clone()
            optimizer.step()
        torch.testing.assert_close(literal, folded, rtol=1e-10, atol=1e-12)
    assert not torch.allclose(literal, start, rtol=0.01)


def test_shapes_of_a_published_model() -> None:
    shapes = shapes_of("llama_60m")
    assert sum(torch.Size(shape.size).numel() for shape in shapes) == 58_073_600
    assert sum(shape.transformed for shape in shapes) == 7 * 8
    layer = shapes_of("llama_1b", layers=1, embeddings=False)
    assert sorted(shape.size for shape in layer if shape.transformed) == sorted(
        [(2048, 2048)] * 4 + [(5461, 2048)] * 2 + [(2048, 5461)]
    )
    assert [shape.decayed for shape in layer if not shape.transformed] == [False, False]


def test_spread() -> None:
    assert Spread.of([5.0, 1.0, 2.0, 3.0, 4.0, 6.0]) == Spread(3.5, 2.0, 5.0, 6)


def test_facts() -> None:
    about = facts(CPU, "bench.optimizers", ["--device", "cpu"])
    assert about["command"] == "python -m bench.optimizers --device cpu"
    assert about["torch"] == torch.__version__


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layers", "0"], "--layers 0: must be at least 1"),
        (["--repetitions", "-1"], "--repetitions -1: must be at least 1"),
        (["--minutes", "0"], "--minutes 0.0: must be above 0"),
        (["--peers", "gwt", "sophia"], "invalid choice: 'sophia'"),
        (["--models", "llama_9t"], "llama_9t: no such configuration"),
        (["--device", "meta"], "--device meta: must be cpu or cuda"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        optimizers.parse(["--device", "cpu", *arguments])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_a_device_that_is_not_there_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(optimizers, "copy_bandwidth", lambda *_: pytest.fail("measured"))
    assert optimizers.main(["--device", "cuda:1", "--out", str(tmp_path), "--commit", "abc"]) == 1
    (path,) = tmp_path.iterdir()
    (row,) = records.rows_of(path, "optimizers")
    assert (row["metric"], row["median"]) == ("step_time", None)
    assert row["note"] == "no device: PyTorch finds no cuda:1 here, so nothing was measured"


@pytest.mark.parametrize("given", ["cuda", "cuda:0"])
def test_a_cuda_device_is_made_current_by_its_number(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.cuda.set_device` refuses a device without one."""
    made: list[torch.device] = []

    def first_step(device: torch.device) -> None:
        raise InterruptedError

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", made.append)
    monkeypatch.setattr(optimizers, "facts", lambda *_: {"device": "made up", "date": "2026"})
    monkeypatch.setattr(optimizers, "copy_bandwidth", first_step)
    with pytest.raises(InterruptedError):
        optimizers.main(["--device", given])
    assert made == [torch.device("cuda", 0)]


def test_a_time_budget_on_cuda_begins_with_the_aims() -> None:
    candidates = [adamw(HALF, foreach=False), adamw(HALF, fused=True), gwt(2, HALF, limiter=False)]
    order = optimizers.batches(["llama_1b", "llama_7b"], candidates, torch.device("cuda"))
    assert [(model, candidate.name) for model, (candidate,) in order] == [
        ("llama_7b", "AdamW(fused=True)"),
        ("llama_7b", "GWTAdamW level 2"),
        *(("llama_1b", candidate.name) for candidate in candidates),
        ("llama_7b", "AdamW(foreach=False)"),
    ]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch finds no CUDA device")
def test_the_cuda_suite(tiny_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "--device",
        "cuda",
        "--models",
        tiny_model,
        "--repetitions",
        "2",
        "--out",
        str(tmp_path / "out"),
    ]
    assert optimizers.main(arguments) == 0
    printed = capsys.readouterr().out
    for name in ("AdamW(fused=True)", "GWTAdamW level 0", "GWTAdamW level 3, limiter", "AdamW(foreach=False)"):
        assert name in printed
    (path,) = (tmp_path / "out").iterdir()
    _, rows = records.read(path)
    assert {row["metric"] for row in rows} >= {
        *("peak_extra_bytes", "host_time", "wall_time", "kernel_launches", "copy_bandwidth", "launch_latency")
    }
