"""The sdist is complete, and the wheel built from it installs and runs in new environments."""

from __future__ import annotations

import email
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import gwt_kernels
from gwt_kernels.backends.cpu import build

ROOT = Path(__file__).parents[1]
VERSIONS = ("3.11", "3.12", "3.13")

STEP = """
import pathlib, sys, torch, gwt_kernels
assert pathlib.Path(gwt_kernels.__file__).is_relative_to(sys.prefix), gwt_kernels.__file__
stepped = []
for backend in ("compiled", "torch"):
    weight = torch.nn.Parameter(torch.arange(24.0).reshape(2, 12))
    optimizer = gwt_kernels.GWTAdamW([weight], level=2, backend=backend)
    weight.square().sum().backward()
    optimizer.step()
    stepped.append(weight.detach())
torch.testing.assert_close(*stepped)
assert (stepped[0] != torch.arange(24.0).reshape(2, 12)).any()
print("stepped")
"""


def run(*command: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command away from the checkout, so that only what is installed is found."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "TRITON_INTERPRET")}
    return subprocess.run(
        list(map(str, command)), cwd=Path(sys.executable).anchor, env=kept | environment,
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def tracked(*folders: str) -> set[str]:
    """Return the files under version control, or skip if there is no version control."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip(reason="no version control here says which files belong to the project: run it in a clone")
    listed = subprocess.run(["git", "ls-files", *folders], cwd=ROOT, capture_output=True, text=True, check=True)
    return {name for name in listed.stdout.splitlines() if (ROOT / name).exists()}


def interpreter(version: str) -> str | None:
    """Return a Python of a version: the tests' own, one on the path, or one of pyenv's."""
    if version == f"{sys.version_info.major}.{sys.version_info.minor}":
        return sys.executable
    home = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    candidates = [shutil.which(f"python{version}"), *sorted(home.glob(f"versions/{version}.*/bin/python"))]
    for candidate in filter(None, candidates):
        if run(candidate, "-c", "import venv, ensurepip").returncode == 0:  # pyenv's own scripts may fail
            return str(candidate)
    return None


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return the sdist, and the wheel built from it."""
    for needed in ("build", "hatchling"):
        pytest.importorskip(needed, reason=f"{needed} is of the extra `test`")
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return sdist, wheel


def test_the_sdist_has_every_file(built: tuple[Path, Path]) -> None:
    with tarfile.open(built[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert tracked() <= names
    assert {"CITATION.cff", "LICENSE", "PKG-INFO", "gwt_kernels/backends/cpu/level.inc"} <= names
    assert not {name for name in names if name.startswith(("build/", "site/", "csrc_reference/build"))}


def test_the_wheel_has_the_package_alone(built: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(built[1]) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        said = email.message_from_bytes(archive.read(metadata))
    assert names == tracked("gwt_kernels")
    assert {"c", "h", "inc", "py", "typed"} <= {name.rpartition(".")[2] for name in names}
    assert (said["Name"], said["Version"]) == ("gwt-kernels", gwt_kernels.__version__)
    assert (said["License-Expression"], said["Requires-Python"]) == ("Apache-2.0", ">=3.11")
    assert said["Description-Content-Type"] == "text/markdown"
    assert "Paper: GWT, https://arxiv.org/abs/2501.07237" in said.get_all("Project-URL", [])


def folder_of_torch(python: str) -> str | None:
    """Return the folder that a Python has PyTorch in, with what PyTorch needs, or None."""
    find = "import importlib.util as u, pathlib; print(pathlib.Path(u.find_spec('torch').origin).parents[1])"
    said = run(python, "-c", find)
    return said.stdout.strip() if said.returncode == 0 else None


@pytest.mark.parametrize("version", VERSIONS)
def test_the_wheel_installs_and_runs(built: tuple[Path, Path], version: str, tmp_path: Path) -> None:
    """Check that a step and `gwt-kernels doctor` run if the Python has PyTorch; else only that is missing."""
    python = interpreter(version)
    if python is None:
        pytest.skip(reason=f"no Python {version} is at hand: install it as python{version}")
    place = tmp_path / "environment"
    made = run(python, "-m", "venv", "--without-pip", place)
    assert made.returncode == 0, made.stderr
    own, command = place / "bin" / "python", place / "bin" / "gwt-kernels"
    pip = [sys.executable, "-m", "pip", "--python", own, "install", "--quiet", "--no-deps", "--no-index", built[1]]
    installed = run(*pip)
    assert installed.returncode == 0, installed.stderr
    compiled = run(own, "-m", "compileall", "-q", place / "lib")
    assert compiled.returncode == 0, compiled.stdout
    known = run(own, "-c", "from importlib.metadata import version; print(version('gwt-kernels'))")
    assert known.stdout == f"{gwt_kernels.__version__}\n", known.stderr
    folder = folder_of_torch(python)
    if folder is None:
        assert version != f"{sys.version_info.major}.{sys.version_info.minor}"
        stepped = run(own, "-c", STEP)
        assert stepped.stderr.endswith("ModuleNotFoundError: No module named 'torch'\n")
        return
    (site,) = place.glob("lib/python*/site-packages")
    (site / "torch_of_the_tests.pth").write_text(folder)
    quick = tmp_path / "quick-cc"
    quick.write_text(f'#!/bin/sh\nexec {(build.compiler() or ["cc"])[0]} "$@" -O0\n')
    quick.chmod(0o755)
    cache = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "CC": str(quick)}
    stepped = run(own, "-c", STEP, **cache)
    assert (stepped.returncode, stepped.stdout) == (0, "stepped\n"), stepped.stderr
    doctor = run(command, "doctor", **cache)
    assert doctor.returncode == 0, doctor.stdout + doctor.stderr
    assert re.search(rf"^  gwt-kernels +{re.escape(gwt_kernels.__version__)}$", doctor.stdout, re.MULTILINE)
    assert f"python        {version}." in doctor.stdout
    for backend in ("torch, float64", "torch, float32", "compiled, float32"):
        assert f"ok     {backend}, level 2, on cpu" in doctor.stdout
    assert "All checks passed" in doctor.stdout


def test_the_citation_is_of_this_version() -> None:
    yaml = pytest.importorskip("yaml")
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["version"] == gwt_kernels.__version__
    assert cited["preferred-citation"]["url"] == "https://arxiv.org/abs/2501.07237"
