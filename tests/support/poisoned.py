"""Tensors inside larger buffers full of NaN, so that reads and writes outside of them show."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

LAYOUTS = ("contiguous", "misaligned", "transposed", "strided", "gaps")
GUARD = 4096  # elements of NaN before and after: a whole tile, and a multiple of 16 bytes in every dtype
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@contextlib.contextmanager
def uninitialized() -> Iterator[None]:
    """Fill uninitialized allocations of torch with NaN within the context."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(before)


class Poisoned:
    """A tensor in a buffer of NaN.

    Attributes:
        tensor: holds the given values, in the given layout.
        buffer: the 1-D memory around it.
    """

    def __init__(self, values: Tensor, layout: str = "contiguous") -> None:
        shape = values.shape
        place = _PLACES[layout if values.dim() else "contiguous"]
        size, offset, strides = place(shape)
        self.buffer = torch.full((size + offset + 2 * GUARD,), math.nan, dtype=values.dtype, device=values.device)
        self.tensor = self.buffer.as_strided(shape, strides, GUARD + offset)
        self.tensor.copy_(values)
        outside = torch.ones(self.buffer.shape, dtype=torch.bool, device=values.device)
        outside.as_strided(shape, strides, GUARD + offset).fill_(False)
        self._outside = outside
        self._before = self._guards().clone()

    def check(self) -> None:
        """Raise AssertionError if a bit outside the tensor has changed."""
        changed = (self._guards() != self._before).nonzero()
        assert not len(changed), f"{len(changed)} elements outside a tensor of {self.tensor.shape} were written"

    def _guards(self) -> Tensor:
        return self.buffer.view(_BITS[self.buffer.element_size()])[self._outside]


def _packed(shape: Sequence[int]) -> list[int]:
    return [max(1, math.prod(shape[i + 1 :])) for i in range(len(shape))]


def _contiguous(shape: Sequence[int]) -> tuple[int, int, list[int]]:
    return math.prod(shape), 0, _packed(shape)


def _misaligned(shape: Sequence[int]) -> tuple[int, int, list[int]]:
    return math.prod(shape), 1, _packed(shape)


def _transposed(shape: Sequence[int]) -> tuple[int, int, list[int]]:
    return math.prod(shape), 0, _packed(shape[::-1])[::-1]


def _strided(shape: Sequence[int]) -> tuple[int, int, list[int]]:
    return 2 * math.prod(shape), 0, [2 * stride for stride in _packed(shape)]


def _rows_with_gaps(shape: Sequence[int]) -> tuple[int, int, list[int]]:
    """Return contiguous rows with 3 elements between them, as in a slice of a wider tensor."""
    wider = [*shape[:-1], shape[-1] + 3]
    return math.prod(wider), 0, _packed(wider)


_PLACES: dict[str, Callable[[Sequence[int]], tuple[int, int, list[int]]]] = {
    "contiguous": _contiguous,
    "misaligned": _misaligned,
    "transposed": _transposed,
    "strided": _strided,
    "gaps": _rows_with_gaps,
}
