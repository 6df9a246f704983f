"""Bandwidths of memory, over which a roofline divides the bytes that must move."""

from __future__ import annotations

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


class StepBandwidth:
    """The bandwidth that bounds an optimizer's step: of a pass in place on a CPU, else of a copy.

    On a CPU an optimizer's step is a pass that overwrites what it has read, and a copy is a slower one: it also
    reads the cache lines that it overwrites. Neighbours and the clock change a CPU's bandwidth within seconds, so
    that a pass takes turns with the steps.

    Attributes:
        metric: What the results call it.
        words: What people call it.
        spread: Bytes moved per second (read plus written), measured when this is made.
    """

    def __init__(self, device: torch.device, *, size: int | None = None, repetitions: int = 20) -> None:
        """Measure it.

        Args:
            device: Whose memory.
            size: Bytes of the buffer; None for `copy_bandwidth`'s.
            repetitions: Timed passes, after three for warming up.
        """
        self._device = device
        self._buffer: torch.Tensor | None = None
        if device.type != "cpu":
            self.metric, self.words = "copy_bandwidth", "copy bandwidth"
            self.spread = copy_bandwidth(device, size=size, repetitions=repetitions)
            return
        self.metric, self.words = "in_place_bandwidth", "bandwidth in place"
        self._buffer = torch.ones((256 * 2**20 if size is None else size) // 4)
        self.spread = Spread.of([self.now() for _ in range(3 + repetitions)][3:])

    def now(self) -> float:
        """Return bytes moved per second by one more pass on a CPU, else the median of those measured."""
        if self._buffer is None:
            return self.spread.median
        buffer = self._buffer
        return 2 * buffer.nbytes / clock(lambda: buffer.mul_(1.0), self._device)[0]
