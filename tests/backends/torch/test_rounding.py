"""Random bits and 16-bit storage in plain PyTorch: known answers, exact round trips, exact expectations."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from gwt_kernels.core.hyper import key_of
from gwt_kernels.core.philox import MOMENTS, WEIGHTS, philox, random_halves, random_words
from gwt_kernels.formats.split import join_low, split_low
from gwt_kernels.formats.stochastic import stochastic_round
from tests.support import philox as oracle

CPU = torch.device("cpu")
NARROW = (torch.bfloat16, torch.float16)
narrow = pytest.mark.parametrize("dtype", NARROW, ids=str)
KEY = key_of(seed=0xDEADBEEF, stream=0x7654321)
LARGEST = torch.finfo(torch.float32).max


# Random bits -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("counter", "key", "words"), oracle.KNOWN)
def test_the_oracle_gives_the_published_answers(counter, key, words):
    assert oracle.philox4x32(counter, key) == words
    assert oracle.philox4x32(counter, key, rounds=6) != words


def test_philox_of_zeros_gives_the_published_answer():
    assert tuple(map(int, philox(torch.tensor([0]), 0, 0, 0))) == oracle.KNOWN[0][2]


@pytest.mark.parametrize("key", [0, 1, KEY, key_of(2**32 - 1, 2**31 - 1)])
@pytest.mark.parametrize("step", [1, 2**24 + 1, 2**31 + 1, 2**32 - 1, 2**32 + 7])
@pytest.mark.parametrize("first", [0, 3, 2**32 - 5, 2**34 + 1, 2**45 + 6, 2**62 + 5])
def test_bits_are_those_of_the_oracle(first, step, key):
    n = 21
    words = random_words(first, n, step, key, CPU)
    assert [word % 2**32 for word in words.tolist()] == oracle.words(range(first, first + n), step, MOMENTS, key)
    halves = random_halves(first, n, step, key, CPU)
    assert halves.tolist() == oracle.words(range(first, first + n), step, WEIGHTS, key, per_call=8)


@pytest.mark.parametrize("bits", [random_words, random_halves])
def test_a_part_of_a_run_is_the_run_of_that_part(bits):
    """Check that a part draws its bits of the run, so that chunks, tiles and shards draw the whole tensor's."""
    first = 2**33 - 40
    whole = bits(first, 100, 5, KEY, CPU)
    for start in range(0, 30):
        for n in (1, 2, 7, 8, 33):
            assert torch.equal(bits(first + start, n, 5, KEY, CPU), whole[start : start + n])
    assert bits(first, 0, 5, KEY, CPU).shape == (0,)


@pytest.mark.parametrize("bits", [random_words, random_halves])
@pytest.mark.parametrize(
    "changed",
    [
        {"step": 4},
        {"step": 3 + 2**16},
        {"key": key_of(1, 0)},
        {"key": key_of(0, 1)},
        {"key": key_of(2**31, 0)},
        {"first": 2**40},
    ],
    ids=str,
)
def test_bits_depend_on_step_seed_parameter_and_index(bits, changed):
    own = {"first": 0, "n": 4096, "step": 3, "key": 0, "device": CPU}
    difference = bits(**own) ^ bits(**(own | changed))
    # Each bit of independent words differs half of the time.
    for i in range(16):
        share = float((difference >> i & 1).double().mean())
        assert abs(share - 0.5) < 5 * 0.5 / math.sqrt(4096), i


def test_seed_and_stream_keep_their_bits():
    assert key_of(5, 7) == 5 | 7 << 32
    assert key_of(2**32 - 1, 2**31 - 1) == 2**63 - 1  # the largest int64
    assert key_of(0, 2**31 + 3) == key_of(0, 3)


def test_weights_and_moments_draw_different_bits():
    n = 1 << 16
    words = random_words(0, n, 1, 0, CPU).to(torch.int64)
    first, second, weights = words & 0xFFFF, words >> 16 & 0xFFFF, random_halves(0, n, 1, 0, CPU).to(torch.int64)
    for x in (first, second, weights):
        assert (int(x.min()), int(x.max())) <= (50, 2**16 - 1)
        assert int(x.min()) >= 0
        centred = (x.double() + 0.5) / 2**16 - 0.5
        assert abs(float(centred.mean())) < 5 * math.sqrt(1 / 12 / n)
        counts = torch.bincount(x >> 8, minlength=256).double()
        chi_square = float(((counts - n / 256) ** 2 / (n / 256)).sum())
        assert abs(chi_square - 255) < 5 * math.sqrt(2 * 255)
    pairs = (
        (first, second),
        (first, weights),
        (second, weights),
        (weights[1:], weights[:-1]),
        (first[1:], first[:-1]),
    )
    for x, y in pairs:
        correlation = torch.corrcoef(torch.stack((x.double(), y.double())))[0, 1]
        assert abs(float(correlation)) < 5 / math.sqrt(n)


# Rounding ----------------------------------------------------------------------------------------------


def patterns(n: int, seed: int = 0) -> Tensor:
    """Return float32 numbers of random bits, including subnormal ones and the limits of 16 bits, without NaN."""
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(-(2**31), 2**31, (n,), generator=generator).to(torch.int32)
    edges = [0x00000001, 0x0000FFFF, 0x00010000, 0x007FFFFF, 0x00800000, 0x33000000, 0x33800000, 0x387FE000]
    edges += [0x38800000, 0x477FE000, 0x477FEFFF, 0x477FF000, 0x47800000, 0x7F7EFFFF, 0x7F7F0000, 0x7F7F7FFF]
    edges += [0x7F7F8000, 0x7F7FFFFF, 0x7F800000, 0]
    raw[: len(edges)] = torch.tensor(edges, dtype=torch.int32)
    raw[len(edges) : 2 * len(edges)] = raw[: len(edges)] | -(2**31)
    quarter = n // 4
    raw[-quarter:] &= -0x7F800001  # exponent 0: subnormal
    raw[-2 * quarter : -quarter] &= -0x7F800001
    raw[-2 * quarter : -quarter] |= torch.randint(100, 145, (quarter,), generator=generator).to(torch.int32) << 23
    x = raw.view(torch.float32)
    return torch.where(x.isnan(), 1.0, x)


def neighbours(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the bits of the numbers of ``dtype`` next to ``x``: towards zero, and away from it but finite."""
    nearest = x.to(dtype)
    raw = nearest.view(torch.int16)
    below = raw - (nearest.float().abs() > x.abs()).to(torch.int16)
    exact = below.view(dtype).float() == x
    above = below + (~exact & ((below & 0x7FFF).view(dtype).float() < torch.finfo(dtype).max)).to(torch.int16)
    return below, above


@narrow
def test_stochastic_rounding_gives_one_of_two_neighbours(dtype):
    x = patterns(40_000)
    below, above = neighbours(x, dtype)
    generator = torch.Generator().manual_seed(1)
    for bits in (0, 0xFFFF, None):
        bits = torch.randint(0, 2**16, x.shape, generator=generator) if bits is None else torch.full(x.shape, bits)
        got = stochastic_round(x, bits, dtype)
        assert got.dtype == dtype
        raw = got.view(torch.int16)
        assert bool(((raw == below) | (raw == above)).all())
        if bool((bits == 0).all()) and dtype == torch.bfloat16:
            assert torch.equal(raw, below)
    assert float((below != above).float().mean()) > 0.3  # control: both neighbours are possible


@narrow
def test_representable_numbers_are_unchanged(dtype):
    """Check every number of the dtype: both zeros, subnormal numbers, the largest and infinity."""
    every = torch.arange(2**16).to(torch.int16).view(dtype)
    every = every[~every.isnan()]
    for bits in (0, 1, 0x7FFF, 0xFFFF):
        got = stochastic_round(every.float(), torch.full(every.shape, bits), dtype)
        assert torch.equal(got.view(torch.int16), every.view(torch.int16))


@narrow
def test_finite_stays_finite_and_nan_stays_nan(dtype):
    largest = torch.finfo(dtype).max
    beyond = torch.linspace(0, 1, 1001, dtype=torch.float64) * (LARGEST - largest) + largest
    beyond = beyond.float()
    for sign in (1, -1):
        for bits in (0, 0x8000, 0xFFFF):
            got = stochastic_round(sign * beyond, torch.full(beyond.shape, bits), dtype)
            assert bool((got == sign * largest).all())
    assert bool(beyond[1:].to(dtype).isinf().any())  # control: rounding to nearest gives some infinities
    raw = torch.tensor([0x7FC00000, 0x7F800001, 0x7FFFFFFF, -1, -0x400000, -0x7FFFFF], dtype=torch.int32)
    for bits in (0, 0xFFFF):
        assert bool(stochastic_round(raw.view(torch.float32), torch.full(raw.shape, bits), dtype).isnan().all())
    infinite = torch.tensor([math.inf, -math.inf])
    assert stochastic_round(infinite, torch.tensor([0xFFFF, 0xFFFF]), dtype).tolist() == infinite.tolist()


def values(dtype: torch.dtype, n: int = 300) -> Tensor:
    """Return normal numbers that ``dtype`` cannot represent, of both signs and many magnitudes, and its limits."""
    info = torch.finfo(dtype)
    generator = torch.Generator().manual_seed(2)
    exponents = torch.empty(n).uniform_(
        math.log2(info.smallest_normal), math.log2(info.max) - 1, generator=generator
    )
    x = torch.exp2(exponents) * torch.randn(n, generator=generator).sign()
    return torch.cat((x, torch.tensor([1 + 2**-13, 1 - 2**-13, -1 - 2**-12, info.max * (1 - 2**-12)])))


@narrow
def test_the_mean_over_all_noise_is_the_number(dtype):
    """Check the exact mean, over each of the 2**16 values of the noise once, instead of by sampling."""
    noise = torch.arange(2**16)
    x = values(dtype)
    x = torch.cat((x, patterns(2**10)[-200:])) if dtype == torch.bfloat16 else x  # subnormal ones
    for one in x:
        rounded = stochastic_round(one.expand(2**16), noise, dtype).double()
        assert float(rounded.mean()) == float(one)


def test_subnormal_float16_is_unbiased_to_the_resolution_of_the_noise():
    noise = torch.arange(2**16)
    for one in (3e-8, -1.234567e-6, 5.9e-5, 2**-24 * (1 + 2**-17), 1e-30):
        x = torch.tensor(one)
        mean = float(stochastic_round(x.expand(2**16), noise, torch.float16).double().mean())
        assert abs(mean - float(x)) <= 2**-24 * 2**-16  # an ulp, in steps of the noise


def biases(x: Tensor, dtype: torch.dtype, rounded: Tensor) -> Tensor:
    """Return the mean error of ``rounded [n, len(x)]`` in standard errors of an unbiased rounding."""
    below, above = (b.view(dtype).double() for b in neighbours(x, dtype))
    share = (x.double() - below) / (above - below)
    error = (rounded.double().mean(0) - x.double()) / (above - below).abs()
    return error / (share * (1 - share) / len(rounded)).sqrt()


@narrow
def test_rounding_with_the_generators_bits_is_unbiased(dtype):
    """Check within 5 standard errors, which truncation, rounding to nearest, and noise of 8 bits exceed."""
    x, n = values(dtype, 60), 1 << 16
    x[0] = 1 + torch.finfo(dtype).eps * 2**-9  # this fraction of an ulp above a number: less than 8 bits resolve
    bits = random_halves(0, n * len(x), 9, KEY, CPU).view(n, len(x))
    words = random_words(0, n * len(x), 9, KEY, CPU).view(n, len(x))
    for noise in (bits, words & 0xFFFF, words >> 16 & 0xFFFF):
        fair = stochastic_round(x.expand_as(noise), noise, dtype)
        assert float(biases(x, dtype, fair).abs().max()) < 5
    controls = {
        "truncated": stochastic_round(x.expand_as(bits), torch.zeros_like(bits), dtype),
        "nearest": x.to(dtype).expand_as(bits),
        "8 bits": stochastic_round(x.expand_as(bits), bits & 0xFF00, dtype),
    }
    for name, rounded in controls.items():
        assert float(biases(x, dtype, rounded).abs().max()) > 7, name


@narrow
def test_rounding_of_strided_tensors(dtype):
    x = values(dtype, 60)
    bits = random_halves(0, x.numel(), 1, KEY, CPU)
    expected = stochastic_round(x, bits, dtype).view(8, 8).t()
    got = stochastic_round(x.view(8, 8).t(), bits.view(8, 8).t(), dtype)
    assert torch.equal(got, expected)


# Split weights -------------------------------------------------------------------------------------------


def test_split_and_joined_float32_is_unchanged():
    x = patterns(100_000, seed=3)
    weight, low = split_low(x)
    assert (weight.dtype, low.dtype) == (torch.bfloat16, torch.int16)
    assert torch.equal(join_low(weight, low).view(torch.int32), x.view(torch.int32))
    assert float((weight.float() != x).float().mean()) > 0.5  # control: the low halves are not all zero


def test_the_weight_is_the_nearest_bfloat16_and_the_larger_of_two():
    x = patterns(100_000, seed=4)
    weight, _ = split_low(x)
    tied = (x.view(torch.int32) & 0xFFFF) == 0x8000
    assert torch.equal(weight[~tied], x.to(torch.bfloat16)[~tied])
    every = torch.arange(0x7F80).to(torch.int32) << 16 | 0x8000  # every tie, of both signs
    for raw in (every, every | -(2**31)):
        weight, low = split_low(raw.view(torch.float32))
        away = ((raw >> 16) + 1).to(torch.int16).view(torch.bfloat16)
        assert torch.equal(weight, away)
        assert bool((low == -0x8000).all())


def test_a_weight_without_low_bits_joins_zeros():
    """Check missing low bits, as in a run that starts from bfloat16 weights."""
    every = torch.arange(2**16).to(torch.int16).view(torch.bfloat16)
    every = every[~every.isnan()]
    assert torch.equal(join_low(every, torch.zeros(every.shape, dtype=torch.int16)), every.float())
    weight, low = split_low(every.float())
    assert torch.equal(weight.view(torch.int16), every.view(torch.int16))
    assert not low.any()


def test_nan_and_infinity_in_split_weights():
    x = torch.tensor([math.nan, math.inf, -math.inf, -0.0, 0.0, LARGEST, -LARGEST])
    x = torch.cat((x, torch.tensor([0x7F800001, -1], dtype=torch.int32).view(torch.float32)))
    weight, low = split_low(x)
    joined = join_low(weight, low)
    assert torch.equal(joined.isnan(), x.isnan())
    assert torch.equal(weight.isnan(), x.isnan())
    assert torch.equal(joined[1:7].view(torch.int32), x[1:7].view(torch.int32))
