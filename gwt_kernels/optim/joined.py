"""A scalar that many states have, as one tensor that a step takes and changes at once."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gwt_kernels.backends import choice
from gwt_kernels.backends.step_decision import send

__all__ = ["Joined"]

_ONE = torch.ones((), dtype=torch.float64, device="cpu")  # adding a number of Python's takes several times as long
_COUNT = struct.Struct("d")


class Joined:
    """The scalars of several states in one tensor, of which those in the states are views.

    The states hold the truth: their tensor objects stay, and their memory becomes part of ``values``. Where it must
    not move, since other processes share it or operators are being traced, ``values`` is a copy: :meth:`read` it
    before a step and :meth:`write` it back afterwards.

    On a CPU each state's tensor has a storage of its own over that memory, which nothing but itself is saved with.

    Args:
        states: Of the parameters, in order.
        key: Of the scalar in each.
        dtype: That it is kept in.
        device: Where ``values`` lies.
        apart: Whether the memory has to stay where it is.
    """

    values: Tensor
    """``[len(states)]``."""

    def __init__(
        self, states: Sequence[dict[str, Any]], key: str, dtype: torch.dtype, device: torch.device, apart: bool
    ) -> None:
        own = [state[key] for state in states]
        self._n = len(own)
        shared = device.type == "cpu" and any(x.device.type == "cpu" and x.is_shared() for x in own)
        self._apart = own if apart or shared else None
        scalars = [x.detach().reshape(()).to(dtype) for x in own]
        if len({x.device for x in scalars}) > 1:  # some were loaded, some counted on the device
            scalars = [send(x, device) for x in scalars]
        self.values = send(torch.stack(scalars), device)
        self._memory: bytearray | None = None  # of ``values``, where the host reads and writes it itself
        if self._apart is not None:
            return
        parts = self._parts() if device.type == "cpu" else self.values.unbind()
        inference = torch.is_inference_mode_enabled()
        for state, old, part in zip(states, own, parts, strict=True):
            alike = (old.dtype, old.device, old.shape) == (part.dtype, part.device, part.shape)
            if alike and type(old) is Tensor and not (inference or old.is_inference()):
                old.data = part  # whoever holds the state's tensor goes on seeing what it says
            else:
                state[key] = part

    def _parts(self) -> list[Tensor]:
        """A tensor over the memory of each value; ``values`` moves to memory where that can be."""
        size, dtype = self.values.element_size(), self.values.dtype
        memory = self._memory = bytearray(size * len(self.values))
        self.values = torch.frombuffer(memory, dtype=dtype).copy_(self.values)
        return [
            torch.frombuffer(memory, dtype=dtype, count=1, offset=size * i).reshape(())
            for i in range(len(self.values))
        ]

    def read(self) -> None:
        """Take what the states say, where ``values`` is a copy."""
        if self._apart is not None:
            like = self.values
            self.values = torch.stack([x.detach().reshape(()).to(like.device, like.dtype) for x in self._apart])
            self._before = self.values.clone()

    def write(self) -> None:
        """Tell the states, where ``values`` is a copy."""
        for x, value in zip(self._apart or (), self.values.unbind() if self._apart else (), strict=True):
            x.copy_(value)

    def write_counts(self) -> None:
        """Tell the states how many have been counted since ``values``, a copy, was read.

        The difference is added, so that no step of another process is lost.
        """
        if self._apart is not None:
            for x, more in zip(self._apart, (self.values - self._before).unbind(), strict=True):
                x.add_(more)

    def next_steps(self) -> list[int]:
        """The scalars plus 1, as the host knows them; 1 for those of fake tensors, which have no numbers.

        Raises:
            RuntimeError: a graph is being traced in which a scalar has no number yet.
        """
        if self._apart is not None:
            return [int(_number(x)) + 1 for x in self._apart]
        if (common := self._common()) is not None:
            return [int(common) + 1] * self._n
        return [int(count) + 1 for count in self.values.tolist()]

    def count(self) -> None:
        """Add 1 to each."""
        if self._memory is not None and (common := self._common()) is not None:
            self._memory[:] = _COUNT.pack(common + 1) * self._n
        elif self._apart is None:
            self.values.add_(_ONE)
        for x in self._apart or ():  # not a copy, so that no step of another process is lost
            x.add_(1)

    def _common(self) -> float | None:
        """The number that all are; None where they differ, or a tensor alone tells, at several times the time."""
        words = self._memory
        if not words or words != words[: _COUNT.size] * self._n:
            return None
        number: float = _COUNT.unpack_from(words)[0]
        return number


def _number(x: Tensor) -> float:
    try:
        return float(x)
    except RuntimeError:  # of which what a meta tensor raises is one
        if choice.is_graph():
            raise
        return 0.0
