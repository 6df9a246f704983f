"""Compilations in a user's launches: kernels through Triton's JIT binder, without a device, in a new process."""

import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]


def run(script: str, cache: Path) -> Any:
    """Run a script beside this file without Triton's interpreter, and return its output."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, str(Path(__file__).with_name(script))],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_launches_without_binding_pass_the_same_arguments(tmp_path: Path) -> None:
    first, *others = run("jit_launches.py", tmp_path)
    names = [name for name, *_ in first["launches"]]
    kernels = ["norm_kernel", "limiter_kernel", "step_kernel", "observe_kernel"]
    assert names == kernels * 2  # both paths
    assert first["bound"] == names
    for step in others:
        assert step == {"launches": first["launches"], "bound": []}


def test_one_compiled_variant_whatever_the_number_of_tensors(tmp_path: Path) -> None:
    hashes = defaultdict(set)
    launches = defaultdict(int)
    for kernel, flat, compiled in run("jit_variants.py", tmp_path):
        hashes[kernel, flat].add(compiled)
        launches[kernel, flat] += 1
    for kernel in ("step_kernel", "norm_kernel"):
        for flat in (True, False):
            assert launches[kernel, flat] == 8  # four optimizers, two steps each
            assert len(hashes[kernel, flat]) == 1, f"{kernel} was compiled anew for another number of tensors"
        assert hashes[kernel, True] != hashes[kernel, False]  # control: other constants give other code
    assert len(hashes["limiter_kernel", True]) == 1
    assert {len(hashes[kernel, True]) for kernel in ("dwt_kernel", "idwt_kernel")} == {1}
