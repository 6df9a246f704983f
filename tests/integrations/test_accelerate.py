"""GWTAdamW under Accelerate: accumulation, clipping, saving, precision, loss scaling."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from gwt_kernels import GWTAdamW
from tests.support import accelerate_runs, forked
from tests.support.runs import assert_same_bits
from tests.support.tiny import assert_same_run, llama, optimizer_of, sentences

accelerate = pytest.importorskip("accelerate", reason="needs Accelerate: pip install accelerate")


class Run:
    """Six steps of two micro-batches of four sequences, with a schedule."""

    def __init__(self, **options: Any) -> None:
        accelerate.state.AcceleratorState._reset_state(
            reset_partial_state=True
        )  # the first settings of a process hold for its lifetime
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
    """Train the same run in a plain loop."""
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
    assert not torch.equal(Run().train().model.lm_head.weight, run.model.lm_head.weight)  # autocast was active


# A GradScaler that skips steps: Accelerate's own is for GPUs only, so each test passes one for the CPU.

SKIPPED = (0, 3, 4)


class Scaled:
    """Eight steps under a scaler, some with an infinite gradient, and a schedule that waits for skipped steps."""

    def __init__(self, make: Callable[[list[nn.Parameter]], torch.optim.Optimizer], dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.model = nn.Linear(16, 8, bias=False).to(dtype)
        self.bare = make(list(self.model.parameters()))
        self.schedule: Any = torch.optim.lr_scheduler.LambdaLR(self.bare, lambda t: 1 / (1 + t))
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
        self.skips: list[bool] = []
        self.rates: list[float] = []

    def loss(self, t: int) -> torch.Tensor:
        x = torch.randn(4, 16, generator=torch.Generator().manual_seed(t)).to(self.model.weight.dtype)
        loss = self.model(x).float().square().mean() / 8
        return loss * torch.inf if t in SKIPPED else loss

    def plainly(self) -> Scaled:
        """Train as in PyTorch's documentation, where a scale that has shrunk means that the step was skipped."""
        for t in range(8):
            self.scaler.scale(self.loss(t)).backward()
            self.scaler.step(self.bare)
            before = self.scaler.get_scale()
            self.scaler.update()
            self.skips.append(self.scaler.get_scale() < before)
            if not self.skips[-1]:
                self.schedule.step()
            self.rates.append(self.bare.param_groups[0]["lr"])
            self.bare.zero_grad()
        return self

    def accelerated(self, clip: bool = False) -> Scaled:
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        accelerate.state.GradientState._reset_state()
        accelerator = accelerate.Accelerator(cpu=True)
        accelerator.scaler = self.scaler
        model, optimizer, schedule = accelerator.prepare(self.model, self.bare, self.schedule)
        accelerator.native_amp, accelerator.state._mixed_precision = True, "fp16"  # or prepare would autocast
        for t in range(8):
            accelerator.backward(self.loss(t))
            if clip:
                accelerator.clip_grad_norm_(model.parameters(), 1e6)  # unscales, but clips nothing
            optimizer.step()
            self.skips.append(accelerator.optimizer_step_was_skipped)
            schedule.step()
            self.rates.append(self.bare.param_groups[0]["lr"])
            optimizer.zero_grad()
        return self


def ours(params: list[nn.Parameter], **options: Any) -> GWTAdamW:
    return GWTAdamW(params, lr=0.01, **options)


@pytest.mark.parametrize(
    ("make", "dtype", "clip"),
    [
        (ours, torch.float32, False),
        (ours, torch.float32, True),
        (ours, torch.float16, False),
        (partial(ours, max_grad_norm=0.5), torch.float32, False),
        (partial(torch.optim.AdamW, lr=0.01), torch.float32, False),
    ],
    ids=["ours", "unscaled before", "float16 weights", "clipped in the step", "torch"],
)
def test_skipped_steps_are_reported_and_delay_schedules(make: Any, dtype: torch.dtype, clip: bool):
    run, plain = Scaled(make, dtype).accelerated(clip), Scaled(make, dtype).plainly()
    assert run.skips == plain.skips == [t in SKIPPED for t in range(8)]
    assert run.rates == plain.rates
    assert len(set(run.rates)) == 6
    assert_same_bits(list(run.model.parameters()), list(plain.model.parameters()))
    assert_same_bits(run.bare.state_dict()["state"], plain.bare.state_dict()["state"])
    if isinstance(run.bare, GWTAdamW):
        assert run.bare.state[run.model.weight]["step"] == 5
        assert run.bare.skipped_steps == 3
        assert not hasattr(run.bare, "found_inf")


class Unread:
    def __float__(self) -> float:
        raise AssertionError("the host waits for the device")


def test_scaler_is_not_synchronised_without_accelerate():
    optimizer = ours([nn.Parameter(torch.ones(4, 4))])
    torch.optim.lr_scheduler.ConstantLR(optimizer)  # a scheduler replaces step, too
    optimizer.found_inf = Unread()
    with pytest.raises(AttributeError):
        del optimizer.found_inf, optimizer.found_inf
    assert not hasattr(optimizer, "found_inf")
    assert not hasattr(GWTAdamW, "found_inf")


def test_parameters_sharded_by_accelerate_train_as_in_a_plain_loop():
    """Check Accelerate's FSDP2, which replaces the parameters of an existing optimizer by shards."""
    forked.run(1, accelerate_runs.fsdp2)
