"""Surveys in C, compiled by Triton's own builder of extension modules."""

from __future__ import annotations

import ctypes
import functools
import logging
import struct
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from gwt_kernels.core.dtensor import is_sharded, local_of
from gwt_kernels.core.survey import PYTHON, States, Survey, Tensors, has_memory

SOURCE = Path(__file__).with_name("survey.c")


@functools.cache
def quickest() -> Survey:
    """Return the survey in C, or Python's if C is not available."""
    try:
        return compiled()
    except Exception:  # no compiler, no headers, or another PyTorch: Python needs none of them
        logging.getLogger(__name__).debug("survey.c cannot be used", exc_info=True)
        return PYTHON


def compiled() -> Survey:
    """Return the survey in C.

    Raises:
        Exception: of any type, if it cannot be compiled or does not fit PyTorch's object layout.
    """
    c = module()
    samples = [torch.empty(n, dtype=torch.float32, device="cpu") for n in (6, 5)]
    samples[1] = Parameter(samples[1])
    c.open(Tensor, Parameter, Tensor.data_ptr, Tensor.grad, _offset(samples))
    if c.addresses(samples) != PYTHON.addresses(samples):
        raise RuntimeError("PyTorch's interface for C finds tensors at other addresses than Python does")

    def grads(params: list[Tensor]) -> list[Tensor | None]:
        with torch._C.DisableTorchFunctionSubclass():  # as in Python
            found: list[Tensor | None] = c.grads(params)
            return found

    def like(tensors: Tensors) -> Callable[[Tensors], bool]:
        kinds = c.kinds(tensors)
        return PYTHON.like(tensors) if kinds is None else lambda others: c.alike(others, kinds)

    def still(state: States) -> Callable[[States], bool]:
        entries = c.entries(state)
        values = [x for entry in state.values() if isinstance(entry, dict) for x in entry.values()]
        kinds = [has_memory(x) + is_sharded(x) for x in values]
        places = [local_of(x).data_ptr() if kind else 0 for x, kind in zip(values, kinds, strict=True)]
        memory = struct.pack(f"{2 * len(values)}Q", *chain.from_iterable(zip(kinds, places, strict=True)))
        return lambda now: c.still(now, entries, memory)

    return Survey(c.addresses, grads, c.same, like, still)


def module() -> Any:
    """Return the module of survey.c, cached by Triton, before its ``open()`` is called."""
    from triton.runtime.build import compile_module_from_src

    libraries = str(Path(torch.__file__).with_name("lib"))
    return compile_module_from_src(
        SOURCE.read_text(), "gwt_survey", library_dirs=[libraries], libraries=["torch_cpu"]
    )


def _offset(samples: list[Any]) -> int:
    """Return the offset of the tensor pointer in a tensor's Python object; PyTorch exposes only the pointer."""
    size = Tensor.__basicsize__ // 8
    words = [struct.unpack(f"{size}Q", ctypes.string_at(id(x), 8 * size)) for x in samples]
    (place,) = [i for i in range(size) if all(own[i] == x._cdata for own, x in zip(words, samples, strict=True))]
    return 8 * place
