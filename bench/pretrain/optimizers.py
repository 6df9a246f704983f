"""The optimizers of a comparison, built on equal terms, and the state each will hold."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from bench.pretrain import low_rank
from gwt_kernels import GWTAdamW, GWTLion, GWTMuon, gwt_param_groups
from gwt_kernels.plan import predicted_state_bytes as planned_state_bytes

# Rule and level; then, each only where it is not the default, dtype of the moments and rounding of the weights.
_OWN = re.compile(r"(gwt|foam|lion|muon)(\d)(?:-(bf16|int8))?(?:-(nearest|stochastic|split))?")
_STATE_DTYPES = {None: None, "bf16": "bfloat16", "int8": "int8"}


def check_name(name: str) -> str:
    """Return `name`, or raise a `ValueError` that lists the known names."""
    if name not in ("adamw", *low_rank.NAMES) and not _OWN.fullmatch(name):
        known = ", ".join(("adamw", *low_rank.NAMES))
        raise ValueError(
            f"unknown optimizer {name!r}: choose {known}, or gwtL, foamL, lionL or muonL with a level L, such as "
            f"gwt2 (muon0 is Muon itself), and then "
            f"-bf16 or -int8 for the moments and -stochastic or -split for the weights, such as foam2-int8-split"
        )
    return name


def level_of(name: str) -> int | None:
    """Return the levels of the transform: 0 for AdamW and Muon, None for optimizers without one."""
    found = _OWN.fullmatch(name)
    return int(found[2]) if found else (0 if name == "adamw" else None)


def swept_name(name: str) -> str:
    """Return the optimizer whose sweep applies: storage dtypes are not swept."""
    found = _OWN.fullmatch(name)
    return name if found is None else f"{found[1]}{found[2]}"


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
        name: `adamw` for `torch.optim.AdamW`; `gwt2` for GWT at level 2, `foam2` for the folded rule, with
            `muon0` for Muon and `muon2` for GWT-Muon, `lion2` likewise, with `-bf16` or `-int8` for moments so kept
            and `-stochastic` or `-split` for weights so rounded; `galore`, `apollo` and `apollo_mini` from their
            packages.
        model: Its attention and MLP matrices are what GWT transforms.
        lr: Learning rate of embeddings, output head, norms and biases.
        scale: Rate of the attention and MLP matrices over `lr`. This is GWT's `scale`; AdamW gets the same
            option as a learning rate of `lr * scale` for the same matrices, so that both have equally many.
        weight_decay: Decoupled weight decay, scaled like `torch.optim.AdamW`'s by each group's own rate.
        betas: Decay rates of the two moments.
        momentum: Muon's; None for its default.
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
    if check_name(name) == "adamw":
        groups = gwt_param_groups(model, level=1, weight_decay=weight_decay)
        fused = all(p.is_cuda for p in model.parameters())
        return torch.optim.AdamW(
            [
                {
                    "params": group["params"],
                    "lr": lr * scale if group["level"] else lr,
                    "weight_decay": group["weight_decay"],
                }
                for group in groups
            ],
            lr=lr,
            betas=betas,
            fused=fused or None,
        )
    own = _OWN.fullmatch(name)
    assert own is not None
    rule, level, state, rounding = own.groups()
    storage: dict[str, Any] = {"state_dtype": _STATE_DTYPES[state], "weight_rounding": rounding}
    shared = {"level": int(level), "scale": scale, "weight_decay": weight_decay}
    if rule in ("gwt", "foam"):
        return GWTAdamW(gwt_param_groups(model, **shared), lr=lr, betas=betas, rule=rule, **storage)
    groups = gwt_param_groups(model, rule=rule, **shared)
    if rule == "lion":
        return GWTLion(groups, lr=lr, adamw_betas=betas, **storage)
    own_momentum = {} if momentum is None else {"momentum": momentum}
    return GWTMuon(groups, lr=lr, adamw_betas=betas, **own_momentum, **storage)


def predicted_state_bytes(optimizer: Optimizer) -> int:
    """Predict the bytes of state of `optimizer` after its first step, from shapes and options alone."""
    if not low_rank.is_low_rank(optimizer):
        return planned_state_bytes(optimizer)
    groups = optimizer.param_groups
    return sum(low_rank.predicted_bytes(g, p) for g in groups for p in g["params"] if p.requires_grad)


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
