"""Tests of the memory that counts as a live tensor's, in kernels that read it by its address."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.ptx.running import execute, kernel
from tests.ptx.tensors import LiveTensors
from tests.ptx.types import Fault

# Each thread stores the double of its element of x in y.
COPY = """
    mov.u32 %r0, %tid.x;
    ld.param.b64 %l0, [p0];
    ld.param.b64 %l1, [p1];
    mad.wide.u32 %l2, %r0, 4, %l0;
    ld.global.b32 %r3, [%l2];
    add.s32 %r8, %r3, %r3;
    mad.wide.u32 %l3, %r0, 4, %l1;
    st.global.b32 [%l3], %r8;
"""


def test_tensors_that_are_gone() -> None:
    """Check that a read from a tensor deleted since the launch before is a fault."""
    x, y = torch.zeros(64 * 1024, dtype=torch.int32), torch.zeros(64 * 1024, dtype=torch.int32)
    ptx = kernel(COPY, parameters=2, threads=64)
    execute(ptx, [x, y])
    address = x.data_ptr()
    execute(ptx, [address, y])  # the control: it is still there
    del x  # without a collection: the search must not keep tensors alive
    with pytest.raises(Fault, match="outside of every tensor"):
        execute(ptx, [address, y])


def test_a_look_for_tensors_keeps_nothing_alive() -> None:
    tensors, nowhere = LiveTensors(), np.zeros(1, np.int64)
    gc.disable()
    try:
        for _ in range(3):  # searches all objects, then new ones only
            x = torch.zeros(1)
            seen = weakref.ref(x)
            assert not tensors.inside(nowhere, nowhere + 1).any()
            del x
            assert seen() is None
    finally:
        gc.enable()


def test_storages_that_are_given_up() -> None:
    """Check storages freed and allocated again, as sharded data parallelism does between steps."""
    x, y = torch.zeros(64 * 1024, dtype=torch.int32), torch.zeros(64 * 1024, dtype=torch.int32)
    ptx = kernel(COPY, parameters=2, threads=64)
    address = x.data_ptr()
    execute(ptx, [address, y])
    x.untyped_storage().resize_(0)
    with pytest.raises(Fault, match="outside of every tensor"):
        execute(ptx, [address, y])
    x.untyped_storage().resize_(4 * 64 * 1024)
    x.fill_(1)
    execute(ptx, [x, y])
    assert (y[:64] == 2).all()


def test_gradients_that_only_autograd_knows() -> None:
    weight = torch.nn.Parameter(torch.zeros(64))
    (weight * 3).sum().backward()
    y = torch.zeros(64, dtype=torch.int32)
    execute(kernel(COPY, parameters=2, threads=64), [weight.grad.data_ptr(), y])
    assert (y == 2 * int(np.float32(3).view(np.int32)) - 2**32).all()


def test_reads_past_a_storage_that_another_follows() -> None:
    """Check that a read past the end of a storage fails, unless all of it is in a larger one."""
    body = "ld.param.b64 %l0, [p0];\nld.global.v2.b32 {%r1, %r2}, [%l0];"
    memory = np.zeros(64, np.int32)
    first, second = (torch.frombuffer(memory[i : i + 1], dtype=torch.int32) for i in range(2))
    assert second.data_ptr() - first.data_ptr() == first.untyped_storage().nbytes() == 4
    with pytest.raises(Fault, match="outside of every tensor"):
        execute(kernel(body, parameters=1), [first])
    larger = torch.from_numpy(memory)
    execute(kernel(body, parameters=1), [first])
    assert larger.data_ptr() == first.data_ptr()


def test_tensors_without_memory_are_no_extents() -> None:
    """Check a launch while tensors without memory are alive: of a lazy module, fake and meta tensors."""
    with FakeTensorMode():
        fake = torch.zeros(4)
    alive = [torch.nn.LazyLinear(2).weight, fake, torch.zeros(4, device="meta")]
    y = torch.zeros(64, dtype=torch.int32)
    body = "ld.param.b64 %l0, [p0];\nld.global.b32 %r1, [%l0];"
    execute(kernel(body, parameters=1), [y.data_ptr()])
    assert len(alive) == 3
