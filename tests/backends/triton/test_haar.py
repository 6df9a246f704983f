"""The transform's kernels with several programs: many tiles, on both paths."""

from __future__ import annotations

import pytest
import torch

from gwt_kernels.backends.triton import layout
from tests.haar.test_haar import check_forward, check_inverse, random


@pytest.mark.parametrize("level", [1, 2, 5])
@pytest.mark.parametrize("shape", [(3, 2050), (9, 1024), (2, 3, 333), (1030,), (1100, 2)])
def test_tensors_of_several_tiles(device, shape, level):
    level = min(level, (shape[-1] - 1).bit_length())
    coeffs = check_forward(random(shape, torch.float32, device), level, "triton")
    check_inverse(coeffs, shape[-1], "triton")


@pytest.mark.parametrize("level", [1, 2, 3, 5])
@pytest.mark.parametrize("shape", [(3, 64), (2, 72), (5, 37), (70,), (9, 17)])
def test_small_tiles(device, monkeypatch, shape, level):
    """Check tiles that start and end anywhere in a row, of the tensor and of every band."""
    monkeypatch.setattr(layout, "FLAT_TILE", 64)
    monkeypatch.setattr(layout, "ROW_TILE", 32)
    coeffs = check_forward(random(shape, torch.float32, device), level, "triton")
    check_inverse(coeffs, shape[-1], "triton")


@pytest.mark.parametrize("level", [7, 10])
def test_deep_levels(device, level):
    for shape in ((2, 2048), (3, 1000)):
        coeffs = check_forward(random(shape, torch.float32, device), level, "triton")
        check_inverse(coeffs, shape[-1], "triton")


@pytest.mark.parametrize("level", [1, 3])
def test_both_paths_give_the_same_bits(device, level):
    """Compare the same numbers in aligned and in misaligned memory."""
    buffer = torch.zeros(8 * 32 + 1, device=device)
    misaligned = buffer[1:].view(8, 32)
    aligned = random((8, 32), torch.float32, device)
    misaligned.copy_(aligned)
    one, other = (check_forward(x, level, "triton") for x in (aligned, misaligned))
    assert all(map(torch.equal, one, other))
