"""Checks of options of groups with ``rule="adafactor"``, which differ from other rules' in names or meaning."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from operator import itemgetter
from typing import Any

from torch import Tensor

from gwt_kernels.core.hyper import Hyper
from gwt_kernels.optim.numbers import LARGEST, from_zero, learning_rate, number
from gwt_kernels.rules.adafactor import AdafactorNumbers

_NAMES = (
    "lr",
    "beta1",
    "eps",
    "weight_decay",
    "scale",
    "maximize",
    "clip_threshold",
    "decay_rate",
    "scale_parameter",
    "relative_step",
    "warmup_init",
    "details",
)
_values = itemgetter(*_NAMES)
_DETAILS = ("published", "divided")
_PLAIN = {float, int, bool, str, tuple, type(None)}


def adafactor_hyper(group: Mapping[str, Any], slack: float, capturable: bool) -> Hyper:
    """See :func:`gwt_kernels.optim.options.hyper_of`."""
    values = _values(group)
    eps = values[_NAMES.index("eps")]
    plain = (*values, *eps) if isinstance(eps, tuple) else values
    types = tuple(map(type, plain))
    if _PLAIN.issuperset(types):  # no tensor, whose value might change
        return _remembered(values, types, slack)
    return _checked(values, slack, capturable)


def _checked(values: tuple[Any, ...], slack: float, capturable: bool = False) -> Hyper:
    group = dict(zip(_NAMES, values, strict=True))
    for name in ("maximize", "scale_parameter", "relative_step", "warmup_init"):
        if not isinstance(group[name], bool):
            raise TypeError(f"{name} must be True or False, got {group[name]!r}")
    eps = group["eps"]
    if not isinstance(eps, (tuple, list)) or len(eps) != 2:
        raise TypeError(f"eps must be a pair of numbers, of squares and of weights' RMS, got {eps!r}")
    if not isinstance(group["details"], str) or group["details"] not in _DETAILS:
        raise ValueError(f"unknown details {group['details']!r}: use one of {', '.join(map(repr, _DETAILS))}")
    if group["warmup_init"] and not group["relative_step"]:
        raise ValueError("warmup_init=True is of the learning rates of relative_step=True: turn that on as well")
    if group["lr"] is None and not group["relative_step"]:
        raise ValueError("lr is None, which relative_step=True alone does without: pass a number")
    beta1 = 0.0 if group["beta1"] is None else from_zero("beta1", number("beta1", group["beta1"]), slack)
    if not beta1 < 1.0:
        raise ValueError(f"beta1 must be at least 0 and below 1, or None for no first moment, got {beta1}")
    smallest, least_rms = (from_zero(f"eps[{i}]", number(f"eps[{i}]", x), slack) for i, x in enumerate(eps))
    scale = number("scale", group["scale"])
    if not 0.0 < scale <= LARGEST:
        raise ValueError(f"scale must be finite and above 0, got {scale}: the published value is 0.25")
    clip, decay = number("clip_threshold", group["clip_threshold"]), number("decay_rate", group["decay_rate"])
    if not 0.0 < clip <= LARGEST:
        raise ValueError(f"clip_threshold must be finite and above 0, got {clip}: the published value is 1.0")
    if not -math.inf < decay <= 0.0:
        raise ValueError(f"decay_rate must be finite and not above 0, got {decay}: the published value is -0.8")
    numbers = AdafactorNumbers(
        eps=smallest,
        least_rms=least_rms if group["scale_parameter"] else None,
        clip_threshold=clip,
        decay_rate=decay,
        largest_rate=(1e-6 if group["warmup_init"] else 1e-2) if group["relative_step"] else None,
        rate_grows=group["warmup_init"],
        divides_details=group["details"] == "divided",
    )
    lr: float | Tensor = 0.0 if group["lr"] is None else learning_rate(group["lr"], capturable)
    weight_decay = from_zero("weight_decay", number("weight_decay", group["weight_decay"]), slack)
    return Hyper(
        lr=from_zero("lr", lr, slack),
        beta1=beta1,
        beta2=0.0,
        eps=0.0,
        weight_decay=weight_decay,
        scale=scale,
        norm_growth_limit=None,
        maximize=group["maximize"],
        correct_bias=False,
        rule_options=numbers,
    )


@functools.lru_cache(maxsize=256)
def _remembered(values: tuple[Any, ...], types: tuple[type, ...], slack: float) -> Hyper:
    """Cache :func:`_checked`, with ``types`` in the key, since True and 1.0 are equal."""
    return _checked(values, slack)
