"""Checks of a parameter group's options: each error names the option, its value and the remedy."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from gwt_kernels.backends import choice
from gwt_kernels.backends.torch.literal import filter_bank
from gwt_kernels.core.hyper import Hyper, Rounding, check_rounding, literal_alone
from gwt_kernels.core.level import check_level_type
from gwt_kernels.formats.moments import FORMATS, wide
from gwt_kernels.optim.adafactor_options import adafactor_hyper
from gwt_kernels.optim.numbers import LARGEST, SLACK, from_zero, learning_rate, number
from gwt_kernels.rules import ADAFACTOR, ADAMW, MUON, RULES, check_rule

_numbers = itemgetter(
    "lr", "betas", "eps", "weight_decay", "scale", "norm_growth_limit", "maximize", "correct_bias"
)
_NO_BETAS = (0.0, 0.0)
_PLAIN = {(float, tuple, float, float, float, gamma, bool, bool, str, float) for gamma in (float, type(None))}

STRUCTURAL = ("level", "rule", "wavelet", "boundary", "state_dtype", "correct_bias")
"""Options that decide the shape, the meaning or the use of the state: a checkpoint must have the same values."""

FIXED: dict[str, Any] = {"norm_growth_limit": None, "wavelet": "haar", "boundary": "zero", "correct_bias": True}
"""Values of those group options that an optimizer's constructor does not take."""

ADDED: dict[str, Any] = {"boundary": "zero", "correct_bias": True}
"""Options that groups in older checkpoints and pickles lack, with the values that apply to these."""


def check_group(group: Mapping[str, Any], *, capturable: bool = False, slack: float = SLACK) -> None:
    """Raise unless every option of the group is valid.

    Args:
        group: All options of the group.
        capturable: Whether a learning rate may be a tensor on the device.
        slack: Largest distance below 0 that counts as 0; 0 for the numbers that a user passes.

    Raises:
        TypeError: an option has the wrong type.
        ValueError: an option has a value that is out of range or unknown.
        ModuleNotFoundError: the wavelet needs PyWavelets, which is not installed.
    """
    hyper_of(group, capturable=capturable, slack=slack)
    level = group["level"]
    check_level_type(level)
    check_rule(group["rule"], "haar")
    if level and group["rule"] == ADAMW.name:
        raise ValueError(f"level is {level}, but rule='adamw' transforms nothing: give the group level 0")
    name, detail_scale = _detail_scale(group)
    if level and not RULES[group["rule"]].takes_detail_scale and detail_scale != 1.0:
        raise ValueError(f"{name} is {detail_scale}, but rule={group['rule']!r} takes none: leave it out")
    if published_limit(group["rule"]) is None and group["norm_growth_limit"] is not None:
        raise ValueError(
            f"norm_growth_limit is {group['norm_growth_limit']}, but rule={group['rule']!r} has no limiter: "
            f"leave it out, or pass None"
        )
    if not isinstance(group["wavelet"], str):
        raise ValueError(f"unknown wavelet {group['wavelet']!r}: use 'haar', or a name of PyWavelets such as 'db2'")
    if group["wavelet"] != "haar":
        filter_bank(group["wavelet"])
    check_rule(group["rule"], group["wavelet"], group["boundary"], level)
    stored, unknown = state_dtype_name(group["state_dtype"]), literal_alone(group["wavelet"], group["boundary"])
    if stored is not None and FORMATS[stored].is_random and unknown:
        raise ValueError(
            f"state_dtype=torch.{stored} knows no {unknown}: use None, or wavelet='haar' and boundary='zero'"
        )
    if group["weight_rounding"] is not None:
        check_rounding(group["weight_rounding"], torch.bfloat16, group["wavelet"], group["boundary"])
    check_head_rows(group.get("head_rows"))
    seed = group["seed"]
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise ValueError(f"seed must be an integer of at least 0 and below 2**32, got {seed!r}")
    choice.check_name(group["backend"])


def check_head_rows(head_rows: object) -> None:
    """Raise unless ``head_rows`` is an integer of at least 1, or None for all rows of a tensor."""
    if head_rows is None:
        return
    if isinstance(head_rows, bool) or not isinstance(head_rows, int):
        raise TypeError(f"head_rows must be an integer or None, got {head_rows!r}")
    if head_rows < 1:
        raise ValueError(f"head_rows must be at least 1, got {head_rows}: None is for one second moment a tensor")


def check_max_grad_norm(max_grad_norm: float | None) -> None:
    """Raise unless gradients can be clipped to this global norm."""
    if max_grad_norm is not None and not number("max_grad_norm", max_grad_norm) > 0:
        raise ValueError(
            f"max_grad_norm must be above 0, got {max_grad_norm}: None turns clipping off, and float('inf') "
            f"measures the norm alone"
        )


def published_limit(rule: str) -> float | None:
    """Return the default gamma of a rule's limiter; None for a rule that has no limiter."""
    return RULES[rule].norm_growth_limit if rule in RULES else None  # check_group refuses others


def rounding_of(param: Tensor, weight_rounding: Rounding | None) -> Rounding:
    """Return the rounding of a parameter's updated weights: to the nearest by default.

    Raises:
        ValueError: weights of this dtype do not support it.
    """
    rounding = "nearest" if weight_rounding is None else weight_rounding
    check_rounding(rounding, param.dtype, "haar")
    return rounding


def hyper_of(group: Mapping[str, Any], *, capturable: bool = False, slack: float = SLACK) -> Hyper:
    """Check the group's numbers and return them as floats, but for a learning rate on the device if ``capturable``.

    A number below 0 by at most ``slack`` becomes 0.

    Raises:
        TypeError: a number is not a real number, or is a tensor on a device, which the host would wait for.
        ValueError: a number is out of range, or a tensor holds several.
    """
    rule, level = group["rule"], group.get("level", 0)
    if not isinstance(rule, str):  # an array compares with a name element by element, and has no truth value
        check_rule(rule, "haar")
    if not isinstance(level, (int, str)):
        check_level_type(level)
    of_momentum = rule == MUON.name and "momentum" in group
    try:
        if rule == ADAFACTOR.name:
            return adafactor_hyper(group, slack, capturable)
        nesterov = group["nesterov"] if of_momentum else None
        numbers = *_numbers({**group, "betas": _NO_BETAS} if of_momentum else group), *_detail_scale(group)
    except KeyError as missing:
        raise ValueError(f"the group has no {missing}, which rule={rule!r} takes: say it") from None
    if tuple(map(type, numbers)) in _PLAIN and tuple(map(type, numbers[1])) == (float, float):
        hyper = _remembered(numbers, slack)  # no tensor, whose value might change in place
    else:
        hyper = _checked(numbers, slack, capturable)
    if not of_momentum:
        return hyper
    return _with_momentum(hyper, group["momentum"], nesterov, slack)


def _with_momentum(hyper: Hyper, momentum: Any, nesterov: Any, slack: float) -> Hyper:
    """Return the numbers of a rule whose moment is a momentum."""
    if type(momentum) is float and type(nesterov) is bool and not isinstance(hyper.lr, Tensor):
        return _remembered_momentum(hyper, momentum, nesterov, slack)
    return _checked_momentum(hyper, momentum, nesterov, slack)


def _checked_momentum(hyper: Hyper, momentum: Any, nesterov: Any, slack: float) -> Hyper:
    momentum = from_zero("momentum", number("momentum", momentum), slack)
    if not momentum < 1.0:
        raise ValueError(f"momentum must be at least 0 and below 1, got {momentum}")
    if not isinstance(nesterov, bool):
        raise TypeError(f"nesterov must be True or False, got {nesterov!r}")
    return hyper._replace(beta1=momentum, beta2=momentum if nesterov else 1.0)


def _checked(numbers: tuple[Any, ...], slack: float, capturable: bool = False) -> Hyper:
    """See :func:`hyper_of`."""
    lr, betas, eps, weight_decay, scale, gamma, maximize, correct_bias, *detail_scale = numbers
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise TypeError(f"betas must be a pair of numbers, got {betas!r}")
    for name, value in (("maximize", maximize), ("correct_bias", correct_bias)):
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False, got {value!r}")
    hyper = Hyper(
        lr=from_zero("lr", learning_rate(lr, capturable), slack),
        beta1=from_zero("betas[0]", number("betas[0]", betas[0]), slack),
        beta2=from_zero("betas[1]", number("betas[1]", betas[1]), slack),
        eps=from_zero("eps", number("eps", eps), slack),
        weight_decay=from_zero("weight_decay", number("weight_decay", weight_decay), slack),
        scale=number("scale", scale),
        norm_growth_limit=None if gamma is None else number("norm_growth_limit", gamma),
        maximize=maximize,
        correct_bias=correct_bias,
        detail_scale=from_zero(detail_scale[0], number(*detail_scale), slack),
    )
    for i, beta in enumerate((hyper.beta1, hyper.beta2)):
        if not beta < 1.0:
            raise ValueError(f"betas[{i}] must be at least 0 and below 1, got {beta}")
    if not 0.0 < hyper.scale <= LARGEST:
        raise ValueError(f"scale must be finite and above 0, got {hyper.scale}: the published value is 0.25")
    if hyper.norm_growth_limit is not None and not 1.0 <= hyper.norm_growth_limit <= LARGEST:
        raise ValueError(
            f"norm_growth_limit must be finite and at least 1, got {hyper.norm_growth_limit}: "
            f"the published value is 1.01, and None turns the limiter off"
        )
    return hyper


def _detail_scale(group: Mapping[str, Any]) -> tuple[str, Any]:
    """Return the name and the value of the factor on details: FOAM's authors call it ``res_scale``."""
    name = "detail_scale" if "detail_scale" in group else "res_scale"
    return name, group.get(name, 1.0)


_remembered = functools.lru_cache(maxsize=256)(_checked)
_remembered_momentum = functools.lru_cache(maxsize=256)(_checked_momentum)


def state_dtype_name(state_dtype: torch.dtype | str | None) -> str | None:
    """Return the option as a checkpoint stores it: a plain name, or None for the default.

    Raises:
        ValueError: moments of this dtype are not supported.
    """
    if state_dtype is None:
        return None
    name = str(state_dtype).removeprefix("torch.")
    if name not in FORMATS:
        raise ValueError(
            f"state_dtype must be None or one of {', '.join(f'torch.{known}' for known in FORMATS)}, got "
            f"{state_dtype!r}"
        )
    return name


def state_dtype_of(param: Tensor, state_dtype: torch.dtype | str | None) -> torch.dtype:
    """Return the dtype of a parameter's moments: by default float32, float64 for float64 parameters."""
    name = state_dtype_name(state_dtype)
    return (wide(param.dtype) if name is None else FORMATS[name]).dtypes[0]
