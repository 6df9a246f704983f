"""Memory bandwidths for rooflines, which are the bytes that must move over such a bandwidth."""

from __future__ import annotations

import torch

from bench.common.measure import Spread, available_bytes, clock


def copy_bandwidth(device: torch.device, *, size: int | None = None, repetitions: int = 20) -> Spread:
    """Measure bytes moved per second (read plus written) by a copy within the device's memory.

    Args:
        device: Device whose memory is copied.
        size: Bytes of the buffer; None for 4 GiB on CUDA (less where less is free) and 256 MiB on a CPU, both
            far above any cache.
        repetitions: Number of timed copies, after three to warm up.
    """
    if size is None:
        size = min(4 * 2**30, available_bytes(device) // 4) if device.type == "cuda" else 256 * 2**20
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = [clock(lambda: target.copy_(source), device)[0] for _ in range(3 + repetitions)][3:]
    return Spread.of([2 * size / second for second in seconds])


class StepBandwidth:
    """The bandwidth that bounds an optimizer's step: that of an in-place pass on a CPU, else that of a copy.

    On a CPU a step overwrites the cache lines that it has read. A copy is slower, since it also has to read the
    lines that it overwrites. Other load and the clock rate change a CPU's bandwidth within seconds, so passes take
    turns with the steps.

    Attributes:
        metric: Name in the records.
        words: Name in printed text.
        spread: Bytes moved per second (read plus written), measured by the constructor.
    """

    def __init__(self, device: torch.device, *, size: int | None = None, repetitions: int = 20) -> None:
        """Measure the bandwidth.

        Args:
            device: Device whose memory is measured.
            size: Bytes of the buffer; None as for `copy_bandwidth`.
            repetitions: Number of timed passes, after three to warm up.
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
        """Return bytes moved per second: by one more pass on a CPU, else the measured median."""
        if self._buffer is None:
            return self.spread.median
        buffer = self._buffer
        return 2 * buffer.nbytes / clock(lambda: buffer.mul_(1.0), self._device)[0]
