"""Make Triton's interpreter faster, and like a GPU in conversions of bfloat16 and divisions by zero."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import math
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from gwt_kernels.backends import choice


@contextlib.contextmanager
def like_a_gpu() -> Iterator[None]:
    """Silence warnings of masked lanes, and convert like a GPU, within the context.

    By default, the interpreter truncates float32 to bfloat16, and changes subnormal bfloat16 numbers when it widens
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


def quicken() -> None:
    """Remove work from Triton's interpreter that changes no result; do nothing if Triton is not imported.

    By default, it prepares ``triton.language`` at each call of a device function too, and lists all members of the
    language's modules every time: half of the time of a launch. A third of the rest is checks of integer overflow,
    which it computes but uses only for debugging. A third of what remains is descriptions of tensor types, which
    are few, but created for each tensor.
    """
    interpreter: Any = sys.modules.get("triton.runtime.interpreter")
    if not hasattr(interpreter, "_LangPatchScope"):  # not imported, or not release 3.7: left slow
        return
    if interpreter._patch_lang.__module__ == __name__:
        return
    import triton.language as tl

    builder = interpreter.interpreter_builder
    assert not builder.options.debug
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    language = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})  # globals of kernels and of the language
    prepare, call = interpreter._patch_lang, interpreter.InterpretedFunction.__call__
    launches, scope = 0, None

    def prepare_once(function: Any) -> Any:
        nonlocal launches, scope
        launches += 1
        if launches == 1:
            scope = prepare(language)
        return SimpleNamespace(restore=restore_last)

    def restore_last() -> None:
        nonlocal launches
        launches -= 1
        if not launches:  # no launch is left in other threads either
            scope.restore()

    def call_prepared(self: Any, *arguments: Any, **options: Any) -> Any:
        return self.rewrite()(*arguments, **options) if launches else call(self, *arguments, **options)

    @functools.cache
    def builtins_of(module: Any) -> list[tuple[str, Any]]:
        return [(name, member) for name, member in inspect.getmembers(module) if tl.core.is_builtin(member)]

    def patch_builtins(module: Any, builder: Any, scope: Any) -> None:
        for name, member in builtins_of(module):
            interpreter._patch_attr(module, name, member, builder, scope)

    interpreter._patch_lang, interpreter._patch_builtin = prepare_once, patch_builtins
    interpreter.InterpretedFunction.__call__ = call_prepared
    _remember_types(interpreter, tl)


def _remember_types(interpreter: Any, tl: Any) -> None:
    """Compute once what describes a type: its NumPy dtype, its name, and its shape as the language's values."""
    find, describe = interpreter._get_np_dtype, tl.block_type.__init__
    dtypes: dict[str, np.dtype] = {}
    blocks: dict[tuple[Any, ...], dict[str, Any]] = {}
    shapes: dict[tuple[int, ...], tuple[Any, Any]] = {}

    def dtype_of(of: Any) -> np.dtype:
        element = of.scalar
        if element.name not in dtypes:
            dtypes[element.name] = find(element)
        return dtypes[element.name]

    def block_of(self: Any, element: Any, shape: Any) -> None:
        key = element.name, getattr(element, "address_space", None), *tl.core._unwrap_shape(shape)
        if key not in blocks:
            describe(self, element, shape)
            blocks[key] = dict(vars(self))
        vars(self).update(blocks[key])

    def tensor_of(self: Any, handle: Any, of: Any) -> None:
        shape = tuple(of.shape.values) if of.is_block() else ()
        if shape not in shapes:
            shapes[shape] = tl.constexpr(math.prod(shape)), tl.tuple([tl.constexpr(n) for n in shape])
        self.handle, self.type, self.dtype = handle, of, of.scalar
        self.numel, self.shape = shapes[shape]

    interpreter._get_np_dtype, tl.block_type.__init__, tl.tensor.__init__ = dtype_of, block_of, tensor_of
