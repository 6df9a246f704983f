"""The command line as a whole: what becomes of output that nobody reads."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMMANDS = (
    ["--help"],
    ["--version"],
    ["doctor"],
    ["doctor", "--help"],
    ["plan", "llama_60m"],
    ["plan", "llama_60m", "--json", "--verbose"],
    ["plan", "llama_60m", "--world-size", "2"],
    ["plan", "--help"],
    ["migrate", "--help"],
)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_reader_that_goes_away_ends_it_quietly(command: list[str]) -> None:
    """Without a reader from the start; a shell says 128 + SIGPIPE of a program that the closed pipe has ended."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"} | {"PYTHONPATH": str(ROOT)}
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "gwt_kernels", *command],
            env=environment, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=120, check=False,
        )  # fmt: skip
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


def test_the_first_line_is_enough_for_head() -> None:
    command = f"{sys.executable} -m gwt_kernels plan llama_60m --verbose | head -1"
    done = subprocess.run(
        ["bash", "-c", command],
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.stdout.startswith("LlamaForCausalLM from llama_60m")
    assert (done.returncode, done.stderr) == (0, "")
