"""Peak memory of training steps with and without gradient release, each measured in its own process."""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from bench.common import records
from bench.common.measure import facts
from gwt_kernels import GWTAdamW, release_gradients

LAYERS, WIDTH, BATCH, STEPS = 24, 2048, 16, 3


def train(released: bool, device: torch.device) -> tuple[int, int]:
    """Return the peak bytes of a few steps, and the bytes of all gradients together.

    On a CPU the peak is the process's resident set minus that before training.
    """
    torch.manual_seed(0)
    layers = [layer for _ in range(LAYERS) for layer in (nn.Linear(WIDTH, WIDTH, bias=False), nn.Tanh())]
    model = nn.Sequential(*layers).to(device)
    optimizer = GWTAdamW(model.parameters(), level=2)
    if released:
        release_gradients(model, optimizer)
    x = torch.randn(BATCH, WIDTH, device=device)
    gradients = sum(p.numel() * p.element_size() for p in model.parameters())
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
    else:
        before = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(STEPS):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) - before, gradients
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, gradients


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure both modes in separate processes, print them, and add them to the record."""
    parser = argparse.ArgumentParser(prog="python -m bench.studies.gradient_release", description=__doc__)
    parser.add_argument("--out", type=Path, default=records.RESULTS, help="folder for the raw JSON")
    parser.add_argument("--commit", help="the commit measured, where the tree is no git checkout")
    parser.add_argument("--one", choices=("ordinary", "released"), help="measure one in this process and print it")
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.one:
        print(*train(options.one == "released", device))
        return 0
    about = facts(device, "bench.studies.gradient_release", arguments, options.commit)
    path = records.new_path("release", about, options.out)
    # Otherwise glibc, once a tensor is freed, keeps freed memory for reuse, and its fragments are measured.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072"}
    for mode in ("ordinary", "released"):
        command = [sys.executable, "-m", "bench.studies.gradient_release", "--one", mode]
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
        peak, gradients = map(int, done.stdout.split())
        print(f"{mode}: {peak / 2**20:.0f} MiB beyond the weights; all gradients are {gradients / 2**20:.0f} MiB")
        row = {"mode": mode, "layers": LAYERS, "width": WIDTH, "gradient_bytes": gradients, "metric": "peak_bytes"}
        row |= {"unit": "B", "median": peak, "p20": None, "p80": None, "samples": 1, "note": ""}
        records.append(path, "release", [row | about])
    return 0


if __name__ == "__main__":
    sys.exit(main())
