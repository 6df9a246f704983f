"""The optimizers of a comparison, built with the same options, and the bytes of their state."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from bench.common.names import check_name, variant
from bench.pretrain import low_rank
from gwt_kernels import GWTAdafactor, GWTAdamMini, GWTAdamW, GWTLion, GWTMuon, gwt_param_groups
from gwt_kernels.core.level import Level
from gwt_kernels.plan import predicted_state_bytes as planned_state_bytes

_STATE_DTYPES = {"": None, "bf16": "bfloat16", "int8": "int8"}
_ADAMS = ("gwt", "foam", "adam_mini")
_RULES: dict[str, Callable[..., Optimizer]] = {
    "gwt": partial(GWTAdamW, rule="gwt"),
    "foam": partial(GWTAdamW, rule="foam"),
    "lion": GWTLion,
    "adam_mini": GWTAdamMini,
    "adafactor": GWTAdafactor,
    "muon": GWTMuon,
}


def level_of(name: str) -> Level | None:
    """Return the level of the transform: 0 for AdamW, None for other packages' optimizers without one."""
    own = variant(name)
    return own.level if own else (0 if name == "adamw" else None)


def swept_name(name: str) -> str:
    """Return the optimizer whose sweep applies: storage dtypes are not swept."""
    own = variant(name)
    return name if own is None else own.swept_name


def build_optimizer(
    name: str,
    model: nn.Module,
    *,
    lr: float,
    scale: float,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    projection_gap: int | None = None,
    momentum: float | None = None,
) -> Optimizer:
    """Build the optimizer called `name` over the parameters of `model`.

    Args:
        name: `adamw` and `torch_adafactor` from `torch.optim`; `galore`, `apollo` and `apollo_mini` from their
            packages; else a rule of this package with its level and storage (`bench.common.names`), such as
            `gwt2`, `muon0` (Muon itself), `foam-row`, `adafactor2-published` or `foam2-bf16-split`.
        model: Model whose attention and MLP matrices GWT transforms.
        lr: Learning rate of embeddings, output head, norms and biases.
        scale: Rate of the attention and MLP matrices over `lr`. This is GWT's `scale`; AdamW gets the same
            option as a learning rate of `lr * scale` for the same matrices, so that both have equally many options.
            So does `torch.optim.Adafactor`, which also multiplies the rates by the RMS of a tensor.
        weight_decay: Decoupled weight decay, scaled like `torch.optim.AdamW`'s by each group's own rate.
        betas: Decay rates of the two moments.
        momentum: Muon's momentum; None for its default.
        projection_gap: Steps between new projections of GaLore and APOLLO; None for their packages' 200.

    Raises:
        ModuleNotFoundError: The optimizer's package is not installed.
        ValueError: `name` is unknown.
    """
    if name in low_rank.NAMES:
        return low_rank.build(
            name,
            model,
            lr=lr,
            scale=scale,
            weight_decay=weight_decay,
            betas=betas,
            projection_gap=projection_gap,
        )
    if check_name(name) in ("adamw", "torch_adafactor"):
        return _of_torch(name, model, lr=lr, scale=scale, weight_decay=weight_decay, betas=betas)
    own = variant(name)
    assert own is not None
    groups = gwt_param_groups(model, rule=own.rule, level=own.level, scale=scale, weight_decay=weight_decay)
    if own.level == 0 and own.rule not in ("lion", "muon"):  # the others ignore `scale` there
        groups = [{**group, "lr": lr * group["scale"]} for group in groups]
    options: dict[str, Any] = {
        "betas" if own.rule in _ADAMS else "adamw_betas": betas,
        "state_dtype": _STATE_DTYPES[own.moments],
        "weight_rounding": own.rounding or None,
    }
    if own.details:
        options["details"] = own.details
    if own.rule == "muon" and momentum is not None:
        options["momentum"] = momentum
    return _RULES[own.rule](groups, lr=lr, **options)


def _of_torch(
    name: str, model: nn.Module, *, lr: float, scale: float, weight_decay: float, betas: tuple[float, float]
) -> Optimizer:
    """Build AdamW or Adafactor from `torch.optim`, with a learning rate of `lr * scale` for matrices."""
    groups = [
        {
            "params": group["params"],
            "lr": lr * scale if group["level"] else lr,
            "weight_decay": group["weight_decay"],
        }
        for group in gwt_param_groups(model, level=1, weight_decay=weight_decay)
    ]
    if name == "torch_adafactor":
        return torch.optim.Adafactor(groups, lr=lr)
    fused = all(p.is_cuda for p in model.parameters())
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=fused or None)


def predicted_state_bytes(optimizer: Optimizer) -> int:
    """Predict the bytes of state of `optimizer` after its first step, from shapes and options alone."""
    own = low_rank.predicted_bytes if low_rank.is_low_rank(optimizer) else None
    if isinstance(optimizer, torch.optim.Adafactor):
        own = _torch_adafactor_bytes
    if own is None:
        return planned_state_bytes(optimizer)
    groups = optimizer.param_groups
    return sum(own(g, p) for g in groups for p in g["params"] if p.requires_grad)


def _torch_adafactor_bytes(group: dict[str, Any], p: torch.Tensor) -> int:
    """Return the bytes of a tensor's state: a float32 step, and means of rows and of columns, or of its squares."""
    step = torch.float32.itemsize
    if p.dim() < 2:
        return step + p.numel() * p.element_size()
    return step + (p.numel() // p.size(-1) + p.numel() // p.size(-2)) * p.element_size()


def measured_state_bytes(optimizer: Optimizer) -> int:
    """Count the bytes of the tensors in the state of `optimizer`: their own elements, not their storages."""

    def held(values: Iterable[Any]) -> Iterable[torch.Tensor]:
        for value in values:
            if isinstance(value, torch.Tensor):
                yield value
            elif hasattr(value, "__dict__"):  # GaLore's and APOLLO's projectors
                yield from held(vars(value).values())

    return sum(
        tensor.numel() * tensor.element_size()
        for state in optimizer.state.values()
        for tensor in held(state.values())
    )
