"""The command line as a whole: its output to a closed pipe, and to a full disk."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
COMMANDS = (
    ["--help"],
    ["doctor"],
    ["plan", "llama_60m"],
    ["plan", "llama_60m", "--json", "--verbose"],
    ["migrate", "--help"],
)
VERBOSE, PLAN = ["plan", "llama_60m", "--verbose"], ["plan", "llama_60m"]


# Each command runs in a new process, forked with all imports, and exits as Python does. Only the first line of the
# last but one is read, as soon as it is written. The last one writes to a full disk.
EACH = """
import gc, json, os, runpy, sys, tempfile
import transformers.models.llama.modeling_llama, gwt_kernels
assert "gwt_kernels.__main__" not in sys.modules
gc.freeze()  # each exit would look through all imports for garbage, for a second
commands, ended = json.loads(sys.argv[1]), []
for i, command in enumerate(commands):
    reading, writing = os.pipe()
    is_read, is_last = i + 2 == len(commands), i + 1 == len(commands)
    if not is_read:
        os.close(reading)
    if is_last:
        os.close(writing)
        writing = os.open("/dev/full", os.O_WRONLY)
    errors = tempfile.TemporaryFile("w+")
    if not (child := os.fork()):
        if is_read:
            os.close(reading)
            sys.stdout.reconfigure(write_through=True)
        os.dup2(writing, 1)
        os.dup2(errors.fileno(), 2)
        sys.argv[1:] = command
        runpy.run_module("gwt_kernels", run_name="__main__", alter_sys=True)
    os.close(writing)
    first = ""
    if is_read:
        with open(reading) as file:
            first = file.readline()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    errors.seek(0)
    ended.append([status, errors.read(), first])
print(json.dumps(ended))
"""


@pytest.fixture(scope="module")
def ended() -> list[Any]:
    """Return for each command its status, its errors, and the output that was read."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"} | {"PYTHONPATH": str(ROOT)}
    environment["TRITON_INTERPRET"] = "1"  # as doctor would set it, before transformers imports Triton
    done = subprocess.run(
        [sys.executable, "-c", EACH, json.dumps([*COMMANDS, VERBOSE, PLAN])],
        env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: list[Any] = json.loads(done.stdout)
    return found


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, which Linux has")
def test_a_closed_pipe_ends_the_command_quietly_and_a_full_disk_with_one_sentence(ended: list[Any]) -> None:
    """Check a pipe that is closed from the start, for which a shell reports 128 + SIGPIPE."""
    *closed, _, (status, errors, _) = ended
    assert closed == [[141, "", ""]] * len(COMMANDS)
    assert status == 1
    assert errors.count("\n") == 1
    assert errors.startswith("gwt-kernels: the output cannot be written: ")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, which Linux has")
def test_the_first_line_is_enough_for_head(ended: list[Any]) -> None:
    """Check a pipe that is closed during the output, or after it."""
    status, errors, first = ended[-2]
    assert first.startswith("LlamaForCausalLM from llama_60m")
    assert (status in (0, 141), errors) == (True, "")
