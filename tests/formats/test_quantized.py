"""Int8 moments: equal on every backend, unbiased, close to the exact ones, and used only where they save memory."""

from __future__ import annotations

import math

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from gwt_kernels import GWTAdamW
from gwt_kernels.backends import choice
from gwt_kernels.core import kernel
from gwt_kernels.formats import int8 as quantized
from gwt_kernels.formats.int8 import block_size
from gwt_kernels.plan import predicted_state_bytes
from tests.support import interpreter

needs_kernels_here = pytest.mark.skipif(
    torch.cuda.is_available(), reason="needs kernels on the CPU: hide the CUDA devices, CUDA_VISIBLE_DEVICES=''"
)
kernel.load()
FIRST = [quantized.encode_first, quantized.decode_first]
SECOND = [quantized.encode_second, quantized.decode_second]


@triton.jit
def _both(m_ptr, v_ptr, bits_ptr, out_ptr, N: tl.constexpr, Q: tl.constexpr):
    """Compute quantized and decoded values of both moments: float32 ``[4, N]``, then the scales ``[2, N

    Q]``.
    """
    i = tl.arange(0, N)
    j = tl.arange(0, N // Q)
    bits = tl.load(bits_ptr + i).to(tl.uint32)
    values, scales = quantized.kernel_encode_first(tl.load(m_ptr + i), bits, Q, N)
    tl.store(out_ptr + i, values.to(tl.float32))
    tl.store(out_ptr + N + i, quantized.kernel_decode_first(values, scales, Q, N))
    tl.store(out_ptr + 4 * N + j, scales)
    values, scales = quantized.kernel_encode_second(tl.load(v_ptr + i), bits, Q, N)
    tl.store(out_ptr + 2 * N + i, values.to(tl.float32))
    tl.store(out_ptr + 3 * N + i, quantized.kernel_decode_second(values, scales, Q, N))
    tl.store(out_ptr + 4 * N + N // Q + j, scales)


def moments(n: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return moments of many magnitudes, with zeros, blocks of zeros, and the smallest and largest numbers."""
    generator = torch.Generator().manual_seed(seed)
    m = torch.randn(n, generator=generator) * torch.randn(n, generator=generator).mul(3).exp()
    v = torch.randn(n, generator=generator).mul(4).exp() * 1e-6
    m[:128] = v[:128] = 0.0
    m[130] = v[131] = 0.0
    m[256:384] *= 1e-30
    v[256:384] *= 1e-30
    m[384], v[385] = 3e38, 3e38
    return m, v, torch.randint(65536, (n,), generator=generator)


@needs_kernels_here
@pytest.mark.parametrize("level", [0, 3, 4, 6])
def test_both_backends_quantize_alike(level):
    n, q = 1024, block_size(level)
    m, v, bits = moments(n, seed=level)
    out = torch.full((4 * n + 2 * n // q,), torch.nan)
    with interpreter.like_a_gpu():
        _both[(1,)](m, v, bits, out, n, q)
    first, first_scales = quantized.encode_first(m, bits, level)
    second, second_scales = quantized.encode_second(v, bits, level)
    expected = [
        first.float(),
        quantized.decode_first(first, first_scales, level),
        second.float(),
        quantized.decode_second(second, second_scales, level),
        first_scales,
        second_scales,
    ]
    assert torch.equal(out, torch.cat(expected))


@needs_kernels_here
@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf])
@pytest.mark.parametrize("level", [0, 4])
def test_a_bad_moment_spoils_its_block_on_both_backends(level, bad):
    if math.isinf(bad) and choice.interpreted():
        pytest.skip("Triton's interpreter converts NaN, which inf / inf is, to another integer than a GPU")
    n, q = 1024, block_size(level)
    m, v, bits = moments(n, seed=level)
    places = torch.tensor([3, 127, 700])
    m[places], v[places] = bad, bad
    out = torch.full((4 * n + 2 * n // q,), 7.0)
    with interpreter.like_a_gpu():
        _both[(1,)](m, v, bits, out, n, q)
    first, first_scales = quantized.encode_first(m, bits, level)
    second, second_scales = quantized.encode_second(v, bits, level)
    decoded = (
        quantized.decode_first(first, first_scales, level),
        quantized.decode_second(second, second_scales, level),
    )
    expected = [first.float(), decoded[0], second.float(), decoded[1], first_scales, second_scales]
    torch.testing.assert_close(out, torch.cat(expected), rtol=0, atol=0, equal_nan=True)
    spoilt = torch.zeros(n // q, dtype=torch.bool).index_fill_(0, places // q, True)
    assert torch.equal(first_scales.isfinite(), ~spoilt)
    assert torch.equal(decoded[0].view(-1, q).isnan().all(1), spoilt)


@triton.jit
def _sizes(fractions_ptr, bits_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    values = quantized.kernel_first_code(tl.load(fractions_ptr + i), tl.load(bits_ptr + i).to(tl.uint32))
    tl.store(out_ptr + i, values.to(tl.int8))


@needs_kernels_here
def test_rounding_never_changes_the_sign():
    """Check that a moment slightly above its block's computed maximum gets the largest value, and not -128."""
    off = torch.tensor([-1, 0, 1, 2, 8, 64, 1024, 1 << 16])  # in ulps of 1.0
    fractions = (torch.tensor(1.0).view(torch.int32) + off.int()).view(torch.float32).repeat_interleave(2)
    bits = torch.tensor([0, 65535]).repeat(len(off))
    out = torch.zeros(len(bits), dtype=torch.int8)
    with interpreter.like_a_gpu():
        _sizes[(1,)](fractions, bits, out, len(bits))
    assert out.tolist() == [127] * len(bits)
    largest = torch.full((256,), 3.0).copysign(torch.tensor([1.0, -1.0]).repeat(128))
    for drawn in (0, 65535):
        values, _ = quantized.encode_first(largest, torch.full((256,), drawn), 2)
        assert torch.equal(values, largest.sign().mul(127).to(torch.int8))


@pytest.mark.parametrize(("encode", "decode"), [FIRST, SECOND], ids=["first", "second"])
def test_the_mean_over_all_noise_is_the_exact_value(encode, decode):
    """Check the mean over all 65,536 draws of values between two quantized ones; rounding to nearest would fail."""
    n = 128
    values = torch.linspace(0.002, 1.0, n, dtype=torch.float64).float()
    total = torch.zeros(n, dtype=torch.float64)
    for bits in range(0, 65536, 16):
        stored, scales = encode(values, torch.full((n,), bits), 0)
        total += decode(stored, scales, 0).double()
    mean = total / (65536 / 16)
    assert float(((mean - values.double()) / values.double()).abs().max()) < 2e-3
    nearest, scales = encode(values, torch.full((n,), 32768), 0)
    assert float(((decode(nearest, scales, 0) - values) / values).abs().max()) > 2e-3  # control


@pytest.mark.parametrize(("encode", "decode"), [FIRST, SECOND], ids=["first", "second"])
def test_the_stored_value_is_a_neighbour(encode, decode):
    m, v, bits = moments(1024)
    x = m if encode is quantized.encode_first else v
    lowest, scales = encode(x, torch.zeros_like(bits), 2)
    highest, _ = encode(x, torch.full_like(bits, 65535), 2)
    values, _ = encode(x, bits, 2)
    assert bool(((values == lowest) | (values == highest)).all())
    # Every draw lies between those of the least and the most noise, which are at most one step apart.
    assert int((highest.int() - lowest.int()).abs().max()) <= 1
    assert torch.equal(decode(values, scales, 2)[x == 0], x[x == 0])
    assert bool((decode(values, scales, 2)[:128] == 0).all())


def test_a_small_second_moment_never_becomes_zero():
    v = torch.full((128,), 1e-20)
    v[0] = 1.0
    values, scales = quantized.encode_second(v, torch.full((128,), 65535), 2)
    assert int(values.min()) == 1
    assert float(quantized.decode_second(values, scales, 2).min()) > 0


@pytest.mark.parametrize("rule", ["gwt", "foam"])
@pytest.mark.parametrize("shape", [(96, 256), (67, 333)])
def test_a_run_stays_close_to_the_one_with_float32_moments(shape, rule):
    """Check the update's error, that of quantization: some per cent of its norm, averaged out over steps."""

    def run(state_dtype):
        p = torch.nn.Parameter(torch.zeros(shape))
        optimizer = GWTAdamW([p], lr=0.01, rule=rule, state_dtype=state_dtype)
        for t in range(20):
            generator = torch.Generator().manual_seed(t)
            p.grad = torch.randn(shape, generator=generator) + torch.linspace(-1, 1, shape[1])
            optimizer.step()
        return p.detach(), optimizer.state[p]

    (exact, _), (near, state) = run(None), run(torch.int8)
    assert (state["exp_avg"].dtype, state["exp_avg_sq"].dtype) == (torch.int8, torch.uint8)
    error = float((near - exact).norm() / exact.norm())
    assert 0 < error < 0.02


@needs_kernels_here
@pytest.mark.parametrize(
    ("shape", "level", "options"),  # every pair of a level, a shape and options
    [
        ((96, 256), 0, {}),
        ((67, 333), 2, {}),
        ((67, 333), 0, {"norm_growth_limit": None}),
        ((96, 256), 2, {"norm_growth_limit": None}),
        ((67, 333), 0, {"rule": "foam"}),
        ((96, 256), 2, {"rule": "foam"}),
    ],
    ids=str,
)
def test_both_backends_agree(shape, level, options):
    def run(backend):
        p = torch.nn.Parameter(torch.ones(shape))
        optimizer = GWTAdamW([p], lr=0.01, level=level, state_dtype="int8", backend=backend, **options)
        for t in range(3):
            p.grad = torch.randn(shape, generator=torch.Generator().manual_seed(t))
            with interpreter.like_a_gpu():
                optimizer.step()
        return p.detach(), optimizer.state[p]

    (one, first), (two, second) = run("torch"), run("triton")
    for key in ("exp_avg", "exp_avg_sq"):
        apart = (first[key].int() - second[key].int()).abs()
        assert int(apart.max()) <= 1
        assert float((apart > 0).float().mean()) < 0.01  # float32 values that differ in the last place
    assert float(((one - two).abs() > 1e-4).float().mean()) < 0.01


def test_bytes_and_fallback_to_float32():
    """Check for 0.52 bytes per parameter at level 2; small tensors and deep levels keep float32 moments."""
    wide = torch.nn.Parameter(torch.zeros(512, 1024))
    small = torch.nn.Parameter(torch.zeros(63, 256))
    optimizer = GWTAdamW([wide, small], state_dtype=torch.int8)
    for p in (wide, small):
        p.grad = torch.ones_like(p)
    predicted = predicted_state_bytes(optimizer)
    optimizer.step()
    state = optimizer.state[wide]
    held = sum(x.numel() * x.element_size() for key, x in state.items() if key.startswith("exp_avg"))
    assert held / wide.numel() == pytest.approx(0.5156, abs=1e-4)
    assert optimizer.state[small]["exp_avg"].dtype == torch.float32
    assert predicted == sum(x.numel() * x.element_size() for s in optimizer.state.values() for x in s.values())
    deep = GWTAdamW([wide], level=7, state_dtype="int8")
    deep.step()
    assert deep.state[wide]["exp_avg"].dtype == torch.float32


def test_chunks_do_not_change_results(monkeypatch):
    from gwt_kernels.backends.torch import step as torch_step

    def run(chunk):
        monkeypatch.setattr(torch_step, "CHUNK", chunk)
        p = torch.nn.Parameter(torch.ones(300, 93))
        optimizer = GWTAdamW([p], state_dtype="int8", norm_growth_limit=None)
        for t in range(2):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(t))
            optimizer.step()
        return [p.detach(), *(x for x in optimizer.state[p].values())]

    assert all(map(torch.equal, run(1 << 20), run(2048)))


def test_a_resumed_run_is_equal_bit_for_bit():
    def fresh():
        p = torch.nn.Parameter(torch.ones(128, 256))
        return p, GWTAdamW([p], state_dtype="int8")

    def steps(p, optimizer, seeds):
        for t in seeds:
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(t))
            optimizer.step()

    p, optimizer = fresh()
    steps(p, optimizer, range(4))
    q, half = fresh()
    steps(q, half, range(2))
    r, resumed = fresh()
    r.data.copy_(q.data)
    resumed.load_state_dict(half.state_dict())
    steps(r, resumed, range(2, 4))
    assert torch.equal(p, r)
    assert all(torch.equal(optimizer.state[p][key], resumed.state[r][key]) for key in optimizer.state[p])


def test_a_state_of_another_dtype_or_with_wrong_scales_is_refused():
    p = torch.nn.Parameter(torch.ones(128, 256))
    p.grad = torch.ones_like(p)
    own, plain = GWTAdamW([p], state_dtype="int8"), GWTAdamW([p])
    own.step()
    plain.step()
    with pytest.raises(ValueError, match="state_dtype"):
        plain.load_state_dict(own.state_dict())
    with pytest.raises(ValueError, match="state_dtype"):
        own.load_state_dict(plain.state_dict())
    broken = own.state_dict()
    broken["state"] = {0: {**broken["state"][0], "exp_avg_scale": torch.zeros(3)}}
    with pytest.raises(ValueError, match=r"exp_avg_scale .* shape \(3,\)"):
        own.load_state_dict(broken)
