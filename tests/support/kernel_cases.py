"""Tiny cases of the kernel benchmark, and quick runs of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from bench.common import records
from bench.kernels import __main__ as kernels
from bench.kernels.cases import Case
from bench.kernels.oracle import Buffers, check

CPU = torch.device("cpu")
HALF, SINGLE = torch.bfloat16, torch.float32
TINY = ["--device", "cpu", "--shapes", "6x16", "5x37", "--repetitions", "2", "--commit", "abc"]


def run(folder: Path, *arguments: str) -> tuple[int, list[dict[str, Any]]]:
    """Return the status and the rows of a run."""
    status = kernels.main([*arguments, "--out", str(folder / "out")])
    (path,) = (folder / "out").glob("*.json")
    benchmark, rows = records.read(path)
    assert benchmark == "kernels"
    return status, rows


def step(
    level: int = 2, *, limited: bool = False, shape: tuple[int, ...] = (6, 16), data: torch.dtype = SINGLE
) -> Case:
    return Case("step_limiter" if limited else "step", shape, level, data, SINGLE)


def quantized(shape: tuple[int, ...], level: int = 2, *, limited: bool = False) -> Case:
    return step(level, limited=limited, shape=shape, data=HALF)._replace(moments=torch.int8)


def error_of(case: Case, device: torch.device = CPU, backend: Any = None) -> float:
    before = Buffers(case, device, backend)
    return check(before.clone(), before)
