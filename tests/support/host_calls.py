"""Print the number of function calls in a step of the host-time benchmark; tests/bench/test_host.py runs it."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from bench import host
from gwt_kernels import GWTMuon
from gwt_kernels.core.dtensor import local_of

TENSORS = 300


def calls(mesh: DeviceMesh | None, limiter: bool, reallocated: bool) -> tuple[int, int]:
    """Count calls of Python and C functions in one step on many tensors, and the all-reduces among them."""
    optimizer, params = host.build(TENSORS, torch.device("cpu"), limiter=limiter, mesh=mesh)
    assert {isinstance(p, DTensor) for p in params} == {mesh is not None}
    assert {tuple(local_of(p).shape) for p in params} == {host.SIZE}
    return _counted(optimizer, params, reallocated)


def calls_of_matrices(tensors: int, mesh: DeviceMesh | None) -> int:
    """Count calls in a step of GWTMuon, in which products of matrices count as none."""
    with host.without_products():
        optimizer, params = host.build_matrices(tensors, torch.device("cpu"), GWTMuon, mesh)
        return _counted(optimizer, params, False)[0]


def _counted(optimizer: Any, params: Sequence[torch.Tensor], reallocated: bool) -> tuple[int, int]:
    counts = [0, 0]
    all_reduce = dist.all_reduce.__wrapped__.__code__  # type: ignore[attr-defined]

    def count(frame: object, event: str, argument: object) -> None:
        counts[0] += event in ("call", "c_call")
        counts[1] += event == "call" and getattr(frame, "f_code", None) is all_reduce

    run = host.time_steps(optimizer, params, reallocated=reallocated)
    next(run)
    assert all(
        p.grad is not None and type(p.grad) is (DTensor if isinstance(p, DTensor) else torch.Tensor) for p in params
    )
    assert all(p.grad._spec is p._spec for p in params if isinstance(p, DTensor))
    own = optimizer.step

    def watched() -> None:
        sys.setprofile(count)
        try:
            own()
        finally:
            sys.setprofile(None)

    optimizer.step = watched
    next(run)
    return counts[0], counts[1]


if __name__ == "__main__":
    found = []
    with host.without_device(), host.two_processes(torch.device("cpu")) as devices:
        for both in itertools.product((False, True), repeat=2):
            plain, sharded = calls(None, *both), calls(devices, *both)
            assert plain[1] == 0
            found.append([*both, plain[0], *sharded])
        matrices = [[calls_of_matrices(n, mesh) for n in (TENSORS // 3, TENSORS)] for mesh in (None, devices)]
    print(json.dumps([found, matrices]))
