"""Starts processes that communicate over gloo, forked cheaply from a process with all imports."""

from __future__ import annotations

import datetime
import faulthandler
import gc
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from tests.ptx import plugin
from tests.support import interpreter

_context = multiprocessing.get_context("forkserver")
# Modules that take long to import and start no threads, which a fork would lose.
_context.set_forkserver_preload(["tests.support.parallel_runs", "tests.support.resharded", "tests.support.wrapped"])


class Processes:
    """Processes that have met over gloo and call one function; the output of each goes to a file."""

    def __init__(self, world: int, function: Callable[..., object], *arguments: Any) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._outputs = [Path(self._folder.name) / str(rank) for rank in range(world)]
        store = Path(self._folder.name) / "store"
        _start_server()
        self.started: list[ForkServerProcess] = [
            _context.Process(target=_main, args=(store, rank, world, output, function, arguments))
            for rank, output in enumerate(self._outputs)
        ]
        for process in self.started:
            process.start()

    @property
    def running(self) -> bool:
        return any(process.is_alive() for process in self.started)

    def printed(self) -> str:
        """Return the output of all processes."""
        texts = [output.read_text() if output.exists() else "" for output in self._outputs]
        return "\n".join(f"--- process {rank}\n{text}" for rank, text in enumerate(texts))

    def wait(self, seconds: float = 120) -> bool:
        """Wait for all processes, kill those that exceed the time, and return whether there were none."""
        end = time.monotonic() + seconds
        for process in self.started:
            process.join(max(0.0, end - time.monotonic()))
        hung = [process for process in self.started if process.is_alive()]
        for process in hung:
            process.kill()
            process.join()
        return not hung


def _start_server() -> None:
    """Start the server process from which the others are forked, unless it runs; it imports Triton."""
    with mock.patch.dict(os.environ, {} if plugin.driver() else {"TRITON_INTERPRET": "1"}):  # see plugin.begin
        forkserver.ensure_running()


def _main(
    store: Path, rank: int, world: int, output: Path, function: Callable[..., object], arguments: tuple[Any, ...]
) -> None:
    with output.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    faulthandler.enable()  # a crash leaves the calls of all threads in the output
    gc.freeze()  # collections need not search the imports
    torch.set_num_threads(1)
    interpreter.quicken()
    # The processes meet at a file: no port that another run may have taken.
    how = {"rank": rank, "world_size": world, "timeout": datetime.timedelta(seconds=60)}
    dist.init_process_group("gloo", init_method=f"file://{store}", **how)
    function(*arguments)
    dist.barrier()  # no process leaves while another still communicates with it
    dist.destroy_process_group()


def run(world: int, function: Callable[..., object], *arguments: Any) -> None:
    """Call a function in several processes, and raise AssertionError with their output unless all succeed."""
    processes = Processes(world, function, *arguments)
    in_time = processes.wait()
    codes = [process.exitcode for process in processes.started]
    assert in_time, f"a process hung:\n{processes.printed()}"
    assert not any(codes), f"exit codes {codes}:\n{processes.printed()}"
