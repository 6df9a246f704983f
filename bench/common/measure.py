"""Timing, memory and facts about the machine, the same for every benchmark."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import platform
import re
import subprocess
import time
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, supported_activities

from gwt_kernels.backends import choice

_CYCLES_PER_SECOND = 2e9  # about a GPU's clock rate, rounded up, so that it never idles for less than requested


class Spread(NamedTuple):
    """Median and 20th and 80th percentile of repeated measurements."""

    median: float
    p20: float
    p80: float
    samples: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        p20, median, p80 = np.percentile(values, [20, 50, 80])
        return cls(float(median), float(p20), float(p80), len(values))


def clock(work: Callable[[], object], device: torch.device, *, lead: float = 0.01) -> tuple[float, float]:
    """Run `work` once and return its seconds on the device and on the host.

    On CUDA the first is the time between two events around the work, and the second the host's time for the call;
    on a CPU both are the time of the call. CUDA work is queued behind a sleep kernel, so that the device does not
    wait for the host and the events enclose device work only. If the work itself waits for the device, or launches
    more kernels than the queue holds (about a thousand), its time includes launch latency.

    Args:
        work: Function to time.
        device: Device that it runs on.
        lead: Seconds of sleep, which should be longer than the work takes to launch.
    """
    if device.type != "cuda":
        start = time.perf_counter()
        work()
        elapsed = time.perf_counter() - start
        return elapsed, elapsed
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda.synchronize(device)
    torch.cuda._sleep(int(lead * _CYCLES_PER_SECOND))  # type: ignore[no-untyped-call]
    begin.record()
    start = time.perf_counter()
    work()
    host = time.perf_counter() - start
    end.record()
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end) / 1e3, host


def wall_clock(work: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Run `work` once on an idle device; return the time until the call returns and until the device is done.

    Both are seconds from the start of the call; on a CPU they are equal.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    host = wall = time.perf_counter() - start
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        wall = time.perf_counter() - start
    return host, wall


def kernel_launches(work: Callable[[], object], device: torch.device) -> int | None:
    """Run `work` once and count its CUDA kernels; None on a CPU, or where the profiler sees none.

    Copies and fills by the driver are not counted.
    """
    if device.type != "cuda" or ProfilerActivity.CUDA not in supported_activities():
        return None
    torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        work()
        torch.cuda.synchronize(device)
    kernels = [
        event
        for event in profiler.events() or []
        if event.device_type == torch.autograd.DeviceType.CUDA
        and not getattr(event, "is_user_annotation", False)
        and not event.name.startswith(("Memcpy", "Memset", "Optimizer."))  # torch.optim annotates its steps
    ]
    return len(kernels) or None


def plain_tensors(holder: object) -> Iterator[Tensor]:
    """Yield every plain tensor of an object once: those in containers, attributes and tensor subclasses."""
    seen: dict[int, object] = {}
    pending = [holder]
    while pending:
        item = pending.pop()
        if id(item) in seen:
            continue
        seen[id(item)] = item  # kept alive, since the id of a freed object may be used again
        if isinstance(item, Tensor):
            if hasattr(item, "__tensor_flatten__"):  # quantized states wrap their values and scales this way
                names, _ = item.__tensor_flatten__()
                pending += [getattr(item, name) for name in names]
            else:
                yield item
        elif isinstance(item, Mapping):
            pending += item.values()
        elif isinstance(item, list | tuple | set | frozenset):
            pending += item
        elif not isinstance(item, type | types.ModuleType | types.FunctionType | types.MethodType):
            pending += getattr(item, "__dict__", {}).values()


def held_bytes(holder: object, apart: Iterable[Tensor] = ()) -> int:
    """Count the bytes of memory kept by an object's tensors, shared memory once, excluding that of `apart`."""
    sizes = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in plain_tensors(holder))}
    for tensor in apart:
        sizes.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(sizes.values())


def chosen_device(name: str | None) -> torch.device:
    """Return the device of a name, by default CUDA if available; a CUDA device always with its index.

    `torch.cuda.set_device` refuses a device without an index, and events and streams use the current device.

    Raises:
        ValueError: PyTorch knows no device of that name.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ValueError(f"--device {name}: PyTorch knows no such device; use --device cpu or cuda") from error
    return torch.device("cuda", 0) if device == torch.device("cuda") else device


def is_present(device: torch.device) -> bool:
    """Return whether PyTorch finds a device; the CPU always exists."""
    return device.type == "cpu" or (device.type == "cuda" and device.index < torch.cuda.device_count())


def available_bytes(device: torch.device) -> int:
    """Return the bytes that can still be allocated on a device."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    found = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    if found is None:
        raise RuntimeError("/proc/meminfo has no MemAvailable line; this benchmark knows Linux only")
    return int(found[1]) * 1024


def facts(device: torch.device, module: str, arguments: Iterable[str], commit: str | None = None) -> dict[str, Any]:
    """Return the facts that every row of results records about its origin.

    Args:
        device: Where the benchmark runs.
        module: The module that was run, for the exact command.
        arguments: Its command line.
        commit: The commit measured, where the tree is no git checkout; None asks git.
    """
    return {
        "commit": commit or commit_of_checkout(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join(("python -m", module, *arguments)),
        "device": device_name(device),
        "driver": _driver(device),
        "threads": torch.get_num_threads(),
        "own_backend": own_backend(device),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
    }


def own_backend(device: torch.device) -> str:
    """Return the backend that `GWTAdamW` chooses on a device by default."""
    if device.type == "cpu" and choice.is_compiled(None, device):
        return "compiled"
    return choice.resolve(None, device, torch.float32, level=2)


def device_name(device: torch.device) -> str:
    """Return the model of the GPU, or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return found[1].strip() if found else platform.machine()


def commit_of_checkout() -> str:
    """Return the commit of the checkout, with "-dirty" if Python files differ from it; "unknown" without git."""
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        here = Path(__file__).parents[1]

        def git(*words: str) -> str:
            return subprocess.run(
                ("git", *words), cwd=here, check=True, capture_output=True, text=True
            ).stdout.strip()

        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "--", "*.py") else "")
    return "unknown"


def _driver(device: torch.device) -> str:
    if device.type == "cuda":
        query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            return subprocess.run(query, check=True, capture_output=True, text=True).stdout.split("\n")[0].strip()
    return "none" if device.type == "cpu" else "unknown"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"
