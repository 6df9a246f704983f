"""``gwt-kernels doctor``: reports the installation, and detects a wrong kernel."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gwt_kernels import cli, doctor
from gwt_kernels.backends import choice
from gwt_kernels.rules import gwt

ROOT = Path(__file__).parents[1]


def test_command_reports_and_passes() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-m", "gwt_kernels", "doctor"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    for expected in (f"torch         {torch.__version__}", "cpu:", "float64   -> torch", "All checks passed"):
        assert expected in result.stdout
    assert "triton, float32, level 2" in result.stdout  # through the interpreter if there is no device


def test_wrong_kernel_is_noticed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    block_sums = gwt.block_sums
    monkeypatch.setattr(gwt, "block_sums", lambda *parts: block_sums(*parts) * (1 + 1e-4))
    assert not doctor.report()
    assert "FAILED" in capsys.readouterr().out


def test_unknown_command_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        cli.main(["cure"])
    assert error.value.code == 2
    assert "cure" in capsys.readouterr().err


def test_a_step_that_cannot_be_taken_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(choice, "triton_obstacle", lambda device, dtype, *args: None)
    monkeypatch.setitem(sys.modules, "gwt_kernels.backends.triton.runner", None)  # as with a broken Triton
    assert not doctor.report()
    said = capsys.readouterr().out
    assert "FAILED triton, float32, level 0, on cpu: ModuleNotFoundError: import of gwt_kernels.backends" in said
    assert "ok     torch, float32, level 3, on cpu: largest relative error" in said


def test_command_without_numpy_leaves_the_interpreter_out() -> None:
    """Check without numpy, which Triton's interpreter imports, but PyTorch and Triton do not install."""
    hidden = (
        "import importlib.util, sys\n"
        "find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *more: None if name == 'numpy' else find(name, *more)\n"
        "sys.modules['numpy'] = None\n"
        "from gwt_kernels.cli import main\n"
        "sys.exit(main(['doctor']))\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-c", hidden],
        env=environment | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "All checks passed" in result.stdout
    assert "triton, float32" not in result.stdout
