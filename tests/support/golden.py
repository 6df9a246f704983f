"""Golden vectors: results of the authors' published optimizers in float64.

Each case is a run of a few steps on one tensor: of GWT-Adam or plain AdamW in `data/official_adamw.npz`, of FOAM in
`data/official_foam.npz`, and in `data/official_variants.npz` of either with further options, of GWT-Adafactor, and
of Muon and Adam-mini without a transform.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

DATA = Path(__file__).resolve().parents[1] / "data"


@dataclass(frozen=True)
class Case:
    """One run: its settings, inputs and results. Every array is float64 and read-only.

    Attributes:
        name: unique in the file; fit for a test id.
        rule: "gwt" or "foam".
        level: 0 for plain AdamW.
        wavelet: PyWavelets' name. "haar" for "foam" (the same blocks).
        boundary: PyWavelets' name of the mode. "zero" for "foam".
        lr: the learning rate of each of the `T` steps.
        betas: decay of the first and of the second moment.
        eps: added to the root of the second moment, which is not bias-corrected.
        scale: factor on the update.
        correct_bias: whether the update was multiplied by `sqrt(1-b2**t) / (1-b1**t)`.
        weight_decay: as in the published code, which decays after the update, `p -= lr * weight_decay * p`; this
            package decays before it.
        norm_growth_limit: the limiter's gamma; None for "foam", which has no limiter.
        res_scale: factor on the residuals of "foam"; 1 for "gwt".
        p0: the weights at the start, `[...]`.
        grads: the gradients, `[T, ...]`.
        params: the weights after each step, `[T, ...]`.
        exp_avg: the first moment after the last step, `[..., blocks]`.
        exp_avg_sq: the second moment after the last step, `[..., blocks]`.
        limiter_norm: the limiter's norm after each step, `[T]`; NaN where there is none, at level 0 and for "foam".
    """

    name: str
    rule: str
    level: int
    wavelet: str
    boundary: str
    correct_bias: bool
    lr: tuple[float, ...]
    betas: tuple[float, float]
    eps: float
    scale: float
    weight_decay: float
    norm_growth_limit: float | None
    res_scale: float
    p0: np.ndarray
    grads: np.ndarray
    params: np.ndarray
    exp_avg: np.ndarray
    exp_avg_sq: np.ndarray
    limiter_norm: np.ndarray

    def decayed(self, p: Any, lr: float) -> Any:
        """Apply weight decay in the published order, after an update without it."""
        return p - lr * self.weight_decay * p

    @property
    def limiter_active(self) -> np.ndarray:
        """`[T]` bool: at which steps the limiter divided the update by more than 1.

        At exactly those steps, the new norm is gamma times the old one (plus the limiter's 1e-8).
        """
        if self.level == 0 or self.norm_growth_limit is None:
            return np.zeros(len(self.lr), bool)
        bound = self.norm_growth_limit * (self.limiter_norm[:-1] + 1e-8)
        return np.concatenate([[False], np.isclose(self.limiter_norm[1:], bound, rtol=1e-12, atol=0)])


@functools.cache
def adamw_cases(wavelet: str | None = None) -> tuple[Case, ...]:
    """Return the cases of `official_adamw.npz`, or those of one wavelet (level 0 counts as "haar")."""
    configurations, arrays = _load("official_adamw.npz")
    return tuple(
        _case(configuration, arrays, "gwt")
        for configuration in configurations
        if _is(configuration, "mode", "zero")
        and _is(configuration, "weight_decay", 0.0)
        and wavelet in (None, configuration["wavelet"])
    )


@functools.cache
def foam_cases() -> tuple[Case, ...]:
    """Return the cases of `official_foam.npz`."""
    configurations, arrays = _load("official_foam.npz")
    return tuple(
        _case(configuration, arrays, "foam")
        for configuration in configurations
        if _is(configuration, "variant", "foam") and _is(configuration, "weight_decay", 0.0)
    )


@functools.cache
def variant_cases(res_scaled: bool = False) -> tuple[Case, ...]:
    """Return GWT-Adam's and FOAM's cases in `official_variants.npz`, with `res_scaled` those of any `res_scale`."""
    configurations, arrays = _load("official_variants.npz")
    rules = {"adamw": "gwt", "foam": "foam"}
    return tuple(
        _case(configuration, arrays, rules[configuration["family"]])
        for configuration in configurations
        if configuration["family"] in rules and (res_scaled or configuration.get("res_scale", 1.0) == 1.0)
    )


@dataclass(frozen=True)
class OptimizerCase:
    """One run of an optimizer beyond Adam. Every array is float64 and read-only. Weight decay precedes the update.

    Attributes:
        name: unique; fit for a test id.
        level: 0 for all but "adafactor".
        wavelet: PyWavelets' name.
        boundary: PyWavelets' name of the mode.
        lr: the learning rate of each of the `T` steps.
        weight_decay: decoupled.
        options: further options of its optimizer, by this package's names. For "muon": `momentum`, `nesterov`,
            `ns_steps`, `adjust_lr_fn`; its buffer was a sum, and Newton-Schulz in float64 divided by `norm + 1e-7`.
            For "adafactor": `beta1`, `eps` (two numbers), `clip_threshold`, `decay_rate`, `scale`,
            `scale_parameter`, `relative_step`, `warmup_init`; its details are those of `details="published"`. For
            "adam_mini": `betas`, `eps`.
        p0: the weights at the start, `[...]`.
        grads: the gradients, `[T, ...]`.
        params: the weights after each step, `[T, ...]`.
        state: the state after the last step. For "muon": `momentum_buffer`. For "adafactor": `exp_avg` if there is
            `beta1`, and `exp_avg_sq` in one dimension, `exp_avg_sq_row` and `exp_avg_sq_col` in more. For
            "adam_mini": `exp_avg`, of the shape of the weights, and `exp_avg_sq` `[groups]`: one per row, or per
            head of equally many rows.
    """

    name: str
    level: int
    wavelet: str
    boundary: str
    lr: tuple[float, ...]
    weight_decay: float
    options: dict[str, Any]
    p0: np.ndarray
    grads: np.ndarray
    params: np.ndarray
    state: dict[str, np.ndarray]


_OPTIONS = {
    "muon": ("momentum", "nesterov", "ns_steps"),
    "adafactor": (
        *("beta1", "eps", "clip_threshold", "decay_rate", "scale"),
        *("scale_parameter", "relative_step", "warmup_init"),
    ),
    "adam_mini": ("betas", "eps"),
}
_SLOTS = ("momentum_buffer", "exp_avg", "exp_avg_sq", "exp_avg_sq_row", "exp_avg_sq_col")


@functools.cache
def optimizer_cases(family: str) -> tuple[OptimizerCase, ...]:
    """Return the cases of one family in `official_variants.npz`: "muon", "adafactor" or "adam_mini"."""
    configurations, arrays = _load("official_variants.npz")
    return tuple(_optimizer_case(c, arrays) for c in configurations if c["family"] == family)


def _optimizer_case(configuration: dict, arrays: dict[str, np.ndarray]) -> OptimizerCase:
    name, family = configuration["name"], configuration["family"]
    options = {key: configuration[key] for key in _OPTIONS[family]}
    options |= {key: tuple(options[key]) for key in ("eps", "betas") if isinstance(options.get(key), list)}
    state = {slot: arrays[f"{name}/{slot}"] for slot in _SLOTS if f"{name}/{slot}" in arrays}
    p0, grads, params = (arrays[f"{name}/{key}"] for key in ("p0", "grads", "params"))
    if family == "muon":
        options["adjust_lr_fn"] = "match_rms_adamw"
    elif family == "adam_mini":
        state = {"exp_avg": state["exp_avg"].reshape(p0.shape), "exp_avg_sq": state["exp_avg_sq"].ravel()}
    return OptimizerCase(
        name=name,
        level=configuration["level"],
        wavelet=configuration.get("wavelet", "haar"),
        boundary=configuration.get("mode", "zero"),
        lr=tuple(configuration["lr"]),
        weight_decay=configuration["weight_decay"],
        options=options,
        p0=p0,
        grads=grads,
        params=params,
        state=state,
    )


def _load(file: str) -> tuple[list[dict], dict[str, np.ndarray]]:
    with np.load(DATA / file, allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in archive.files}
    for array in arrays.values():
        array.setflags(write=False)
    return json.loads(str(arrays["cases"])), arrays


def _is(configuration: dict, key: str, expected: object) -> bool:
    """Return True if the file's configuration has the expected value; raise otherwise."""
    if configuration[key] != expected:
        name, found = configuration["name"], configuration[key]
        raise ValueError(f"golden case {name!r} has {key} {found!r}, expected {expected!r}")
    return True


def _case(configuration: dict, arrays: dict[str, np.ndarray], rule: str) -> Case:
    if rule == "foam":
        configuration = {"wavelet": "haar", "mode": "zero", "limiter_gamma": None} | configuration
    name = configuration["name"]
    return Case(
        name=name,
        rule=rule,
        level=configuration["level"],
        lr=tuple(configuration["lr"]),
        betas=tuple(configuration["betas"]),
        eps=configuration["eps"],
        scale=configuration["scale"],
        weight_decay=configuration["weight_decay"],
        wavelet=configuration["wavelet"],
        boundary=configuration["mode"],
        correct_bias=configuration.get("correct_bias", True),
        norm_growth_limit=configuration["limiter_gamma"],
        res_scale=configuration.get("res_scale", 1.0),
        limiter_norm=arrays.get(f"{name}/limiter_norm", np.full(len(configuration["lr"]), np.nan)),
        **{key: arrays[f"{name}/{key}"] for key in ("p0", "grads", "params", "exp_avg", "exp_avg_sq")},
    )
