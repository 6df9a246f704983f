"""Makes Triton's interpreter behave like a GPU where it differs: bfloat16 conversion, and division by zero."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from gwt_kernels.backends import choice


@contextlib.contextmanager
def like_a_gpu() -> Iterator[None]:
    """Silence warnings of masked lanes, and convert like a GPU, within the context.

    By itself, the interpreter truncates float32 to bfloat16, and changes subnormal bfloat16 numbers when it widens
    them.
    """
    if not choice.interpreted():
        yield
        return
    import triton.language as tl
    from triton.runtime import interpreter

    original = interpreter._convert_float

    def convert(data: np.ndarray, source: Any, target: Any, mode: Any) -> np.ndarray:
        if (source, target) == (tl.bfloat16, tl.float32):
            return np.array(data).view(np.uint16).astype(np.uint32) << 16
        if (source, target) != (tl.float32, tl.bfloat16):
            return original(data, source, target, mode)
        values = torch.from_numpy(np.array(data).view(np.float32))
        return values.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)

    interpreter._convert_float = convert
    try:
        with np.errstate(all="ignore"):
            yield
    finally:
        interpreter._convert_float = original
