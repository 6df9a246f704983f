"""Parse bandwidths and times from text, and measure a device's memory bandwidth."""

from __future__ import annotations

import math
import re

import torch


def measure_bandwidth(device: torch.device | None = None, *, size: int | None = None) -> float:
    """Measure the bytes per second (read plus written) of a copy on CUDA, or of a pass in place on a CPU.

    A copy on a CPU also reads the cache lines that it overwrites. For an optimizer's step these are no extra reads,
    since it has read what it writes.

    Args:
        device: None for the CUDA device if there is one, else the CPU.
        size: Bytes of the buffer, far larger than any cache. None for 4 GiB on CUDA (at most a quarter of free
            memory), and 256 MiB on a CPU.
    """
    from torch.utils.benchmark import Timer

    if device is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if size is None:
        size = min(2**32, torch.cuda.mem_get_info(device)[0] // 4) if device.type == "cuda" else 2**28
    source = torch.ones(size // 4, dtype=torch.float32, device=device)
    in_place = device.type == "cpu"
    timer = Timer(
        "source.mul_(1.0)" if in_place else "target.copy_(source)",
        globals={"source": source, "target": source if in_place else torch.empty_like(source)},
        num_threads=torch.get_num_threads(),
    )
    timer.timeit(3)
    return 2 * size / timer.timeit(20).median


def parse_bandwidth(text: str) -> float:
    """Return the bytes per second of ``"3.35e12"``, ``"3350GB/s"`` or ``"3.35TB/s"`` (decimal units).

    Raises:
        ValueError: the text has another format, or is a number below 1e6, whose unit is probably missing.
    """
    found = re.fullmatch(r"\s*([0-9.]+(?:[eE][+-]?[0-9]+)?)\s*(?:([MGT])B/s)?\s*", text)
    try:
        value = float(found[1]) if found else math.nan
    except ValueError:
        value = math.nan
    value *= {"M": 1e6, "G": 1e9, "T": 1e12}[found[2]] if found and found[2] else 1
    if not (math.isfinite(value) and value >= 1e6):
        raise ValueError(
            f"bandwidth {text!r} is not understood: give bytes per second, such as 3.35e12, or a number with its "
            f"unit, such as 3350GB/s or 3.35TB/s"
        )
    return value


def parse_seconds(text: str, what: str = "latency") -> float:
    """Return the seconds of ``"1e-5"``, ``"10us"`` or ``"0.01ms"``.

    Raises:
        ValueError: the text has another format, or is 1 second or more, whose unit is probably missing.
    """
    found = re.fullmatch(r"\s*(\d*\.?\d+(?:[eE][+-]?\d+)?)\s*(us|ms|s)?\s*", text, re.ASCII)
    value = float(found[1]) * {"us": 1e-6, "ms": 1e-3}.get(found[2], 1) if found else math.nan
    if not 0 <= value < 1:
        raise ValueError(f"{what} {text!r} is not understood: give seconds below 1, such as 1e-5 or 10us")
    return value
