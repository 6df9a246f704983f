"""Bandwidths of memory, over which a roofline divides the bytes that must move."""

from __future__ import annotations

from typing import NamedTuple

import torch

from bench.common.measure import Spread, available_bytes, clock


def copy_bandwidth(device: torch.device, *, size: int | None = None, repetitions: int = 20) -> Spread:
    """Measure bytes moved per second (read plus written) by a copy within the device's memory.

    Args:
        device: Where to copy.
        size: Bytes of the buffer; None for 4 GiB on CUDA (less where less is free) and 256 MiB on a CPU, both
            far above any cache.
        repetitions: Timed copies, after three for warming up.
    """
    if size is None:
        size = min(4 * 2**30, available_bytes(device) // 4) if device.type == "cuda" else 256 * 2**20
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = [clock(lambda: target.copy_(source), device)[0] for _ in range(3 + repetitions)][3:]
    return Spread.of([2 * size / second for second in seconds])


def in_place_bandwidth(device: torch.device, *, size: int | None = None, repetitions: int = 20) -> Spread:
    """Measure bytes moved per second (read plus written) by a pass that overwrites what it has read.

    On a CPU an optimizer's step is such a pass, and a copy is a slower one: it also reads the cache lines that it
    overwrites.

    Args:
        device: Where to pass.
        size: Bytes of the buffer; None for 256 MiB, far above any cache.
        repetitions: Timed passes, after three for warming up.
    """
    size = 256 * 2**20 if size is None else size
    buffer = torch.ones(size // 4, dtype=torch.float32, device=device)
    seconds = [clock(lambda: buffer.mul_(1.0), device)[0] for _ in range(3 + repetitions)][3:]
    return Spread.of([2 * size / second for second in seconds])


class Bandwidth(NamedTuple):
    """Bytes that a pass over memory moves per second.

    Attributes:
        metric: What the results call it.
        words: What people call it.
        spread: As measured.
    """

    metric: str
    words: str
    spread: Spread


def step_bandwidth(device: torch.device, *, size: int | None = None) -> Bandwidth:
    """Measure the bandwidth that bounds an optimizer's step: of a pass in place on a CPU, else of a copy."""
    if device.type == "cpu":
        return Bandwidth("in_place_bandwidth", "bandwidth in place", in_place_bandwidth(device, size=size))
    return Bandwidth("copy_bandwidth", "copy bandwidth", copy_bandwidth(device, size=size))
