"""Threads of the step in C: reused, safe when a process forks, and with the caller's floating-point mode."""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from gwt_kernels import GWTAdamW
from gwt_kernels.backends.cpu import step as compiled_step
from tests.support.native import needs_step_in_c
from tests.support.runs import assert_same_bits, give_gradients, parameters, snapshot

pytestmark = needs_step_in_c


@pytest.fixture(autouse=True, params=["PyTorch's", "own"])
def two_threads(request):
    """Provide PyTorch's threads, or the backend's own as if PyTorch had none to lend; both have to pass."""
    before, c = torch.get_num_threads(), compiled_step.functions()
    torch.set_num_threads(2)
    if request.param == "own":
        c.gwt_lend(None, None)
    yield request.param
    c.gwt_lend(*compiled_step.threads_of_pytorch())
    torch.set_num_threads(before)


def optimizer_of(seed: int, *, size: int = 512) -> GWTAdamW:
    params = parameters([(size, 512), (3, 40)], seed=seed)
    give_gradients(params, seed=seed)
    return GWTAdamW(params, lr=0.01, backend="compiled")


def started() -> int:
    found: int = compiled_step.functions().gwt_threads()
    return found


def tasks() -> set[str]:
    """Return the threads of this process by number."""
    return {path.name for path in Path("/proc/self/task").iterdir()}


def test_threads_are_started_once(two_threads):
    optimizer = optimizer_of(seed=1)
    optimizer.step()
    count, before = started(), tasks()
    assert count >= 1 or two_threads != "own"
    for _ in range(5):
        optimizer.step()
    assert started() == count
    assert tasks() <= before  # threads of an earlier test may have ended meanwhile


# Each function runs in a process that has started no thread, forked from one with all imports.
NEW_PROCESSES = """
import os, resource, sys, torch
from gwt_kernels import GWTAdamW
from gwt_kernels.backends.cpu import step

def buckets():
    torch.set_num_threads(4)
    for shapes in ([(100, 100)], [(8, 8)] * 100, [(64, 64)] * 30, [(512, 512)]):
        params = [torch.nn.Parameter(torch.ones(*shape)) for shape in shapes]
        for p in params:
            p.grad = torch.ones_like(p)
        GWTAdamW(params, backend="compiled").step()
        print(step.functions().gwt_threads())

def none_to_be_had():
    torch.set_num_threads(1)
    p = torch.nn.Parameter(torch.ones(512, 512))
    p.grad = torch.ones_like(p)
    optimizer = GWTAdamW([p], backend="compiled")
    optimizer.step()  # has the memory that a step needs
    once = p.detach().clone()
    torch.set_num_threads(3)
    taken = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + 2**25,) * 2)  # room, but not for a stack
    optimizer.step()
    torch.set_num_threads(1)
    print(step.functions().gwt_threads(), bool((p != once).all()))

for work in (buckets, none_to_be_had):
    if not os.fork():
        try:
            step.functions().gwt_lend(None, None)
            work()
        finally:
            sys.stdout.flush()
            os._exit(0)
    os.wait()
    print("end", flush=True)
"""


@pytest.fixture(scope="module")
def printed() -> tuple[list[str], list[str]]:
    """Return what each of these processes printed."""
    env = os.environ | {"OPENBLAS_NUM_THREADS": "1"}  # a NumPy thread, ended by the fork, would leave a stack
    command = 'ulimit -s 65536 && exec "$0" -c "$1"', sys.executable, NEW_PROCESSES
    done = subprocess.run(["bash", "-c", *command], stdout=subprocess.PIPE, text=True, check=True, env=env)
    buckets, none_to_be_had, _ = done.stdout.split("end\n")
    return buckets.split(), none_to_be_had.split()


@pytest.mark.parametrize("two_threads", ["own"], indirect=True)
def test_small_buckets_start_no_thread(printed):
    """Check that work is measured over the whole bucket: many small tensors count like a large one."""
    assert printed[0] == ["0", "0", "2", "3"]


@pytest.mark.parametrize("two_threads", ["PyTorch's"], indirect=True)
def test_a_thread_takes_the_range_of_its_number():
    """Check equal ranges in both passes of the limiter, in any order of threads; surplus threads take none."""
    optimizer, twin = optimizer_of(seed=3), optimizer_of(seed=3)
    begun, asked, c = [], [], compiled_step.functions()
    work_of = ctypes.CFUNCTYPE(None, ctypes.c_void_p)

    @ctypes.CFUNCTYPE(None, work_of, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    def one_after_another(work, context, threads, flags):
        for number in (7, 1, 0):
            begun.append(number)
            work(context)

    @ctypes.CFUNCTYPE(ctypes.c_int)
    def own_number():
        asked.append(begun[-1])
        return begun[-1]

    c.gwt_lend(*(ctypes.cast(each, ctypes.c_void_p) for each in (one_after_another, own_number)))
    optimizer.step()
    c.gwt_lend(*compiled_step.threads_of_pytorch())
    twin.step()
    assert asked == begun == 2 * [7, 1, 0]
    assert_same_bits(snapshot(optimizer), snapshot(twin))


def in_a_child(work) -> str:
    """Return the output of a forked child, which has to end by itself."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writer, work().encode())
        finally:
            os._exit(0)
    os.close(writer)
    end = time.monotonic() + 60
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        if time.monotonic() > end:
            os.kill(child, 9)
            os.waitpid(child, 0)
            pytest.fail("the child hangs")
        time.sleep(0.01)
    with os.fdopen(reader) as file:
        return file.read()


def fingerprint(optimizer: GWTAdamW) -> str:
    """Hash the weights without PyTorch's operators, which in a child wait for threads that do not exist."""
    parts = [p.detach().numpy().tobytes() for group in optimizer.param_groups for p in group["params"]]
    return hashlib.sha256(b"".join(parts)).hexdigest()


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_forked_child_starts_new_threads():
    """Check that a child, in which the parent's threads do not exist, starts its own, and the parent keeps its."""
    optimizer, twin = optimizer_of(seed=2), optimizer_of(seed=2)
    optimizer.step()
    twin.step()

    def work() -> str:
        before = started()
        optimizer.step()
        return f"{before} {started()} {fingerprint(optimizer)}"

    said = in_a_child(work)
    twin.step()
    assert said == f"0 1 {fingerprint(twin)}"
    optimizer.step()
    assert fingerprint(optimizer) == fingerprint(twin)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_forks_while_others_step():
    """Check that a child never waits for work that the parent had in progress."""
    stop = threading.Event()
    others = optimizer_of(seed=3, size=2048)

    def train() -> None:
        while not stop.is_set():
            others.step()

    thread = threading.Thread(target=train)
    thread.start()
    try:
        for seed in range(5):
            optimizer, twin = optimizer_of(seed), optimizer_of(seed)
            for own in (optimizer, twin, twin):  # PyTorch's operators create the state
                own.step()
            assert in_a_child(lambda own=optimizer: (own.step(), fingerprint(own))[1]) == fingerprint(twin)
    finally:
        stop.set()
        thread.join()


class Numbers(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> torch.Tensor:
        optimizer = optimizer_of(seed=i)  # a worker may train, too
        optimizer.step()
        return optimizer.param_groups[0]["params"][0].detach()[0].clone()


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_workers_that_fork_between_steps():
    def train() -> list[object]:
        optimizer = optimizer_of(seed=4)
        seen = []
        for _ in range(2):
            for batch in torch.utils.data.DataLoader(Numbers(), num_workers=2, batch_size=4, timeout=60):
                optimizer.step()
                seen.append(batch)
        return [seen, snapshot(optimizer)]

    expected = [[Numbers()[i] for i in range(4 * k, 4 * k + 4)] for k in (0, 1)]
    seen, taken = train()
    for batch, own in zip(seen, expected * 2, strict=True):
        assert torch.equal(batch, torch.stack(own))
    twin = optimizer_of(seed=4)
    for _ in range(4):
        twin.step()
    assert_same_bits(taken, snapshot(twin))


def test_concurrent_callers():
    """Check that one caller gets the threads and the others work alone, with the same bits."""
    optimizers, twins = ([optimizer_of(seed) for seed in range(4)] for _ in range(2))

    def train(optimizer: GWTAdamW) -> None:
        for _ in range(10):
            optimizer.step()

    workers = [threading.Thread(target=train, args=(each,)) for each in optimizers]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert not worker.is_alive()
    for each in twins:
        train(each)
    assert_same_bits(list(map(snapshot, optimizers)), list(map(snapshot, twins)))


@pytest.mark.parametrize("two_threads", ["PyTorch's"], indirect=True)
def test_pytorch_lends_its_threads():
    """Check that the installed PyTorch lends its threads, which are unchanged after a step."""
    assert compiled_step.threads_of_pytorch()
    own = torch.full((1 << 20,), 1e-39)
    before = started()
    assert torch.set_flush_denormal(True)
    optimizer_of(seed=5).step()
    torch.set_flush_denormal(False)
    assert started() == before
    assert ((own + 0.0) == own).all()
    assert (own + 0.0 > 0).all()


def test_all_threads_flush_denormals_as_the_caller_does():
    """Check ``torch.set_flush_denormal``, which applies to the calling thread, and so to the whole step."""

    def moments(flush: bool, threads: int) -> torch.Tensor:
        torch.set_num_threads(threads)
        p = torch.nn.Parameter(torch.ones(1024, 512))
        p.grad = torch.full_like(p, 1e-38)
        optimizer = GWTAdamW([p], level=0, betas=(0.9, 0.999), backend="compiled")
        try:
            assert torch.set_flush_denormal(flush)
            optimizer.step()
        finally:
            torch.set_flush_denormal(False)
        return optimizer.state[p]["exp_avg"].clone()

    moments(False, 2)  # threads started while nothing was flushed
    assert torch.equal(moments(True, 2), torch.zeros(1024, 512))
    assert torch.equal(moments(False, 2), moments(False, 1))
    assert (moments(False, 2) > 0).all()  # control


@pytest.mark.parametrize("two_threads", ["own"], indirect=True)
def test_process_that_cannot_start_threads_works_alone(printed):
    assert printed[1] == ["0", "True"]
