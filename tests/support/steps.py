"""One step on a bucket of tensors in poisoned memory, compared tensor by tensor with the C oracle.

Each step is judged alone: the oracle starts, in float64, from the numbers that the backend had stored, so that the
bounds need not grow from step to step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gwt_kernels.backends.bucket import Bucket as Tensors
from gwt_kernels.backends.bucket import StepInputs
from gwt_kernels.backends.prepare import prepare
from gwt_kernels.backends.runner import Runner
from gwt_kernels.core.level import Level, blocks_of
from gwt_kernels.functional import Hyper, gwt_adamw_
from gwt_kernels.rules import rule_of
from tests.support import interpreter, poisoned, reference, rounding
from tests.support.poisoned import Poisoned

ARRAYS = ("params", "grads", "exp_avgs", "exp_avg_sqs")


class Bucket:
    """Tensors of one bucket with random weights, gradients and moments.

    Args:
        shapes: one shape per tensor.
        level: level of the transform, or "row".
        dtype: dtype of the weights.
        grad_dtype: dtype of the gradients; None for that of the weights.
        moment_dtype: dtype of the moments; None for float32, and float64 for float64 weights.
        layouts: layouts of weights and gradients (``poisoned.LAYOUTS``), repeated over the tensors.
        rule: rule of the update.
        limited: whether there are limiter norms.
        first: whether the moments are zeros, as before the first step.
    """

    def __init__(
        self,
        shapes: Sequence[Sequence[int]],
        level: Level,
        *,
        dtype: torch.dtype = torch.float32,
        grad_dtype: torch.dtype | None = None,
        moment_dtype: torch.dtype | None = None,
        layouts: Sequence[str] = ("contiguous",),
        rule: str = "gwt",
        limited: bool = False,
        first: bool = False,
        device: torch.device | str = "cpu",
        seed: int = 0,
    ) -> None:
        self.level, self.rule, self.dtype, self.device = level, rule, dtype, torch.device(device)
        self.grad_dtype = grad_dtype or dtype
        wide = torch.promote_types(dtype, torch.float32)
        self.generator = torch.Generator().manual_seed(seed)
        self.layouts = [layouts[i % len(layouts)] for i in range(len(shapes))]
        moments = [(*s[:-1], blocks_of(level, s[-1])) if s else () for s in shapes]
        scale = 0.0 if first else 1.0

        def place(values: Tensor, to: torch.dtype, layout: str = "contiguous") -> Poisoned:
            return Poisoned(values.to(device=self.device, dtype=to), layout)

        # Moments of the size that gradients of size 1 produce; misaligned only if the weights are.
        own = ["misaligned" if layout == "misaligned" else "contiguous" for layout in self.layouts]
        moment_dtype = moment_dtype or wide
        self.params = [place(self._normal(s), dtype, x) for s, x in zip(shapes, self.layouts, strict=True)]
        self.grads = [place(self._normal(s), self.grad_dtype, x) for s, x in zip(shapes, self.layouts, strict=True)]
        self.exp_avgs = [
            place(scale * 0.5 * self._normal(s), moment_dtype, x) for s, x in zip(moments, own, strict=True)
        ]
        self.exp_avg_sqs = [
            place(scale * 0.3 * (0.5 + torch.rand(s, generator=self.generator)), moment_dtype, x)
            for s, x in zip(moments, own, strict=True)
        ]
        zero = torch.zeros(())
        self.norms = [place(zero, wide) for _ in shapes] if limited else None

    def _normal(self, shape: Sequence[int]) -> Tensor:
        # An offset, so that the mean of a block is as large as the differences within it.
        return torch.randn(tuple(shape), generator=self.generator, dtype=torch.float64) + 0.5

    def renew_gradients(self, factor: float = 1.0, layouts: Sequence[str] | None = None) -> None:
        """Allocate new random gradients, as a backward pass does."""
        layouts = self.layouts if layouts is None else [layouts[i % len(layouts)] for i in range(len(self.grads))]
        self.grads = [
            Poisoned((factor * self._normal(g.tensor.shape)).to(self.device, self.grad_dtype), layout)
            for g, layout in zip(self.grads, layouts, strict=True)
        ]

    def tensors(self, name: str) -> list[Tensor]:
        return [x.tensor for x in getattr(self, name)]

    def results(self) -> list[Tensor]:
        """Copy everything that a step changes."""
        names = ("params", "exp_avgs", "exp_avg_sqs", *(["norms"] if self.norms else []))
        return [x.clone() for name in names for x in self.tensors(name)]

    def step(self, hypers: Hyper | Sequence[Hyper], step: int | Sequence[int] = 1, /, **options: Any) -> None:
        """Call ``gwt_adamw_`` on the bucket, and check the memory around every tensor.

        ``options`` override the bucket's own arguments.
        """
        n = len(self.params)
        before = [x.clone() for x in self.tensors("grads")]
        with interpreter.like_a_gpu(), poisoned.uninitialized():
            kept = ["params", "grads", *(f"{slot}s" for slot in rule_of(self.rule).slots)]
            arguments = {name: self.tensors(name) if name in kept else None for name in ARRAYS} | {
                "limiter_norms": self.tensors("norms") if self.norms else [None] * n,
                "steps": [step] * n if isinstance(step, int) else step,
                "hypers": [hypers] * n if isinstance(hypers, Hyper) else hypers,
                "level": self.level,
                "rule": self.rule,
            }
            gwt_adamw_(**(arguments | options))
        for name in (*ARRAYS, *(["norms"] if self.norms else [])):
            for x in getattr(self, name):
                x.check()
        assert all(map(torch.equal, before, self.tensors("grads"))), "a gradient was changed"

    def check_step(self, hypers: Hyper | Sequence[Hyper], step: int | Sequence[int] = 1, /, **options: Any) -> None:
        """Take a step, and compare everything that it stored with the C oracle."""
        n = len(self.params)
        before = [list(map(_numpy, self.tensors(name))) for name in ARRAYS]
        norms = list(map(float, self.tensors("norms"))) if self.norms else [None] * n
        self.step(hypers, step, **options)
        per_tensor = [hypers] * n if isinstance(hypers, Hyper) else hypers
        steps = [step] * n if isinstance(step, int) else step
        for i, (arrays, norm, hyper, t) in enumerate(
            zip(zip(*before, strict=True), norms, per_tensor, steps, strict=True)
        ):
            self._compare(i, *arrays, norm, hyper, t)

    def _compare(
        self,
        i: int,
        p: np.ndarray,
        g: np.ndarray,
        m: np.ndarray,
        v: np.ndarray,
        norm: float | None,
        hyper: Hyper,
        t: int,
    ) -> None:
        if p.size == 0:
            return
        g = g * hyper.grad_factor
        u = rounding.unit(self.dtype)
        if self.dtype == torch.float64:
            u *= 16  # the oracle rounds too, in transforms level by level
        bounds = rounding.step_bounds(p, g, m, v, norm, hyper, t, self.level, u, self.rule)
        new_norm = reference.adamw_step(
            p,
            g,
            m,
            v,
            norm or 0.0,
            level=self.level,
            step=t,
            lr=hyper.lr,
            betas=(hyper.beta1, hyper.beta2),
            eps=hyper.eps,
            weight_decay=hyper.weight_decay,
            scale=hyper.scale,
            norm_growth_limit=None if norm is None else hyper.norm_growth_limit,
            maximize=hyper.maximize,
            rule=self.rule,
            correct_bias=hyper.correct_bias,
            res_scale=hyper.detail_scale,
        )
        what = f"of tensor {i}, shape {p.shape}, {self.layouts[i]}, level {self.level}, step {t}"
        for name, exact, bound in (
            ("params", p, bounds.p),
            ("exp_avgs", m, bounds.exp_avg),
            ("exp_avg_sqs", v, bounds.exp_avg_sq),
        ):
            stored = getattr(self, name)[i].tensor
            at_random = name != "params" and stored.dtype == torch.bfloat16
            bound = rounding.widen(bound, exact, stored.dtype, self.dtype, at_random)
            assert_within(_numpy(stored), exact, bound, f"{name} {what}")
        if norm is not None:
            got = float(self.norms[i].tensor)
            assert_within(np.array(got), np.array(new_norm), np.array(bounds.norm), f"limiter norm {what}")


def prepared(
    *,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[int] | Tensor,
    hypers: Sequence[Hyper],
    backend: Any = None,
    **options: Any,
) -> tuple[Runner, StepInputs]:
    """Return a runner for the tensors, and the inputs of one step, from the arguments of ``gwt_adamw_``."""
    bucket = Tensors(params, exp_avgs, exp_avg_sqs, grad_dtype=grads[0].dtype, **options)
    return prepare(bucket, backend), StepInputs(grads, steps, hypers)


@torch.no_grad()
def update_sums(**arguments: Any) -> Tensor:
    """Return sums of squares of the update, as needed by a limiter over several processes."""
    runner, inputs = prepared(**arguments)
    sums = runner.reduce(inputs, update_sums=True).update_sums
    assert sums is not None
    return sums


def assert_within(got: np.ndarray, exact: np.ndarray, bound: np.ndarray, what: str) -> None:
    """Raise AssertionError, with the worst element, unless ``got`` is within ``bound`` of ``exact`` everywhere."""
    assert got.shape == exact.shape, f"{what}: shape {got.shape}, expected {exact.shape}"
    with np.errstate(invalid="ignore"):
        wrong = ~(np.abs(got - exact) <= bound)  # NaN counts as wrong
    if wrong.any():
        excess = np.where(wrong, np.nan_to_num(np.abs(got - exact) / np.maximum(bound, 1e-300), nan=math.inf), 0)
        worst = np.unravel_index(np.argmax(excess), got.shape)
        raise AssertionError(
            f"{what}: {wrong.sum()} of {wrong.size} elements are wrong, the worst at {tuple(map(int, worst))}: "
            f"{got[worst]!r}, expected {exact[worst]!r} +- {bound[worst]:.3g}"
        )


def _numpy(x: Tensor) -> np.ndarray:
    return np.ascontiguousarray(x.detach().to("cpu", torch.float64).numpy()).copy()
