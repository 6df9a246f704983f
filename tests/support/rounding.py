"""Bounds on rounding errors: how far a result may be from the exact one.

Every bound follows the arithmetic operation by operation with the operands of the case (Higham, Accuracy
and Stability of Numerical Algorithms, chapter 3), so it is as narrow as the case is well conditioned. Storage in a
narrower dtype adds half a unit in the last place of that dtype, or a whole one for stochastic rounding.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from gwt_kernels.core.level import Level, block_width
from gwt_kernels.functional import Hyper
from tests.support import reference


def unit(dtype: torch.dtype) -> float:
    """Return the unit roundoff of the arithmetic used for ``dtype``: at least that of float32."""
    return torch.finfo(torch.promote_types(dtype, torch.float32)).eps / 2


def half_ulp(x: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """Return half the distance between the values of ``dtype`` around ``x``."""
    info = torch.finfo(dtype)
    exponents = np.floor(np.log2(np.maximum(np.abs(x), info.smallest_normal)))
    return 0.5 * info.eps * 2.0**exponents


def widen(
    bound: np.ndarray,
    exact: np.ndarray,
    dtype: torch.dtype,
    data: torch.dtype | None = None,
    at_random: bool = False,
) -> np.ndarray:
    """Widen a bound by the rounding of a value stored as ``dtype``.

    The arithmetic is that for tensors of dtype ``data``, by default of ``dtype`` itself. Rounding to nearest adds
    half an ulp if ``dtype`` is narrower; rounding ``at_random`` adds a whole ulp.
    """
    if unit(data or dtype) >= torch.finfo(dtype).eps / 2:
        return bound
    return bound + (2 if at_random else 1) * half_ulp(np.abs(exact) + bound, dtype)


def dwt_bounds(x: np.ndarray, level: int, dtype: torch.dtype) -> list[np.ndarray]:
    """Return bounds on ``haar_dwt(x, level)``: an addition, a product and a rounded constant per level."""
    bands = [reference.haar_dwt(np.abs(x), depth)[0] for depth in (level, *range(level, 0, -1))]
    depths = (level, *range(level, 0, -1))
    exact = reference.haar_dwt(x, level)
    return [
        widen(3 * depth * unit(dtype) * band, value, dtype)
        for depth, band, value in zip(depths, bands, exact, strict=True)
    ]


def idwt_bound(coeffs: list[np.ndarray], length: int, dtype: torch.dtype) -> np.ndarray:
    """Return a bound on ``haar_idwt(coeffs, length)``: an addition, a product and a rounded constant per level."""
    x = np.abs(coeffs[0])
    for d in coeffs[1:]:
        x = np.repeat((x[..., : d.shape[-1]] + np.abs(d)) * np.sqrt(0.5), 2, axis=-1)
    return widen(3 * (len(coeffs) - 1) * unit(dtype) * x[..., :length], reference.haar_idwt(coeffs, length), dtype)


@dataclass
class StepBounds:
    """Bounds on the results of one step, in the arithmetic's dtype; see :func:`widen` for narrower ones."""

    p: np.ndarray
    exp_avg: np.ndarray
    exp_avg_sq: np.ndarray
    norm: float


def step_bounds(
    p: np.ndarray,
    g: np.ndarray,
    m: np.ndarray,
    v: np.ndarray,
    norm: float | None,
    hyper: Hyper,
    step: int,
    level: Level,
    u: float,
    rule: str = "gwt",
) -> StepBounds:
    """Bound the folded step at unit roundoff ``u``; ``p``, ``g [..., N]``, ``m``, ``v [..., nb]`` are float64."""
    if rule == "foam" and level:
        return _foam_bounds(p, g, m, v, hyper, step, level, u)
    n = p.shape[-1]
    width = block_width(level, n)
    root = np.sqrt(width)
    blocks = np.pad(g, [(0, 0)] * (g.ndim - 1) + [(0, -n % width)]).reshape(*m.shape, width)
    sign = -1 if hyper.maximize else 1
    mean, mean_abs = sign * blocks.mean(-1), np.abs(blocks).mean(-1)
    # A tree sum of W terms is L additions deep; SIMD lanes and blocks of a tree's leaves add a few more.
    e_mean = (min(width - 1, (width - 1).bit_length() + 8) + 1) * u * mean_abs
    a, e_a = root * mean, root * e_mean + 2 * u * root * np.abs(mean)
    b1, b2 = hyper.beta1, hyper.beta2
    new_m = b1 * m + (1 - b1) * a
    e_m = 3 * u * (np.abs(b1 * m) + np.abs((1 - b1) * a)) + (1 - b1) * e_a
    new_v = b2 * v + (1 - b2) * a * a
    e_v = 4 * u * new_v + (1 - b2) * (2 * np.abs(a) + e_a) * e_a
    d = np.sqrt(new_v) + hyper.eps
    e_d = 2 * u * d + np.sqrt(new_v) - np.sqrt(np.maximum(new_v - e_v, 0))
    rel_d = e_d / (d - e_d)
    e_a_divided = e_m / d + np.abs(new_m / d) * (rel_d + u)
    total = np.sqrt(np.sum((new_m / d) ** 2))
    limit, rel_norm, rel_limit = 1.0, 0.0, 0.0
    if level and norm is not None:
        # The sum of squares: nb terms in lanes and trees, whose error the root halves.
        rel_norm = np.sqrt(np.sum(e_a_divided**2)) / total + 16 * u
        if norm:
            gamma = hyper.norm_growth_limit
            limit, rel_limit = max(total / (norm + 1e-8), gamma) / gamma, rel_norm + 6 * u
    factor = abs(hyper.step_size(step, level)) / limit
    spread = lambda x: np.repeat(x, width, axis=-1)[..., :n]  # noqa: E731  # one value per block to one per element
    if level:
        size = np.abs(g) + spread(np.abs(mean) + np.abs(new_m) / root)
        numerator = sign * g + spread(new_m / root - mean)
        e_numerator = 4 * u * size + spread(e_mean + e_m / root)
    else:
        numerator, e_numerator = new_m, e_m
    update = factor * numerator / spread(d)
    e_update = factor / spread(d) * e_numerator + np.abs(update) * (spread(rel_d) + rel_limit + 6 * u)
    e_p = 3 * u * np.abs(p) * (1 + hyper.lr * hyper.weight_decay) + 2 * u * np.abs(update) + e_update
    return StepBounds(e_p, e_m, e_v, total / limit * (rel_norm + rel_limit + 8 * u))


def _foam_bounds(
    p: np.ndarray, g: np.ndarray, m: np.ndarray, v: np.ndarray, hyper: Hyper, step: int, level: Level, u: float
) -> StepBounds:
    """Bound the step as :func:`step_bounds`, for the rule with a denominator per element."""
    n, s = p.shape[-1], hyper.detail_scale
    width = block_width(level, n)
    spread = lambda x: np.repeat(x, width, axis=-1)[..., :n]  # noqa: E731  # one value per block to one per element
    g = -g if hyper.maximize else g
    blocks = np.pad(g, [(0, 0)] * (g.ndim - 1) + [(0, -n % width)]).reshape(*m.shape, width)
    additions = min(width - 1, (width - 1).bit_length() + 8)  # as in step_bounds
    mean, square = blocks.mean(-1), (blocks**2).mean(-1)
    e_mean, e_square = (additions + 1) * u * np.abs(blocks).mean(-1), (additions + 3) * u * square
    b1, b2 = hyper.beta1, hyper.beta2
    new_m = b1 * m + (1 - b1) * mean
    e_m = 3 * u * (np.abs(b1 * m) + np.abs((1 - b1) * mean)) + (1 - b1) * e_mean
    new_v = b2 * v + (1 - b2) * square
    e_v = 4 * u * new_v + (1 - b2) * e_square
    r = s * (g - spread(mean))
    e_r = 2 * u * np.abs(r) + s * (1 + 2 * u) * spread(e_mean)
    under = spread(new_v) + r**2
    e_under = spread(e_v) + (2 * np.abs(r) + e_r) * e_r + 3 * u * under
    d = np.sqrt(under) + hyper.eps
    e_d = 2 * u * d + np.sqrt(under) - np.sqrt(np.maximum(under - e_under, 0))
    numerator = spread(new_m) + r
    e_numerator = spread(e_m) + e_r + u * np.abs(numerator)
    factor = abs(hyper.step_size(step, level))
    update = factor * numerator / d
    e_update = (factor * e_numerator + np.abs(update) * e_d) / (d - e_d) + 6 * u * np.abs(update)
    e_p = 3 * u * np.abs(p) * (1 + hyper.lr * hyper.weight_decay) + 2 * u * np.abs(update) + e_update
    return StepBounds(e_p, e_m, e_v, np.nan)
