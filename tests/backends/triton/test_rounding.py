"""The kernels' random bits and 16-bit storage: known answers, and bit for bit the torch backend's."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from gwt_kernels.backends.triton.philox import (
    _philox,
    random_halves,
    random_halves_at,
    random_words,
)
from gwt_kernels.backends.triton.tables import TRITON_DTYPES
from gwt_kernels.core import kernel
from gwt_kernels.core import philox as expected
from gwt_kernels.core.hyper import key_of
from gwt_kernels.formats import split, stochastic
from tests.backends.torch.test_rounding import NARROW, patterns
from tests.support import interpreter, philox

kernel.load()
join_low, split_low = split.kernel_join_low, split.kernel_split_low
stochastic_round = stochastic.kernel_stochastic_round

CPU = torch.device("cpu")
KEYS = (0, key_of(3, 5), key_of(2**32 - 1, 2**31 - 1))
STEPS = (1, 2**24 + 1, 2**31 + 1, 2**32 - 1, 2**32 + 7)


@triton.jit
def call_kernel(arguments_ptr, out_ptr, PURPOSE: tl.constexpr):
    call, step, key = tl.load(arguments_ptr), tl.load(arguments_ptr + 1), tl.load(arguments_ptr + 2)
    w0, w1, w2, w3 = _philox(call + tl.arange(0, 1), step, PURPOSE, key)
    tl.store(out_ptr + tl.arange(0, 1), w0.to(tl.int64))
    tl.store(out_ptr + 1 + tl.arange(0, 1), w1.to(tl.int64))
    tl.store(out_ptr + 2 + tl.arange(0, 1), w2.to(tl.int64))
    tl.store(out_ptr + 3 + tl.arange(0, 1), w3.to(tl.int64))


@triton.jit
def bits_kernel(arguments_ptr, out_ptr, N: tl.constexpr, KIND: tl.constexpr):
    first, step, key = tl.load(arguments_ptr), tl.load(arguments_ptr + 1), tl.load(arguments_ptr + 2)
    if KIND == "words":
        bits = random_words(first, N, step, key)
    elif KIND == "halves":
        bits = random_halves(first, N, step, key)
    else:
        bits = random_halves_at(first + tl.arange(0, N), step, key)
    tl.store(out_ptr + tl.arange(0, N), bits.to(tl.int64))


@triton.jit
def round_kernel(x_ptr, bits_ptr, out_ptr, N: tl.constexpr, DTYPE: tl.constexpr):
    i = tl.program_id(0) * N + tl.arange(0, N)
    bits = tl.load(bits_ptr + i).to(tl.uint32)
    tl.store(out_ptr + i, stochastic_round(tl.load(x_ptr + i), bits, DTYPE))


@triton.jit
def split_kernel(x_ptr, weight_ptr, low_ptr, joined_ptr, N: tl.constexpr):
    i = tl.program_id(0) * N + tl.arange(0, N)
    weight, low = split_low(tl.load(x_ptr + i))
    tl.store(weight_ptr + i, weight)
    tl.store(low_ptr + i, low)
    tl.store(joined_ptr + i, join_low(weight, low))


def run(kernel, *tensors, programs=1, **constants):
    """Launch a kernel, as on a GPU."""
    with interpreter.like_a_gpu():
        kernel[(programs,)](*tensors, **constants)


def bits_of(kind: str, first: int, n: int, step: int, key: int, device: torch.device) -> torch.Tensor:
    out = torch.full((n,), -1, device=device)
    run(bits_kernel, torch.tensor([first, step, key], device=device), out, N=n, KIND=kind)
    return out.cpu()


@pytest.mark.parametrize(("counter", "key", "words"), philox.KNOWN)
def test_known_answers(device, counter, key, words):
    call, seed = (low | high << 32 for low, high in (counter[:2], key))
    signed = [x - 2**64 if x >= 2**63 else x for x in (call, counter[2], seed)]
    out = torch.zeros(4, dtype=torch.int64, device=device)
    run(call_kernel, torch.tensor(signed, device=device), out, PURPOSE=counter[3])
    assert tuple(x & 0xFFFFFFFF for x in out.tolist()) == words


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("n", [1, 2, 4, 64])
def test_words_are_those_of_the_torch_backend(device, n, step, key):
    for first in (0, 8, 4 * n, 2**32 - 64, 2**34 + 64, 2**45):
        got = bits_of("words", first, n, step, key, device)
        assert torch.equal(got.to(torch.int32), expected.random_words(first, n, step, key, CPU))


@pytest.mark.parametrize("n", [1, 2])
def test_words_of_tiles_of_one_or_two_blocks(device, n):
    whole = expected.random_words(0, 16, 7, KEYS[1], CPU)
    for first in range(0, 16, n):
        got = bits_of("words", first, n, 7, KEYS[1], device)
        assert torch.equal(got.to(torch.int32), whole[first : first + n])


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("step", STEPS)
def test_16_bit_halves_of_words_are_those_of_the_torch_backend(device, step, key):
    for first in (0, 8, 2**32 - 64, 2**35 + 64, 2**45):
        halves = expected.random_halves(first, 64, step, key, CPU)
        for kind in ("halves", "at"):
            assert torch.equal(bits_of(kind, first, 64, step, key, device), halves), kind
    for first in (1, 2**32 - 3):  # rows may begin at any index
        halves = expected.random_halves(first, 64, step, key, CPU)
        assert torch.equal(bits_of("at", first, 64, step, key, device), halves)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_rounding_is_that_of_the_torch_backend(device, dtype):
    n = 1 << 15
    x = patterns(n, seed=5)
    x[-3:] = torch.tensor([0x7FC00000, 0x7F800001, -1], dtype=torch.int32).view(torch.float32)
    random = expected.random_halves(0, n, 1, KEYS[1], CPU)
    for bits in (random, torch.zeros_like(random), torch.full_like(random, 0xFFFF)):
        out = torch.zeros(n, dtype=dtype, device=device)
        run(round_kernel, x.to(device), bits.to(device), out, programs=8, N=n // 8, DTYPE=TRITON_DTYPES[dtype])
        got, wanted = out.cpu(), stochastic.stochastic_round(x, bits, dtype)
        assert torch.equal(got.isnan(), wanted.isnan())
        assert int(wanted.isnan().sum()) == 3
        number = ~wanted.isnan()
        assert torch.equal(got[number].view(torch.int16), wanted[number].view(torch.int16))


def test_split_weights_are_those_of_the_torch_backend(device):
    n = 1 << 15
    x = patterns(n, seed=6)
    x[100:200].view(torch.int32).bitwise_and_(-0x10000).bitwise_or_(0x8000)  # ties
    x = torch.where(x.isnan(), 1.0, x)
    x[-2:] = torch.tensor([0x7F800001, -1], dtype=torch.int32).view(torch.float32)
    weight = torch.zeros(n, dtype=torch.bfloat16, device=device)
    low, joined = (torch.zeros(n, dtype=d, device=device) for d in (torch.int16, torch.float32))
    run(split_kernel, x.to(device), weight, low, joined, programs=8, N=n // 8)
    wanted, wanted_low = split.split_low(x)
    assert torch.equal(weight.cpu().view(torch.int16), wanted.view(torch.int16))
    assert torch.equal(low.cpu(), wanted_low)
    assert torch.equal(joined.cpu()[:-2].view(torch.int32), x[:-2].view(torch.int32))
    assert bool(joined[-2:].isnan().all())
    assert wanted_low.any()
