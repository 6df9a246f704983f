"""The command line as a whole: its output to a closed pipe."""

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


# Each command runs in a new process, forked with all imports; each exits as Python does.
EACH = """
import gc, json, os, runpy, sys, tempfile
import transformers.models.llama.modeling_llama, gwt_kernels
assert "gwt_kernels.__main__" not in sys.modules
gc.freeze()  # each exit would look through all imports for garbage, for a second
commands, ended = json.loads(sys.argv[1]), []
for command in commands:
    reading, writing = os.pipe()
    os.close(reading)
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


def test_a_closed_pipe_ends_the_command_quietly() -> None:
    """The pipe is closed from the start; a shell reports 128 + SIGPIPE for such a program."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"} | {"PYTHONPATH": str(ROOT)}
    environment["TRITON_INTERPRET"] = "1"  # as doctor would set it, before transformers imports Triton
    done = subprocess.run(
        [sys.executable, "-c", EACH, json.dumps(COMMANDS)],
        env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [[141, ""]] * len(COMMANDS)


def test_the_first_line_is_enough_for_head() -> None:
    command = f"{sys.executable} -m gwt_kernels plan llama_60m --verbose | head -1"
    done = subprocess.run(
        ["bash", "-c", command],
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.stdout.startswith("LlamaForCausalLM from llama_60m")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, which Linux has")
def test_output_that_cannot_be_written_gives_one_sentence() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "gwt_kernels", "plan", "llama_60m"],
            stdout=full, stderr=subprocess.PIPE, cwd=ROOT, text=True, timeout=300, check=False,
        )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("gwt-kernels: the output cannot be written: ")
