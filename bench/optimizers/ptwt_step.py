"""The GWT step level by level, with a convolution-based transform: the baseline for the folded step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import pywt
import torch
from ptwt.conv_transform import wavedec, waverec
from torch import Tensor
from torch.optim import Optimizer

HAAR = pywt.Wavelet("haar")


class LiteralGWTAdamW(Optimizer):
    """GWT-Adam with `ptwt.wavedec` and `ptwt.waverec`, level by level; no folding identity, no backend.

    Arguments and state are as for `gwt_kernels.GWTAdamW`, so that one harness runs both; narrow weights and
    gradients are widened to float32. Tensors at level 0 take a plain AdamW step. Source: GWT
    (arXiv 2501.07237), with the limiter of Fira (arXiv 2410.01623).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        level: int = 2,
        scale: float = 0.25,
        norm_growth_limit: float | None = 1.01,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "level": level,
            "scale": scale,
            "norm_growth_limit": norm_growth_limit,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient, one tensor at a time; `closure` must be None."""
        if closure is not None:
            raise ValueError("LiteralGWTAdamW.step takes no closure; run it before the step")
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, p.grad, group)

    def _update(self, p: Tensor, g: Tensor, group: dict[str, Any]) -> None:
        level, (b1, b2) = group["level"], group["betas"]
        g = g.to(torch.promote_types(g.dtype, torch.float32))  # ptwt supports no narrower dtype
        coarse, *details = wavedec(g, HAAR, mode="zero", level=level) if level else [g]
        state = self.state[p]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(coarse)
            state["exp_avg_sq"] = torch.zeros_like(coarse)
        state["step"] += 1
        m = state["exp_avg"].mul_(b1).add_(coarse, alpha=1 - b1)
        v = state["exp_avg_sq"].mul_(b2).addcmul_(coarse, coarse, value=1 - b2)
        denominator = v.sqrt().add_(group["eps"])
        coarse = m / denominator

        factor = 1.0
        if level:
            factor = group["scale"] / self._limit(state, coarse, group["norm_growth_limit"])
            normed = [coarse]
            for detail in details:
                normed.append(detail / denominator[..., : detail.shape[-1]])
                denominator = denominator.repeat_interleave(2, dim=-1)
            update = waverec(normed, HAAR)[..., : p.shape[-1]]
        else:
            update = coarse

        t = state["step"].item()
        rate = group["lr"] * math.sqrt(1 - b2**t) / (1 - b1**t)
        weights = p.to(update.dtype)  # p itself, unless it is narrower and would be rounded twice
        weights.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update * (rate * factor))
        if weights is not p:
            p.copy_(weights)

    @staticmethod
    def _limit(state: dict[str, Any], coarse: Tensor, gamma: float | None) -> float:
        if gamma is None:
            return 1.0
        norm = coarse.norm().item()
        previous = state["limiter_norm"].item() if "limiter_norm" in state else 0.0
        limit = max(norm / (previous + 1e-8), gamma) / gamma if previous > 0 else 1.0
        state["limiter_norm"] = torch.tensor(norm / limit, dtype=coarse.dtype)
        return limit
