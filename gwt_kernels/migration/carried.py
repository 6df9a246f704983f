"""Build the optimizer that continues from a checkpoint, from given options and those of the checkpoint's groups."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence, Set
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gwt_kernels.core.factored import FACTORS
from gwt_kernels.core.level import Level
from gwt_kernels.migration.foreign import is_of_muon
from gwt_kernels.optim.base import PlannedOptimizer
from gwt_kernels.optim.by_rule import optimizer_of
from gwt_kernels.optim.numbers import number
from gwt_kernels.optim.param_groups import gwt_param_groups
from gwt_kernels.rules import ADAMW, rule_of

_FAMILIES = {"gwt": "Adam", "foam": "Adam", "adamw": "Adam", "adam_mini": "Adam", "muon": "Muon", "lion": "Lion"}
_FAMILIES["adafactor"] = "Adafactor"
_GIVEN = {"params", "level", "scale", "rule", "norm_growth_limit", "weight_decay", "state_dtype", "weight_rounding"}
_GIVEN |= {"capturable", "telemetry", "backend", "adamw_betas", "adamw_eps"}
"""Options that no checkpoint decides, or that are taken from it in a way of their own."""
_SHARED = ("maximize", "seed", "max_grad_norm", "skip_nonfinite")
"""Options that mean the same in every optimizer."""
_FLAGS = {"lr", "betas", "eps", "momentum", "wavelet", "boundary", "correct_bias"}
"""Options that the command has flags for."""


class Recipe(NamedTuple):
    """Arguments of `gwt_param_groups`."""

    level: Level = 2
    include: list[str] | None = None
    exclude: list[str] | None = None


def optimizer_for(
    model: nn.Module, state: Mapping[str, Any], recipe: Recipe, options: Mapping[str, Any]
) -> PlannedOptimizer:
    """Return an optimizer over the model with the given options, and the checkpoint's for the rest.

    Learning rate, betas and the like are taken from the checkpoint's groups of the same family of optimizers: Adam
    (with Adam-mini), Muon, Lion or Adafactor. For groups at ``rule="adamw"`` in ``GWTMuon``, ``GWTLion`` and
    ``GWTAdafactor``, they are taken from its groups of Adam.

    Args:
        model: As for :func:`gwt_kernels.gwt_param_groups`.
        state: The optimizer's state in the checkpoint.
        recipe: Which parameters are transformed, and at which level.
        options: ``rule``, and options of its optimizer; None if not given. ``adamw_lr`` is the learning rate of
            groups at ``rule="adamw"``.

    Raises:
        ValueError: the optimizer does not have an option, or one is neither given nor in the state.
        TypeError, ValueError: as the optimizer, and as :func:`gwt_kernels.gwt_param_groups`.
    """
    given = {key: value for key, value in options.items() if value is not None}
    rule = given.pop("rule", "gwt")
    if rule == ADAMW.name and recipe.level:
        raise ValueError(f"level is {recipe.level}, but rule='adamw' transforms nothing: say --level 0")
    kind = optimizer_of(rule)
    known = inspect.signature(kind).parameters
    if "norm_growth_limit" not in known:
        given.pop("norm_growth_limit", None)  # it has no limiter
    elif "norm_growth_limit" in options:
        given["norm_growth_limit"] = options["norm_growth_limit"]
    adamw_lr, scale, decay = (given.pop(key, None) for key in ("adamw_lr", "scale", "weight_decay"))
    if unknown := sorted(given.keys() - known.keys()):
        flag = unknown[0].replace("_", "-")
        raise ValueError(f"{kind.__name__} has no {unknown[0]}: leave out --{flag}, or give another --rule")
    if "eps" in given and isinstance(known["eps"].default, tuple):
        raise ValueError(f"{kind.__name__}'s eps are two numbers, of which no flag is one: leave out --eps")
    every = state["param_groups"]
    families = [_family_of(group, state) for group in every]
    own_places = [i for i, family in enumerate(families) if family == _FAMILIES[rule]]
    asked = {option for option, value in (("lr", given.get("lr")), ("scale", scale)) if value is not None}
    for i in own_places:
        _check_said(every[i], i, asked)
    own = [_named_here(every[i]) for i in own_places]
    adams = [group for group, family in zip(every, families, strict=True) if family == "Adam"]
    for option in [name for name in known if name not in _GIVEN | given.keys()]:
        value = agreed(every if option in _SHARED else own, option)
        is_said = value is not None or any(option in group for group in own)  # None is a value, too
        if is_said and not (option == "res_scale" and rule != "foam"):
            given[option] = value
    if not own and "lr" not in given:
        raise ValueError(
            f"the state's learning rates are of {' and '.join(sorted(set(families)))}, and say nothing of "
            f"{kind.__name__}'s: say it with --lr"
        )
    if _FAMILIES[rule] != "Adam":
        if adamw_lr is None and (adamw_lr := agreed(adams, "lr", "adamw_lr")) is None:
            raise ValueError(
                f"the state has no learning rate of AdamW, which {kind.__name__} takes for embeddings, heads, "
                f"norms and biases: say it with --adamw-lr"
            )
        given |= {f"adamw_{key}": value for key in ("betas", "eps") if (value := agreed(adams, key)) is not None}
    elif adamw_lr is not None:
        raise ValueError(f"{kind.__name__} has one learning rate: leave out --adamw-lr, or give another --rule")
    if decay is None:
        decays = {float(group.get("weight_decay", 0.0)) for group in every} - {0.0}
        if len(decays) > 1:
            raise ValueError(f"the state's groups have the weight decays {sorted(decays)}: say --weight-decay")
        decay = max(decays, default=0.0)
    if scale is None:
        scale = next((group["scale"] for group in own if group.get("level")), known["scale"].default)
    if optimizer_of("gwt") is kind:
        groups = gwt_param_groups(model, scale=scale, weight_decay=decay, **recipe._asdict())
        if rule == ADAMW.name:
            given |= {"level": 0, "norm_growth_limit": None}
        return kind(groups, **given, **({} if rule == "gwt" else {"rule": rule}))
    groups = gwt_param_groups(
        model, scale=scale, weight_decay=decay, rule=rule, adamw_lr=adamw_lr, **recipe._asdict()
    )
    return kind(groups, **given)


def agreed(groups: Sequence[Mapping[str, Any]], option: str, flag: str | None = None) -> Any:
    """Return the value of an option in all groups that have it; None if none does.

    Raises:
        ValueError: the values differ.
        TypeError, ValueError: a value is a tensor, but not one real number.
    """
    values = [group[option] for group in groups if option in group]
    plain = [
        number(option, v) if isinstance(v, Tensor) else tuple(v) if isinstance(v, list | tuple) else v
        for v in values
    ]
    distinct = [v for i, v in enumerate(plain) if v not in plain[:i]]  # damaged values may not be hashable
    if len(distinct) > 1:
        remedy = "build the optimizer in Python, and use gwt_kernels.migrate"
        if flag or option in _FLAGS:
            remedy = f"say one with --{(flag or option).replace('_', '-')}"
        raise ValueError(f"the state's groups differ in {option}: {sorted(distinct, key=str)}; {remedy}")
    return plain[0] if plain else None


def _family_of(group: Mapping[str, Any], state: Mapping[str, Any]) -> str:
    """Return the family of optimizers that a group's learning rate and options are for."""
    if group.get("rule") in _FAMILIES:
        return _FAMILIES[group["rule"]]
    held = {key for member in group["params"] for key in state["state"].get(member, {})}
    if is_of_muon(group):
        return "Muon"
    if {"clip_threshold", "beta2_decay"} & group.keys() or {"row_var", "variance", *FACTORS} & held:
        return "Adafactor"
    return "Lion" if "exp_avg" in held and "exp_avg_sq" not in held else "Adam"


def _check_said(group: Mapping[str, Any], index: int, asked: Set[str]) -> None:
    """Raise a ValueError if a group lacks an option that is needed and not in ``asked``, or one of Adafactor's."""
    needed = {"lr": "--lr"} | ({"scale": "--scale"} if group.get("level") else {})
    for option, flag in needed.items():
        if option not in asked and option not in group:
            raise ValueError(
                f"group {index} of the state has no {option}: say it with {flag}, or take another state"
            )
    if "beta2_decay" in group and not (isinstance(group.get("eps"), list | tuple) and {"d", "lr"} <= group.keys()):
        raise ValueError(
            f"group {index} of the state has beta2_decay, but not lr, d and two eps, as PyTorch's Adafactor: "
            f"it is damaged; take another"
        )


def _named_here(group: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a group's options under this package's names, without those that have no effect in it.

    Options of ``torch.optim.Adafactor`` are translated. It multiplies its learning rate by the RMS of weights and
    bounds it by ``1 / sqrt(t)``; at its default rate that is a relative step.
    """
    if "rule" in group and not rule_of(group["rule"]).row_slots:
        group = {key: value for key, value in group.items() if key != "head_rows"}
    if "beta2_decay" not in group:
        return group
    least, rms = group["eps"]
    return {
        **group,
        "decay_rate": group["beta2_decay"],
        "clip_threshold": group["d"],
        "eps": (torch.finfo(torch.float32).eps if least is None else least, rms),
        "beta1": None,
        "scale_parameter": True,
        "relative_step": float(group["lr"]) == 1e-2,
    }
