"""Launches of Triton kernels through the driver, which test_driver.py runs in a process of its own."""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import pytest
import torch
import triton
import triton.language as tl
from triton import knobs
from triton.runtime import driver

from gwt_kernels import GWTAdafactor, GWTAdamW, haar_dwt, haar_idwt
from gwt_kernels.backends import choice
from gwt_kernels.backends.bucket import Bucket, StepInputs
from gwt_kernels.backends.triton.compiling import UNFUSED
from gwt_kernels.backends.triton.runner import TritonRunner
from gwt_kernels.core.hyper import Hyper
from tests.ptx.counts import ExecutionCounter, Traffic
from tests.ptx.driver import Driver, Options
from tests.ptx.types import Fault

assert not os.environ.get("TRITON_INTERPRET")


@triton.jit
def scale_kernel(x_ptr, y_ptr, n, factor, extra, flag, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n, other=0.0)
    total = tl.sum(x, axis=0)  # of a program, through shared memory
    y = x * factor + total
    if flag:
        y += extra
    tl.store(y_ptr + i, y, mask=i < n)


@triton.jit
def overwrite_kernel(x_ptr, BLOCK: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, BLOCK), tl.program_id(0))


@triton.jit
def several_kernel(pointers, numbers, absent_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(pointers[1] + i, tl.load(pointers[0] + i) + numbers[0] * numbers[1])
    if absent_ptr is not None:
        tl.store(absent_ptr + i, i)


@triton.jit
def approximate_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(x_ptr + i) / tl.load(x_ptr + BLOCK + i))


@triton.jit
def grid_kernel(x_ptr):
    tl.store(x_ptr + tl.program_id(1), 1.0)


@contextlib.contextmanager
def refused(kind: type[Exception], *words: str) -> Iterator[None]:
    with pytest.raises(kind) as caught:
        yield
    assert all(word in str(caught.value) for word in words), caught.value


def scaled(x: torch.Tensor, factor: float, extra: float, block: int) -> torch.Tensor:
    return torch.cat([part * factor + part.sum() + extra for part in x.split(block)])


def check_launches(d: Driver) -> None:
    x = torch.arange(1000, dtype=torch.float32)
    y = torch.empty_like(x)
    for n, factor, extra, flag in ((1000, 0.5, 3, True), (16, 2.0, 1, False), (1, 2.0, 5, True)):
        y.fill_(-1)
        compiled = scale_kernel[(4,)](x, y, n, factor, extra, flag, BLOCK=256)
        shown = scaled(x[:n], factor, extra if flag else 0, 256)
        torch.testing.assert_close(y[:n], shown, rtol=1e-6, atol=0)
        assert (y[n:] == -1).all()
    x = -x  # other memory; the compiled kernel is launched again without binding arguments
    y.zero_()
    compiled[4, 1, 1](x, y, 1, 2.0, 5, True, 256)
    assert y[0] == 5
    assert d.counts.launches["scale_kernel"] == 4
    assert len([p for p in d.counts.programs if p.name == "scale_kernel"]) == 3  # Triton specializes on 1 and 16
    a, b = torch.arange(64), torch.zeros(64, dtype=torch.int64)
    several_kernel[(1,)]((a, b), (3, 4), None, BLOCK=64)
    assert torch.equal(b, a + 12)


def check_hooks() -> None:
    seen: list[Any] = []
    enter, leave = (lambda metadata: seen.append("enter")), (lambda metadata: seen.append("leave"))
    knobs.runtime.launch_enter_hook.add(enter)
    knobs.runtime.launch_exit_hook.add(leave)
    several_kernel[(1,)]((torch.arange(64), torch.zeros(64, dtype=torch.int64)), (3, 4), None, BLOCK=64)
    knobs.runtime.launch_enter_hook.remove(enter)
    knobs.runtime.launch_exit_hook.remove(leave)
    assert seen == ["enter", "leave"]


def check_faults() -> None:
    x, y = torch.zeros(100), torch.zeros(100)
    with refused(Fault, "scale_kernel", "launched.py:", "outside of every tensor", "of shape (100,)", "'x'"):
        holder = {"x": x}
        scale_kernel[(1,)](holder["x"], y, 128, 1.0, 1, False, BLOCK=128)
    with refused(Fault, "overwrite_kernel", "a race in global memory", "of program 0", "of program 1"):
        overwrite_kernel[(3,)](torch.zeros(64), BLOCK=64)
    overwrite_kernel[(1,)](torch.zeros(64), BLOCK=64)
    with refused(ValueError, "on meta"):
        overwrite_kernel[(1,)](torch.zeros(64, device="meta"), BLOCK=64)
    with refused(NotImplementedError, "one dimension"):
        grid_kernel[(1, 2)](x)


def check_options(chip: str) -> None:
    x, y = torch.rand(512) + 1, torch.zeros(256)
    results = []
    for seed in (None, 0, 0, 1):
        with Driver(chip, Options(disturb=seed)):
            approximate_kernel[(1,)](x, y, BLOCK=256)
            results.append(y.clone())
    exact, *disturbed = results
    assert torch.equal(exact, x[:256] / x[256:])
    assert torch.equal(disturbed[0], disturbed[1])
    assert not torch.equal(disturbed[0], disturbed[2])
    off = (disturbed[0].view(torch.int32) - exact.view(torch.int32)).unique()
    assert off.abs().max() in (1, 2)
    for backwards in (False, True):  # the last program to run overwrites the others
        with Driver(chip, Options(races=False, backwards=backwards, threads=128)):
            x = torch.zeros(64)
            overwrite_kernel[(3,)](x, BLOCK=64)
            assert (x == (0 if backwards else 2)).all()
    x = torch.arange(64, dtype=torch.float32)
    counter = ExecutionCounter({"x": [x]}, "x")
    with Driver(chip, Options(counter=counter, machine_code=True)) as d:
        overwrite_kernel[(1,)](x, BLOCK=64)
    tally = counter.of("overwrite_kernel")
    assert tally.traffic == {("x", "store"): Traffic(bytes=256, sectors=8, distinct=8)}
    assert d.counts.machine_code[tally.program].startswith(b"\x7fELF")
    with Driver(chip) as d:
        overwrite_kernel[(1,)](x, BLOCK=64)
        assert not d.counts.machine_code


def check_optimizer() -> None:
    """Check steps that the package launches, against PyTorch's operators."""
    results = []
    for backend in ("triton", "torch"):
        params = [
            torch.nn.Parameter(torch.randn(s, generator=torch.Generator().manual_seed(0)))
            for s in ((8, 64), (5, 13))
        ]
        optimizer = GWTAdamW(params, lr=0.1, backend=backend)
        for t in range(3):
            for p in params:
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(t))
            optimizer.step()
        results.append([p.detach() for p in params])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


KERNELS = ("step", "norm", "limiter", "sum", "observe", "squares", "total", "decide", "rows", "dwt", "idwt")
KERNELS += ("panel", "join", "mean", "factor", "rate", "clip")


def check_products(chip: str) -> None:
    """Check that no launch of the package contracts a product with a sum, so that lanes agree on sums of blocks."""

    def step(kind: Any = GWTAdamW, **options: Any) -> None:
        p = torch.nn.Parameter(torch.ones(5, 61))
        optimizer = kind([p], max_grad_norm=0.3, backend="triton", **options)
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
        optimizer.step()

    with Driver(chip) as d:
        step(skip_nonfinite=True, telemetry=True, capturable=True)
        step(GWTAdafactor, scale_parameter=True)
        haar_idwt(haar_dwt(torch.ones(8, 64), 2, backend="triton"), 64, backend="triton")
        p, m = torch.ones(5, 61), torch.ones(5, 16)
        runner = TritonRunner(Bucket([p], [m], [m], level=2, grad_dtype=p.dtype))
        runner.reduce(StepInputs([p], [1], [Hyper()]), update_sums=True)
        assert set(d.counts.launches) == {f"{name}_kernel" for name in KERNELS}
        assert not d.counts.contracted
        scale_kernel[(1,)](p, p, 128, 1.0, 1, False, BLOCK=128)
        assert d.counts.contracted == {"scale_kernel"}  # the control: Triton's default
        with patch.dict(UNFUSED, enable_fp_fusion=True), refused(Fault, "_kernel", "a race"):
            step(level=5)  # several lanes hold one block


def main(chip: str, first: bool) -> None:
    assert not choice.launches_on("cpu")
    before = driver._active
    with Driver(chip) as d:
        assert driver.active is d
        assert choice.launches_on("cpu")
        assert not choice.launches_on("meta")
        check_launches(d)
        if first:
            check_hooks()
            check_faults()
        check_optimizer()
        assert d.counts.launches["step_kernel"] == 6
    assert driver._active is before
    choice.triton_obstacle.cache_clear()
    assert not choice.launches_on("cpu")
    if first:  # the same for every chip
        check_options(chip)
        check_products(chip)
        with refused(ValueError, "sm_70"):
            Driver("sm_70")


if __name__ == "__main__":
    for each in sys.argv[1:]:
        print(f"for {each}", flush=True)
        main(each, each == sys.argv[1])
