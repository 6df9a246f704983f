"""Hundreds of steps with random faults, each judged by the C oracle: bad input is refused or skipped."""

from __future__ import annotations

import copy
import io
import math
import random

import pytest
import torch

from gwt_kernels import GWTAdamW
from tests.support import interpreter
from tests.support.runs import assert_same_bits, checked_step, parameters_of, place, refused, snapshot

SHAPES = [(4, 16), (3, 37), (2, 3, 8), (33,), (5, 4), (1, 9), (64,), ()]
MAX_NORM = 3.0


class Fuzz:
    """An optimizer that skips and clips, and random faults."""

    def __init__(self, backend: str, on: torch.device, seed: int) -> None:
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.backend, self.on = backend, on
        self.skipped = 0
        groups = [
            {"params": [self.parameter(s) for s in SHAPES[:3]], "level": 2},
            {"params": [self.parameter(SHAPES[3])], "level": 1, "norm_growth_limit": None, "maximize": True},
            {"params": [self.parameter(SHAPES[4])], "level": 2, "rule": "foam", "weight_decay": 0.1},
            {"params": [self.parameter(s) for s in SHAPES[5:]], "level": 0},
        ]
        self.optimizer = self.build(groups)

    def build(self, groups):
        return GWTAdamW(groups, lr=0.01, backend=self.backend, skip_nonfinite=True, max_grad_norm=MAX_NORM)

    def parameter(self, shape):
        return torch.nn.Parameter(torch.randn(shape, generator=self.generator).to(self.on))

    @property
    def params(self):
        return parameters_of(self.optimizer)

    def renew_gradients(self):
        for p in self.params:
            size = self.random.choice((0.01, 1.0, 30.0))
            p.grad = (torch.randn(p.shape, generator=self.generator) * size + 0.1).to(self.on)

    def step(self):
        grads = [p.grad for p in self.params if p.grad is not None]
        if not all(g.isfinite().all() for g in grads):
            before = snapshot(self.optimizer)
            with interpreter.like_a_gpu():
                self.optimizer.step()
            after = snapshot(self.optimizer)
            assert_same_bits(after["params"], before["params"])
            for new, old in zip(after["state"], before["state"], strict=True):
                if old:
                    assert_same_bits(new, old)
                else:  # a skipped first step leaves the state as before the first step
                    assert all(not x.count_nonzero() for x in new.values())
            self.skipped += 1
            return
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in grads))
        checked_step(self.optimizer, min(1.0, MAX_NORM / (norm + 1e-6)))

    # Faults: changes of gradients, parameters or the optimizer before a step.

    def nan(self):
        self.spoil(math.nan)

    def infinity(self):
        self.spoil(-math.inf)

    def spoil(self, value):
        p = self.random.choice([p for p in self.params if p.grad is not None])
        p.grad.view(-1)[self.random.randrange(p.numel())] = value

    def zero(self):
        for p in self.random.sample(self.params, 3):
            p.grad.zero_()

    def missing(self):
        for p in self.random.sample(self.params, 3):
            p.grad = None

    def the_same_memory(self):
        kept = [p.grad for p in self.params]
        self.step()
        for p, g in zip(self.params, kept, strict=True):
            p.grad = g.mul_(0.9)

    def reallocated(self):
        for p in self.params:
            p.grad = p.grad.clone()

    def not_contiguous(self):
        for p in self.params:
            if p.dim() > 1:
                p.grad = p.grad.transpose(0, -1).contiguous().transpose(0, -1)
            elif p.dim() == 1:
                p.grad = torch.stack([p.grad, p.grad], 1)[:, 0]

    def sparse(self):
        p = self.random.choice([p for p in self.params if p.dim() == 2])
        dense, p.grad = p.grad, p.grad.to_sparse()
        with refused(self.optimizer, RuntimeError, "sparse gradients"):
            self.optimizer.step()
        p.grad = dense

    def reshaped(self):
        p = self.random.choice([p for p in self.params if p.dim() == 2])
        kept = p.data
        p.data = torch.zeros(p.shape[0], p.shape[1] + 1, device=self.on)
        with refused(self.optimizer, (RuntimeError), "backward"):
            self.optimizer.step()
        p.data = kept

    def moved(self):
        for p in self.random.sample(self.params, 2):
            p.data = p.data.clone()

    def frozen(self):
        p = self.random.choice(self.params)
        p.requires_grad_(not p.requires_grad)
        p.grad = None

    def added(self):
        if len(self.params) < 20:
            p = self.parameter(self.random.choice(SHAPES[:2]))
            self.optimizer.add_param_group({"params": [p], "level": self.random.choice((0, 1, 2))})
            p.grad = torch.ones_like(p)

    def saved_and_loaded(self):
        file = io.BytesIO()
        torch.save(self.optimizer.state_dict(), file)
        file.seek(0)
        groups = [{k: copy.copy(v) for k, v in g.items()} for g in self.optimizer.param_groups]
        fresh = self.build(groups)
        fresh.load_state_dict(torch.load(file, weights_only=True))
        before = snapshot(self.optimizer)
        self.optimizer = fresh
        assert_same_bits(snapshot(fresh)["state"], before["state"])
        self.skipped = 0

    def bad_rate(self):
        group = self.random.choice(self.optimizer.param_groups)
        kept, group["lr"] = group["lr"], -1.0
        with refused(self.optimizer, ValueError, "lr must be finite and at least 0"):
            self.optimizer.step()
        group["lr"] = kept

    def another_rate(self):
        for group in self.optimizer.param_groups:
            group["lr"] = self.random.choice((0.01, torch.tensor(0.003), 0.0))


FAULTS = [
    *(
        Fuzz.nan,
        Fuzz.infinity,
        Fuzz.zero,
        Fuzz.missing,
        Fuzz.the_same_memory,
        Fuzz.reallocated,
        Fuzz.not_contiguous,
    ),
    *(Fuzz.sparse, Fuzz.reshaped, Fuzz.moved, Fuzz.frozen, Fuzz.added, Fuzz.saved_and_loaded, Fuzz.bad_rate),
    Fuzz.another_rate,
]


@pytest.mark.parametrize(("backend", "steps"), [("torch", 210), ("compiled", 210), ("triton", 30)])
def test_random_faults(backend, steps, device):
    fuzz = Fuzz(backend, place(backend, device), seed=steps)
    order: list = []
    for _ in range(steps):
        order = order or fuzz.random.sample(FAULTS, len(FAULTS))  # every fault once in so many steps
        fuzz.renew_gradients()
        order.pop()(fuzz)
        fuzz.step()
        assert fuzz.optimizer.skipped_steps == fuzz.skipped
