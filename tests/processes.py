"""Runs a function of a test module in several processes that talk over gloo, as torchrun would start them."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
_MAIN = """
import datetime, importlib, os, sys
import torch
import torch.distributed as dist
torch.set_num_threads(1)
module, function, store, *arguments = sys.argv[1:]
rank, world = map(int, arguments[:2])
# A file for the processes to meet at: no port that another run may have taken.
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world,
                        timeout=datetime.timedelta(seconds=60))
getattr(importlib.import_module(module), function)(*arguments[2:])
dist.barrier()
dist.destroy_process_group()
# All has been checked; threads of PyTorch's that are still there have been seen to abort an ordinary exit.
sys.stdout.flush()
os._exit(0)
"""


def run(world: int, function: object, *arguments: object, timeout: float = 180) -> list[str]:
    """What each of ``world`` processes printed that called a module's function with the arguments as text.

    Raises AssertionError with the output of all of them if one fails, or if they have not ended in time.
    """
    module, name = function.__module__, function.__name__  # type: ignore[attr-defined]
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "RANK", "WORLD_SIZE")}
    environment.update(
        PYTHONPATH=os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        OMP_NUM_THREADS="1",
        PYTHONWARNINGS="ignore",
    )
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        started = [
            subprocess.Popen(
                [sys.executable, "-c", _MAIN, module, name, store, str(rank), str(world), *map(str, arguments)],
                env=environment,
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(world)
        ]
        printed = []
        try:
            for process in started:
                try:
                    printed.append(process.communicate(timeout=timeout)[0])
                except subprocess.TimeoutExpired:
                    process.kill()
                    printed.append(process.communicate()[0] + "\n(killed: it hung)")
        finally:
            for process in started:
                process.kill()
                process.wait()
    failed = [i for i, process in enumerate(started) if process.returncode]
    report = "\n".join(f"--- process {i}\n{text}" for i, text in enumerate(printed))
    assert not failed, f"processes {failed} of {world} failed:\n{report}"
    return printed
