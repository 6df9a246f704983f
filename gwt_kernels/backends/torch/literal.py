"""The published algorithm, literally, for any discrete wavelet: transform, divide, limit, invert, update.

It is slow, and the only path for wavelets other than Haar and boundaries other than zero. With ``wavelet="haar"``
and ``boundary="zero"`` it is an independent reference for the folded step. For the notation see docs/algorithm.md.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from gwt_kernels.backends.torch.haar import compute_dtype
from gwt_kernels.core.level import ROW, Level, blocks_of
from gwt_kernels.core.tensor_step import TensorStep
from gwt_kernels.rules.limiter import limit_

FilterBank = tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...], tuple[float, ...]]


def gwt_adamw_(tensor_steps: Sequence[TensorStep], *, level: int, wavelet: str, boundary: str = "zero") -> None:
    """See :func:`gwt_kernels.functional.gwt_adamw_`; arguments are already checked."""
    bank = filter_bank(wavelet)
    for t in tensor_steps:
        if t.p.numel() == 0:
            continue
        m, v, denominator, details = _moments(t, bank, level, boundary)
        dtype, hyper = m.dtype, t.hyper
        coeffs = [m / denominator]
        for i, detail in enumerate(details):
            if i:
                denominator = denominator.repeat_interleave(2, dim=-1)[..., : detail.shape[-1]]
            coeffs.append(detail / denominator)
        limit: Tensor | float = 1.0 if t.limit is None else t.limit
        if t.norm is not None and hyper.norm_growth_limit is not None:
            limit = limit_(t.norm, coeffs[0].square().sum().sqrt(), hyper.norm_growth_limit)
        update = waverec(coeffs, bank)[..., : t.p.shape[-1]] * (hyper.step_size(t.step, level) / limit)
        t.p.copy_(t.p.to(dtype) * (1 - float(hyper.lr) * hyper.weight_decay) - update)
        t.m.copy_(m)
        t.v.copy_(v)


def update_sums(tensor_steps: Sequence[TensorStep], *, level: int, wavelet: str, boundary: str = "zero") -> Tensor:
    """See :meth:`gwt_kernels.backends.runner.Runner.reduce`; arguments are already checked."""
    bank, first = filter_bank(wavelet), tensor_steps[0].p
    sums = torch.zeros(len(tensor_steps), dtype=compute_dtype(first.dtype), device=first.device)
    for total, t in zip(sums, tensor_steps, strict=True):
        if t.p.numel():
            m, _, denominator, _ = _moments(t, bank, level, boundary)
            total += (m / denominator).square().sum()
    return sums


def _moments(
    t: TensorStep, bank: FilterBank, level: int, boundary: str
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Return new moments, ``sqrt(v) + eps`` and the gradient's details."""
    hyper = t.hyper
    dtype = compute_dtype(torch.promote_types(t.p.dtype, t.m.dtype))
    approximation, *details = wavedec(t.g.to(dtype) * hyper.signed_factor, bank, level, boundary)
    m = t.m.to(dtype) * hyper.beta1 + (1 - hyper.beta1) * approximation
    v = t.v.to(dtype) * hyper.beta2 + (1 - hyper.beta2) * approximation.square()
    return m, v, v.sqrt() + hyper.eps, details


@functools.lru_cache(maxsize=32)
def filter_bank(wavelet: str) -> FilterBank:
    """Return decomposition and reconstruction filters (low, high, low, high) of a discrete wavelet.

    Raises:
        ModuleNotFoundError: PyWavelets, which has the filters, is not installed.
        ValueError: the name is unknown, or not that of a discrete wavelet.
    """
    if wavelet == "haar":
        root = math.sqrt(0.5)
        return (root, root), (-root, root), (root, root), (root, -root)
    try:
        import pywt
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"wavelet={wavelet!r} takes its filters from PyWavelets, which is not installed: "
            "pip install PyWavelets, or use wavelet='haar'"
        ) from error
    if wavelet not in pywt.wavelist(kind="discrete"):
        raise ValueError(
            f"unknown wavelet {wavelet!r}: use 'haar', or a name of pywt.wavelist(kind='discrete') such as 'db2'"
        )
    low, high, low_inverse, high_inverse = (tuple(map(float, f)) for f in pywt.Wavelet(wavelet).filter_bank)
    return low, high, low_inverse, high_inverse


def approximation_width(width: int, level: Level, wavelet: str) -> int:
    """Return the approximation's width for a row: ``ceil(width / 2**level)`` for Haar, 1 for ``"row"``."""
    if wavelet == "haar":
        return blocks_of(level, width)
    assert level != ROW  # check_rule refuses it for other wavelets
    taps = len(filter_bank(wavelet)[0])
    for _ in range(level):
        width = (width + taps - 1) // 2
    return width


def wavedec(x: Tensor, bank: FilterBank, level: int, boundary: str = "zero") -> list[Tensor]:
    """Return ``pywt.wavedec(x, wavelet, mode=boundary, level=level, axis=-1)``: ``[A, D_L, ..., D_1]``."""
    details = []
    for _ in range(level):
        x, detail = _analyse(x, bank, boundary)
        details.append(detail)
    return [x, *reversed(details)]


def waverec(coeffs: Sequence[Tensor], bank: FilterBank) -> Tensor:
    """Return ``pywt.waverec(coeffs, wavelet, axis=-1)``, which does not depend on the boundary.

    The result may be one element longer than the original.
    """
    x = coeffs[0]
    for detail in coeffs[1:]:
        x = _synthesise(x[..., : detail.shape[-1]], detail, bank)
    return x


def _analyse(x: Tensor, bank: FilterBank, boundary: str) -> tuple[Tensor, Tensor]:
    """Analyse one level: ``y[k] = sum_j h[j] x[2k + 1 - j]`` for both filters, with ``x`` extended at its ends."""
    low, high = bank[:2]
    taps, n = len(low), x.shape[-1]
    out = (n + taps - 1) // 2
    # The padding makes index 2k + 1 - j start at 2 - taps. No convolution: CUDA's may round to TF32.
    padded = _continued(x, taps - 2, 2 * out - n, boundary)
    shifted = [padded[..., taps - 1 - j :: 2][..., :out] for j in range(taps)]
    approximation, detail = torch.zeros_like(shifted[0]), torch.zeros_like(shifted[0])
    for j, column in enumerate(shifted):
        approximation.add_(column, alpha=low[j])
        detail.add_(column, alpha=high[j])
    return approximation, detail


def _continued(x: Tensor, before: int, after: int, boundary: str) -> Tensor:
    """Extend rows by ``before`` and ``after`` elements, as ``pywt.pad(x, ..., mode=boundary)``.

    A row ``a b c`` becomes ``a a|a b c|c c`` (``constant``), ``b a|a b c|c b`` (``symmetric``),
    ``c b|a b c|b a`` (``reflect``) or ``b c|a b c|a b`` (``periodic``), repeated if the row is short.
    """
    if boundary == "zero":
        return F.pad(x, (before, after))
    n = x.shape[-1]
    index = torch.arange(-before, n + after, dtype=torch.int64, device=x.device)
    if boundary == "constant":
        index = index.clamp(0, n - 1)
    elif boundary == "periodic":
        index = index.remainder(n)
    else:  # forwards and backwards; symmetric repeats the elements at the ends
        twice = boundary == "symmetric"
        last = 2 * n - 2 + twice
        index = index.remainder(max(last + twice, 1))
        index = torch.minimum(index, last - index)
    return x.index_select(-1, index)


def _synthesise(approximation: Tensor, detail: Tensor, bank: FilterBank) -> Tensor:
    """Synthesise one level: ``x[2k + j] += h[j] y[k]`` for both filters, cut by ``taps - 2`` at each end."""
    low, high = bank[2:]
    taps, n = len(low), detail.shape[-1]
    x = detail.new_zeros(*detail.shape[:-1], 2 * n + taps - 2)
    for j in range(taps):
        column = x[..., j::2][..., :n]
        column.add_(approximation, alpha=low[j]).add_(detail, alpha=high[j])
    return x[..., taps - 2 : x.shape[-1] - (taps - 2)]
