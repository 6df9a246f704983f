"""Fixtures of tests of benchmarks: one thread, an empty checkout, and quick kernels.

If pytest is given a file of this folder, it imports this one before it chooses Triton's interpreter. So nothing
here imports Triton at import time.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Use one thread, since sharing tensors this small among threads only takes time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Return a checkout without results."""
    from tests.support.reports import checkout

    return checkout(tmp_path)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the bandwidth measurement, and shrink the cache so that a few sets of tiny buffers fill it."""
    from bench.common.measure import Spread
    from bench.kernels import __main__ as kernels

    monkeypatch.setattr(kernels, "copy_bandwidth", lambda device: Spread(1e9, 0.9e9, 1.1e9, 20))
    monkeypatch.setattr(kernels, "CPU_CACHE", 4096)
