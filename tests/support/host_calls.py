"""Print the number of function calls in a step of the host-time benchmark; tests/bench/test_host.py runs it."""

from __future__ import annotations

import itertools
import json
import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from bench import host
from gwt_kernels.core.dtensor import local_of

TENSORS = 300


def calls(mesh: DeviceMesh | None, limiter: bool, reallocated: bool) -> tuple[int, int]:
    """Count calls of Python and C functions in one step on many tensors, and the all-reduces among them."""
    counts = [0, 0]
    all_reduce = dist.all_reduce.__wrapped__.__code__  # type: ignore[attr-defined]

    def count(frame: object, event: str, argument: object) -> None:
        counts[0] += event in ("call", "c_call")
        counts[1] += event == "call" and getattr(frame, "f_code", None) is all_reduce

    optimizer, params = host.build(TENSORS, torch.device("cpu"), limiter=limiter, mesh=mesh)
    assert {isinstance(p, DTensor) for p in params} == {mesh is not None}
    assert {tuple(local_of(p).shape) for p in params} == {host.SIZE}
    run = host.time_steps(optimizer, params, reallocated=reallocated)
    next(run)
    assert all(p.grad is not None and type(p.grad) is (torch.Tensor if mesh is None else DTensor) for p in params)
    assert all(p.grad._spec is p._spec for p in params if isinstance(p, DTensor))
    own = optimizer.step

    def watched() -> None:
        sys.setprofile(count)
        try:
            own()
        finally:
            sys.setprofile(None)

    optimizer.step = watched  # type: ignore[method-assign]
    next(run)
    return counts[0], counts[1]


if __name__ == "__main__":
    found = []
    with host.without_device(), host.two_processes(torch.device("cpu")) as devices:
        for both in itertools.product((False, True), repeat=2):
            plain, sharded = calls(None, *both), calls(devices, *both)
            assert plain[1] == 0
            found.append([*both, plain[0], *sharded])
    print(json.dumps(found))
