"""Run pieces of PTX in tests: one instruction on given values, or a whole kernel on tensors."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.ptx.checks import GLOBAL, check_races
from tests.ptx.machine import Launch, Machine
from tests.ptx.memory import HostMemory
from tests.ptx.program import Program
from tests.ptx.tensors import LiveTensors
from tests.ptx.types import DTYPES, WARP

_MEMORY = HostMemory(LiveTensors())
_ROOM = 8 * 1024  # bytes for one operand of all threads
_BUFFER = torch.zeros(8 * _ROOM, dtype=torch.uint8)
_CLASSES = {1: ("%s", "b16"), 2: ("%s", "b16"), 4: ("%r", "b32"), 8: ("%l", "b64")}


def execute(
    ptx: str,
    arguments: Sequence[Tensor | int] = (),
    *,
    grid: int = 1,
    shared: int = 0,
    disturb: int | None = None,
    at_once: int | None = None,
) -> None:
    """Run a kernel whose parameters all have 64 bits, ``at_once`` programs together, or all of them."""
    program = Program(ptx)
    _MEMORY.tensors.begin()
    words = [x.data_ptr() if isinstance(x, Tensor) else x for x in arguments]
    launch = Launch(program, grid, struct.pack(f"<{len(words)}q", *words), shared, _MEMORY, disturb)
    log = []
    for first in range(0, grid, at_once or grid):
        machine = Machine(launch, first, min(at_once or grid, grid - first))
        machine.run()
        log += machine.log[GLOBAL]
    check_races(program, log, GLOBAL, _MEMORY.tensors.nearest)


def kernel(body: str, *, parameters: int = 0, threads: int = WARP, registers: str = "") -> str:
    """Return a kernel's PTX, with parameters ``p0``, ... and 32 each of ``%p0``, ``%s0``, ``%r0`` and ``%l0``."""
    listed = ",\n".join(f".param .u64 p{i}" for i in range(parameters))
    return f"""
.version 8.7
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry test_kernel(
{listed}
)
.reqntid {threads}
{{
    .reg .pred %p<32>;
    .reg .b16 %s<32>;
    .reg .b32 %r<32>;
    .reg .b64 %l<32>;
    {registers}
{body}
    ret;
}}
"""


def apply(
    form: str,
    sources: Sequence[tuple[str, Sequence[Any]]],
    result: str | Sequence[str],
    *,
    extra: Sequence[str] = (),
    disturb: int | None = None,
) -> Any:
    """Return an instruction's result for each element of its operands.

    Args:
        form: The instruction.
        sources: The type and the values of each operand; a predicate's type is ``"pred"``.
        result: The result's type; several types if the form has a vector of results.
        extra: Further operands, as text.
        disturb: Seed of errors of approximations.

    Returns:
        An array of the result's type, or one for each result; bfloat16 as its bits.
    """
    results = [result] if isinstance(result, str) else list(result)
    n = len(sources[0][1])
    threads = -(-n // WARP) * WARP
    lines, names = [], []
    for i, (kind, values) in enumerate(sources):
        dtype = DTYPES["u16" if kind == "pred" else kind]
        place = _BUFFER.numpy()[i * _ROOM :][: threads * dtype.itemsize].view(dtype)
        place[:] = _as(dtype, values[0])
        place[:n] = [_as(dtype, value) for value in values]
        name, bits = f"{_CLASSES[dtype.itemsize][0]}{i}", 8 * dtype.itemsize
        lines += [f"ld.param.b64 %l20, [p{i}];", f"mad.wide.u32 %l21, %r20, {dtype.itemsize}, %l20;"]
        lines.append(f"ld.global.b{bits} {name}, [%l21];")
        if kind == "pred":
            lines.append(f"setp.ne.b16 %p{i}, {name}, 0;")
        names.append(f"%p{i}" if kind == "pred" else name)
    targets = [
        f"%p{10 + i}" if kind == "pred" else f"{_CLASSES[DTYPES[kind].itemsize][0]}{10 + i}"
        for i, kind in enumerate(results)
    ]
    target = targets[0] if isinstance(result, str) else "{" + ", ".join(targets) + "}"
    lines.append(f"{form} {', '.join([target, *names, *extra])};")
    outputs = []
    for i, (kind, name) in enumerate(zip(results, targets, strict=True), start=len(sources)):
        dtype = DTYPES["u16" if kind == "pred" else kind]
        if kind == "pred":
            lines.append(f"selp.b16 %s30, 1, 0, {name};")
        lines += [f"ld.param.b64 %l20, [p{i}];", f"mad.wide.u32 %l21, %r20, {dtype.itemsize}, %l20;"]
        lines.append(f"st.global.b{8 * dtype.itemsize} [%l21], {'%s30' if kind == 'pred' else name};")
        outputs.append(_BUFFER.numpy()[i * _ROOM :][: threads * dtype.itemsize].view(dtype))
        outputs[-1].view(np.uint8)[:] = 0x55
    body = "mov.u32 %r20, %tid.x;\n" + "\n".join(lines)
    count = len(sources) + len(results)
    addresses = [_BUFFER.data_ptr() + i * _ROOM for i in range(count)]
    execute(kernel(body, parameters=count, threads=threads), addresses, disturb=disturb)
    found = [
        x[:n].astype(bool) if kind == "pred" else x[:n].copy() for kind, x in zip(results, outputs, strict=True)
    ]
    return found[0] if isinstance(result, str) else found


def _as(dtype: np.dtype, value: Any) -> Any:
    """Convert a number to a type; integers wrap, so that bits may be written with any sign."""
    if dtype.kind in "iu":
        size = dtype.itemsize
        return np.frombuffer((int(value) & ((1 << 8 * size) - 1)).to_bytes(size, "little"), dtype)[0]
    return dtype.type(value)


def bits(values: np.ndarray) -> list[int]:
    """Return the bits of floats, for comparisons."""
    return values.view(f"u{values.dtype.itemsize}").tolist()
