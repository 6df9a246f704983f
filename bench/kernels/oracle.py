"""A kernel's buffers, and the comparison of its results with the literal algorithm in float64."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from bench.kernels import quantized
from bench.kernels.cases import RULE_KERNELS, Case, bytes_held
from gwt_kernels import haar_dwt, haar_idwt
from gwt_kernels.backends import choice
from gwt_kernels.backends.bucket import Bucket, StepInputs
from gwt_kernels.backends.prepare import prepare
from gwt_kernels.backends.torch import literal
from gwt_kernels.core.tensor_step import TensorStep
from gwt_kernels.functional import Hyper, gwt_adamw_

# A learning rate and a step at which the update is far above the rounding error of bfloat16 weights.
HYPER = Hyper(lr=1.0, weight_decay=0.1)
STEP = 1000

CHUNK = 1 << 22  # elements per comparison: float64 copies of 2**31 elements would not fit
TEMPORARIES = 40  # upper bound on the float64 arrays of a chunk's size in a comparison
EPS = torch.finfo(torch.float32).eps
NORM_ROUNDING = 32 * EPS  # relative error of a float32 sum of squares, added up in trees

_HAAR = literal.filter_bank("haar")


class Buffers:
    """All tensors that one kernel call reads and writes.

    Args:
        case: The kernel and its shape.
        device: Device of the tensors.
        backend: As for :func:`gwt_kernels.functional.gwt_adamw_`.
    """

    def __init__(self, case: Case, device: torch.device, backend: choice.Backend | None) -> None:
        self.case, self.backend = case, backend
        generator = torch.Generator(device).manual_seed(0)

        def normal(shape: Sequence[int], dtype: torch.dtype, mean: float, deviation: float) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device).normal_(mean, deviation, generator=generator)

        def band(level: int) -> tuple[int, ...]:
            return (*case.shape[:-1], -(-case.shape[-1] // 2**level))

        self.inputs: list[Tensor]
        """Tensors that the kernel only reads."""
        self.outputs: list[Tensor] = []
        """Tensors that the kernel writes: weights, moments with their scales, and limiter norm; or coefficients."""
        self.workspace: dict[str, Any] = {}
        if case.kernel in RULE_KERNELS:
            self.inputs = [normal(case.shape, case.read, 0.5, 1.0)]
            self.outputs = [normal(case.shape, case.written, 0.0, 1.0)]
            stored = quantized.draw(band(case.level), case.level, device, generator) if case.quantized else []
            for i, slot in enumerate(case.rule.slots):
                if slot in case.rule.row_slots:
                    self.outputs.append(normal((*case.shape[:-1], 1), torch.float32, 1.0, 0.1))
                elif stored:
                    self.outputs.append(stored[i])
                else:
                    self.outputs.append(normal(band(case.level), case.moments or torch.float32, 1.0, 0.1))
            self.outputs += stored[2 : 2 + len(case.rule.slots)]
        elif case.moments is not None:
            # Gradients with an offset, so that a block's mean is as large as the differences within it;
            # moments as in mid-training, since a denominator near 0 would make the tolerance meaningless.
            self.inputs = [normal(case.shape, case.data, 0.5, 1.0)]
            if case.quantized:
                moments = quantized.draw(band(case.level), case.level, device, generator)
            else:
                moments = [normal(band(case.level), case.moments, 0.0, 0.5) for _ in range(2)]
                moments[1].uniform_(0.5, 1.5, generator=generator)
            self.outputs = [normal(case.shape, case.data, 0.0, 1.0), *moments]
            if case.limited:  # a previous norm far enough below the next one to activate the limiter
                norm = 0.1 * math.sqrt(case.band(case.level))
                self.outputs.append(torch.tensor(norm, dtype=torch.float32, device=device))
        elif case.kernel == "haar_dwt":
            self.inputs = [normal(case.shape, case.data, 0.5, 1.0)]
        else:
            levels = (case.level, *range(case.level, 0, -1))
            self.inputs = [normal(band(level), case.data, 0.5, 1.0) for level in levels]

    @property
    def scales(self) -> list[Tensor]:
        """Scales of the moments if these are int8, else none."""
        slots = len(self.case.rule.slots)
        return self.outputs[1 + slots : 1 + 2 * slots] if self.case.quantized else []

    def clone(self) -> Buffers:
        """Return independent buffers with the same values."""
        other = copy.copy(self)
        other.inputs, other.outputs = ([x.clone() for x in tensors] for tensors in (self.inputs, self.outputs))
        other.workspace = {}
        return other

    def run(self) -> None:
        """Call the kernel; keep a transform's result until the next call, so that results take turns too."""
        case = self.case
        if case.kernel == "haar_dwt":
            self.outputs = haar_dwt(self.inputs[0], case.level, backend=self.backend)
        elif case.kernel == "haar_idwt":
            self.outputs = [haar_idwt(self.inputs, case.shape[-1], backend=self.backend)]
        elif case.kernel in RULE_KERNELS:
            if "runner" not in self.workspace:
                moments = [[x] for x in self.outputs[1 : 1 + len(case.rule.slots)]] + [None, None]
                scales = [tuple(self.scales)] if case.quantized else None
                self.workspace["runner"] = prepare(_bucket(case, self.outputs[:1], moments, scales), self.backend)
            self.workspace["runner"].apply(StepInputs(self.inputs, [STEP], [HYPER]))
        else:
            p, m, v, *others = self.outputs
            gwt_adamw_(
                params=[p],
                grads=self.inputs,
                exp_avgs=[m],
                exp_avg_sqs=[v],
                limiter_norms=others[-1:] if case.limited else [None],
                steps=[STEP],
                hypers=[HYPER],
                level=case.level,
                scales=[(others[0], others[1])] if case.quantized else None,
                backend=self.backend,
                workspace=self.workspace,
            )


def bytes_needed(case: Case, sets: int) -> int:
    """Estimate the peak bytes of a check and of timed calls with `sets` sets of buffers."""
    chunk = min(case.elements, max(CHUNK, case.shape[-1])) * 8 * TEMPORARIES
    compared = case.elements  # torch.equal allocates a byte per element
    return (sets if case.is_step else sets + 1) * bytes_held(case) + max(chunk, compared)


def check(after: Buffers, before: Buffers) -> float:
    """Run `after` once, and compare every element with the literal algorithm on `before` in float64.

    Args:
        after: Buffers that the kernel updates.
        before: Buffers of the same values, left unchanged.

    Returns:
        The largest error divided by its rounding-error bound; above 1 or infinite is wrong.
    """
    with _poisoned_memory():
        after.run()
    if not all(map(torch.equal, after.inputs, before.inputs)):
        return math.inf
    if after.case.kernel in RULE_KERNELS:
        ratio = float(_rule_error(after, before))
    else:
        ratio = float(_step_error(after, before) if after.case.is_step else _transform_error(after))
    return math.inf if math.isnan(ratio) else ratio


@contextlib.contextmanager
def _poisoned_memory() -> Iterator[None]:
    """Fill uninitialized allocations with NaN within the context."""
    strict = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(strict)


def _bucket(
    case: Case, params: list[Tensor], moments: list[Any], scales: list[tuple[Tensor, ...]] | None = None
) -> Bucket:
    exact = params[0].dtype == torch.float64
    rule: Any = case.kernel.removeprefix("step_")
    read = torch.float64 if exact else case.read
    return Bucket(params, *moments[:2], level=case.level, grad_dtype=read, rule=rule, scales=scales)


def _rule_error(after: Buffers, before: Buffers) -> Tensor:
    """Compare with PyTorch's operators in float64; bounds are relative to the largest magnitude of a row."""
    case, slots = after.case, len(after.case.rule.slots)
    once = 8 * (case.level + 4) * EPS + (quantized.DECODING if case.quantized else 0.0)
    worst = torch.zeros((), dtype=torch.float64, device=after.outputs[0].device)
    peaks = [[torch.zeros_like(x, dtype=torch.float64) for _ in range(2)] for x in after.scales]
    first = 0
    for chunk in _chunks(*before.inputs, *before.outputs[: 1 + slots], *after.outputs[: 1 + slots]):
        g, p, *stored = chunk[: 2 + slots]
        found = chunk[2 + slots :]
        wide = [x.double() for x in stored]
        if case.quantized:
            scales = [quantized.spread(x, stored[0], first, case.level) for x in before.scales]
            wide = [q.dequantize(*pair) for q, *pair in zip(quantized.QUANTIZERS, stored, scales, strict=False)]
        exact = [p.double().clone(), *(x.clone() for x in wide)]
        moments = [[x] for x in exact[1:]] + [None, None]
        prepare(_bucket(case, exact[:1], moments), "torch").apply(StepInputs([g.double()], [STEP], [HYPER]))
        moved = (exact[0] - p.double()).abs() if case.rule.reads_weights else exact[0].abs()
        size = moved.amax(-1, keepdim=True) + p.double().abs() * case.rule.reads_weights
        worst = torch.maximum(worst, _ratio(found[0], exact[0], once * size))
        for i, (kept, value) in enumerate(zip(found[1:], exact[1:], strict=True)):
            bound = once * (wide[i].abs() + g.double().abs().amax(-1, keepdim=True) ** (1 + i))
            if case.quantized:
                own = quantized.spread(after.scales[i], kept, first, case.level)
                error = quantized.ratio(quantized.QUANTIZERS[i], kept, own, value, bound)
                for x, peak in zip((value.abs(), bound), peaks[i], strict=True):
                    quantized.largest(x, peak, first, case.level)
            else:
                error = _ratio(kept, value, bound, at_random=kept.dtype == torch.bfloat16)
            worst = torch.maximum(worst, error)
        first += stored[0].numel() if stored else 0
    for scales_of, (value, bound) in zip(after.scales, peaks, strict=True):
        worst = torch.maximum(worst, _ratio(scales_of, value, bound))
    return worst


def _step_error(after: Buffers, before: Buffers) -> Tensor:
    level = after.case.level
    hyper, rounding, worst = HYPER, 0.0, torch.zeros((), dtype=torch.float64, device=after.outputs[0].device)
    if after.case.limited:
        squares = torch.zeros_like(worst)
        for _, chunk in _exact_chunks(before):
            _, m, v = _expected(*chunk, level, HYPER)
            squares += (m / (v.sqrt() + HYPER.eps)).square().sum()
        assert HYPER.norm_growth_limit is not None
        norm, gamma = float(squares.sqrt()), HYPER.norm_growth_limit
        limit = max(norm / (float(before.outputs[-1]) + 1e-8), gamma) / gamma
        hyper, rounding = HYPER._replace(scale=HYPER.scale / limit), NORM_ROUNDING
        worst = (after.outputs[-1].double() - norm / limit).abs() / (2 * NORM_ROUNDING * norm / limit)
    # For each int8 block the largest magnitude, which is its scale, and the largest bound on it.
    peaks = [[torch.zeros_like(x, dtype=torch.float64) for _ in range(2)] for x in after.scales]
    pairs = zip(_exact_chunks(before), _chunks(*after.outputs[:3]), strict=True)
    for (first, (g, *start)), found in pairs:
        exact = _expected(g, *start, level, hyper)
        bounds = _step_bounds(g, *start, exact[2], after.case, hyper, rounding)
        worst = torch.maximum(worst, _ratio(found[0], exact[0], bounds[0]))
        for i, (stored, value, bound) in enumerate(zip(found[1:], exact[1:], bounds[1:], strict=True)):
            if after.case.quantized:
                scales = quantized.spread(after.scales[i], stored, first, level)
                error = quantized.ratio(quantized.QUANTIZERS[i], stored, scales, value, bound)
                for x, peak in zip((value.abs(), bound), peaks[i], strict=True):
                    quantized.largest(x, peak, first, level)
            else:  # weights are rounded to the nearest, bf16 moments stochastically
                error = _ratio(stored, value, bound, at_random=stored.dtype == torch.bfloat16)
            worst = torch.maximum(worst, error)
    for scales, (value, bound) in zip(after.scales, peaks, strict=True):
        worst = torch.maximum(worst, _ratio(scales, value, bound))
    return worst


def _exact_chunks(buffers: Buffers) -> Iterator[tuple[int, tuple[Tensor, Tensor, Tensor, Tensor]]]:
    """Yield chunks of rows: the first coefficient's offset; gradients, weights and both moments in float64."""
    first = 0
    for g, p, *stored in _chunks(*buffers.inputs, *buffers.outputs[:3]):
        m, v = (x.double() for x in stored)
        if buffers.case.quantized:
            scales = [quantized.spread(x, m, first, buffers.case.level) for x in buffers.scales]
            m, v = (q.dequantize(*pair) for q, *pair in zip(quantized.QUANTIZERS, stored, scales, strict=True))
        yield first, (g.double(), p.double(), m, v)
        first += m.numel()


def _expected(g: Tensor, p: Tensor, m: Tensor, v: Tensor, level: int, hyper: Hyper) -> tuple[Tensor, ...]:
    """Compute weights and moments after a step without limiter: transform, divide, invert, level by level."""
    p, m, v = (x.clone() for x in (p, m, v))
    literal.gwt_adamw_([TensorStep(p, g, m, v, None, STEP, hyper)], level=level, wavelet="haar")
    return p, m, v


def _step_bounds(
    g: Tensor, p: Tensor, m: Tensor, v: Tensor, new_v: Tensor, case: Case, hyper: Hyper, rounding: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Bound the error of float32 arithmetic on weights and moments, using the magnitudes of all operands.

    `rounding` is the relative error of a factor on the whole update: the error of the limiter's norm.
    """
    level, width = case.level, 2**case.level
    once = (level + 4) * EPS  # a tree sum of W terms, and a few products
    once += quantized.DECODING if case.quantized else 0.0
    a = literal.wavedec(g.abs(), _HAAR, level)[0]
    m_size = hyper.beta1 * m.abs() + (1 - hyper.beta1) * a
    v_size = hyper.beta2 * v + (1 - hyper.beta2) * a * a
    gain = hyper.step_size(STEP, level) / (new_v.sqrt() + hyper.eps)
    gain_error = once * v_size / new_v + 2 * EPS + rounding

    def spread(x: Tensor) -> Tensor:
        return x.repeat_interleave(width, dim=-1)[..., : p.shape[-1]]

    size = g.abs() + spread((a + m_size) / math.sqrt(width)) if level else m_size
    return spread(gain) * size * (once + spread(gain_error)) + 2 * EPS * p.abs(), once * m_size, 2 * once * v_size


def _transform_error(after: Buffers) -> Tensor:
    """Compare a transform in float64; each level rounds a sum, a product and a constant."""
    case = after.case
    once = 1.5 * EPS
    worst = torch.zeros((), dtype=torch.float64, device=after.inputs[0].device)
    n = len(after.inputs)
    for chunk in _chunks(*after.inputs, *after.outputs):
        inputs, found = [x.double() for x in chunk[:n]], chunk[n:]
        if case.kernel == "haar_dwt":
            exact = literal.wavedec(inputs[0], _HAAR, case.level)
            sizes = [literal.wavedec(inputs[0].abs(), _HAAR, level)[0] for level in range(case.level + 1)]
            levels = (case.level, *range(case.level, 0, -1))
            bounds = [once * level * sizes[level] for level in levels]
        else:
            exact = [literal.waverec(inputs, _HAAR)[..., : case.shape[-1]]]
            bounds = [once * case.level * _magnitude(inputs)[..., : case.shape[-1]]]
        for stored, value, bound in zip(found, exact, bounds, strict=True):
            worst = torch.maximum(worst, _ratio(stored, value, bound))
    return worst


def _magnitude(coeffs: Sequence[Tensor]) -> Tensor:
    """Compute the inverse transform of the operands' magnitudes."""
    x = coeffs[0].abs()
    for detail in coeffs[1:]:
        x = ((x[..., : detail.shape[-1]] + detail.abs()) * math.sqrt(0.5)).repeat_interleave(2, dim=-1)
    return x


def _ratio(found: Tensor, exact: Tensor, bound: Tensor, *, at_random: bool = False) -> Tensor:
    """Return the largest error over its bound, storage in `found`'s dtype included; NaN if any value is NaN.

    Rounding to nearest is off by up to half a unit in the last place, stochastic rounding by up to one.
    """
    info = torch.finfo(found.dtype)
    stored = (exact.abs() + bound).clamp(min=info.smallest_normal) * (info.eps * (1.0 if at_random else 0.5))
    return ((found.double() - exact).abs() / (bound + stored)).max()


def _chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield chunks of rows of all tensors, about `CHUNK` elements of the widest; all have equally many rows."""
    rows = max(1, CHUNK // max(x.shape[-1] for x in tensors))
    yield from zip(*(x.reshape(-1, x.shape[-1]).split(rows) for x in tensors), strict=True)
