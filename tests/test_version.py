"""The version has one source, used by the package, its metadata, doctor and the command line."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import gwt_kernels
from gwt_kernels import cli, doctor

ROOT = Path(__file__).parents[1]


def test_the_metadata_s_version_is_the_package_s() -> None:
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" not in pyproject["project"]
    assert "version" in pyproject["project"]["dynamic"]
    source = ROOT / pyproject["tool"]["hatch"]["version"]["path"]
    assert source.samefile(str(gwt_kernels.__file__))
    assert re.findall(r'^__version__ = "(.+)"$', source.read_text(), re.MULTILINE) == [gwt_kernels.__version__]


def test_the_changelog_begins_with_the_version() -> None:
    assert re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[0] == gwt_kernels.__version__


def test_the_version_is_known_without_an_installation(tmp_path: Path) -> None:
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import gwt_kernels; print(gwt_kernels.__version__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == gwt_kernels.__version__


def test_doctor_and_the_command_line_print_the_version(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "__version__", "7.8.9")
    monkeypatch.setattr(doctor, "self_check", lambda: iter(()))
    assert doctor.report()
    assert re.search(r"^  gwt-kernels +7\.8\.9$", capsys.readouterr().out, re.MULTILINE)
    with pytest.raises(SystemExit) as left:
        cli.main(["--version"])
    assert left.value.code == 0
    assert capsys.readouterr().out == f"gwt-kernels {gwt_kernels.__version__}\n"
