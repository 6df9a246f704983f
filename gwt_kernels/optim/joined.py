"""Join a scalar of many states in one tensor, which a step reads and updates at once."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gwt_kernels.backends import choice
from gwt_kernels.core.send import send

_ONE = torch.ones((), dtype=torch.float64, device="cpu")  # adding a Python number takes several times as long
_COUNT = struct.Struct("d")


class Joined:
    """The scalars of several states in one tensor, of which those in the states are views.

    The states' tensor objects stay, and their memory becomes part of ``values``. If the memory must not move, since
    other processes share it or operators are being traced, ``values`` is a copy: :meth:`read` it before a step and
    :meth:`write` it back afterwards.

    On a CPU each state's tensor has its own storage over that memory, so that saving it saves no other scalar.

    Args:
        states: The parameters' states, in order.
        key: Key of the scalar in each state.
        dtype: dtype of ``values``.
        device: Device of ``values``.
        apart: Whether the states' memory must not move.
    """

    values: Tensor
    """``[len(states)]``."""

    def __init__(
        self, states: Sequence[dict[str, Any]], key: str, dtype: torch.dtype, device: torch.device, apart: bool
    ) -> None:
        tensors = [state[key] for state in states]
        self._n = len(tensors)
        shared = device.type == "cpu" and any(x.device.type == "cpu" and x.is_shared() for x in tensors)
        self._apart = tensors if apart or shared else None
        scalars = [x.detach().reshape(()).to(dtype) for x in tensors]
        if len({x.device for x in scalars}) > 1:  # loaded states and states counted on the device
            scalars = [send(x, device) for x in scalars]
        self.values = send(torch.stack(scalars), device)
        self._memory: bytearray | None = None  # of ``values``, if the host accesses it directly
        if self._apart is not None:
            return
        parts = self._parts() if device.type == "cpu" else self.values.unbind()
        inference = torch.is_inference_mode_enabled()
        for state, old, part in zip(states, tensors, parts, strict=True):
            alike = (old.dtype, old.device, old.shape) == (part.dtype, part.device, part.shape)
            if alike and type(old) is Tensor and not (inference or old.is_inference()):
                old.data = part  # other references to the state's tensor stay valid
            else:
                state[key] = part

    def _parts(self) -> list[Tensor]:
        """Move ``values`` to host memory, and return a scalar tensor with its own storage over each value."""
        size, dtype = self.values.element_size(), self.values.dtype
        memory = self._memory = bytearray(size * len(self.values))
        self.values = torch.frombuffer(memory, dtype=dtype).copy_(self.values)
        return [
            torch.frombuffer(memory, dtype=dtype, count=1, offset=size * i).reshape(())
            for i in range(len(self.values))
        ]

    def read(self) -> None:
        """Copy the states' scalars to ``values``, if it is a copy."""
        if self._apart is not None:
            like = self.values
            self.values = torch.stack([x.detach().reshape(()).to(like.device, like.dtype) for x in self._apart])
            self._before = self.values.clone()

    def write(self) -> None:
        """Copy ``values`` to the states, if it is a copy."""
        for x, value in zip(self._apart or (), self.values.unbind() if self._apart else (), strict=True):
            x.copy_(value)

    def write_counts(self) -> None:
        """Add to the states the steps counted since :meth:`read`, if ``values`` is a copy.

        Adding the difference keeps steps of other processes.
        """
        if self._apart is not None:
            for x, more in zip(self._apart, (self.values - self._before).unbind(), strict=True):
                x.add_(more)

    def next_steps(self) -> list[int]:
        """Return the scalars plus 1 as Python integers; 1 for fake tensors, which have no numbers.

        Raises:
            RuntimeError: a graph is being traced, and a scalar has no value.
        """
        if self._apart is not None:
            return [int(_number(x)) + 1 for x in self._apart]
        if (common := self._common()) is not None:
            return [int(common) + 1] * self._n
        return [int(count) + 1 for count in self.values.tolist()]

    def count(self) -> None:
        """Add 1 to each scalar."""
        if self._memory is not None and (common := self._common()) is not None:
            self._memory[:] = _COUNT.pack(common + 1) * self._n
        elif self._apart is None:
            self.values.add_(_ONE)
        for x in self._apart or ():  # in place, which keeps steps of other processes
            x.add_(1)

    def _common(self) -> float | None:
        """Return the common value; None if values differ, or can only be read through a tensor, which is slower."""
        words = self._memory
        if not words or words != words[: _COUNT.size] * self._n:
            return None
        number: float = _COUNT.unpack_from(words)[0]
        return number


def _number(x: Tensor) -> float:
    try:
        return float(x)
    except RuntimeError:  # meta tensors raise a subclass
        if choice.is_graph():
            raise
        return 0.0
