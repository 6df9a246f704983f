"""Compilation of the step in C: how the library is cached and shared, and the messages if it cannot be built."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from gwt_kernels import GWTAdamW
from gwt_kernels.backends import choice
from gwt_kernels.backends.cpu import build, step
from tests.support.native import needs_step_in_c
from tests.support.runs import assert_same_bits, give_gradients, parameters, train

CPU = torch.device("cpu")
FLAGS = build.FLAGS

pytestmark = needs_step_in_c


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """Provide an empty cache folder, and no loaded library, before and after the test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(build, "FLAGS", [flag.replace("-O3", "-O0") for flag in FLAGS])  # compiles faster
    remembered = (build.library, build.warn_of, choice.compiler_obstacle)
    for function in remembered:
        function.cache_clear()
    yield tmp_path / "cache" / "gwt_kernels"
    for function in remembered:
        function.cache_clear()


def take_steps() -> None:
    """Take several steps with several optimizers."""
    params = parameters([(4, 8)])
    give_gradients(params, seed=0)
    for _ in range(2):
        GWTAdamW(params, level=1).step()
    assert not torch.equal(params[0], parameters([(4, 8)])[0])


def kept(cache: Path) -> list[Path]:
    return sorted(cache.glob("*.so"))


@pytest.fixture
def small_source(monkeypatch, tmp_path):
    """Replace the step by one function, which compiles faster."""
    monkeypatch.setattr(build, "LINK", [x for x in build.LINK if "hidden" not in x])
    monkeypatch.setattr(build, "SOURCES", [tmp_path / "step.c"])
    build.SOURCES[0].write_text("int gwt_answer(void) { return 42; }\n")


def compiler_that_counts(folder: Path) -> Path:
    """Return a compiler that appends a line to a file at each call."""
    script = folder / "counting-cc"
    script.write_text(f'#!/bin/sh\necho called >> {folder}/calls\nexec {build.compiler()[0]} "$@" -O0\n')
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return script


def test_one_compilation_serves_all_processes(cache, monkeypatch, tmp_path):
    monkeypatch.setenv("CC", str(compiler_that_counts(tmp_path)))
    monkeypatch.setattr(build, "FLAGS", FLAGS)  # as the other process has them
    assert build.library().gwt_update
    code = "from gwt_kernels.backends.cpu import build; print(build.library().gwt_update is not None)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"
    assert len(kept(cache)) == 1
    assert (tmp_path / "calls").read_text().splitlines() == ["called"]


def test_another_source_or_compiler_is_compiled_anew(cache, monkeypatch, tmp_path):
    monkeypatch.setattr(build, "LINK", [x for x in build.LINK if "hidden" not in x])
    build.library()
    monkeypatch.setattr(build, "SOURCES", [tmp_path / "step.c"])
    build.SOURCES[0].write_text('#include "answer.h"\n#include "answer.inc"\n')
    (tmp_path / "answer.h").write_text("#define ANSWER 42\n")
    (tmp_path / "answer.inc").write_text("int gwt_answer(void) { return ANSWER; }\n")
    assert build.library.__wrapped__().gwt_answer() == 42
    assert len(kept(cache)) == 2
    (tmp_path / "answer.h").write_text("#define ANSWER 43\n")
    assert build.library.__wrapped__().gwt_answer() == 43
    assert len(kept(cache)) == 3
    monkeypatch.setenv("CC", f"{build.compiler()[0]} -DNOTHING")
    assert build.library.__wrapped__().gwt_answer() == 43
    assert len(kept(cache)) == 4


def is_another(name):
    """Return whether there is a compiler of this name, and the package chooses another by default."""
    found, own = shutil.which(name), build.compiler()
    return found and own and Path(found).resolve() != Path(shutil.which(own[0])).resolve()


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name,
            marks=pytest.mark.skipif(not is_another(name), reason=f"needs {name} beside cc: install {name}"),
        )
        for name in ("gcc", "clang")
    ],
)
def test_supported_compilers(cache, monkeypatch, tmp_path, name):
    """Check that all flags are supported, and the libraries give the same bits."""
    taken = []
    monkeypatch.setattr(build, "FLAGS", FLAGS)
    for command in (None, name):
        if command:
            monkeypatch.setenv("CC", command)
            library = build.library.__wrapped__()
            monkeypatch.setattr(step, "functions", step.functions.__wrapped__)
            monkeypatch.setattr(step, "library", lambda own=library: own)
        params = parameters([(40, 256), (30, 37)], dtype=torch.bfloat16)
        options = {"level": 2, "weight_rounding": "stochastic", "state_dtype": "int8", "norm_growth_limit": None}
        train(GWTAdamW(params, backend="compiled", **options), range(3))
        taken.append([p.detach().clone() for p in params])
    assert_same_bits(*taken)


def test_library_is_synced_to_disk_before_it_is_renamed(cache, small_source, monkeypatch):
    """Check the order: otherwise a crash may leave part of the file, and loading that kills the process."""
    calls = []
    for name in ("fsync", "replace"):
        own = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, name=name, own=own: (calls.append(name), own(*args)))
    build.library()
    assert calls[:2] == ["fsync", "replace"]


@pytest.mark.parametrize("damage", ["cut short", "changed", "without its hash", "with half a hash"])
def test_a_damaged_library_is_compiled_anew(damage, cache, small_source, monkeypatch, tmp_path):
    """Check that a damaged library is not loaded, which would kill the process."""
    monkeypatch.setenv("CC", str(compiler_that_counts(tmp_path)))
    build.library.__wrapped__()
    (path,) = kept(cache)
    whole, note = path.read_bytes(), path.with_suffix(".sha256")
    path.unlink()  # a loaded library goes on using its memory
    path.write_bytes({"cut short": whole[: len(whole) // 2], "changed": whole[:-1] + b"x"}.get(damage, whole))
    if damage == "without its hash":
        note.unlink()
    elif damage == "with half a hash":
        note.write_text(note.read_text()[:9])
    for _ in range(2):
        assert build.library.__wrapped__().gwt_answer() == 42
    assert (tmp_path / "calls").read_text().splitlines() == ["called"] * 2
    assert sorted(each.suffix for each in cache.iterdir()) == [".sha256", ".so"]
    assert path.stat().st_size == len(whole)


def test_a_home_that_cannot_be_written_to(cache, tmp_path):
    """Check that the library is compiled for this process only, with one warning."""
    (tmp_path / "cache").write_text("in the way")
    with pytest.warns(UserWarning, match=r"cannot be kept .*cache.* XDG_CACHE_HOME") as told:
        take_steps()
    assert len(told) == 1
    assert isinstance(build.library(), ctypes.CDLL)
    assert choice.compiler_obstacle(CPU) is None


def test_no_writable_folder(cache, monkeypatch, tmp_path):
    (tmp_path / "cache").write_text("in the way")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "cache" / "absent"))
    with pytest.warns(UserWarning, match="PyTorch's operators") as told:
        take_steps()
    assert len(told) == 1


def test_no_home_directory(cache, small_source, monkeypatch):
    def fail() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", fail)
    with pytest.warns(UserWarning, match="Could not determine home"):
        assert isinstance(build.library(), ctypes.CDLL)


def test_library_that_cannot_be_loaded_is_compiled_elsewhere(cache, small_source, monkeypatch):
    """Check a folder from which libraries cannot be loaded, as on a file system mounted without exec."""
    load = ctypes.CDLL

    def refuse(path: str) -> ctypes.CDLL:
        if str(cache) in path:
            raise OSError("failed to map segment from shared object")
        return load(path)

    monkeypatch.setattr(ctypes, "CDLL", refuse)
    with pytest.warns(UserWarning, match="failed to map segment"):
        assert build.library().gwt_answer() == 42


def test_machines_that_share_a_home(cache, small_source, monkeypatch):
    """Check that each machine loads the library compiled for its kind of processor."""
    for machine in ("x86_64", "aarch64"):
        monkeypatch.setattr(platform, "machine", lambda own=machine: own)
        build.library.__wrapped__()
    assert len(kept(cache)) == 2


def test_no_compiler(cache, monkeypatch):
    """Check that ``backend="compiled"`` raises an error, and that by default PyTorch's operators run."""
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(RuntimeError, match=r"backend='compiled'.*C compiler.*'no-such-compiler'.*backend='torch'"):
        GWTAdamW(parameters([(4, 8)]), backend="compiled")
    with pytest.warns(UserWarning, match=r"'no-such-compiler'.*PyTorch's operators") as told:
        take_steps()
    assert len(told) == 1
    assert not choice.is_compiled(None, CPU)
    choice.compiler_obstacle.cache_clear()
    monkeypatch.delenv("CC")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    take_steps()  # no warning: the machine has no compiler
    with pytest.raises(RuntimeError, match="none of cc, gcc and clang"):
        GWTAdamW(parameters([(4, 8)]), backend="compiled")


def test_compiler_command_not_found(cache, monkeypatch):
    monkeypatch.setenv("CC", "gcc '-O2")
    assert build.compiler() is None
    with pytest.warns(UserWarning, match="gcc '-O2"):
        assert not choice.is_compiled(None, CPU)


def test_a_compiler_that_fails(cache, monkeypatch, tmp_path):
    """Check that the message ends with the compiler's output, in any encoding, and no file remains."""
    script = tmp_path / "failing-cc"
    script.write_bytes(b"#!/bin/sh\necho '\xe9: the disk is full' >&2\nexit 3\n")
    script.chmod(0o755)
    monkeypatch.setenv("CC", str(script))
    with pytest.raises(RuntimeError, match=r"failing-cc .* ended with 3: .: the disk is full; use backend='torch'"):
        choice.resolve("compiled", CPU, torch.float32, 2)
    with pytest.warns(UserWarning, match=r"the disk is full\. PyTorch's operators.*backend='torch'") as told:
        take_steps()
    assert len(told) == 1
    assert kept(cache) == []


@pytest.mark.parametrize(
    ("backend", "dtype", "calls"),
    [
        (None, torch.float32, 1),
        ("compiled", torch.bfloat16, 1),
        (None, torch.float64, 0),
        ("torch", torch.float32, 0),
    ],
)
def test_backend_chosen_on_a_cpu(monkeypatch, backend, dtype, calls):
    """Check that by default the step runs in C if C supports it."""
    seen, own = [], step.Packed.step
    monkeypatch.setattr(step.Packed, "step", lambda self: (seen.append(1), own(self)))
    train(GWTAdamW(parameters([(4, 8), (3, 5)], dtype=dtype), level=1, backend=backend), range(1))
    assert len(seen) == calls


def test_not_for_a_gpu():
    with pytest.raises(RuntimeError, match=r"backend='compiled' cannot run here: the tensors are on cuda"):
        choice.resolve("compiled", torch.device("cuda"), torch.float32, 2)
    assert not choice.is_compiled(None, torch.device("cuda"))


def test_importing_compiles_nothing(cache):
    code = "import torch, gwt_kernels; gwt_kernels.GWTAdamW([torch.nn.Parameter(torch.zeros(4, 8))])"
    subprocess.run([sys.executable, "-c", code], env=os.environ | {"CC": "false"}, check=True)
    assert kept(cache) == []
