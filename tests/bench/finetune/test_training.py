"""Fine-tuning runs: they learn, see the same batches, and report their state; each in its own process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.finetune.tasks import Classification, Sizes, checksum, load_plain_text
from bench.finetune.training import CHECK_EVERY, lr_factor, peak_bytes, train, train_apart
from tests.support.finetuning import tiny_config, tiny_task, write_bert, write_llama, write_text

CPU = torch.device("cpu")


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    return write_bert(tmp_path / "bert")


def test_schedule_values() -> None:
    at = [lr_factor(step, steps=10, warmup=0.2) for step in range(1, 11)]
    assert at == pytest.approx([0.5, 1.0, *(8 / 9 - i / 9 for i in range(8))])
    assert lr_factor(1, steps=1, warmup=0.0) == 1.0


@pytest.mark.parametrize("optimizer", ["adamw", "gwt2", "foam2"])
@pytest.mark.parametrize("recipe", ["matrices", "full"])
def test_runs_learn(tmp_path: Path, bert: Path, optimizer: str, recipe: str) -> None:
    task = tiny_task(tmp_path)
    config = tiny_config(bert, optimizer=optimizer, recipe=recipe, steps=150, lr=1e-2, scale=0.5)
    result = train(config, task, CPU)
    assert result["test"]["accuracy"] >= 0.9  # a word decides
    assert result["test"]["loss"] < 0.35
    assert result["validation"]["accuracy"] >= 0.9
    chance = train(tiny_config(bert, optimizer=optimizer, recipe=recipe, steps=1, lr=1e-9), task, CPU)
    assert chance["test"]["loss"] == pytest.approx(0.693, abs=0.1)
    assert chance["untrained_loss"] is None


def test_the_head_alone_learns_less(tmp_path: Path, bert: Path) -> None:
    task = tiny_task(tmp_path)
    head, full = (train(tiny_config(bert, recipe=recipe, steps=60), task, CPU) for recipe in ("head", "full"))
    assert full["test"]["loss"] < head["test"]["loss"] < 0.72
    assert head["trained_parameters"] == 32 * 32 + 32 + 2 * 32 + 2
    assert head["state_bytes"] == 8 * head["trained_parameters"] + 4 * 4
    assert full["trained_parameters"] == full["parameters"] == head["parameters"]


def test_a_language_model_goes_on(tmp_path: Path) -> None:
    folder = write_llama(tmp_path / "llama")
    task = load_plain_text(write_text(tmp_path / "text.txt"), str(folder), Sizes(None, 4, 8, 12), 0.2)
    task.facts["model_digest"] = "made up"
    result = train(tiny_config(folder, optimizer="gwt2", recipe="matrices", steps=40, scale=0.5), task, CPU)
    assert result["untrained_loss"] > 2.7  # ln 15
    assert result["test"]["loss"] < 2.5
    assert result["test"].keys() == {"loss"}
    assert task.steps_of(1.0, 4) == round(task.tokens / 48)


def test_held_out_windows_are_apart_and_spread(tmp_path: Path) -> None:
    folder = write_llama(tmp_path / "llama")
    data = write_text(tmp_path / "text.txt")
    task = load_plain_text(data, str(folder), Sizes(None, 4, 8, 12), 0.2)
    held = torch.cat([task.held["validation"], task.held["test"]])
    assert (len(task.held["validation"]), len(task.held["test"])) == (4, 8)
    assert len({tuple(window.tolist()) for window in held}) == 12
    bigger = load_plain_text(data, str(folder), Sizes(None, 20, 20, 12), 0.2)
    later = torch.cat([bigger.held["validation"], bigger.held["test"]])
    rows = {tuple(window.tolist()) for window in held} & {tuple(window.tolist()) for window in later}
    assert 1 <= len(rows) < 12  # both have the first and the last window, with others closer together
    with pytest.raises(
        ValueError, match=r"--data .*text\.txt: \d+ held-out tokens are too few .*--validation, --test"
    ):
        load_plain_text(data, str(folder), Sizes(None, 4000, 8, 12), 0.2)
    with pytest.raises(FileNotFoundError, match=r"--data .*none: no such file or folder; give one"):
        load_plain_text(tmp_path / "none", str(folder), Sizes(None, 4, 8, 12), 0.2)


# Batches


def test_batches_are_a_pass_over_the_data_sorted_a_little(tmp_path: Path, bert: Path) -> None:
    task = tiny_task(tmp_path)
    batches = list(islice(task.deal(8, 3), 6))
    assert sum(len(batch["labels"]) for batch in batches) == 48
    seen = sorted(
        (tuple(ids[mask.bool()].tolist()), int(label))
        for batch in batches
        for ids, mask, label in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True)
    )
    assert seen == sorted((tuple(ids), label) for ids, label in task.parts["train"])
    padding = sum(int((batch["attention_mask"] == 0).sum()) for batch in batches)
    assert padding < 0.1 * sum(batch["attention_mask"].numel() for batch in batches)
    assert all((batch["input_ids"][batch["attention_mask"] == 0] == 0).all() for batch in batches)


def test_batches_depend_on_the_seed_alone(tmp_path: Path, bert: Path) -> None:
    task = tiny_task(tmp_path)

    def digest(**changed: Any) -> str:
        return str(train(tiny_config(bert, **changed), task, CPU)["data_digest"])

    assert digest() == digest(optimizer="gwt2", lr=0.1, recipe="matrices") == digest(recipe="head")
    assert digest() != digest(seed=1)
    assert digest() != digest(steps=5)


def test_the_same_run_gives_the_same_numbers(tmp_path: Path, bert: Path) -> None:
    task = tiny_task(tmp_path)
    one, other = (train(tiny_config(bert, optimizer="gwt2"), task, CPU) for _ in range(2))
    assert one["test"] == other["test"]
    assert one["test"] != train(tiny_config(bert, optimizer="gwt2", seed=1), task, CPU)["test"]


def test_accuracy_and_loss_by_hand(tmp_path: Path, bert: Path) -> None:
    task = tiny_task(tmp_path)

    class Fixed(nn.Module):
        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
            logits = torch.tensor([0.0, 1.0]).expand(len(input_ids), 2)
            return type("Output", (), {"logits": logits})()

    share = sum(label for _, label in task.parts["test"]) / 20
    found = task.evaluate(Fixed(), "test", CPU)
    right, wrong = (float(torch.log1p(torch.tensor(x).exp())) for x in (-1.0, 1.0))
    assert found["accuracy"] == share
    assert found["loss"] == pytest.approx(share * right + (1 - share) * wrong, rel=1e-6)


def test_clipping_and_decay_reach_the_step(tmp_path: Path, bert: Path) -> None:
    task = tiny_task(tmp_path)
    losses = {
        name: train(tiny_config(bert, **changed), task, CPU)["test"]["loss"]
        for name, changed in {
            "plain": {},
            "clipped": {"grad_clip": 1e-3},
            "decayed": {"weight_decay": 10.0},
        }.items()
    }
    assert len(set(losses.values())) == 3


def test_without_validation_the_tests_choose(tmp_path: Path, bert: Path) -> None:
    task = tiny_task(tmp_path)
    task.parts["validation"], task.facts["validation_size"] = [], 0
    result = train(tiny_config(bert), task, CPU)
    assert result["validation"] == result["test"]


def test_divergence_names_the_rates(tmp_path: Path, bert: Path) -> None:
    with pytest.raises(
        FloatingPointError, match=r"adamw: the loss is \w+ at step \d+; lower --lr \(1e\+30\) or --scale"
    ):
        train(tiny_config(bert, lr=1e30, steps=CHECK_EVERY), tiny_task(tmp_path), CPU)


# Processes


class Ended(Classification):
    """A task that ends its process in the middle of training, as the system does when memory runs out."""

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        os._exit(9)


def test_a_process_of_its_own(tmp_path: Path, bert: Path) -> None:
    task = tiny_task(tmp_path)
    held = torch.ones(300_000_000)  # 1.2 GB of this process, not of the run
    config = tiny_config(bert, optimizer="gwt2")
    result, here = train_apart(config, task, CPU, 1), train(config, task, CPU)
    assert result["test"] == pytest.approx(here["test"], rel=1e-6)
    assert result["threads"] == 1
    assert result["state_bytes"] < result["peak_bytes"] < 1_200_000_000 < (peak_bytes(CPU) or 0)
    assert float(held[0]) == 1.0
    with pytest.raises(FloatingPointError, match="lower --lr"):
        train_apart(tiny_config(bert, lr=1e30, steps=CHECK_EVERY), task, CPU, 1)
    with pytest.raises(MemoryError, match=r"ended from outside.*lower --batch"):
        train_apart(config, Ended(task.parts, 2, 0, task.facts), CPU, 1)


class Interrupting(Classification):
    """A task that sends SIGINT to the process's parent, given in its facts, and records that it was not ended."""

    def deal(self, batch: int, seed: int) -> Iterator[dict[str, Tensor]]:
        for step, each in enumerate(super().deal(batch, seed)):
            if step == 1:
                os.kill(self.facts["parent"], signal.SIGINT)
            if step == 400:
                Path(self.facts["note"]).touch()
            yield each


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Let SIGINT, which a shell's background job ignores, raise KeyboardInterrupt."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupted_run_does_not_go_on(tmp_path: Path, bert: Path) -> None:
    task, note = tiny_task(tmp_path), tmp_path / "went on"
    told = task.facts | {"parent": os.getpid(), "note": str(note)}
    with pytest.raises(KeyboardInterrupt):
        train_apart(tiny_config(bert, steps=401), Interrupting(task.parts, 2, 0, told), CPU, 1)
    assert not note.exists()


def test_the_end_of_a_job_interrupts_the_command() -> None:
    """Check that the signal of batch systems acts like Ctrl-C, so that the run's own process ends too."""
    ended = (
        "import argparse, os, runpy, signal\n"
        "argparse.ArgumentParser.parse_args = lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM)\n"
        "runpy.run_module('bench.finetune', run_name='__main__')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", ended], cwd=Path(__file__).parents[3], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stderr[:11]) == (1, "interrupted"), done.stderr


def test_a_checksum_is_of_every_tensor() -> None:
    batch = {"input_ids": torch.tensor([[1, 2]]), "labels": torch.tensor([1])}
    known = checksum(batch, 0)
    assert known != checksum({**batch, "labels": torch.tensor([0])}, 0)
    assert known != checksum(batch, known)
