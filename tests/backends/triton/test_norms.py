"""The limiter's kernel by itself: its numbers are those of IEEE divisions, on every device."""

from __future__ import annotations

import pytest
import torch

from gwt_kernels.backends.triton import schema
from gwt_kernels.backends.triton.compiling import UNFUSED
from gwt_kernels.backends.triton.norms import limiter_kernel
from tests.ptx import plugin
from tests.support import interpreter

N = 64


@pytest.mark.parametrize("seed", [None, 0, 1])
def test_the_limiter_divides_exactly(device, monkeypatch, seed):
    """Check exact divisions: errors of approximate ones exceed what bench.optimizers accepts as rounding."""
    if (compiled := plugin.driver()) is not None:  # a GPU has its own errors
        monkeypatch.setattr(compiled.options, "disturb", seed)
    generator = torch.Generator().manual_seed(0)
    previous, partials = 0.5 + torch.rand(2, N, generator=generator)
    previous[::7], gamma = 0.0, torch.tensor(1.01)  # 0: no norm yet
    norm = partials.double().sqrt().float()  # rounded once: a vector's root in float32 may not be
    limit = torch.where(previous == 0, 1.0, (norm / (previous + 1e-8)).maximum(gamma) / gamma)

    kept, factors = previous.clone().to(device), torch.full((N,), torch.nan, device=device)
    pointers = torch.zeros(len(schema.POINTERS), N, dtype=torch.int64)
    pointers[schema.NORM_PTR.value] = kept.data_ptr() + 4 * torch.arange(N)
    scalars = torch.zeros(N, len(schema.SCALARS))
    scalars[:, schema.GAMMA.value] = gamma
    tables = [x.to(device) for x in (pointers, scalars, torch.arange(N + 1), partials)]
    with interpreter.like_a_gpu():
        limiter_kernel[(N,)](*tables, factors, N, BLOCK=16, CAN_SKIP=False, **UNFUSED)
    assert torch.equal(kept.cpu(), norm / limit)
    assert torch.equal(factors.cpu(), 1 / limit)
    assert 0 < (limit > 1).sum() < N
