"""The command line as a whole: its output to a closed pipe, and to a full disk."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMMANDS = (
    ["--help"],
    ["doctor"],
    ["plan", "llama_60m"],
    ["plan", "llama_60m", "--json", "--verbose"],
    ["migrate", "--help"],
)


# Each command runs in a new process, forked with all imports; each exits as Python does. The last one writes
# to a disk that is full.
EACH = """
import gc, json, os, runpy, sys, tempfile
import transformers.models.llama.modeling_llama, gwt_kernels
assert "gwt_kernels.__main__" not in sys.modules
gc.freeze()  # each exit would look through all imports for garbage, for a second
commands, ended = json.loads(sys.argv[1]), []
for i, command in enumerate(commands):
    reading, writing = os.pipe()
    os.close(reading)
    if i + 1 == len(commands):
        os.close(writing)
        writing = os.open("/dev/full", os.O_WRONLY)
    errors = tempfile.TemporaryFile("w+")
    if not (child := os.fork()):
        os.dup2(writing, 1)
        os.dup2(errors.fileno(), 2)
        sys.argv[1:] = command
        runpy.run_module("gwt_kernels", run_name="__main__", alter_sys=True)
    os.close(writing)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    errors.seek(0)
    ended.append([status, errors.read()])
print(json.dumps(ended))
"""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, which Linux has")
def test_a_closed_pipe_ends_the_command_quietly_and_a_full_disk_with_one_sentence() -> None:
    """The pipe is closed from the start; a shell reports 128 + SIGPIPE for such a program."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"} | {"PYTHONPATH": str(ROOT)}
    environment["TRITON_INTERPRET"] = "1"  # as doctor would set it, before transformers imports Triton
    done = subprocess.run(
        [sys.executable, "-c", EACH, json.dumps([*COMMANDS, ["plan", "llama_60m"]])],
        env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    *closed, (status, errors) = json.loads(done.stdout)
    assert closed == [[141, ""]] * len(COMMANDS)
    assert status == 1
    assert errors.count("\n") == 1
    assert errors.startswith("gwt-kernels: the output cannot be written: ")


def test_the_first_line_is_enough_for_head() -> None:
    command = f"{sys.executable} -m gwt_kernels plan llama_60m --verbose | head -1"
    done = subprocess.run(
        ["bash", "-c", command],
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.stdout.startswith("LlamaForCausalLM from llama_60m")
    assert (done.returncode, done.stderr) == (0, "")
