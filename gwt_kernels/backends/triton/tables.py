"""Build tables of pointers and scalars on the host, and send them to the device."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from gwt_kernels.backends.triton.native import quickest
from gwt_kernels.backends.triton.schema import CONSTANTS, SCALARS
from gwt_kernels.core.hyper import Hyper
from gwt_kernels.core.laid_out import LaidOut
from gwt_kernels.formats.moments import FORMATS
from gwt_kernels.rules import Rule

TRITON_DTYPES = {
    dtype: getattr(tl, str(dtype).removeprefix("torch."))
    for dtype in (torch.float16, *chain.from_iterable(each.dtypes for each in FORMATS.values()))
}
"""Triton's dtypes of weights, gradients and moments."""

_MISALIGNMENT = bytes(i & 15 for i in range(256))  # by the lowest byte of an address
_pack_constants = struct.Struct(f"{len(CONSTANTS)}d").pack
_pack_scalars = struct.Struct(f"{len(SCALARS)}f").pack


def addresses(tensors: Sequence[Tensor]) -> bytes:
    """Return the tensors' addresses, 8 bytes each."""
    if isinstance(tensors, LaidOut):
        return tensors.addresses()
    return quickest().addresses(tensors)


def misalignments(words: bytes) -> bytes:
    """Return each address modulo 16."""
    return words[::8].translate(_MISALIGNMENT)


class Sender:
    """Sends bytes to a device without waiting for it, also while a CUDA graph is being captured.

    A replay copies the host memory again. Captured copies therefore use pinned memory that was allocated before the
    capture and is never written again. What they send is on the device only once the graph is replayed, so that
    tables of later steps are refused.
    """

    def __init__(self) -> None:
        self._spare: Tensor | None = None
        self._captured: list[Tensor] = []

    def send(self, data: bytes, device: torch.device, *, capturable: bool = False) -> Tensor:
        """Return the bytes on the device, as int64.

        Args:
            data: Bytes to send, a multiple of 8.
            device: Target device.
            capturable: Whether this call, or a later one of at most as many bytes, may be captured.

        Raises:
            RuntimeError: a graph is being captured, and this is not capturable, or no earlier call has allocated
                pinned memory.
        """
        host = torch.frombuffer(bytearray(data), dtype=torch.int64)
        if device.type != "cuda":
            return host.to(device)
        if torch.cuda.is_current_stream_capturing():
            if not capturable or self._spare is None or len(self._spare) < len(host):
                raise RuntimeError(
                    "a step is being captured in a CUDA graph with tensors or options that it has not stepped "
                    "before, or with counts of steps on the host: take a few steps before each capture, on a side "
                    "stream, with counts of steps on the device"
                )
            pinned, self._spare = self._spare, None
            self._captured.append(pinned)
            pinned[: len(host)].copy_(host)
            return pinned[: len(host)].to(device, non_blocking=True)
        if capturable and (self._spare is None or len(self._spare) < len(host)):
            self._spare = torch.empty_like(host, pin_memory=True)
        return host.pin_memory().to(device, non_blocking=True)  # the allocator keeps it until the copy is done


def owners(counts: Tensor, total: int) -> Tensor:
    """Return the tensor index of each tile or chunk: int32 ``[total]``, computed on the device.

    Args:
        counts: Number of tiles or chunks per tensor: int64, on the device.
        total: Sum of ``counts``.
    """
    tensors = torch.arange(len(counts), dtype=torch.int32, device=counts.device)
    return torch.repeat_interleave(tensors, counts, output_size=total)


def device_guard(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Make a CUDA device current, since Triton launches there."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def scalar_rows(hypers: Sequence[Hyper], steps: Sequence[int], rule: Rule) -> list[bytes]:
    """Return a row of scalars per tensor; neighbours with the same options and step share one."""
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
    """Return a row of `rows_kernel`'s constants per tensor; neighbours with the same options share one."""
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
    """Return addresses of learning rates that are tensors, and 0 for numbers."""
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
