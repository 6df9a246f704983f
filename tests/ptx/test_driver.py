"""Tests of launches of Triton's kernels through the driver, in separate processes, and of the options of pytest."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.ptx import plugin

ROOT = Path(__file__).parents[2]


def run(*command: str, cache: Path) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(cache), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def test_launches() -> None:
    done = run("-m", "tests.ptx.launched", *plugin.CHIPS, cache=plugin.CACHE)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.split() == [word for chip in plugin.CHIPS for word in ("for", chip)]


def pytest_run(*options: str, cache: Path) -> subprocess.CompletedProcess[str]:
    test = "tests/backends/triton/test_step.py::test_number_of_tensors[2-1]"
    return run("-m", "pytest", "-q", "-p", "no:cacheprovider", *options, test, cache=cache)


def test_the_option_of_pytest(tmp_path: Path) -> None:
    done = pytest_run("--compiled", "sm_90", "--disturb", "1", cache=tmp_path)
    assert done.returncode == 0, done.stdout
    assert "compiled for sm_90: 3 kernels of" in done.stdout
    assert "1 of step_kernel" in done.stdout
    assert any(tmp_path.rglob("step_kernel.ptx"))


def configure(**options: object) -> bool:
    """Configure the plugin in this process, as by a command line with only these options."""
    return plugin.configure(SimpleNamespace(getoption=lambda name: options.get(name.removeprefix("--"))))


def test_options_that_are_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("GWT_KERNELS_COMPILED", "")  # restored after the test
    with pytest.raises(pytest.UsageError, match="--disturb needs --compiled"):
        configure(disturb=1)
    parser = argparse.ArgumentParser()
    group = SimpleNamespace(addoption=parser.add_argument)
    plugin.add_options(SimpleNamespace(getgroup=lambda *_: group))
    assert parser.parse_args(["--compiled", "sm_80"]).compiled == "sm_80"
    with pytest.raises(SystemExit):
        parser.parse_args(["--compiled", "sm_70"])
    assert "invalid choice: 'sm_70'" in capsys.readouterr().err


def test_a_cuda_device_runs_kernels_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("GWT_KERNELS_COMPILED", "sm_80")  # as if set by the run that started this one
    before = plugin.driver()
    assert not configure(compiled="sm_90")
    assert plugin.driver() is before
    assert "GWT_KERNELS_COMPILED" not in os.environ
    with pytest.raises(pytest.UsageError, match="CUDA_VISIBLE_DEVICES=''"):
        configure(compiled="sm_90", disturb=1)
