"""Tables that describe tensors to kernels, on their way from the host to the device."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

__all__ = ["TRITON_DTYPES", "Sender", "device_guard", "off"]

TRITON_DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.int8: tl.int8,  # codes of exp_avg; those of exp_avg_sq are uint8
}

off = (15).__and__
"""Bytes that an address is off a multiple of 16."""


class Sender:
    """Sends bytes to a device without waiting for it, into a CUDA graph that is being captured too.

    A replay sends again what lies in the host's memory then. So what is sent into a graph lies in pinned memory
    that was set aside before the capture (none can be had during one) and is never written again.
    """

    def __init__(self) -> None:
        self._spare: Tensor | None = None
        self._captured: list[Tensor] = []

    def send(self, data: bytes, device: torch.device, *, capturable: bool = False) -> Tensor:
        """The bytes on the device, uint8.

        Args:
            data: What to send.
            device: Where to.
            capturable: Whether a later call, of as many bytes at the most, may come under capture.

        Raises:
            RuntimeError: a graph is being captured, and no call before it has set memory aside.
        """
        host = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        if device.type != "cuda":
            return host.to(device)
        if capturable and torch.cuda.is_current_stream_capturing():
            if self._spare is None or len(self._spare) < len(data):
                raise RuntimeError(
                    "GWTAdamW.step() is being captured in a CUDA graph with tensors that it has not stepped "
                    "before: take a few steps before each capture, on a side stream"
                )
            pinned, self._spare = self._spare, None
            self._captured.append(pinned)
            pinned[: len(data)].copy_(host)
            return pinned[: len(data)].to(device, non_blocking=True)
        if capturable and (self._spare is None or len(self._spare) < len(data)):
            self._spare = torch.empty(len(data), dtype=torch.uint8, pin_memory=True)
        return host.pin_memory().to(device, non_blocking=True)  # the allocator keeps it until it is read


def device_guard(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Make a CUDA device the current one, which is where Triton launches."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
