"""Loads of kernel parameters, and loads and stores of shared memory and of global memory, which is the host's."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from tests.ptx.forms import Execute, Mask, Operands, any_unknown, forms, moved, vector
from tests.ptx.types import BITS, DTYPES, U32, U64, PtxError

if TYPE_CHECKING:
    from tests.ptx.machine import Machine

NARROW = "{b8,b16,b32,u8,u16,u32,s8,s16,s32,f32}"
KINDS = "{b8,b16,b32,b64,u8,u16,u32,u64,s8,s16,s32,s64,f32,f64}"


@forms(f"ld.param.{KINDS}")
def parameter(operands: Operands, parts: list[str]) -> Execute:
    operands.count(2)
    dtype = DTYPES[parts[2]]
    target = operands.target(operands.text[0], BITS[dtype.itemsize], wider=True)
    register = operands.widths[target]
    name, _, offset = operands.text[1].strip("[] ").partition("+")
    own = operands.kernel.parameters.get(name.strip())
    if own is None:
        raise PtxError(f"{name} is no parameter")
    start = own.offset + int(offset or 0)

    def execute(m: Machine, mask: Mask) -> None:
        value = np.frombuffer(m.parameters, dtype, 1, start).reshape(1, 1)
        m.write(target, value.astype(register) if value.dtype.itemsize < register.itemsize else value, mask)

    return execute


def _place(parts: list[str], vectors: str) -> tuple[bool, np.dtype, int, np.dtype]:
    """Return whether an access is to shared memory, its element type, vector length and type of addresses."""
    shared = parts[1] == "shared"
    n = int(parts[2][1:]) if parts[2].startswith("v") else 1
    if len(vector(vectors)) != n:
        raise PtxError(f"{n} registers are expected")
    return shared, DTYPES[parts[-1]], n, U32 if shared else U64


@forms(f"ld.{{global,shared}}{{,.v2}}.{KINDS}", f"ld.{{global,shared}}.v4.{NARROW}")
def load(operands: Operands, parts: list[str]) -> Execute:
    """Load values; those narrower than their registers are sign-extended if signed, else zero-extended."""
    operands.count(2)
    shared, dtype, n, width = _place(parts, operands.text[0])
    base, offset = operands.address(operands.text[1], width)
    bits = BITS[dtype.itemsize]
    targets = [operands.target(name, bits, wider=True) for name in vector(operands.text[0])]
    register = operands.widths[targets[0]]
    register = register if register.itemsize > dtype.itemsize else None

    def execute(m: Machine, mask: Mask) -> None:
        address = moved(m.read(base, width, mask), offset)
        memory = m.shared if shared else m.memory
        values, unwritten = memory.load(m, address, bits, n, mask)
        for target, value in zip(targets, values, strict=True):
            m.write(target, value if register is None else value.view(dtype).astype(register), mask)
        m.forget(targets, unwritten, mask)

    return execute


@forms(f"st.{{global,shared}}{{,.v2}}.{KINDS}", f"st.{{global,shared}}.v4.{NARROW}")
def store(operands: Operands, parts: list[str]) -> Execute:
    operands.count(2)
    shared, dtype, _, width = _place(parts, operands.text[1])
    base, offset = operands.address(operands.text[0], width)
    bits = BITS[dtype.itemsize]
    sources = [operands.source(name, bits, wider=True) for name in vector(operands.text[1])]
    given = [operands.widths[source] for source in sources]
    unknown = any_unknown(sources)
    if not shared:
        operands.sinks += sources

    def execute(m: Machine, mask: Mask) -> None:
        address = moved(m.read(base, width, mask), offset)
        values = [m.read(i, t, mask) for i, t in zip(sources, given, strict=True)]
        values = [x if x.dtype.itemsize == bits.itemsize else x.astype(bits) for x in values]
        if shared:
            m.shared.store(m, address, bits, values, mask, unknown(m, mask) if m.unknown else None)
        else:
            m.memory.store(m, address, bits, values, mask)

    return execute
