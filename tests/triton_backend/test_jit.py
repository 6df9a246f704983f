"""What a user's launches compile: kernels through Triton's JIT binder, without a device, in their own process."""

import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_one_compiled_variant_whatever_the_number_of_tensors(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("jit_variants.py"))],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    hashes = defaultdict(set)
    launches = defaultdict(int)
    for kernel, flat, compiled in json.loads(result.stdout):
        hashes[kernel, flat].add(compiled)
        launches[kernel, flat] += 1
    for kernel in ("step_kernel", "norm_kernel"):
        for flat in (True, False):
            assert launches[kernel, flat] == 8  # four optimizers, two steps each
            assert len(hashes[kernel, flat]) == 1, f"{kernel} was compiled anew for another number of tensors"
        assert hashes[kernel, True] != hashes[kernel, False]  # the control: other constants, other code
    assert len(hashes["limiter_kernel", True]) == 1
    assert {len(hashes[kernel, True]) for kernel in ("dwt_kernel", "idwt_kernel")} == {1}
