"""Pre-training runs of several processes, and their checkpoints; test_parallel_pretrain.py starts them."""

from __future__ import annotations

import random
import re
import shutil
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from bench.pretrain import __main__ as pretrain
from bench.pretrain import parallel, sharded_checkpoint
from bench.pretrain.training import Run, read_log, train
from tests.support import forked
from tests.support.pretraining import TEXT, assert_same_leaves, tensors, tiny_model

STEPS, SAVE_EVERY = 8, 2


def options_of(folder: Path, *more: str) -> list[str]:
    """Return a command line of a few steps on a model that tensor parallelism can divide."""
    model = tiny_model(folder, intermediate_size=32, num_hidden_layers=2)
    line = f"--model {model} --text {TEXT} --device cpu --threads 1 --steps {STEPS} --batch 6 --context 16"
    # 7 windows to evaluate on: never the same number on each process.
    return [*line.split(), "--lr", "0.003", "--evals", "3", "--eval-windows", "7", "--quiet", *more]


def trained_here(mode: str | None, options: list[str], out: Path, **how: Any) -> dict[str, Any]:
    """Train this process's part of a run; without a mode the whole run."""
    parsed = pretrain.parse(options)[0]
    config = pretrain.run_config(parsed, parsed.optimizer)
    processes = None if mode is None else parallel.start(mode, "cpu")
    run = Run(config, pretrain.load_corpus(parsed, config.seed), torch.device("cpu"), processes=processes)
    return train(run, out, log_every=1, progress=False, **how)


def every_mode(options: list[str], root: Path) -> None:
    """Run each mode, with and without clipping, and with the optimizer of torch."""
    for mode in parallel.MODES:
        result = trained_here(mode, options, root / mode)
        assert result["state_bytes_measured"] == result["state_bytes_predicted"]
    for mode in ("fsdp2", "tp"):
        trained_here(mode, [*options, "--grad-clip", "0.5", "--accumulate", "2"], root / f"{mode}-clipped")
    trained_here("tp", [*options, "--optimizer", "adamw"], root / "tp-adamw")
    trained_here("fsdp2", options, root / "stopped", stop_at=3)


def resumed(mode: str, options: list[str], out: Path) -> None:
    """Resume from a checkpoint, after checking that every number is restored bit for bit."""
    parsed = pretrain.parse(options)[0]
    config = pretrain.run_config(parsed, parsed.optimizer)
    corpus = pretrain.load_corpus(parsed, config.seed)
    run = Run(config, corpus, torch.device("cpu"), processes=parallel.start(mode, "cpu"))
    run.load(out / "checkpoints")
    run.save(out / "again" / "checkpoints")
    if run.processes.is_first:
        assert_same_leaves(contents(out / "again"), contents(out))
    trained_here(mode, options, out, resume=True)


def losses(out: Path, kind: str = "train") -> list[float]:
    """Return the losses of the log, with every step exactly once."""
    lines = read_log(out / "log.jsonl", kind)
    steps = [line["step"] for line in lines]
    assert steps == sorted(set(steps))
    return [line["loss"] for line in lines]


def last_good(out: Path) -> Path:
    return out / "checkpoints" / (out / "checkpoints" / "latest").read_text()


def step_of(out: Path) -> int:
    """Return the step of the last complete checkpoint; 0 without one."""
    if not sharded_checkpoint.exists(out / "checkpoints"):
        return 0
    return int(last_good(out).name.split("-")[1])


def contents(out: Path) -> dict[str, Any]:
    """Return all weights and state of the last complete checkpoint, gathered, by name."""
    dcp_to_torch_save(last_good(out), out / "whole.pt")
    return tensors(torch.load(out / "whole.pt", weights_only=True))


def everywhere(value: Any) -> list[Any]:
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def refused(words: str, mode: str, options: list[str], out: Path, **how: Any) -> None:
    """Check that every process raises a ValueError with a matching message."""
    try:
        trained_here(mode, options, out, **how)
    except ValueError as error:
        said = str(error)
    else:
        said = "nothing"
    for message in everywhere(said):
        assert re.search(words, message), f"{message!r}, expected {words!r}"


def damage(root: Path, options: list[str]) -> None:
    """Check that a missing or damaged file of a checkpoint stops the resumed run on every process, by name."""
    first = dist.get_rank() == 0
    sound = root / "sound"
    trained_here("fsdp2", options, sound, stop_at=4, save_every=2)
    names = sorted(file.name for file in last_good(sound).iterdir())
    assert names == [".metadata", "__0_0.distcp", "__1_0.distcp", "manifest.json", "run.pt"]
    before = next(x.name for x in (sound / "checkpoints").iterdir() if x.is_dir() and x != last_good(sound))
    for name in names:
        for how in ("missing", "damaged", "cut"):
            out = root / f"{name}-{how}"
            if first:
                shutil.copytree(sound, out)
                _spoil(last_good(out) / name, how)
            dist.barrier()
            refused(rf"{re.escape(name)} is (missing|damaged).*{before} into", "fsdp2", options, out, resume=True)
    other = [*options, "--optimizer", "gwt1"]
    refused("optimizer='gwt2' there, 'gwt1' here", "fsdp2", other, sound, resume=True)
    refused("no multiple of the 2", "ddp", [*options, "--batch", "5"], root / "odd")
    refused("num_attention_heads", "tp", [*options, "--model", str(_odd_heads(root))], root / "heads")
    _saves_that_fail(sound, options, first)


def _spoil(file: Path, how: str) -> None:
    if how == "missing":
        file.unlink()
        return
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0x10
    file.write_bytes(content[:-1] if how == "cut" else content)


def _odd_heads(root: Path) -> Path:
    folder = root / f"heads{dist.get_rank()}"
    folder.mkdir()
    return tiny_model(folder, num_attention_heads=1)


def _saves_that_fail(out: Path, options: list[str], first: bool) -> None:
    """Check that if one process cannot write, all stop, the last checkpoint stays, and the run can continue."""
    good = last_good(out)
    for function, on_first in (("_checksum", False), ("_sync", True), ("write_text", True)):
        real = getattr(sharded_checkpoint, function)
        reading = len(list(good.iterdir()))  # files whose checksums are verified on resuming

        def full(path: Path, *more: Any, function: Any = real) -> Any:
            if path.parent == good:
                return function(path, *more)
            raise OSError("no space left on device")

        with pytest.MonkeyPatch.context() as patch:
            if first == on_first:
                patch.setattr(sharded_checkpoint, function, full)
            refused("process [01].*no space", "fsdp2", options, out, resume=True, stop_at=6)
        assert last_good(out) == good
        assert len(list(good.iterdir())) == reading
        dist.barrier()
    with mock.patch("torch.distributed.checkpoint.filesystem.os.fsync", side_effect=OSError("no space left")):
        refused("cannot write a checkpoint", "fsdp2", options, out, resume=True, stop_at=6)
    assert last_good(out) == good
    dist.barrier()
    trained_here("fsdp2", options, out, resume=True, stop_at=6)
    assert step_of(out) == 6
    dist.barrier()
    assert not list((out / "checkpoints").glob("*.partial"))


def saving_run(options: list[str], out: Path) -> None:
    """Run this process's part of a run, resumed if there is a checkpoint."""
    trained_here("fsdp2", options, out, save_every=SAVE_EVERY, resume=True)


def kill_and_resume(options: list[str], out: Path, reference: Path, seconds: float, seed: int) -> str:
    """Kill a two-process run at a random moment, resume it, and compare it with an uninterrupted one.

    Returns:
        What was interrupted: `step`, `save` or, if the run had already finished, `end`.
    """
    chance = random.Random(seed)
    run = forked.Processes(2, saving_run, options, out)
    while not (out / "log.jsonl").exists() and run.running:
        time.sleep(0.001)
    time.sleep(chance.uniform(0.0, seconds))
    victims = chance.choice([[0], [1], [0, 1]])
    for victim in victims:
        run.started[victim].kill()
    assert run.wait(60), f"trial {seed}: a process was left hanging when {victims} were killed:\n{run.printed()}"
    reached = len(losses(out))
    saves = out / "checkpoints"
    left = [x for x in saves.iterdir() if x.suffix == ".partial"] if saves.exists() else []
    # The line of a step is written before its checkpoint, so a later line means that the checkpoint is complete.
    assert step_of(out) >= max(reached - 1, 0) // SAVE_EVERY * SAVE_EVERY, f"trial {seed}: lost a checkpoint"
    ended = (out / "result.json").exists()
    forked.run(2, saving_run, options, out)
    assert losses(out) == losses(reference), f"trial {seed}"
    assert_same_leaves(contents(out), contents(reference))
    return "end" if ended else "save" if left else "step"
