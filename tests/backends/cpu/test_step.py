"""The step in C alone: what it stores, its tiles and threads, and what it leaves to PyTorch.

The oracle, the published random bits and bad input are tested for all backends together.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from gwt_kernels.backends.cpu import build
from gwt_kernels.backends.cpu import step as compiled_step
from gwt_kernels.core import philox
from gwt_kernels.core.hyper import Span, key_of, padded_spans
from gwt_kernels.core.tensor_step import TensorStep
from gwt_kernels.formats import int8 as quantized
from gwt_kernels.formats import split as split_
from gwt_kernels.formats import stochastic
from gwt_kernels.functional import Hyper, gwt_adamw_
from gwt_kernels.optim.by_rule import optimizer_of
from gwt_kernels.rules import GWT, RULES, rule_of
from tests.support.native import needs_step_in_c
from tests.support.poisoned import LAYOUTS
from tests.support.runs import assert_differ, assert_same_bits, give_gradients, parameters, snapshot, train
from tests.support.steps import Bucket, update_sums

CPU, BF16, FP16, FP32 = torch.device("cpu"), torch.bfloat16, torch.float16, torch.float32
KEY = key_of(seed=0xDEADBEEF, stream=0x7654321)
STEP = 2**24 + 3
# Several tiles of whole blocks; short last blocks, one with several tiles; narrow rows; a vector; a scalar.
SHAPES = [(150, 256), (37, 311), (3, 5003), (1000, 3), (4099,), ()]

pytestmark = needs_step_in_c
rules = pytest.mark.parametrize("rule", ["gwt", "foam", "lion"])
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


def all_kinds(shape: tuple[int, ...], seed: int) -> Tensor:
    """Return float32 numbers of all magnitudes, first those at the limits of a rounding."""
    generator = torch.Generator().manual_seed(seed)
    n = math.prod(shape)
    raw = torch.randint(-(2**31), 2**31, (n,), generator=generator).to(torch.int32).view(torch.float32)
    raw[n // 3 :] = torch.randn(n - n // 3, generator=generator)
    raw[n // 2 :] *= 1e-5
    ends = [0.0, -0.0, math.inf, -math.inf, math.nan, 3.4028e38, -3.4e38, 3.3895e38, 1e-45]
    ends += [65504.0, 65519.0, -65520.0, 2**-14, 2**-14 - 2**-26, 2**-25, 3 * 2**-25, 2**-26]
    raw[: len(ends)] = torch.tensor(ends)[:n]
    return raw.view(shape)


def same(a: Tensor, b: Tensor) -> bool:
    """Return whether tensors are equal bit for bit, all NaNs counting as equal."""
    return bool(((a == b) & (a.signbit() == b.signbit()) | (a.isnan() & b.isnan())).all()) and a.dtype == b.dtype


class State:
    """Weights, gradient and moments of one tensor, and a step on them."""

    def __init__(
        self, shape: tuple[int, ...], level: int, rule: str, p: Tensor, g_dtype: torch.dtype = FP32
    ) -> None:
        generator = torch.Generator().manual_seed(level)
        coefficients = (*shape[:-1], -(-shape[-1] // 2**level)) if shape else ()
        self.level, self.rule, self.p = level, rule, p.clone()
        self.g = (torch.randn(shape, generator=generator) + 0.3).to(g_dtype)
        self.m = torch.randn(coefficients, generator=generator) * 0.1
        self.v = torch.rand(coefficients, generator=generator) * 0.1
        self.slots = ("m",) if rule == "lion" else ("m", "v")
        self.low: Tensor | None = None
        self.scales: tuple[Tensor, ...] | None = None

    def step(
        self, backend: str = "compiled", rounding: str = "nearest", weight_decay: float = 0.1, **options: object
    ) -> State:
        limited = self.rule == "gwt" and self.level > 0
        hyper = Hyper(lr=0.01, weight_decay=weight_decay, norm_growth_limit=1.01 if limited else None)
        arrays = {"params": [self.p], "grads": [self.g], "exp_avgs": [self.m]}
        arrays["exp_avg_sqs"] = [self.v] if "v" in self.slots else None
        gwt_adamw_(
            **arrays, limiter_norms=[torch.tensor(0.5) if limited else None], steps=[STEP], hypers=[hyper],
            level=self.level, rule=self.rule, rounding=rounding, keys=[KEY], lows=[self.low], scales=[self.scales],
            backend=backend, **options,
        )  # fmt: skip
        return self


def levels_of(shape: tuple[int, ...]) -> list[int]:
    return [level for level in (0, 1, 2, 3, 6) if not level or (shape and 2**level < 2 * shape[-1])]


# Stored values are those of a float32 step, rounded as by the torch backend --------------------------------


def drawn(shape: tuple[int, ...], of: tuple[int, ...], level: int, which: int) -> torch.Tensor:
    """Return the indices by which weights (0) or coefficients (1) draw random bits; rows with a short block are
    padded.
    """
    i = torch.arange(math.prod(of))
    spans = padded_spans(shape, level)
    if spans is not None:
        i = i // spans[which].run * spans[which].pitch + i % spans[which].run
    return i.view(of)


@shapes
@rules
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_narrow_weights_are_the_rounded_float32_weights(dtype, rule, shape):
    """Compare nearest and stochastic rounding, for all magnitudes, infinity and NaN, and all gradient dtypes."""
    n = math.prod(shape)
    for level in levels_of(shape):
        bits = philox.random_halves_at(drawn(shape, shape, level, 0), STEP, KEY).to(torch.int32)
        p = all_kinds(shape, level).to(dtype)
        for g_dtype in (FP32, BF16, FP16):
            wide = State(shape, level, rule, p.float(), g_dtype).step().p
            assert same(State(shape, level, rule, p, g_dtype).step().p, wide.to(dtype))
            got = State(shape, level, rule, p, g_dtype).step(rounding="stochastic").p
            assert same(got, stochastic.stochastic_round(wide, bits, dtype))
            if n > 1000:
                assert not same(got, wide.to(dtype))  # control


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_every_number_of_16_bits_is_read_and_stored(dtype, rounding):
    """Compare weights without an update, and gradients, with float32 copies."""
    numbers = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    still = State((2**16,), 0, "gwt", numbers)
    still.g, still.m = torch.zeros(2**16), torch.zeros(2**16)
    still.step(rounding=rounding, weight_decay=0.0)
    assert same(still.p, numbers)
    narrow, wide = (State((2**16,), 0, "gwt", torch.zeros(2**16)) for _ in range(2))
    narrow.g, wide.g = numbers, numbers.float()
    assert same(narrow.step().p, wide.step().p)
    assert same(narrow.m, wide.m)


@pytest.mark.parametrize(
    ("dtype", "rounding"), [(BF16, "split"), *((d, r) for d in (BF16, FP16) for r in ("nearest", "stochastic"))]
)
def test_every_nan_stays_nan(dtype, rounding):
    """Rounding must not carry into the exponent or sign."""
    state = State((64,), 1, "foam", torch.ones(64, dtype=dtype))
    state.low = torch.zeros(64, dtype=torch.int16) if rounding == "split" else None
    state.g = torch.tensor([0x7FFFFFFF, -1, 0x7F800001, 0x7FFF8000] * 16, dtype=torch.int32).view(FP32)
    assert state.step(rounding=rounding).p.isnan().all()


@shapes
@rules
def test_split_weights_are_the_float32_weights(rule, shape):
    for level in levels_of(shape):
        p = all_kinds(shape, level)
        wide, split = State(shape, level, rule, p), State(shape, level, rule, split_.split_low(p)[0])
        split.low = split_.split_low(p)[1]
        for _ in range(2):
            wide.step()
            split.step(rounding="split")
            assert same(split_.join_low(split.p, split.low), wide.p)


@shapes
@rules
def test_bfloat16_moments_are_the_rounded_float32_moments(rule, shape):
    for level in levels_of(shape):
        wide, narrow = (State(shape, level, rule, torch.zeros(shape)) for _ in range(2))
        for slot in narrow.slots:
            setattr(narrow, slot, getattr(narrow, slot).to(BF16))
            setattr(wide, slot, getattr(narrow, slot).float())
        words = philox.random_words_at(drawn(shape, wide.m.shape, level, 1), STEP, KEY).to(torch.int32)
        wide.step()
        narrow.step()
        assert same(narrow.p, wide.p)
        for slot, bits in zip(narrow.slots, (words & 0xFFFF, words >> 16 & 0xFFFF), strict=False):
            assert same(getattr(narrow, slot), stochastic.stochastic_round(getattr(wide, slot), bits, BF16))


@shapes
@rules
@pytest.mark.parametrize("spoiled", [False, True])
def test_int8_moments_are_the_quantized_float32_moments(spoiled, rule, shape):
    """Compare ordinary blocks, blocks of zeros, of tiny and of large numbers; some with an infinity or a NaN."""
    for level in levels_of(shape):
        wide, narrow = (State(shape, level, rule, torch.zeros(shape)) for _ in range(2))
        q = quantized.block_size(level)
        words = philox.random_words_at(drawn(shape, narrow.m.shape, level, 1), STEP, KEY).to(torch.int32)
        for each in (wide, narrow):
            g = each.g.view(-1)
            for i, x in enumerate((0.0, 1e-45, 1e-20, 1e18, *((math.inf, math.nan) if spoiled else ()))):
                g[i * 900 : i * 900 + 700 if i < 4 else i * 900 + 1] = x
        narrow.m *= torch.rand(narrow.m.shape) > 0.2
        encoders = quantized.encode_first, quantized.encode_second
        decoders = quantized.decode_first, quantized.decode_second
        for slot, encode, decode in zip(narrow.slots, encoders, decoders, strict=False):
            getattr(narrow, slot).view(-1)[: 2 * q] = 0.0
            codes, scale = encode(getattr(narrow, slot), words & 1, level)
            setattr(narrow, slot, codes)
            setattr(wide, slot, decode(codes, scale, level))
            narrow.scales = (*(narrow.scales or ()), scale)
        wide.step()
        narrow.step()
        assert same(narrow.p, wide.p)
        bits = words & 0xFFFF, words >> 16 & 0xFFFF
        for slot, scale, encode, own in zip(narrow.slots, narrow.scales, encoders, bits, strict=False):
            expected_codes, expected_scale = encode(getattr(wide, slot), own, level)
            assert same(getattr(narrow, slot), expected_codes)
            assert same(scale, expected_scale)


def test_rounding_never_exceeds_the_largest_quantized_value():
    """Check the largest value: one more would wrap to the other sign, or to zero."""
    n = 2**18
    assert (philox.random_words(0, n, STEP, KEY, CPU) & 0xFFFF == 0).any()  # control
    state = State((n,), 0, "gwt", torch.zeros(n))
    state.g, state.m = torch.ones(n), torch.full((n,), 127, dtype=torch.int8)
    state.v, state.scales = torch.full((n,), 255, dtype=torch.uint8), (torch.ones(n // 128), torch.ones(n // 128))
    state.step()
    assert (state.m == 127).all()
    assert (state.v == 255).all()


# Memory layouts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@rules
def test_layouts_make_no_difference(layout, rule):
    """Weights and gradients have different strides, in poisoned memory."""

    def run(layout: str) -> list[Tensor]:
        kinds = {"dtype": BF16, "moment_dtype": BF16, "layouts": [layout], "rule": rule, "limited": rule == "gwt"}
        bucket = Bucket([(60, 400), (50, 37), (3, 40, 160), (900,)], 3, **kinds)
        bucket.step(Hyper(lr=0.01), 3, backend="compiled", rounding="stochastic", keys=[5] * 4)
        return bucket.results()

    assert_same_bits(run(layout), run("contiguous"))


@pytest.mark.parametrize(
    ("weights", "coefficients"),
    [
        ((9, 16, 64), (2, 4, 16)),
        ((2**34 + 5, 1, 7), (2**33, 3, 5)),
        ((2**35 - 99, 2560, 0), (2**34 - 33, 640, 0)),
    ],
)
def test_bits_of_shards_with_gaps(weights, coefficients):
    """Check runs of elements, contiguous in the whole tensor, from anywhere, and across 2**32 generator calls."""
    p = all_kinds((40, 64), 1).to(BF16)
    narrow, wide = State((40, 64), 2, "foam", p), State((40, 64), 2, "foam", p.float())
    narrow.m, narrow.v = narrow.m.to(BF16), narrow.v.to(BF16)
    wide.m, wide.v = narrow.m.float(), narrow.v.float()
    wide.step()
    narrow.step(rounding="stochastic", spans=[(Span(*weights), Span(*coefficients))])
    elements, blocks = (
        (first + e // run * pitch + e % run).view(x.shape)
        for (first, run, pitch), x in ((weights, narrow.p), (coefficients, narrow.m))
        for e in [torch.arange(x.numel())]
    )
    words = philox.random_words_at(blocks, STEP, KEY)
    assert same(
        narrow.p, stochastic.stochastic_round(wide.p, philox.random_halves_at(elements, STEP, KEY).int(), BF16)
    )
    assert same(narrow.m, stochastic.stochastic_round(wide.m, (words & 0xFFFF).int(), BF16))
    assert same(narrow.v, stochastic.stochastic_round(wide.v, (words >> 16 & 0xFFFF).int(), BF16))


def steps(
    dtype: torch.dtype = BF16, *, telemetry: bool = True, rule: str = "gwt", **options: object
) -> list[object]:
    """Return weights, state and telemetry after each step."""
    params = parameters([(700, 311), (640, 256), (41,), (3, 3, 9), (), (0, 8)], dtype=dtype)
    groups = [{"params": params[:2], "rule": rule}, {"params": params[2:], "rule": rule, "level": 0}]
    optimizer = optimizer_of(rule)(groups, lr=0.03, backend="compiled", telemetry=telemetry, **options)
    history: list[object] = []
    for t in range(3):
        give_gradients(params, seed=t)
        optimizer.step()
        taken = snapshot(optimizer)
        history.append((taken["params"], taken["state"], optimizer.telemetry()))
    return history


@pytest.fixture
def threads():
    """Set the number of PyTorch's threads for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("own", [{}, {"rule": "adafactor", "telemetry": False}], ids=str)
def test_results_do_not_depend_on_the_number_of_threads(threads, own):
    """Check that weights, moments and telemetry have the same bits."""
    options: dict[str, object] = {"weight_rounding": "stochastic", "state_dtype": "int8", **own}
    runs = []
    for n in (1, 2, 5):
        threads(n)
        runs.append(steps(**options))
    assert_same_bits(runs[0], runs[1])
    assert_same_bits(runs[0], runs[2])
    assert_differ(runs[0], steps(**options, seed=1))


@pytest.mark.parametrize("level", range(11))
@rules
def test_what_is_observed_is_the_same(rule, level):
    """Compare runs with and without telemetry, with which float32 weights are updated in a tile first."""

    def run(observed: bool, seed: int = 0) -> list[Tensor]:
        params = parameters([(70, 2048), (3, 1030), (4099,)])
        groups = [{"params": params[:2], "rule": rule}, {"params": params[2:], "rule": rule, "level": 0}]
        options = {"level": level, "lr": 0.03, "weight_decay": 0.1, "backend": "compiled"}
        train(optimizer_of(rule)(groups, telemetry=observed, **options), range(seed, seed + 3))
        return [p.detach() for p in params]

    assert_same_bits(run(False), run(True))
    assert_differ(run(False), run(True, seed=1))


def vectors_of(capability: str) -> list[str]:
    """Return the vector extensions of a machine with this capability, as PyTorch names it."""
    return {"AVX512": ["AVX2", "AVX512"], "AVX2": ["AVX2"]}.get(capability, [])


def on_a_cpu_with_more_than(vectors: str) -> pytest.MarkDecorator:
    """Return a mark that skips, unless this CPU has these vectors and the package uses wider ones by default."""
    *others, _ = vectors_of(torch.backends.cpu.get_cpu_capability()) or [""]
    return pytest.mark.skipif(vectors not in others, reason="needs a CPU with wider vectors: run it on one")


@pytest.mark.parametrize(
    "vectors",
    [
        pytest.param([], id="plain"),
        pytest.param(build.AVX2, id="avx2", marks=on_a_cpu_with_more_than("AVX2")),
    ],
)
def test_results_do_not_depend_on_vector_extensions(monkeypatch, tmp_path, vectors):
    """Check that all stored numbers are equal on every machine, including limiter norm and telemetry."""
    runs = [{"weight_rounding": r, "state_dtype": s} for r, s in (("stochastic", "int8"), ("split", "bfloat16"))]
    runs += [{"weight_rounding": "stochastic", "state_dtype": s, "rule": "lion"} for s in ("int8", "bfloat16")]
    runs += [
        {"dtype": dtype, "rule": rule, "level": 1}
        for dtype, rule in ((FP32, "foam"), (FP16, "gwt"), (FP16, "foam"), (FP16, "lion"))
    ]
    runs += [{"level": level} for level in (3, 4, 7)]
    runs += [
        {"rule": "adafactor", "telemetry": False, "level": level, "dtype": dtype}
        for level, dtype in ((0, FP32), (1, BF16), (2, FP32), (4, FP16))
    ]
    # Without telemetry float32 weights are updated directly.
    runs += [{"dtype": FP32, "level": level, "telemetry": False} for level in (1, 2, 4)]
    runs += [
        {"dtype": FP32, "level": level, "telemetry": False, "rule": rule}
        for rule in ("foam", "lion")
        for level in (1, 2, 5)
    ]
    expected = [steps(**options) for options in runs]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build, "VECTORS", dict.fromkeys(build.VECTORS, vectors))
    lib = build.library.__wrapped__()
    monkeypatch.setattr(compiled_step, "library", lambda: lib)
    monkeypatch.setattr(compiled_step, "functions", compiled_step.functions.__wrapped__)
    assert_same_bits([steps(**options) for options in runs], expected)
    assert len(list((tmp_path / "gwt_kernels").glob("*.so"))) == 1


# Steps of PyTorch's operators, and refusals ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "level", "dtype"), [((4, 2048), 11, FP32), ((6, 40), 2, torch.float64)], ids=["deep", "float64"]
)
def test_unsupported_steps_run_on_the_torch_backend(shape, level, dtype):
    """Compare results, and the sums of shards, bit for bit."""
    results = []
    for backend in ("torch", "compiled"):
        bucket = Bucket([shape], level, dtype=dtype, limited=True)
        arrays = {"params": bucket.tensors("params"), "grads": bucket.tensors("grads")}
        arrays |= {"exp_avgs": bucket.tensors("exp_avgs"), "exp_avg_sqs": bucket.tensors("exp_avg_sqs")}
        sums = update_sums(**arrays, steps=[1], hypers=[Hyper()], level=level, backend=backend)
        bucket.step(Hyper(lr=0.01), 3, backend=backend)
        results.append([sums, *bucket.results()])
    assert_same_bits(*results)


def test_supported_dtypes_rules_and_levels():
    p, m = torch.zeros(2, 2048), torch.zeros(2, 2)
    one = TensorStep(p=p, g=p, m=m, v=m, norm=None, step=1, hyper=Hyper())
    assert compiled_step.knows([one], 10, GWT)
    assert not compiled_step.knows([one], 11, GWT)
    known = {name for name in RULES if compiled_step.knows([one], 2, rule_of(name))}
    assert known == {"gwt", "foam", "adamw", "lion", "adafactor", "muon"}
    for name, half, byte in (("p", True, False), ("g", True, False), ("m", False, True)):
        for dtype, known in ((BF16, True), (FP16, half), (torch.int8, byte), (torch.float64, False)):
            other = one._replace(**{name: getattr(one, name).to(dtype)})
            assert compiled_step.knows([other], 10, GWT) == known


def test_sums_are_the_torch_backends():
    """Compare sums up to rounding, for whole and short blocks; nothing else changes."""
    for moment_dtype in (FP32, BF16):
        bucket = Bucket([(60, 400), (50, 37), (0, 8), (3, 40, 160)], 2, dtype=BF16, moment_dtype=moment_dtype)
        arrays = {name: bucket.tensors(name) for name in ("params", "grads", "exp_avgs", "exp_avg_sqs")}
        before = bucket.results()
        told = [
            update_sums(**arrays, steps=[1] * 4, hypers=[Hyper()] * 4, level=2, backend=backend)
            for backend in ("torch", "compiled")
        ]
        torch.testing.assert_close(told[1], told[0], rtol=1e-5, atol=0)
        assert told[1][2] == 0
        assert_same_bits(bucket.results(), before)


@pytest.mark.parametrize("fault", ["moments", "gradient", "halves", "scales", "mixed"])
def test_tensors_that_do_not_fit_are_refused(fault):
    """Check refusals of tensors outside which the step would write."""
    state = State((16, 64), 2, "foam", torch.zeros(16, 64, dtype=BF16))
    rounding, words = "nearest", "moments of shape"
    if fault == "moments":
        state.m = state.m[:15].clone()
    elif fault == "gradient":
        state.g = state.g[:, :63]
    elif fault == "halves":
        state.low, rounding, words = torch.zeros(16, 63, dtype=torch.int16), "split", "low half"
    elif fault == "scales":
        state.m, state.v = torch.zeros(16, 16, dtype=torch.int8), torch.zeros(16, 16, dtype=torch.uint8)
        state.scales, words = (torch.ones(2), torch.ones(1)), "scales"
    else:
        state.v, words = state.v.double(), "one dtype"
    before = [x.clone() for x in (state.p, state.m, state.v)]
    with pytest.raises(ValueError, match=words):
        state.step(rounding=rounding)
    assert_same_bits([state.p, state.m, state.v], before)
