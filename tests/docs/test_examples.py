"""The examples of the site run unchanged in processes of their own, and the loss falls."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "docs" / "examples"
EXAMPLES_RUN = (
    "plain_pytorch",
    "with_accelerate",
    "with_lightning",
    "with_trainer",
    pytest.param(
        "with_torchtitan",
        marks=pytest.mark.skipif(
            importlib.util.find_spec("torchtitan") is None,
            reason="torchtitan is kept apart: make build/torchtitan/.made, then PYTHONPATH=$PWD/build/torchtitan",
        ),
    ),
)


def test_every_example_is_tested_and_shown() -> None:
    found = {path.stem for path in EXAMPLES.glob("*.py")}
    assert found == {*(run if isinstance(run, str) else run.values[0] for run in EXAMPLES_RUN), "tiny"}
    shown = re.findall(r'--8<-- "docs/examples/(\w+)\.py"', (ROOT / "docs" / "integrations.md").read_text())
    assert sorted(shown) == sorted(found)


@pytest.mark.parametrize("name", EXAMPLES_RUN)
def test_example_runs_and_learns(name: str, tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",  # nothing is downloaded
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "TMPDIR": str(tmp_path),
    }
    done = subprocess.run(
        [sys.executable, EXAMPLES / f"{name}.py"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    said = re.search(r"^loss (\S+) -> (\S+)$", done.stdout, re.MULTILINE)
    assert said is not None, done.stdout
    first, last = map(float, said.groups())
    assert first == pytest.approx(5.55, abs=0.1)  # ln 256: the loss of a uniform guess
    assert last < 4.0
