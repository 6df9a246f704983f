"""Pre-training on several processes: equal to one process, resumed on other numbers, and killed at any moment."""

from __future__ import annotations

import collections
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench.pretrain import __main__ as pretrain
from bench.pretrain import checkpoint, parallel
from tests.support import forked, parallel_runs
from tests.support.parallel_runs import contents, last_good, losses, options_of, trained_here

ROOT = Path(__file__).parents[2]
KILL_TRIALS = int(os.environ.get("GWT_KILL_TRIALS", "3"))


@pytest.fixture
def options(tmp_path: Path) -> list[str]:
    return options_of(tmp_path)


def assert_close(out: Path, alone: Path) -> None:
    """Raise AssertionError unless losses and weights of two runs are equal up to rounding."""
    assert losses(out) == pytest.approx(losses(alone), rel=2e-6)
    assert losses(out, "eval") == pytest.approx(losses(alone, "eval"), rel=2e-6)
    weights = checkpoint.read(alone / "checkpoint.pt")["model"]
    ours = contents(out)
    assert {f"/model/{name}" for name in weights} == {name for name in ours if name.startswith("/model/")}
    for name, weight in weights.items():
        difference = (ours[f"/model/{name}"] - weight).norm() / weight.norm()
        assert difference < 1e-4, f"{out.name}: {name} is off by {difference}"


def test_every_mode_equals_one_process_and_resumes_on_others(tmp_path: Path, options: list[str]) -> None:
    forked.run(2, parallel_runs.every_mode, options, tmp_path)
    clipped = [*options, "--grad-clip", "0.5", "--accumulate", "2"]
    trained_here(None, options, tmp_path / "alone")
    trained_here(None, clipped, tmp_path / "alone-clipped")
    trained_here(None, [*options, "--optimizer", "adamw"], tmp_path / "alone-adamw")
    for mode in parallel.MODES:
        assert_close(tmp_path / mode, tmp_path / "alone")
    for mode in ("fsdp2", "tp"):
        assert_close(tmp_path / f"{mode}-clipped", tmp_path / "alone-clipped")
    assert_close(tmp_path / "tp-adamw", tmp_path / "alone-adamw")
    with pytest.raises(AssertionError):
        assert_close(tmp_path / "fsdp2", tmp_path / "alone-clipped")
    for world, mode in ((1, "fsdp2"), (3, "fsdp2"), (2, "tp")):
        out = tmp_path / f"stopped-{mode}-{world}"
        shutil.copytree(tmp_path / "stopped", out)
        forked.run(world, parallel_runs.resumed, mode, options, out)
        assert_close(out, tmp_path / "alone")


def test_a_damaged_checkpoint_or_bad_division_stops_every_process(tmp_path: Path, options: list[str]) -> None:
    forked.run(2, parallel_runs.damage, tmp_path, options)


def test_a_killed_run_loses_only_the_steps_since_its_checkpoint(tmp_path: Path, options: list[str]) -> None:
    """Kill runs, a hundred with `GWT_KILL_TRIALS=100 python -m pytest -s -k killed test_parallel_pretrain.py`."""
    reference = tmp_path / "reference"
    run = forked.Processes(2, parallel_runs.saving_run, options, reference)
    while not (reference / "log.jsonl").exists() and run.running:
        time.sleep(0.001)
    began = time.monotonic()
    assert run.wait(), run.printed()
    seconds = time.monotonic() - began
    where = collections.Counter(
        parallel_runs.kill_and_resume(options, tmp_path / str(seed), reference, seconds, seed)
        for seed in range(KILL_TRIALS)
    )
    print(f"{where.total()} trials passed; interrupted in a: {dict(where)}")


def test_torchrun(tmp_path: Path, options: list[str]) -> None:
    done = torchrun(2, [*options, "--parallel", "hsdp", "--out", str(tmp_path / "out")])
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert (result["processes"], result["parallel"], result["step"]) == (2, "hsdp", parallel_runs.STEPS)
    assert done.stdout.count("numbers:") == 1  # one table, of the first process
    assert last_good(tmp_path / "out").is_dir()


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["ddp", "fsdp2", "tp"])
def test_torchrun_over_nccl(tmp_path: Path, options: list[str], mode: str) -> None:
    world = min(2, torch.cuda.device_count())
    more = ["--device", "cuda", "--precision", "float32", "--log-every", "1"]
    pretrain.main([*options, *more, "--out", str(tmp_path / "alone")])
    out = tmp_path / mode
    for stop in (["--stop-at", "5"], ["--resume"]):
        done = torchrun(world, [*options, *more, "--parallel", mode, "--out", str(out), *stop])
        assert done.returncode == 0, done.stderr
    assert losses(out) == pytest.approx(losses(tmp_path / "alone"), rel=1e-4)


def torchrun(world: int, options: list[str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command += ["-m", "bench.pretrain", *options]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_errors_name_the_remedy(tmp_path: Path, options: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(variable, raising=False)
    for extra, words in (
        ([], "torchrun --standalone"),
        (["--compare", "adamw", "gwt2"], "leave out"),
        (["--optimizer", "galore"], "--parallel ddp"),
    ):
        with pytest.raises(ValueError, match=words):
            pretrain.main([*options, "--parallel", "fsdp2", "--out", str(tmp_path / "out"), *extra])
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="with --parallel"):
        pretrain.main([*options, "--out", str(tmp_path / "out")])
    (tmp_path / "out" / "checkpoints").mkdir(parents=True)
    (tmp_path / "out" / "checkpoints" / "latest").write_text("step-00000002-000000")
    with pytest.raises(ValueError, match="resume with torchrun and --parallel"):
        trained_here(None, options, tmp_path / "out", resume=True)
