"""GaLore and APOLLO from their own packages, configured like every other pre-training optimizer."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from gwt_kernels import gwt_param_groups

NAMES = ("galore", "apollo", "apollo_mini")

PACKAGES_GAP = 200
"""Steps between new projections in both papers' recipes, whose shortest run takes 10,000 steps."""


def _package(name: str) -> Any:
    module = "galore_torch" if name == "galore" else "apollo_torch"
    try:
        return importlib.import_module(module)
    except ImportError as error:
        wanted = f"{module.replace('_', '-')} bitsandbytes"  # both packages import bitsandbytes unconditionally
        raise ModuleNotFoundError(f"{name} needs other packages ({error}): pip install {wanted}") from error


def missing(name: str) -> str:
    """Return a message that names the missing packages of an optimizer; empty if none is missing."""
    try:
        _package(name)
    except ModuleNotFoundError as error:
        return str(error)
    return ""


def build(
    name: str,
    model: nn.Module,
    *,
    lr: float,
    scale: float,
    weight_decay: float,
    betas: tuple[float, float],
    projection_gap: int | None,
) -> Optimizer:
    """Build the package's optimizer with its published recipe over the matrices that GWT would transform.

    The recipe: rank a quarter of the hidden size (1 for `apollo_mini`), singular vectors of the gradient for
    GaLore, random projections for APOLLO. `scale` multiplies the matrices' update in all three; APOLLO takes the
    root of its own argument, so it gets the square.

    Args:
        name: One of `NAMES`.
        model: A transformers model; the rank comes from its hidden size.
        lr: Learning rate of embeddings, output head, norms and biases.
        scale: Rate of the matrices over `lr`.
        weight_decay: Decoupled weight decay.
        betas: Decay rates of the two moments.
        projection_gap: Steps between new projections; None for the packages' 200.

    Raises:
        ModuleNotFoundError: The package, or one that it imports, is not installed.
    """
    package = _package(name)
    projected: dict[str, Any] = {
        "rank": 1 if name == "apollo_mini" else model.config.hidden_size // 4,
        "update_proj_gap": PACKAGES_GAP if projection_gap is None else projection_gap,
        "scale": scale if name == "galore" else scale**2,
        "proj_type": "std",
    }
    if name != "galore":
        projected |= {"proj": "random", "scale_type": "tensor" if name == "apollo_mini" else "channel"}
    groups = [
        {"params": group["params"], "weight_decay": group["weight_decay"], **(projected if group["level"] else {})}
        for group in gwt_param_groups(model, level=1, weight_decay=weight_decay)
    ]
    kind = package.GaLoreAdamW if name == "galore" else package.APOLLOAdamW
    optimizer: Optimizer = kind(groups, lr=lr, betas=betas, no_deprecation_warning=True)
    optimizer.register_state_dict_post_hook(_pack)
    optimizer.register_load_state_dict_post_hook(_unpack)
    return optimizer


def is_low_rank(optimizer: Optimizer) -> bool:
    """Return whether `build` created the optimizer."""
    return type(optimizer).__module__.startswith(("galore_torch.", "apollo_torch."))


def predicted_bytes(group: dict[str, Any], p: torch.Tensor) -> int:
    """Return the bytes of state of a tensor: moments and projection in its dtype, and APOLLO's limiter norm."""
    if "rank" not in group:
        return 2 * p.numel() * p.element_size()
    short, long = sorted(p.shape)
    rank = group["rank"] if "proj" in group else min(group["rank"], short)  # a random projection may be wider
    return (2 * long * rank + short * rank + ("proj" in group)) * p.element_size()


def _pack(optimizer: Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
    """Convert the projector objects to dictionaries of their state, which a checkpoint can hold."""

    def plain(value: Any) -> Any:
        # `load_state_dict` splits a string in a dictionary; a projector's strings are also in the group.
        return {key: item for key, item in vars(value).items() if not isinstance(item, str)}

    state = {
        index: {key: plain(value) if key == "projector" else value for key, value in entries.items()}
        for index, entries in saved["state"].items()
    }
    return {**saved, "state": state}


def _unpack(optimizer: Optimizer) -> None:
    """Restore the projector objects."""
    if type(optimizer).__module__.startswith("galore_torch."):
        kind = importlib.import_module("galore_torch.galore_projector").GaLoreProjector
    else:
        kind = importlib.import_module("apollo_torch.random_projector").GradientProjector
    for group in optimizer.param_groups:
        for state in (optimizer.state[p] for p in group["params"] if p in optimizer.state):
            if isinstance(state.get("projector"), dict):
                projector = kind(rank=group["rank"], proj_type=group["proj_type"])
                vars(projector).update(state["projector"])
                state["projector"] = projector
