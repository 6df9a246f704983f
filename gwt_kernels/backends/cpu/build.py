"""Compile the step in C once, and cache the library for other processes."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path

import torch

SOURCES = [Path(__file__).with_name(f"{name}.c") for name in ("step", "bucket", "factors", "threads")]
# Flags of both gcc and clang, since clang refuses unknown ones.
FLAGS = [
    *("-std=c11", "-O3", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math"),
    "-ffp-contract=off",  # no fused multiply-add: the same results on every machine
]
LINK = ["-fPIC", "-shared", "-fvisibility=hidden", "-pthread", "-lm"]
# Only what get_cpu_capability() checks for.
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
VECTORS = {"AVX2": AVX2, "AVX512": AVX512}


def compiler() -> list[str] | None:
    """Return the command of the C compiler: ``CC``, or the first of cc, gcc and clang; None if there is none."""
    candidates = [["cc"], ["gcc"], ["clang"]]
    if os.environ.get("CC"):
        try:
            candidates = [shlex.split(os.environ["CC"])]
        except ValueError:  # an unclosed quotation
            return None
    return next((command for command in candidates if command and shutil.which(command[0])), None)


@functools.cache
def library() -> ctypes.CDLL:
    """Compile the C files, unless they are cached, and load the library.

    Raises:
        RuntimeError: there is no compiler, or it fails; the message ends with its output.
        OSError: no folder can be written to, or the library cannot be loaded.
    """
    command = compiler()
    if command is None:
        asked = f"no {os.environ['CC']!r}, which CC names" if os.environ.get("CC") else "none of cc, gcc and clang"
        raise RuntimeError(f"it needs a C compiler, and there is {asked}: install one, or name another in CC")
    # This machine has the instructions of PyTorch's capability.
    command += FLAGS + VECTORS.get(torch.backends.cpu.get_cpu_capability(), [])
    # The digest includes the machine, since different ones may share a home.
    parts = [*_texts(), *command, *LINK, platform.machine()]
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()
    try:
        folder = _cache()
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"step-{digest[:16]}.so"
        if not _is_whole(path):
            _compile(command, path)
            _note(path)
        return ctypes.CDLL(str(path))
    except OSError as error:  # without a writable home, each process compiles
        obstacle = str(error)
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "step.so"
        _compile(command, path)
        loaded = ctypes.CDLL(str(path))  # a loaded library no longer needs its file
    warnings.warn(
        f"the step in C cannot be kept for other processes ({obstacle}), so each one compiles it: name a folder "
        f"that can be written to in XDG_CACHE_HOME",
        stacklevel=2,
    )
    return loaded


@functools.cache
def warn_of(obstacle: str) -> None:
    """Warn once that PyTorch's operators replace the step in C on a CPU with a compiler, and why."""
    if compiler() is not None or os.environ.get("CC"):
        warnings.warn(
            f"{obstacle}. PyTorch's operators update this CPU's tensors instead, several times more slowly: pass "
            f"backend='torch' to choose them without this warning",
            stacklevel=2,
        )


def _texts() -> list[str]:
    """Return the text of the sources and of the files that they include."""
    included = (path for kind in ("*.h", "*.inc") for path in sorted(SOURCES[0].parent.glob(kind)))
    return [path.read_text() for path in (*SOURCES, *included)]


def _cache() -> Path:
    home = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(home) if home else Path.home() / ".cache") / "gwt_kernels"
    except RuntimeError as error:  # a user without a home
        raise OSError(str(error)) from error


def _is_whole(path: Path) -> bool:
    """Return whether this is the library that was compiled; loading a truncated one crashes the process."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest() == path.with_suffix(".sha256").read_text().strip()
    except (FileNotFoundError, UnicodeDecodeError):
        return False


def _note(path: Path) -> None:
    """Write the library's hash to a file beside it, completely or not at all."""
    handle, made = tempfile.mkstemp(suffix=".sha256", dir=path.parent)
    try:
        with open(handle, "w") as file:
            file.write(hashlib.sha256(path.read_bytes()).hexdigest())
        os.replace(made, path.with_suffix(".sha256"))
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(made)


def _compile(command: list[str], path: Path) -> None:
    """Compile into a temporary file and rename it, so that no other process loads an incomplete library."""
    handle, made = tempfile.mkstemp(suffix=".so", dir=path.parent)
    os.close(handle)
    try:
        done = subprocess.run(
            [*command, *map(str, SOURCES), "-o", made, *LINK], capture_output=True, errors="replace", check=False
        )
        if done.returncode:
            said = done.stderr.strip()[-2000:]
            raise RuntimeError(f"{shlex.join(command)} ended with {done.returncode}: {said}")
        with open(made, "rb") as file:  # a truncated library crashes every process that loads it
            os.fsync(file.fileno())
        os.replace(made, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(made)
