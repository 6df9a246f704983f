"""The fused step with several programs: many tiles, many chunks of the norm, many tensors."""

from __future__ import annotations

import pytest
import torch

from gwt_kernels.backends.triton import launch, layout
from gwt_kernels.functional import Hyper
from tests.support.steps import Bucket

HYPER = Hyper(lr=0.01, weight_decay=0.1)

FLAT = [(9, 1024), (4096,), (2, 4100 * 8)]  # whole tiles, and a partial last one
ROWS = [(9, 250), (1030,), (3, 2, 1500), (2000, 1)]  # rows within a tile, and rows of several tiles


@pytest.fixture
def small_tiles(monkeypatch):
    """Make tiles so small that few elements fill many of them."""
    monkeypatch.setattr(layout, "FLAT_TILE", 64)
    monkeypatch.setattr(layout, "ROW_TILE", 32)


def paths(bucket: Bucket) -> list[bool]:
    """Return the paths that a step of the bucket takes."""
    workspace = {}
    bucket.step(HYPER, 1, backend="triton", workspace=workspace)
    return [x.flat for x in workspace["runner"].launches]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("level", [0, 2, 5, 10])
def test_tensors_of_several_tiles(device, level, dtype):
    shapes = [s for s in (*FLAT, *ROWS) if 2**level < 2 * s[-1]]
    bucket = Bucket(shapes, level, dtype=dtype, limited=level > 0, device=device)
    bucket.check_step(HYPER, 3, backend="triton")


@pytest.mark.parametrize("layout", ["contiguous", "misaligned"])
@pytest.mark.parametrize("level", [0, 1, 2, 3, 5])
def test_small_tiles(device, small_tiles, level, layout):
    """Check tiles that start and end anywhere in a row: the first, a middle and the last, on both paths."""
    bucket = Bucket(
        [(3, 64), (2, 72), (3, 37), (70,), (5, 33)], level, layouts=[layout], limited=level > 0, device=device
    )
    bucket.check_step(HYPER, 3, backend="triton")


@pytest.mark.parametrize("n", [1, 2, 3, 17])
@pytest.mark.parametrize("level", [0, 2])
def test_number_of_tensors(device, small_tiles, n, level):
    """Check that each program finds its tensor in the table, among tensors of one and many tiles, of both paths."""
    shapes = [((1 + 3 * i % 5, 32) if i % 3 else (1 + i % 4, 13)) for i in range(n)]
    hypers = [HYPER._replace(lr=0.01 * (i + 1), maximize=i % 2 == 1) for i in range(n)]
    bucket = Bucket(shapes, level, limited=level > 0, device=device)
    bucket.check_step(hypers, list(range(1, n + 1)), backend="triton")


@pytest.mark.parametrize("max_chunks", [1, 2, 5])
@pytest.mark.parametrize("block", [2, 16])
def test_chunks_of_the_norm(device, monkeypatch, small_tiles, max_chunks, block):
    """Check chunks of several tiles, a shorter last one, and more partial sums than the limiter reads at once."""
    monkeypatch.setattr(launch, "MAX_CHUNKS", max_chunks)
    monkeypatch.setattr(launch, "LIMITER_BLOCK", block)
    bucket = Bucket([(7, 64), (3, 64), (5, 37), (2, 37), (16, 64)], 2, limited=True, device=device)
    workspace = {}
    for t in (1, 2):
        bucket.check_step(HYPER, t, backend="triton", workspace=workspace)
    if max_chunks == 1:
        assert all(x.tiles_per_chunk == x.n_tiles > 1 for x in workspace["runner"].launches)


def test_more_partial_norms_than_one_block_of_the_limiter(device, monkeypatch, small_tiles):
    monkeypatch.setattr(launch, "LIMITER_BLOCK", 2)
    bucket = Bucket([(10, 64), (4, 37)], 2, limited=True, device=device)
    workspace = {}
    bucket.check_step(HYPER, 3, backend="triton", workspace=workspace)
    assert all(x.n_chunks > 2 for x in workspace["runner"].launches)


def assert_same(results: list[torch.Tensor], others: list[torch.Tensor]) -> None:
    """Compare bit for bit: a block is added up in one order, however it is distributed over lanes."""
    for x, y in zip(results, others, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize(("level", "limited"), [(0, False), (1, True), (3, False), (3, True)])
def test_results_do_not_depend_on_the_tiles(device, monkeypatch, level, limited):
    """Check that only the norm's sum, and through it the next limited update, may round differently."""

    def run(flat_tile: int, row_tile: int) -> list[torch.Tensor]:
        monkeypatch.setattr(layout, "FLAT_TILE", flat_tile)
        monkeypatch.setattr(layout, "ROW_TILE", row_tile)
        bucket = Bucket([(6, 64), (5, 37)], level, limited=limited, device=device)
        bucket.check_step(HYPER, 2, backend="triton")
        return bucket.results()

    large = run(4096, 1024)
    for tiles in ((64, 16), (256, 64)):
        results = run(*tiles)
        assert_same(results[:6], large[:6])
        for norm, other in zip(results[6:], large[6:], strict=True):
            torch.testing.assert_close(norm, other, rtol=16 * 2**-24, atol=0)


@pytest.mark.parametrize(
    ("level", "dtype"),  # the dtype decides only the bits to which a weight is rounded
    [(0, torch.bfloat16), (1, torch.float16), (3, torch.bfloat16)],
)
def test_random_bits_depend_on_neither_tiles_nor_path(device, monkeypatch, level, dtype):
    """Check tiles from one block, for which words are drawn one by one, to more than the tensor."""

    def run(flat_tile: int, row_tile: int, memory: str = "contiguous", key: int = 5) -> list[torch.Tensor]:
        monkeypatch.setattr(layout, "FLAT_TILE", flat_tile)
        monkeypatch.setattr(layout, "ROW_TILE", row_tile)
        kinds = {"dtype": dtype, "moment_dtype": torch.bfloat16, "layouts": [memory]}
        bucket = Bucket([(6, 64), (5, 37)], level, device=device, **kinds)
        bucket.step(HYPER, 2, backend="triton", rounding="stochastic", keys=[key] * 2)
        return bucket.results()

    large = run(4096, 1024)
    for tiles in ((64, 8), (256, 64), (64, 64, "misaligned")):
        assert_same(run(*tiles), large)
    assert not any(map(torch.equal, run(4096, 1024, key=6), large))


@pytest.mark.parametrize("level", [0, 1, 2, 3, 4, 5, 8, 10])
def test_both_paths_give_the_same_bits(device, level):
    """Compare the same numbers in aligned and in misaligned memory."""
    shapes = [(6, max(64, 2**level)), (8, max(32, 2**level))]
    flat, row = (Bucket(shapes, level, layouts=[x], device=device) for x in ("contiguous", "misaligned"))
    assert paths(flat) == [True]
    assert paths(row) == [False]
    assert_same(flat.results(), row.results())


@pytest.mark.parametrize(
    ("shape", "level", "layout", "flat"),
    [
        ((4, 8), 3, "contiguous", True),
        ((4, 8), 4, "contiguous", False),  # a row shorter than a block
        ((3, 4), 2, "contiguous", False),  # a size that 8 does not divide
        ((4, 8), 3, "misaligned", False),
        ((4, 8), 3, "transposed", True),  # through a copy
        ((2, 4, 6), 1, "contiguous", True),
        ((8, 1), 0, "contiguous", True),
        ((9,), 0, "contiguous", False),
    ],
)
def test_which_path_a_tensor_takes(device, shape, level, layout, flat):
    assert paths(Bucket([shape], level, layouts=[layout], device=device)) == [flat]
