"""Tests that steps on parts of tensors, with their positions, equal those on whole tensors; without processes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gwt_kernels.core.hyper import key_of
from gwt_kernels.functional import Hyper, Span, gwt_adamw_
from tests.support import interpreter, runs
from tests.support.steps import prepared, update_sums

ROWS, WIDTH = 11, 24
PARTS = {
    # Rows of 24 are whole blocks and begin at multiples of 8, so random bits are drawn in order.
    "rows": (WIDTH, [(slice(0, 4), slice(None)), (slice(4, 11), slice(None))]),
    "odd rows": (WIDTH - 1, [(slice(0, 3), slice(None)), (slice(3, 3), slice(None)), (slice(3, 11), slice(None))]),
    "columns": (WIDTH, [(slice(None), slice(0, 8)), (slice(None), slice(8, 24))]),
    # Here a call's 8 weights and 4 moments of level 2 are side by side in the part.
    "columns of whole calls": (96, [(slice(None), slice(0, 32)), (slice(None), slice(32, 96))]),
    "both": (WIDTH, [(slice(0, 5), slice(0, 8)), (slice(0, 5), slice(8, 24)), (slice(5, 11), slice(None))]),
}


def tensors(width: int, level: int, on: torch.device, dtype: torch.dtype, moments: torch.dtype) -> list[Tensor]:
    """Return weights, gradients and moments of a whole tensor."""
    generator = torch.Generator().manual_seed(0)
    narrow = -(-width // 2**level)
    p, g = (torch.randn(ROWS, width, generator=generator) + 0.5 for _ in range(2))
    m, v = torch.randn(ROWS, narrow, generator=generator), torch.rand(ROWS, narrow, generator=generator)
    return [p.to(on, dtype), g.to(on, dtype), m.to(on, moments), v.to(on, moments)]


def spans(rows: slice, columns: slice, width: int, level: int) -> tuple[Span, Span]:
    """Return the positions of a part of rows and columns among the weights and among the moments."""
    row, column = rows.start or 0, columns.start or 0
    if width % 2**level:  # rows count as padded to whole groups of 4 blocks
        padded = -(-width // (4 * 2**level)) * 4
        weights = Span(row * padded * 2**level, width, padded * 2**level)
        return weights, Span(row * padded, -(-width // 2**level), padded)
    if columns == slice(None):
        return Span(row * width, 1, 1), Span(row * (width >> level), 1, 1)
    own = columns.stop - column
    weights = Span(row * width + column, own, width)
    return weights, Span(*(x >> level for x in weights))


def part(x: Tensor, rows: slice, columns: slice, width: int) -> Tensor:
    per_block = width // x.shape[1] if columns != slice(None) else 1
    own = slice(columns.start // per_block, columns.stop // per_block) if columns != slice(None) else columns
    return x[rows, own].clone()


@pytest.mark.parametrize("kind", PARTS)
@pytest.mark.parametrize("level", [0, 2])
@pytest.mark.parametrize("backend", runs.BACKENDS)
def test_random_bits_equal_those_of_the_whole(backend: str, level: int, kind: str, device: torch.device) -> None:
    width, parts = PARTS[kind]
    whole = tensors(width, level, runs.place(backend, device), torch.bfloat16, torch.bfloat16)
    options: dict[str, Any] = {"level": level, "rule": "foam", "rounding": "stochastic", "backend": backend}
    options |= {"steps": [3], "hypers": [Hyper(lr=0.1, norm_growth_limit=None)], "limiter_norms": [None]}
    options["keys"] = [key_of(5, 6)]

    def step(arrays: list[Tensor], **where: Any) -> None:
        p, g, m, v = ([x] for x in arrays)
        with interpreter.like_a_gpu():
            gwt_adamw_(params=p, grads=g, exp_avgs=m, exp_avg_sqs=v, **where, **options)

    own = [[part(x, *at, width) for x in whole] for at in parts]
    unaware = [x.clone() for x in own[-1]]
    step(whole)
    step(unaware)
    for at, arrays in zip(parts, own, strict=True):
        step(arrays, spans=[spans(*at, width, level)])
        for x, y in zip(arrays, whole, strict=True):
            runs.assert_same_bits(x, part(y, *at, width))
    runs.assert_differ(unaware, own[-1])


@pytest.mark.parametrize(
    ("backend", "wavelet", "boundary"),
    [
        ("torch", "haar", "zero"),
        ("torch", "db2", "zero"),
        ("torch", "bior2.2", "periodic"),
        ("torch", "haar", "reflect"),
        ("triton", "haar", "zero"),
    ],
)
def test_limiter_divisors_from_parts_equal_those_of_the_whole(
    backend: str, wavelet: str, boundary: str, device: torch.device
) -> None:
    """Check tensors of both paths: sums change nothing, and divisors from them equal those of the step itself."""
    on = runs.place(backend, device)
    level, hyper = 2, Hyper(lr=0.1, norm_growth_limit=1.01)
    dtype = torch.float32
    whole = [tensors(width, level, on, dtype, dtype) for width in (WIDTH, WIDTH - 1)]
    if wavelet != "haar":
        from gwt_kernels.backends.torch.literal import approximation_width

        for own in whole:
            own[2:] = [x[:, :1].repeat(1, approximation_width(own[0].shape[1], level, wavelet)) for x in own[2:]]
    options: dict[str, Any] = {"level": level, "wavelet": wavelet, "boundary": boundary, "backend": backend}
    options["steps"] = [3, 3]
    options["hypers"] = [hyper, hyper]
    names = ("params", "grads", "exp_avgs", "exp_avg_sqs")

    def arrays(rows: slice) -> dict[str, list[Tensor]]:
        return {name: [own[i][rows].clone() for own in whole] for i, name in enumerate(names)}

    halves = [arrays(slice(0, 4)), arrays(slice(4, 11))]
    all_rows = arrays(slice(0, 11))
    with interpreter.like_a_gpu():
        before = [{k: [x.clone() for x in v] for k, v in half.items()} for half in halves]
        sums = [update_sums(**half, **options) for half in halves]
        runs.assert_same_bits(halves, before)
        previous = [torch.full((), 0.5, device=on) for _ in whole]
        norms = (sums[0] + sums[1]).sqrt()
        expected = (norms / (0.5 + 1e-8)).clamp(min=1.01) / 1.01
        assert bool((expected > 1).all()), "the limiter has nothing to do"
        for half in halves:
            gwt_adamw_(**half, limiter_norms=[None, None], limits=expected, **options)
        gwt_adamw_(**all_rows, limiter_norms=previous, **options)
    torch.testing.assert_close(torch.stack(previous), norms / expected, rtol=1e-6, atol=0)
    for name in ("params", "exp_avgs", "exp_avg_sqs"):
        for i, x in enumerate(all_rows[name]):
            both = torch.cat([half[name][i] for half in halves])
            torch.testing.assert_close(both, x, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rounding", ["stochastic", "split"])
@pytest.mark.parametrize("counted", [False, True])
def test_a_step_split_after_its_sums_equals_the_step(counted: bool, rounding: str, device: torch.device) -> None:
    """Check tensors of both paths, one transposed, and copied gradients; Triton copies its tables once."""
    on = runs.place("triton", device)
    level, moments = 2, torch.bfloat16
    options: dict[str, Any] = {"level": level, "rounding": rounding, "backend": "triton", "keys": [5, 6]}
    options["hypers"] = [Hyper(lr=0.1, norm_growth_limit=1.01)] * 2
    options["spans"] = [spans(slice(4, 4 + ROWS), slice(None), width, level) for width in (WIDTH, WIDTH - 1)]
    results = []
    for begins, factor in ((False, 1.0), (True, 1.0), (True, 2.0)):
        own = [tensors(width, level, on, torch.bfloat16, moments) for width in (WIDTH, WIDTH - 1)]
        own[1][0] = own[1][0].t().contiguous().t()
        own[0][1] = own[0][1].t().contiguous().t()
        arrays = {
            name: [x[i] for x in own] for i, name in enumerate(("params", "grads", "exp_avgs", "exp_avg_sqs"))
        }
        lows = [torch.ones_like(p, dtype=torch.int16).contiguous() for p in arrays["params"]]
        arrays["lows"] = lows if rounding == "split" else [None, None]
        steps: Any = torch.tensor([2.0, 2.0], dtype=torch.float64, device=on) if counted else [3, 3]
        both = {**arrays, **options, "steps": steps}
        with interpreter.like_a_gpu(), torch.no_grad():
            runner, inputs = prepared(**both)
            for _ in range(2):
                if begins:
                    sums = runner.reduce(inputs, update_sums=True).update_sums
                    runner.apply(inputs, None, factor * (1 + sums))
                else:
                    sums = update_sums(**(both | {"steps": steps.clone() if counted else steps}))
                    gwt_adamw_(**both, limiter_norms=[None, None], limits=factor * (1 + sums))
        results.append({**arrays, "steps": steps, "sums": sums})
    if counted:
        assert results[0]["steps"].tolist() == [4.0, 4.0]
    runs.assert_same_bits(results[1], results[0])
    runs.assert_differ(results[2]["params"], results[1]["params"])
