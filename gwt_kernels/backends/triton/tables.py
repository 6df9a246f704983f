"""Tables that describe tensors to kernels, pointers and numbers: made on the host, sent to the device."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Sequence
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from gwt_kernels.backends.triton.native import quickest
from gwt_kernels.backends.triton.schema import CONSTANTS, SCALARS
from gwt_kernels.core.hyper import Hyper
from gwt_kernels.rules import Rule

__all__ = [
    "TRITON_DTYPES",
    "Sender",
    "addresses",
    "constant_rows",
    "device_guard",
    "lr_ptrs",
    "misalignments",
    "owners",
    "scalar_rows",
]

TRITON_DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.int8: tl.int8,  # codes of exp_avg; those of exp_avg_sq are uint8
}

_OFFS = bytes(i & 15 for i in range(256))  # of an address by its lowest byte
_pack_constants = struct.Struct(f"{len(CONSTANTS)}d").pack
_pack_scalars = struct.Struct(f"{len(SCALARS)}f").pack


def addresses(tensors: Sequence[Tensor]) -> bytes:
    """Eight bytes for each tensor's."""
    return quickest().addresses(tensors)


def misalignments(words: bytes) -> bytes:
    """For each of these addresses the number of bytes that it is off a multiple of 16."""
    return words[::8].translate(_OFFS)


class Sender:
    """Sends bytes to a device without waiting for it, into a CUDA graph that is being captured too.

    A replay sends again what lies in the host's memory then. So what is sent into a graph lies in pinned memory
    that was set aside before the capture (none can be had during one) and is never written again.
    """

    def __init__(self) -> None:
        self._spare: Tensor | None = None
        self._captured: list[Tensor] = []

    def send(self, data: bytes, device: torch.device, *, capturable: bool = False) -> Tensor:
        """The bytes on the device, as int64.

        Args:
            data: What to send, a multiple of 8 bytes.
            device: Where to.
            capturable: Whether a later call, of as many bytes at the most, may come under capture.

        Raises:
            RuntimeError: a graph is being captured, and no call before it has set memory aside.
        """
        host = torch.frombuffer(bytearray(data), dtype=torch.int64)
        if device.type != "cuda":
            return host.to(device)
        if capturable and torch.cuda.is_current_stream_capturing():
            if self._spare is None or len(self._spare) < len(host):
                raise RuntimeError(
                    "step() is being captured in a CUDA graph with tensors that it has not stepped "
                    "before: take a few steps before each capture, on a side stream"
                )
            pinned, self._spare = self._spare, None
            self._captured.append(pinned)
            pinned[: len(host)].copy_(host)
            return pinned[: len(host)].to(device, non_blocking=True)
        if capturable and (self._spare is None or len(self._spare) < len(host)):
            self._spare = torch.empty_like(host, pin_memory=True)
        return host.pin_memory().to(device, non_blocking=True)  # the allocator keeps it until it is read


def owners(counts: Tensor, total: int) -> Tensor:
    """The tensor of each tile, or chunk: int32 ``[total]``, made on the device.

    Args:
        counts: How many each of the tensors has: int64, on the device.
        total: Their sum.
    """
    tensors = torch.arange(len(counts), dtype=torch.int32, device=counts.device)
    return torch.repeat_interleave(tensors, counts, output_size=total)


def device_guard(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Make a CUDA device the current one, which is where Triton launches."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def scalar_rows(hypers: Sequence[Hyper], steps: Sequence[int], rule: Rule) -> list[bytes]:
    """One row of numbers per tensor; rows of neighbours that share options and step are made once."""
    if steps.count(steps[0]) == hypers.count(hypers[0]) == len(steps):
        return [_row(hypers[0], steps[0], rule)] * len(steps)
    rows: list[bytes] = []
    last: tuple[Hyper, int] | None = None
    for hyper, step in zip(hypers, steps, strict=True):
        if last is not None and hyper is last[0] and step == last[1]:
            rows.append(rows[-1])
        else:
            rows.append(_row(hyper, step, rule))
            last = (hyper, step)
    return rows


def constant_rows(hypers: Sequence[Hyper], rule: Rule) -> list[bytes]:
    """One row per tensor of what `rows_kernel` takes; rows of neighbours that share options are made once."""
    rows: list[bytes] = []
    last: Hyper | None = None
    for hyper in hypers:
        if hyper is not last:
            last = hyper
            numbers = {
                "lr": 0.0 if isinstance(hyper.lr, Tensor) else hyper.lr,
                "b1": hyper.beta1,
                "b2": hyper.beta2,
                "eps": hyper.eps,
                "weight_decay": hyper.weight_decay,
                "scale": hyper.scale if rule.is_scaled else 1.0,
                "gamma": hyper.norm_growth_limit or 0.0,
                "sign": hyper.signed_factor,
                "corrects_bias": (hyper.correct_bias and rule.corrects_bias) * (2 if rule.corrects_inside else 1),
                "detail_scale": hyper.detail_scale,
            }
            row = _pack_constants(*map(numbers.__getitem__, CONSTANTS))
        rows.append(row)
    return rows


def lr_ptrs(hypers: Sequence[Hyper]) -> list[int]:
    """Where the learning rates that are tensors lie, 0 for those that are numbers."""
    return [hyper.lr.data_ptr() if isinstance(hyper.lr, Tensor) else 0 for hyper in hypers]


def _row(hyper: Hyper, step: int, rule: Rule) -> bytes:
    if rule.corrects_inside:
        hyper = hyper.corrected(step)
    numbers = {
        "b1": hyper.beta1,
        "rest1": 1 - hyper.beta1,
        "b2": hyper.beta2,
        "rest2": 1 - hyper.beta2,
        "eps": hyper.eps,
        "decay": float(hyper.lr) * hyper.weight_decay,
        "step_size": hyper.step_size(step, rule.is_scaled, rule.corrects_bias),
        "gamma": hyper.norm_growth_limit or 0.0,
        "grad_scale": hyper.signed_factor,
        "taken": 1.0,
        "detail_scale": hyper.detail_scale,
        "spare": 0.0,
    }
    return _pack_scalars(*map(numbers.__getitem__, SCALARS))
