"""Tensors end to end in one buffer: kernels take their addresses, other code takes views."""

from __future__ import annotations

import itertools
import math
from array import array
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class MatrixPiece(NamedTuple):
    """Slice of this process's part of a parameter that is exchanged at once: ``part[start : start + length]``.

    Attributes:
        param: The parameter's index among those that have a gradient on this process.
        start: First index along the first dimension of this process's part.
        length: Size of that dimension, unless it is a batch dimension, which may be cut.
    """

    param: int
    start: int
    length: int

    def of(self, part: Tensor) -> Tensor:
        """Return the slice of this process's part of the parameter, or of a state with the same first dimension."""
        return part if self.length == part.shape[0] else part.narrow(0, self.start, self.length)


class Places:
    """Positions of tensors of given shapes in a buffer, the same in every step.

    Args:
        shapes: Shapes of the tensors, in order.
        dtype: dtype of the buffer.
    """

    def __init__(self, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype) -> None:
        self.numel = sum(map(math.prod, shapes))
        self._alike = [(len(list(alike)), shape) for shape, alike in itertools.groupby(shapes)]
        self._offsets = [dtype.itemsize * n for n in itertools.accumulate(map(math.prod, shapes), initial=0)][:-1]
        self._first, self._words = -1, b""

    def __len__(self) -> int:
        return len(self._offsets)

    def addresses(self, buffer: Tensor) -> bytes:
        """Return the tensors' addresses in a buffer, 8 bytes each."""
        first = buffer.data_ptr()
        if first != self._first:  # an allocator tends to return the same memory again
            self._first = first
            self._words = array("q", [first + offset for offset in self._offsets]).tobytes()
        return self._words

    def views(self, buffer: Tensor) -> list[Tensor]:
        """Return the tensors, as views of a buffer."""
        runs = buffer.split_with_sizes([n * math.prod(shape) for n, shape in self._alike]) if self._alike else ()
        return [x for run, (n, shape) in zip(runs, self._alike, strict=True) for x in run.view(n, *shape).unbind()]


class LaidOut(Sequence[Tensor]):
    """Tensors in a buffer, created at the first access to one of them.

    Args:
        places: Their positions.
        buffer: Tensor of one dimension.
    """

    def __init__(self, places: Places, buffer: Tensor) -> None:
        self._places, self._buffer = places, buffer
        self._views: list[Tensor] | None = None

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: Any) -> Any:
        if self._views is None:
            self._views = self._places.views(self._buffer)
        return self._views[index]

    def addresses(self) -> bytes:
        """Return the tensors' addresses, 8 bytes each."""
        return self._places.addresses(self._buffer)

    @property
    def nbytes(self) -> int:
        """Bytes of the buffer."""
        return self._buffer.nbytes

    def release(self) -> None:
        """Release the buffer, even if other code still refers to the sequence."""
        self._buffer, self._views = self._buffer.new_empty(0), None
