"""Resources that a compiled kernel uses: registers, spills, memory accesses and resident warps."""

from __future__ import annotations

import hashlib
import re
import subprocess
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime.cache import get_cache_manager

from bench.codegen.access_names import Frames, array_name, parse_locations, places_of


class ChipLimits(NamedTuple):
    """Resources that the warps on one multiprocessor share (on AMD: the wavefronts on one compute unit).

    Sources: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; AMD CDNA3 Instruction
    Set Architecture and LLVM's AMDGPU usage guide (gfx942).
    """

    warps: int
    programs: int
    registers: int  # of 32 bits, per lane, summed over all warps; times a warp's lanes it is the register file
    register_unit: int  # registers per lane that are allocated at once
    schedulers: int  # parts that warps and registers are divided into
    shared: int  # bytes
    shared_unit: int
    shared_reserved: int  # bytes per program that the system takes

    def __str__(self) -> str:
        return (
            f"{self.warps} warps, {self.programs} programs, {self.registers} registers a lane over all warps in "
            f"units of {self.register_unit}, {self.schedulers} schedulers, {self.shared // 1024} KiB shared memory"
        )


LIMITS = {
    "sm_80": ChipLimits(64, 32, 2048, 8, 4, 164 * 1024, 128, 1024),
    "sm_90": ChipLimits(64, 32, 2048, 8, 4, 228 * 1024, 128, 1024),
    "sm_100": ChipLimits(64, 32, 2048, 8, 4, 228 * 1024, 128, 1024),
    "gfx942": ChipLimits(32, 16, 2048, 8, 4, 64 * 1024, 512, 0),
}

# Accesses by array, then by width in bits: {"p": {"128": 2}}. Text, since JSON has no other keys.
Accesses = dict[str, dict[str, int]]

_OPERATION = re.compile(r"\s+/\*[0-9a-f]+\*/\s+(?:\{\s*)?(?:@!?U?P\w+\s+)?([A-Z][\w.]*)")
_WORDS = {"byte": 8, "short": 16, "dword": 32, "dwordx2": 64, "dwordx3": 96, "dwordx4": 128}


def read(kernel: CompiledKernel, target: str) -> dict[str, Any]:
    """Read a compiled kernel's machine code and intermediate code.

    Args:
        kernel: Kernel from :func:`bench.codegen.variants.compile_variant`.
        target: A key of ``LIMITS``.

    Returns:
        ``warps`` (per program), ``registers`` (per lane), ``stack`` (bytes per lane), ``spills`` (instructions that
        access the stack), ``shared`` (bytes), ``barriers`` and ``instructions`` (in the code), ``loads`` and
        ``stores`` (:data:`Accesses`, all instructions that access global memory), ``tensor_loads`` and
        ``tensor_stores`` (by array, those on more than one element in Triton's intermediate code),
        ``contracts`` (whether the compiler may contract products with sums) and ``resident_warps``.

    Raises:
        RuntimeError: a disassembler is missing.
    """
    row: dict[str, Any] = {"warps": kernel.metadata.num_warps, "shared": kernel.metadata.shared}
    row |= _read_amd(kernel.asm["amdgcn"]) if "amdgcn" in kernel.asm else _read_nvidia(kernel)
    row["contracts"] = kernel.metadata.enable_fp_fusion
    row["tensor_loads"], row["tensor_stores"] = _tensor_accesses(kernel.asm["ttir"])
    row["resident_warps"] = resident_warps(LIMITS[target], row["warps"], row["registers"], row["shared"])
    return row


def resident_warps(limits: ChipLimits, warps: int, registers: int, shared: int) -> int:
    """Return the number of warps that a multiprocessor holds at once.

    Programs have ``warps`` warps with ``registers`` registers per lane, and use ``shared`` bytes of shared memory.
    """
    allotted = max(1, -(-registers // limits.register_unit)) * limits.register_unit
    by_registers = limits.registers // limits.schedulers // allotted * limits.schedulers
    programs = min(limits.programs, limits.warps // warps, by_registers // warps)
    if shared:
        unit = limits.shared_unit
        programs = min(programs, limits.shared // (-(-shared // unit) * unit + limits.shared_reserved))
    return programs * warps


def find_tools() -> tuple[str, str]:
    """Return the paths of ``cuobjdump`` and ``nvdisasm``, which Triton's NVIDIA wheel ships.

    Raises:
        RuntimeError: one of them is missing.
    """
    paths = []
    for name in ("cuobjdump", "nvdisasm"):
        try:
            paths.append(getattr(knobs.nvidia, name).path)
        except (RuntimeError, OSError) as error:
            raise RuntimeError(
                f"{name}, which reads NVIDIA machine code, is neither in the installed triton package nor where "
                f"TRITON_{name.upper()}_PATH points: install triton from its wheel, or CUDA's {name} and set that "
                "variable"
            ) from error
    return paths[0], paths[1]


def body_instructions(cubin: bytes) -> int:
    """Count the instructions of a kernel's body, without padding and without subroutines.

    Subroutines are for divisions and roots of the smallest and the largest numbers, which are rare, and for 64-bit
    divisions.

    Raises:
        RuntimeError: the disassembler is missing, or finds no instruction.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        code = _run(find_tools()[1], "--print-code", "--no-dataflow", str(path))
    body = re.split(r"^\$__internal_[^\n]*:$", code, maxsplit=1, flags=re.MULTILINE)[0]
    n = sum(found[1] != "NOP" for found in map(_OPERATION.match, body.splitlines()) if found)
    if not n:
        raise RuntimeError(f"nvdisasm printed no instruction: {code[:200]!r}")
    return n


def _read_nvidia(kernel: CompiledKernel) -> dict[str, Any]:
    cuobjdump, nvdisasm = find_tools()
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(kernel.asm["cubin"])
        usage = _run(cuobjdump, "-res-usage", str(cubin))
        # Cached with Triton's kernels, since starting nvdisasm takes longer than reading its output.
        kept = get_cache_manager(hashlib.sha256(kernel.asm["cubin"] + nvdisasm.encode()).hexdigest())
        if (path := kept.get_file("sass")) is None:
            text = _run(nvdisasm, "--print-line-info", "--print-code", "--no-dataflow", str(cubin))
            path = kept.put(text, "sass", binary=False)
    code = Path(path).read_text()
    resources = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if resources is None:
        raise RuntimeError(f"cuobjdump printed no resource usage for {kernel.metadata.name}: {usage!r}")
    # nvdisasm leaves out a change of file between equal line numbers, so the number alone tells the place.
    place = 0
    accesses: Counter[tuple[int, int, str]] = Counter()  # line, bits, "ld" or "st"
    operations: Counter[str] = Counter()
    for line in code.splitlines():
        if found := re.search(r'//## File "[^"]*", line (\d+)', line):
            place = int(found[1])
        elif found := _OPERATION.match(line):
            name, *modifiers = found[1].split(".")
            operations[name] += 1
            if name in ("LDG", "STG", "LD", "ST"):
                widths = [int(m.lstrip("US")) for m in modifiers if re.fullmatch(r"[US]?\d+", m)]
                accesses[place, (widths or [32])[-1], "ld" if name.startswith("L") else "st"] += 1
    loads, stores = _name_by_ptx(accesses, kernel.asm["ptx"])
    return {
        "registers": int(resources[1]),
        "stack": int(resources[2]),
        "spills": operations["LDL"] + operations["STL"],
        "barriers": operations["BAR"],
        "instructions": operations.total() - operations["NOP"],
        "loads": loads,
        "stores": stores,
    }


def _name_by_ptx(machine: Counter[tuple[int, int, str]], ptx: str) -> tuple[Accesses, Accesses]:
    """Name the arrays of machine instructions, whose places have no column, by those of PTX, whose places do.

    If instructions of one line, kind and width belong to different arrays in PTX, the machine code must have
    exactly as many; otherwise they are counted for all names together. If PTX has none of that width, as when only
    the lower half of a 64-bit number is used, the names are those of the line's other widths.
    """
    named: dict[tuple[int, int, str], Counter[str]] = defaultdict(Counter)
    of_line: dict[tuple[int, str], set[str]] = defaultdict(set)
    pattern = re.compile(r"\b(ld|st)\.global\S*?(?:\.v(\d))?\.[busf](\d+)\s")
    for line, place, found in _scan(ptx, pattern):
        bits, name = int(found[2] or 1) * int(found[3]), array_name(place)
        named[line, bits, found[1]][name] += 1
        of_line[line, found[1]].add(name)
    counts: dict[str, Counter[tuple[str, int]]] = {"ld": Counter(), "st": Counter()}
    for (line, bits, kind), n in machine.items():
        names = named[line, bits, kind]
        if names.total() != n:  # for example, unrolled
            names = Counter({"|".join(sorted(names or of_line[line, kind])) or "?": n})
        for name, share in names.items():
            counts[kind][name, bits] += share
    return _nested(counts["ld"]), _nested(counts["st"])


def _read_amd(code: str) -> dict[str, Any]:
    def number(field: str) -> int:
        found = re.search(rf"\.{field}:\s+(\d+)", code)
        if found is None:
            raise RuntimeError(f"the AMD code object's metadata does not state {field}")
        return int(found[1])

    counts: dict[str, Counter[tuple[str, int]]] = {"load": Counter(), "store": Counter()}
    # A lane's word is 8 to 128 bits; scalar loads (s_load) fetch for a whole wavefront, up to 16 words.
    vector = re.compile(r"\t(?:global|buffer|flat)_(load|store)_[us]?(byte|short|dword(?:x\d)?)(?:_d16\w*)?\s")
    for _, place, found in _scan(code, vector):
        counts[found[1]][array_name(place), _WORDS[found[2]]] += 1
    for _, place, found in _scan(code, re.compile(r"\ts_(?:buffer_)?load_dword(?:x(\d+))?\s")):
        if (name := array_name(place)) != "?":  # "?": a kernel argument
            counts["load"][name, 32 * int(found[1] or 1)] += 1
    instructions = re.findall(r"^\t([a-z]\w+)", code, re.MULTILINE)
    return {
        "registers": number("vgpr_count"),  # including accumulation registers, which are in the same file
        "stack": number("private_segment_fixed_size"),
        "spills": number("vgpr_spill_count") + number("sgpr_spill_count"),
        "barriers": instructions.count("s_barrier"),
        "instructions": sum(i.startswith(("v_", "s_", "ds_", "global_", "buffer_", "flat_")) for i in instructions),
        "loads": _nested(counts["load"]),
        "stores": _nested(counts["store"]),
    }


def _scan(code: str, pattern: re.Pattern[str]) -> Iterable[tuple[int, Frames, re.Match[str]]]:
    """Yield each line of assembler text that matches, with the source's line that it names, and its place.

    The two differ in inline assembly, of which LLVM counts the lines from its place on (since Triton 3.9).
    """
    named: Frames = ()
    place: Frames = ()
    in_assembly = False
    read = places_of(code)
    for line in code.splitlines():
        if line.lstrip().startswith(".loc"):
            named = read(line)
            place = place if in_assembly else named
        elif line.endswith(" inline asm"):
            in_assembly = line.endswith("begin inline asm")
        elif found := pattern.search(line):
            yield named[0].line if named else 0, place, found


def _tensor_accesses(ttir: str) -> tuple[dict[str, int], dict[str, int]]:
    frames = parse_locations(ttir)
    counts: dict[str, Counter[str]] = {"load": Counter(), "store": Counter()}
    for kind, location in re.findall(r"tt\.(load|store) .* : tensor<.*loc\((#loc\d*)\)", ttir):
        counts[kind][array_name(frames(location))] += 1
    return dict(counts["load"]), dict(counts["store"])


def _nested(counts: Counter[tuple[str, int]]) -> Accesses:
    result: Accesses = {}
    for (name, bits), n in sorted(counts.items()):
        result.setdefault(name, {})[str(bits)] = n
    return result


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{Path(command[0]).name} failed with status {done.returncode}: {done.stderr.strip()}")
    return done.stdout
