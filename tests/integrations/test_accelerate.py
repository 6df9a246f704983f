"""Shows that GWTAdamW works under Accelerate as it is: accumulation, clipping, saving, loading, bfloat16."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from tests.runs import assert_same_bits
from tests.tiny import assert_same_run, llama, optimizer_of, sentences

accelerate = pytest.importorskip("accelerate", reason="needs Accelerate: pip install accelerate")


class Run:
    """Six steps of two micro-batches of four sequences, with a schedule."""

    def __init__(self, **options: Any) -> None:
        accelerate.state.AcceleratorState._reset_state(
            reset_partial_state=True
        )  # a process's first settings hold for all of it
        accelerate.state.GradientState._reset_state()
        self.accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2, **options)
        model = llama()
        optimizer = optimizer_of(model)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=8)
        data: Any = DataLoader(sentences(48), batch_size=4)  # type: ignore[arg-type]
        self.model, self.optimizer, self.schedule, self.data = self.accelerator.prepare(
            model, optimizer, schedule, data
        )
        self.norms: list[float] = []

    def train(self, begin: int = 0, end: int = 6) -> Run:
        for i, batch in enumerate(self.data):
            if not 2 * begin <= i < 2 * end:
                continue
            with self.accelerator.accumulate(self.model):
                self.accelerator.backward(self.model(**batch).loss)
                if self.accelerator.sync_gradients:
                    self.norms.append(float(self.accelerator.clip_grad_norm_(self.model.parameters(), 0.5)))
                self.optimizer.step()
                self.schedule.step()
                self.optimizer.zero_grad()
        return self


def plain(model: nn.Module) -> Any:
    """The same run in a plain loop."""
    optimizer = optimizer_of(model)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=8)
    for i, batch in enumerate(DataLoader(sentences(48), batch_size=4)):  # type: ignore[arg-type,var-annotated]
        (model(**batch).loss / 2).backward()
        if i % 2:
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    return optimizer


def test_equals_a_plain_loop():
    run = Run().train()
    model = llama()
    optimizer = plain(model)
    assert_same_run(run.model, run.optimizer, model, optimizer)
    assert len(run.norms) == 6
    assert max(run.norms) > 0.5  # some steps were clipped
    assert {int(s["step"]) for s in optimizer.state.values()} == {6}


def test_resumes_bit_for_bit(tmp_path: Path):
    whole = Run().train()
    Run().train(end=3).accelerator.save_state(str(tmp_path))
    resumed = Run()
    resumed.accelerator.load_state(str(tmp_path))
    resumed.train(begin=3)
    assert_same_run(whole.model, whole.optimizer, resumed.model, resumed.optimizer)

    weights_alone = Run()
    weights_alone.model.load_state_dict(Run().train(end=3).model.state_dict())
    weights_alone.train(begin=3)
    with pytest.raises(AssertionError):  # the moments matter, so the comparison can fail
        assert_same_bits(list(whole.model.parameters()), list(weights_alone.model.parameters()))


def test_mixed_precision():
    run = Run(mixed_precision="bf16").train()
    assert {p.dtype for p in run.model.parameters()} == {torch.float32}
    assert all(torch.isfinite(p).all() for p in run.model.parameters())
    assert not torch.equal(Run().train().model.lm_head.weight, run.model.lm_head.weight)  # autocast was on
