"""Rows of any width: a few elements, about a tile, many tiles; results, and the random bits of each element."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from gwt_kernels.backends.triton.layout import rows_of
from gwt_kernels.backends.triton.tiles import ROWS, index_in_array, inside_tile, is_run, tile_of
from gwt_kernels.core.hyper import key_of
from gwt_kernels.functional import Hyper, gwt_adamw_
from tests.support import interpreter, philox, runs
from tests.support.steps import Bucket

HYPER = Hyper(lr=0.01, weight_decay=0.1)
NARROW = [(3, width) for width in range(1, 71)]
ABOUT_A_TILE = [(3, 1023), (2, 1024), (3, 1025), (2, 2047), (2, 2049)]
OTHERS = [(1, 4099), (1500, 3), (257, 7), (4, 5, 33), (2, 3, 5, 9), (1, 1)]
KEY, STEP = key_of(3, 4), 7


@pytest.mark.parametrize("shapes", [NARROW, ABOUT_A_TILE, OTHERS], ids=["narrow", "about a tile", "others"])
@pytest.mark.parametrize(
    ("level", "moments"), [(1, torch.bfloat16), (2, torch.float32), (5, torch.bfloat16)], ids=str
)
def test_rows_of_any_width(device, shapes, level, moments):
    """Compare with the exact step; a tensor is one row, rows of whole blocks, or rows with a short last block."""
    shapes = [s for s in shapes if 2**level < 2 * s[-1]]
    options = {"dtype": torch.bfloat16, "moment_dtype": moments, "device": device}
    bucket = Bucket(shapes, level, limited=True, **options)
    bucket.check_step(HYPER, 3, backend="triton", keys=list(range(len(shapes))))


def expected(p: Tensor, m: Tensor, v: Tensor, hyper: Hyper, level: int) -> list[Tensor]:
    """Compute a step without a gradient: each number times a factor, rounded by the random bits of its index.

    Rows without whole blocks count as padded to whole groups of 4 blocks. Everything is written out here.
    """
    width, blocks = p.shape[-1], m.shape[-1]
    whole = width % 2**level == 0
    pitch = blocks if whole else math.ceil(blocks / 4) * 4

    def places(columns: int, pitch: int) -> list[int]:
        return [row * pitch + column for row in range(p.numel() // width) for column in range(columns)]

    weights, moments = places(width, width if whole else pitch * 2**level), places(blocks, pitch)
    words = [philox.words(range(i, i + 1), STEP, 1, KEY)[0] for i in moments]
    halves = [philox.words(range(i, i + 1), STEP, 0, KEY, per_call=8)[0] for i in weights]
    decayed = p.float() - hyper.lr * hyper.weight_decay * p.float()
    if m.dtype == torch.float32:
        return [rounded(decayed, halves), m * hyper.beta1, v * hyper.beta2]
    return [
        rounded(decayed, halves),
        rounded(m.float() * hyper.beta1, [word & 0xFFFF for word in words]),
        rounded(v.float() * hyper.beta2, [word >> 16 for word in words]),
    ]


def rounded(x: Tensor, bits: Sequence[int]) -> Tensor:
    raw = x.view(torch.int32) + torch.tensor(bits, dtype=torch.int32).view(x.shape)
    return (raw >> 16).to(torch.int16).view(torch.bfloat16)


@pytest.mark.parametrize("shape", [*NARROW[::6], (3, 1025), (5, 2, 33), (40, 3), (1, 70), (8, 64)], ids=str)
@pytest.mark.parametrize(
    ("level", "moments"),  # the weights' bits are those of a level, whatever the moments
    [(1, torch.bfloat16), (2, torch.float32), (3, torch.bfloat16), (5, torch.float32), (5, torch.bfloat16)],
    ids=str,
)
@pytest.mark.parametrize("backend", runs.BACKENDS)
def test_every_backend_draws_the_bits_of_an_elements_index(device, backend, moments, level, shape):
    """Compare with a zero gradient and exact factors, for which random bits alone decide the result."""
    on = runs.place(backend, device)
    hyper = Hyper(lr=0.5, weight_decay=2.0**-7, beta1=1 - 2.0**-8, beta2=1 - 2.0**-8, norm_growth_limit=None)
    generator = torch.Generator().manual_seed(0)
    p, m = torch.randn(shape, generator=generator), torch.zeros(*shape[:-1], -(-shape[-1] // 2**level))
    p, v = p.bfloat16(), torch.rand(m.shape, generator=generator).bfloat16() + 1
    m, v = m.to(moments), v.to(moments)  # all updates are 0, and rounding an average of 0 needs no bits
    arrays = [x.clone().to(on) for x in (p, torch.zeros_like(p), m, v)]
    with interpreter.like_a_gpu():
        gwt_adamw_(
            **{name: [x] for name, x in zip(("params", "grads", "exp_avgs", "exp_avg_sqs"), arrays, strict=True)},
            limiter_norms=[None], steps=[STEP], hypers=[hyper], level=level, rule="foam", rounding="stochastic",
            keys=[KEY], backend=backend,
        )  # fmt: skip
    runs.assert_same_bits([arrays[0].cpu(), *(x.cpu() for x in arrays[2:])], expected(p, m, v, hyper, level))


@pytest.mark.parametrize("shape", [(7, 33), (3, 1025), (2, 3, 5), (300, 7)], ids=str)
@pytest.mark.parametrize("backend", runs.BACKENDS)
def test_moments_of_rows_draw_the_bits_of_their_index(device, backend, shape):
    """Compare moments with nonzero averages, and weights that stay constant."""
    on, level = runs.place(backend, device), 2
    hyper = Hyper(lr=0.0, beta1=1 - 2.0**-8, beta2=1 - 2.0**-8, norm_growth_limit=None)
    generator = torch.Generator().manual_seed(1)
    p, blocks = torch.zeros(shape), (*shape[:-1], -(-shape[-1] // 2**level))
    m, v = (torch.rand(blocks, generator=generator).bfloat16() + 1 for _ in range(2))
    arrays = [x.clone().to(on) for x in (p, p, m, v)]
    with interpreter.like_a_gpu():
        gwt_adamw_(
            **{name: [x] for name, x in zip(("params", "grads", "exp_avgs", "exp_avg_sqs"), arrays, strict=True)},
            limiter_norms=[None], steps=[STEP], hypers=[hyper], level=level, keys=[KEY], backend=backend,
        )  # fmt: skip
    runs.assert_same_bits([x.cpu() for x in arrays[2:]], expected(p, m, v, hyper, level)[1:])


@triton.jit
def _where(rows_ptr, firsts_ptr, index_ptr, inside_ptr, run_ptr, W: tl.constexpr, NB: tl.constexpr):
    """Return the part of an array with ``W`` elements per block that each program's tile covers."""
    i = tl.program_id(0)
    width, padded = tl.load(rows_ptr + 1), tl.load(rows_ptr + 3)
    tile = tile_of(tl.load(rows_ptr), padded, tl.load(rows_ptr + 4), tl.load(firsts_ptr + i), NB, ROWS, 1)
    elements = i * NB * W + tl.arange(0, NB * W)
    tl.store(index_ptr + elements, index_in_array(tile, width, padded, W, NB, ROWS))
    tl.store(inside_ptr + elements, inside_tile(tile, width, padded, W, NB, ROWS).to(tl.int8))
    tl.store(run_ptr + i, is_run(tile, width, padded, W, NB).to(tl.int8))


@pytest.mark.parametrize(
    "shape",
    [(5, 33), (70, 3), (9, 1), (3, 1025), (2, 4 * 32 + 1), (1, 2**40), (2**36, 3), (3, 2**38 + 1),
     (2**19 + 1, 2**19 + 1)],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize(("together", "blocks"), [(1, 32), (2, 32), (4, 32), (4, 1), (1, 2)])
def test_offsets_in_tensors_of_any_size(device, shape, together, blocks):
    """Compare with Python's integers for first, middle and last tiles, some of tensors too large to exist."""
    w = 4
    rows = rows_of(torch.empty(shape, device="meta"), w, together)
    n_tiles = -(-rows.n_blocks // blocks)
    about = rows.padded // blocks
    tiles = sorted({t % n_tiles for t in (0, 1, 2, 3, about, about + 1, n_tiles // 2, n_tiles // 3, -2, -1)})
    firsts = torch.tensor([t * blocks for t in tiles], device=device)
    index, inside = (
        torch.full((len(tiles), blocks * w), -1, dtype=x, device=device) for x in (torch.int64, torch.int8)
    )
    run = torch.full((len(tiles),), -1, dtype=torch.int8, device=device)
    with interpreter.like_a_gpu():
        _where[(len(tiles),)](torch.tensor([*rows], device=device), firsts, index, inside, run, w, blocks)
    for t, indices, insides, is_one in zip(tiles, index.tolist(), inside.tolist(), run.tolist(), strict=True):
        known = []
        for e in range(blocks * w):
            row, column = divmod(t * blocks * w + e, rows.padded * w)
            known.append(column < rows.width and t * blocks + e // w < rows.n_blocks)
            assert insides[e] == known[-1]
            assert not known[-1] or indices[e] == row * rows.width + column
        assert not is_one or all(known)
        assert is_one or not all(known) or len({(t * blocks + b) // rows.padded for b in range(blocks)}) > 1
