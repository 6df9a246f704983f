"""A driver for Triton whose device is this interpreter: kernels are compiled for a GPU and run on CPU tensors."""

from __future__ import annotations

import gc
import itertools
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver

from tests.ptx.checks import GLOBAL, Access, check_races
from tests.ptx.counts import ExecutionCounter
from tests.ptx.machine import Launch, Machine
from tests.ptx.memory import HostMemory
from tests.ptx.program import Program
from tests.ptx.tensors import LiveTensors
from tests.ptx.types import WARP


class _Chip(NamedTuple):
    capability: int
    shared: int
    """Bytes of shared memory that a program can have."""
    multiprocessors: int


CHIPS = {
    "sm_80": _Chip(80, 163 * 1024, 108),
    "sm_90": _Chip(90, 227 * 1024, 132),
    "sm_100": _Chip(100, 227 * 1024, 148),
}
"""An A100, an H100 and a B200."""

_NUMBERS = itertools.count()
_FORMATS = {"i1": "?", "i8": "b", "i16": "h", "i32": "i", "i64": "q", "u1": "?", "u8": "B", "u16": "H", "u32": "I"}
_FORMATS |= {"u64": "Q", "fp32": "f", "fp64": "d"}


@dataclass
class Options:
    """Options for running kernels.

    Attributes:
        threads: Largest number of threads that run together, in whole programs.
        races: Whether to find races in the host's memory.
        disturb: Seed of errors of approximate instructions, within documented bounds, the same for the same
            operands; None for no errors.
        backwards: Whether to run the last programs first, since the order on a GPU is undefined.
        counter: Counter of what is executed; None counts nothing, at no cost.
        machine_code: Whether to compile kernels to machine code, which a GPU would run and nothing here does.
    """

    threads: int = 1 << 13
    races: bool = True
    disturb: int | None = None
    backwards: bool = False
    counter: ExecutionCounter | None = None
    machine_code: bool = False


@dataclass
class Counts:
    """Launches by kernel, kernels whose products may be contracted, the programs loaded, and their machine code."""

    launches: dict[str, int] = field(default_factory=dict)
    contracted: set[str] = field(default_factory=set)
    programs: list[Program] = field(default_factory=list)
    machine_code: dict[Program, bytes] = field(default_factory=dict)


class Driver(DriverBase):
    """The interface of a device that Triton calls.

    Attributes:
        chip: The architecture that kernels are compiled for.
    """

    def __init__(self, chip: str, options: Options | None = None) -> None:
        super().__init__()
        if chip not in CHIPS:
            raise ValueError(f"an architecture must be one of {', '.join(CHIPS)}, got {chip!r}")
        self.chip, self.options, self.counts = chip, options or Options(), Counts()
        self.memory = HostMemory(LiveTensors())
        self.utils = SimpleNamespace(load_binary=self._load, get_device_properties=self._properties)
        self.launcher_cls = self._launcher
        self._device = f"interpreted {chip}, {next(_NUMBERS)}"
        self._programs: dict[str, Program] = {}  # by the kernel's hash
        self._loading: tuple[str, Path] | None = None

    def __enter__(self) -> Driver:
        """Become Triton's active driver, which runs every kernel that Triton loads from then on."""
        self._before, self._threshold = driver._active, gc.get_threshold()
        gc.set_threshold(self._threshold[0], 10_000, 10_000)  # see LiveTensors
        knobs.runtime.kernel_load_start_hook.add(self._begin_load)
        self._stages = knobs.runtime.add_stages_inspection_hook
        if not self.options.machine_code:
            knobs.runtime.add_stages_inspection_hook = _stages
        driver.set_active(self)
        return self

    def __exit__(self, *error: object) -> None:
        driver._active = self._before
        gc.set_threshold(*self._threshold)
        knobs.runtime.kernel_load_start_hook.remove(self._begin_load)
        knobs.runtime.add_stages_inspection_hook = self._stages

    # What Triton calls -------------------------------------------------------------------------------------

    @classmethod
    def is_active(cls) -> bool:
        return False  # Triton must not choose it by itself

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", CHIPS[self.chip].capability, WARP)

    def get_current_device(self) -> str:
        return self._device  # key of Triton's loaded kernels, which belong to one driver

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError("nothing is compiled to launch kernels")

    def get_benchmarker(self) -> Any:
        raise NotImplementedError("times of interpreted kernels say nothing")

    def _properties(self, device: str) -> dict[str, int]:
        chip = CHIPS[self.chip]
        return {"max_shared_mem": chip.shared, "multiprocessor_count": chip.multiprocessors, "warpSize": WARP}

    def _begin_load(self, module: Any, function: Any, name: str, files: dict[str, str], digest: str) -> None:
        """Note the path of a kernel's PTX before Triton loads the kernel."""
        ptx = next(path for file, path in files.items() if file.endswith(".ptx"))
        self._loading = digest, Path(ptx)

    def _load(self, name: str, binary: bytes, shared: int, device: str) -> tuple[Any, Program, int, int, int]:
        if self._loading is None:
            raise RuntimeError(f"{name} is loaded without its PTX")
        (digest, path), self._loading = self._loading, None
        if digest not in self._programs:
            self._programs[digest] = Program(path.read_text())
            self.counts.programs.append(self._programs[digest])
            if self.options.machine_code:
                self.counts.machine_code[self._programs[digest]] = binary
        return self, self._programs[digest], 0, 0, 1024

    def _launcher(self, source: Any, metadata: Any) -> Callable[..., None]:
        """Return the function that launches a kernel: it takes Triton's arguments and runs the kernel at once."""
        names = source.fn.arg_names
        kinds = [kind for name in names for kind in _leaves(source.signature[name])]
        unsupported = [kind for kind in kinds if kind[0] != "*" and kind not in (*_FORMATS, "constexpr")]
        if unsupported or metadata.global_scratch_size or metadata.profile_scratch_size:
            raise NotImplementedError(f"{source.fn.__name__}: arguments of {unsupported}, or scratch memory")
        if metadata.enable_fp_fusion:
            self.counts.contracted.add(source.fn.__name__)

        def launch(
            x: int, y: int, z: int, stream: int, program: Program, packed: Any, launch_metadata: Any,
            enter: Any, leave: Any, *arguments: Any,
        ) -> None:  # fmt: skip
            if enter is not None:
                enter(launch_metadata)
            values = [(k, v) for k, v in zip(kinds, _leaves(arguments), strict=True) if k != "constexpr"]
            self.run(program, (x, y, z), metadata.shared, values)
            if leave is not None:
                leave(launch_metadata)

        return launch

    # Running -----------------------------------------------------------------------------------------------

    def run(
        self, program: Program, grid: tuple[int, int, int], shared: int, arguments: Iterable[tuple[str, Any]]
    ) -> None:
        """Run a launch to its end.

        Args:
            program: The kernel.
            grid: Number of programs, in one dimension.
            shared: Bytes of shared memory per program.
            arguments: Triton's types of the kernel's arguments, and their values.

        Raises:
            Fault: the launch has an error, or undefined behaviour, on a GPU.
        """
        if grid[1:] != (1, 1):
            raise NotImplementedError(f"{program.name}: a grid of {grid}: only one dimension is known")
        self.counts.launches[program.name] = self.counts.launches.get(program.name, 0) + 1
        self.memory.tensors.begin()
        launch = Launch(program, grid[0], _packed(program, arguments), shared, self.memory, self.options.disturb)
        together = max(1, self.options.threads // program.threads)
        parts = [(first, min(together, grid[0] - first)) for first in range(0, grid[0], together)]
        log: list[Access] = []
        make = Machine if self.options.counter is None else self.options.counter.machine
        for first, count in reversed(parts) if self.options.backwards else parts:
            machine = make(launch, first, count)
            machine.run()
            log += machine.log[GLOBAL] if self.options.races else []
        if self.options.races:
            check_races(program, log, GLOBAL, self.memory.tensors.nearest)


def _stages(*compilation: Any) -> tuple[str, str]:
    """Leave out machine code, which nothing here runs, and which takes a fifth of the time of compiling.

    Called without arguments, return what distinguishes kernels without it from others in Triton's cache.
    """
    if compilation:
        _, stages, *_ = compilation
        stages["cubin"] = lambda ptx, metadata: b"left out"
    return "without machine code", "without machine code"


def _leaves(x: Any) -> list[Any]:
    """Return the leaves of nested tuples, in order."""
    return [leaf for each in x for leaf in _leaves(each)] if isinstance(x, (tuple, list)) else [x]


def _packed(program: Program, arguments: Iterable[tuple[str, Any]]) -> bytes:
    """Pack a kernel's arguments, then up to two null pointers, to scratch memory that no kernel here uses."""
    kernel = program.kernel
    buffer = bytearray(kernel.parameter_bytes)
    places = list(kernel.parameters.values())
    given = list(arguments)
    if len(places) - len(given) not in (0, 1, 2):
        raise RuntimeError(f"{program.name} has {len(places)} parameters, and is given {len(given)}")
    for place, (kind, value) in zip(places, given, strict=False):
        if kind.startswith("*"):
            value, kind = _pointer(program, value), "u64"
        packed = struct.pack("<" + _FORMATS[kind], value)
        if len(packed) != place.size:
            raise RuntimeError(
                f"{program.name} is given an argument of {kind} for a parameter of {place.size} bytes"
            )
        buffer[place.offset : place.offset + place.size] = packed
    return bytes(buffer)


def _pointer(program: Program, value: Any) -> int:
    if value is None:
        return 0
    if isinstance(value, Tensor):
        if value.device.type != "cpu":
            raise ValueError(f"{program.name} is given a tensor on {value.device}: kernels run on the CPU here")
        return value.data_ptr()
    return int(value.data_ptr() if hasattr(value, "data_ptr") else value)
