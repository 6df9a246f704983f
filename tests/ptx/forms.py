"""The table of instruction forms, and helpers to make them: registers, constants and element-wise operations.

A form is an opcode with all of its modifiers, such as ``cvt.rn.bf16x2.f32``. A kernel with a form that is not in
the table is refused when it is read.
"""

from __future__ import annotations

import itertools
import re
import struct
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from tests.ptx.parser import SHARED, Instruction, Kernel
from tests.ptx.types import BITS, DTYPES, F64, PRED, S64, PtxError

if TYPE_CHECKING:
    from tests.ptx.machine import Machine

Mask = np.ndarray | None
"""Mask of active threads; None if all are."""
Execute = Callable[["Machine", Mask], None]
Unknown = Callable[["Machine", Mask], np.ndarray | None]
"""Function that returns in which threads an instruction's results are unknown; None: in none."""
Maker = Callable[["Operands", list[str]], Execute]

ALL = np.uint8(3)
"""Unknown in both halves of a register: see :class:`tests.ptx.machine.Machine`."""
FORMS: dict[str, Maker] = {}
SPECIAL = ("%tid.x", "%ctaid.x", "%nctaid.x", "%ntid.x", "%laneid", "%warpid")
ZEROS = ("%tid.y", "%tid.z", "%ctaid.y", "%ctaid.z")
ONES = ("%ntid.y", "%ntid.z", "%nctaid.y", "%nctaid.z")

_FLOAT32 = re.compile(r"0[fF]([0-9A-Fa-f]{8})")
_FLOAT64 = re.compile(r"0[dD]([0-9A-Fa-f]{16})")
_INTEGER = re.compile(r"-?(0[xX][0-9A-Fa-f]+|\d+)U?")
_ADDRESS = re.compile(r"\[\s*([%$\w@.]+)\s*(?:\+\s*(-?\d+)\s*)?\]")


def forms(*patterns: str) -> Callable[[Maker], Maker]:
    """Register a maker for all forms of patterns, in which ``{a,b}`` stands for ``a`` or ``b``."""

    def enter(maker: Maker) -> Maker:
        for form in itertools.chain(*map(expand, patterns)):
            if form in FORMS:
                raise ValueError(f"{form} is in the table already")
            FORMS[form] = maker
        return maker

    return enter


def expand(pattern: str) -> list[str]:
    parts = re.split(r"\{([^}]*)\}", pattern)
    choices = [part.split(",") if i % 2 else [part] for i, part in enumerate(parts)]
    return ["".join(chosen) for chosen in itertools.product(*choices)]


class Operands:
    """An instruction's operands as indices of a machine's registers; constants have registers too.

    Attributes:
        text: The operands as written.
        index: Registers by name, for all instructions of the kernel.
        initial: Values of constants, by register.
        sources, targets: Registers that the current instruction reads, and writes.
        sinks: Registers whose values must be known: addresses, and what is stored in global memory.
        unknown: How unknown values propagate, if not from each thread's sources to its targets.
    """

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.index = {name: i for i, name in enumerate(kernel.registers)}
        self.widths = [DTYPES[kind] for kind in kernel.registers.values()]
        self.initial: dict[int, np.ndarray] = {}
        self.text: tuple[str, ...] = ()
        self.sources: list[int] = []
        self.targets: list[int] = []
        self.sinks: list[int] = []
        self.unknown: Unknown | None = None

    def make(self, instruction: Instruction) -> Execute:
        """Return the function that executes an instruction.

        Raises:
            PtxError: its form is not known, or its operands do not fit the form.
        """
        maker = FORMS.get(instruction.opcode)
        if maker is None:
            raise PtxError(f"{self.kernel.name}: {instruction.opcode} is a form that is not known: {instruction}")
        self.text = instruction.operands
        self.sources, self.targets, self.sinks, self.unknown = [], [], [], None
        try:
            return maker(self, instruction.opcode.split("."))
        except (PtxError, ValueError, IndexError) as error:
            raise PtxError(f"{self.kernel.name}: {instruction}: {error}") from error

    def count(self, n: int) -> None:
        if len(self.text) != n:
            raise PtxError(f"{n} operands are expected")

    def target(self, text: str, dtype: np.dtype, wider: bool = False) -> int:
        """Return the register for results of a type; it may be ``wider`` if the form extends them."""
        register = self._register(text, dtype, wider)
        self.targets.append(register)
        return register

    def _register(self, text: str, dtype: np.dtype, wider: bool) -> int:
        if text not in self.kernel.registers:
            raise PtxError(f"{text!r} is no register")
        width = self.widths[self.index[text]].itemsize
        fits = width >= dtype.itemsize if wider else width == dtype.itemsize
        if not fits or (dtype == PRED) != (self.widths[self.index[text]] == PRED):
            raise PtxError(f"{text} has {8 * width} bits, which do not fit {dtype}")
        return self.index[text]

    def source(self, text: str, dtype: np.dtype, wider: bool = False) -> int:
        """Return the register of an operand of a type; literals become registers."""
        if text in self.kernel.registers:
            register = self._register(text, dtype, wider)
            self.sources.append(register)
            return register
        if text in (*SPECIAL, *ZEROS, *ONES):
            return self._named(text)
        return self._constant(self._literal(text, dtype), BITS[dtype.itemsize])

    def address(self, text: str, dtype: np.dtype) -> tuple[int, int]:
        """Return the register and the offset of ``[register+offset]``."""
        found = _ADDRESS.fullmatch(text)
        if found is None:
            raise PtxError(f"{text!r} is no address")
        register = self.source(found[1], dtype)
        self.sinks.append(register)
        return register, int(found[2] or 0)

    @property
    def carry(self) -> int:
        """The register of the carry, 0 or 1, between instructions of wide sums."""
        return self._named("CC.CF")

    def _named(self, name: str) -> int:
        if name not in self.index:
            self.index[name] = len(self.widths)
            self.widths.append(DTYPES["b32"])
        return self.index[name]

    def _constant(self, value: int, dtype: np.dtype) -> int:
        register = self._named(f"{dtype} {value}")
        self.widths[register] = dtype
        self.initial[register] = np.full((1, 1), value, dtype)
        return register

    def _literal(self, text: str, dtype: np.dtype) -> int:
        """Return the bits of a literal, in the size of a type."""
        size = dtype.itemsize
        if found := _FLOAT32.fullmatch(text):
            if dtype == F64:
                (value,) = struct.unpack(">f", bytes.fromhex(found[1]))
                return int.from_bytes(struct.pack(">d", value))
            if size == 4:
                return int(found[1], 16)
        elif found := _FLOAT64.fullmatch(text):
            if size == 8:
                return int(found[1], 16)
        elif _INTEGER.fullmatch(text):
            return int(text.rstrip("U"), 0) & ((1 << 8 * size) - 1)
        elif text == SHARED:
            return 0  # shared memory begins at 0
        raise PtxError(f"{text!r} is no operand of {8 * size} bits")


def vector(text: str) -> list[str]:
    """Return the registers of ``{a, b}``, or the one without braces."""
    return [each.strip() for each in text.strip("{} ").split(",")]


def any_unknown(sources: Sequence[int]) -> Unknown:
    """Return a function by which both halves of a thread's result are unknown if any part of a source is."""

    halves = unknown_halves(sources)

    def unknown(m: Machine, mask: Mask) -> np.ndarray | None:
        found = halves(m, mask)
        return None if found is None else (found != 0) * ALL

    return unknown


def unknown_halves(sources: Sequence[int]) -> Unknown:
    """Return a function by which a half of the result is unknown if the same half of a source is."""

    def unknown(m: Machine, mask: Mask) -> np.ndarray | None:
        found = [m.unknown[i] for i in sources if i in m.unknown]
        result = found[0] if found else None
        for each in found[1:]:
            result = result | each
        return result

    return unknown


def moved(address: np.ndarray, offset: int) -> np.ndarray:
    """Add an offset to unsigned addresses, which wrap at their type's size, as 64-bit integers."""
    bits = 8 * address.dtype.itemsize
    return (address + address.dtype.type(offset % (1 << bits)) if offset else address).astype(S64)


def elementwise(
    operands: Operands, function: Callable[..., np.ndarray], result: np.dtype, sources: Sequence[np.dtype]
) -> Execute:
    """Make ``d = function(a, b, ...)``, with operands of the types in ``sources``."""
    operands.count(1 + len(sources))
    target = operands.target(operands.text[0], result)
    read = [(operands.source(text, t), t) for text, t in zip(operands.text[1:], sources, strict=True)]
    if len(read) == 1:
        [(a, t)] = read

        def execute(m: Machine, mask: Mask) -> None:
            m.write(target, function(m.read(a, t, mask)), mask)
    elif len(read) == 2:
        [(a, t), (b, u)] = read

        def execute(m: Machine, mask: Mask) -> None:
            m.write(target, function(m.read(a, t, mask), m.read(b, u, mask)), mask)
    else:

        def execute(m: Machine, mask: Mask) -> None:
            m.write(target, function(*[m.read(i, t, mask) for i, t in read]), mask)

    return execute
