"""Helpers for tests of code in C."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sysconfig
from pathlib import Path

import pytest
import torch

from gwt_kernels.backends import choice

_found = [
    importlib.util.find_spec("triton"),
    os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang"),
    Path(sysconfig.get_paths()["include"], "Python.h").exists(),
]
needs_compiler = pytest.mark.skipif(
    not all(_found), reason="needs Triton, a C compiler and Python's headers: install triton, gcc and python3-dev"
)
needs_step_in_c = pytest.mark.skipif(
    choice.compiler_obstacle(torch.device("cpu")) is not None,
    reason="needs a C compiler: apt-get install gcc, or set CC",
)
