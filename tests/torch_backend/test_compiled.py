"""``backend="compiled"``: the torch backend's numbers, bit for bit, compiled once; what it says where it cannot."""

from __future__ import annotations

import math
import shutil
import warnings

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from gwt_kernels import GWTAdamW, backends
from gwt_kernels.functional import Hyper
from gwt_kernels.hyper import key_of
from gwt_kernels.torch_backend import compiled, quantized, rounding
from gwt_kernels.torch_backend import step as torch_step
from tests.poisoned import LAYOUTS
from tests.runs import assert_differ, assert_same_bits, checked_step, give_gradients, parameters, snapshot
from tests.steps import Bucket

CPU, BF16, FP16 = torch.device("cpu"), torch.bfloat16, torch.float16
KEY = key_of(seed=0xDEADBEEF, stream=0x7654321)
SHAPES = [(150, 311), (140, 256), (41,), (3, 3, 9), (1,), (), (0, 8)]

pytestmark = pytest.mark.skipif(
    backends.compiler_obstacle(CPU) is not None, reason="needs a C++ compiler: apt-get install g++, or set CXX"
)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Compiled code for small tensors, too, in chunks that begin anywhere; and failures are errors."""
    monkeypatch.setattr(compiled, "SMALLEST", 64)
    monkeypatch.setattr(torch_step, "CHUNK", 20_000)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        with torch.no_grad():
            yield


def float32_of(n: int, seed: int = 0) -> Tensor:
    """All kinds of numbers, first those at which a rounding ends."""
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(-(2**31), 2**31, (n,), generator=generator).to(torch.int32).view(torch.float32)
    raw[n // 2 :] = torch.randn(n - n // 2, generator=generator) * 1e-5
    ends = [
        0.0,
        -0.0,
        math.inf,
        -math.inf,
        math.nan,
        3.4028e38,
        -3.4e38,
        3.3895e38,
        1e-45,
        65504.0,
        65519.0,
        2**-14,
    ]
    raw[: len(ends)] = torch.tensor(ends)
    return raw


def same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit, but that one NaN is as good as another where a dtype is not an integer's."""
    return bool(((a == b) & (a.signbit() == b.signbit()) | (a.isnan() & b.isnan())).all()) and a.dtype == b.dtype


# The functions -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [64, 65, 1000, 40_003])
@pytest.mark.parametrize("first", [0, 5, 2**34 - 40, 2**35 - 40, 2**62 + 3])
def test_bits_are_the_same(first, n):
    for step, key in ((1, 0), (2**24 + 1, KEY), (2**32 + 7, key_of(2**32 - 1, 2**31 - 1))):
        own = (first, n, step, key, CPU)
        assert torch.equal(rounding.random_words(*own, compiled.draw), rounding.random_words(*own))
        assert torch.equal(rounding.random_halves(*own, compiled.draw), rounding.random_halves(*own))
    assert not torch.equal(rounding.random_words(*own, compiled.draw), rounding.random_words(first, n, 1, 0, CPU))


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("first", [0, 3, 8, 2**35 - 50])
@pytest.mark.parametrize("n", [64, 129, 40_007])
def test_weights_are_rounded_the_same(n, first, dtype):
    x = float32_of(n)
    kept = x.clone()
    got, expected = (module.round_weights(x, first, 3, KEY, dtype) for module in (compiled, rounding))
    assert got.shape == x.shape
    assert same(got, expected)
    assert same(x, kept)
    assert not same(got, rounding.round_weights(x, first, 4, KEY, dtype))


@pytest.mark.parametrize("n", [64, 129, 40_007])
def test_moments_are_rounded_the_same(n):
    m, v, words = float32_of(n), float32_of(n, 1).abs(), rounding.random_words(7, n, 3, KEY, CPU)
    for got, expected in zip(compiled.round_moments(m, v, words), rounding.round_moments(m, v, words), strict=True):
        assert same(got, expected)


@pytest.mark.parametrize("level", range(7))
@pytest.mark.parametrize("n", [64, 128 * 7, 40_007])
def test_codes_are_the_same(n, level):
    """Ordinary quanta, of zeros, of tiny and of large numbers, and with an infinity or a NaN."""
    m = torch.randn(n, generator=torch.Generator().manual_seed(level)).mul_(1e-3)
    v = m.square().mul_(torch.rand(n, generator=torch.Generator().manual_seed(9)))
    for i, x in enumerate((0.0, 1e-45, 3e38, math.inf, -math.inf, math.nan)):
        m[i * 130 : i * 130 + 9], v[i * 130 + 3 : i * 130 + 9] = x, abs(x)
    m[800:1100], v[900:1100] = 0.0, 0.0
    words = rounding.random_words(0, n, 5, KEY, CPU)
    got, expected = (module.encode(m, v, words, level) for module in (compiled, quantized))
    for a, b in zip(got, expected, strict=True):
        assert a.shape == b.shape
        assert same(a, b)
    if n > 64:
        assert int(got[0].int().abs().max()) == 127


# The step ----------------------------------------------------------------------------------------------


def steps(backend: str, dtype: torch.dtype, **options) -> list[tuple]:
    """Weights, state and telemetry after each of some steps."""
    params = parameters(SHAPES, dtype=dtype)
    matrices = [p for p in params if p.dim() == 2 and p.shape[0]]
    groups = [{"params": matrices}, {"params": [p for p in params if p not in set(matrices)], "level": 0}]
    optimizer = GWTAdamW(groups, lr=0.03, weight_decay=0.1, backend=backend, telemetry=True, **options)
    history = []
    for t in range(3):
        give_gradients(params, seed=t)
        for p in matrices:  # column by column
            p.grad = p.grad.t().contiguous().t()
        optimizer.step()
        taken = snapshot(optimizer)
        history.append((taken["params"], taken["state"], optimizer.telemetry()))
    return history


@pytest.mark.parametrize("rule", ["gwt", "foam"])
@pytest.mark.parametrize("level", [0, 2, 5])
@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {}),
        (torch.float32, {"state_dtype": "bfloat16"}),
        (torch.float32, {"state_dtype": "int8"}),
        (torch.float64, {}),
        (FP16, {"weight_rounding": "stochastic"}),
        (BF16, {"weight_rounding": "stochastic"}),
        (BF16, {"weight_rounding": "stochastic", "state_dtype": "bfloat16"}),
        (BF16, {"weight_rounding": "stochastic", "state_dtype": "int8"}),
        (BF16, {"weight_rounding": "split", "state_dtype": "int8"}),
    ],
    ids=str,
)
def test_steps_are_the_same(dtype, options, level, rule):
    """Weights, state and telemetry after every step, for matrices in chunks, and for what is too small."""
    runs = [steps(backend, dtype, level=level, rule=rule, **options) for backend in ("torch", "compiled")]
    assert_same_bits(*runs)
    if rule == "gwt" and level and dtype == BF16:
        assert_differ(runs[0], steps("compiled", dtype, level=level, norm_growth_limit=None, **options))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("level", [0, 3])
def test_layouts_are_the_same(layout, level):
    """Weights and gradients with strides of their own, in poisoned memory."""

    def run(backend: str, key: int = 5) -> list[Tensor]:
        kinds = {"dtype": BF16, "moment_dtype": BF16, "layouts": [layout]}
        bucket = Bucket([(60, 400), (50, 37), (3, 40, 160), (900,)], level, **kinds)
        bucket.step(Hyper(lr=0.01), 3, backend=backend, rounding="stochastic", keys=[key] * 4)
        return bucket.results()

    assert all(map(torch.equal, run("compiled"), run("torch")))
    assert not any(map(torch.equal, run("compiled", key=6), run("torch")))


@pytest.mark.parametrize("rule", ["gwt", "foam"])
@pytest.mark.parametrize("level", [0, 1, 2, 3])
@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {"state_dtype": "bfloat16"}),
        (BF16, {"weight_rounding": "stochastic"}),
        (BF16, {"weight_rounding": "split", "state_dtype": "bfloat16"}),
        (FP16, {"weight_rounding": "stochastic"}),
    ],
    ids=str,
)
def test_steps_follow_the_oracle(dtype, options, level, rule):
    params = parameters([(37, 311), (64, 64)], dtype=dtype)
    optimizer = GWTAdamW(params, level=level, rule=rule, weight_decay=0.1, backend="compiled", **options)
    for t in range(2):
        give_gradients(params, seed=t)
        assert checked_step(optimizer) == 2


def test_nothing_is_compiled_again():
    """Neither for later steps, other rates and seeds, nor for tensors of other sizes or a group beside."""
    options = {"weight_rounding": "stochastic", "state_dtype": "int8", "backend": "compiled"}

    def step(shape: tuple[int, int], **others) -> GWTAdamW:
        params = parameters([shape], dtype=BF16)
        optimizer = GWTAdamW(params, **options, **others)
        for t in range(3):
            optimizer.param_groups[0]["lr"] = 0.1 / (t + 1)
            give_gradients(params, seed=t)
            optimizer.step()
        return optimizer

    step((150, 311))
    step((128, 256))
    before = counters["stats"]["unique_graphs"]
    assert before > 0
    for shape in ((151, 313), (90, 1000), (500, 64)):
        step(shape, seed=7, level=1, rule="foam", maximize=True)
        step(shape, weight_decay=0.1, betas=(0.8, 0.99))
    assert counters["stats"]["unique_graphs"] == before


def test_any_number_of_threads():
    threads, runs = torch.get_num_threads(), []
    try:
        for n in (1, 3):
            torch.set_num_threads(n)
            runs.append(steps("compiled", BF16, weight_rounding="stochastic", state_dtype="int8"))
    finally:
        torch.set_num_threads(threads)
    assert_same_bits(*([own[:2] for own in run] for run in runs))  # telemetry is added up in another order


def test_inside_a_compiled_training_step():
    """The step is called outside the graph, and compiles what is its own there."""

    def run(backend: str, compile_it: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = torch.nn.Linear(128, 128, bias=False).to(BF16)
        optimizer = GWTAdamW(model.parameters(), lr=0.1, backend=backend, weight_rounding="stochastic")

        @torch.enable_grad()
        def step(x: Tensor) -> None:
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

        step = torch.compile(step, backend="eager") if compile_it else step
        for t in range(3):
            step(torch.linspace(-1, 1, 512).view(4, 128).to(BF16) * (t + 1))
        return [p.detach() for p in model.parameters()]

    assert_same_bits(run("torch", False), run("compiled", True))


# Where it cannot run -----------------------------------------------------------------------------------


@pytest.fixture
def fresh_obstacles():
    backends.compiler_obstacle.cache_clear()
    yield
    backends.compiler_obstacle.cache_clear()


def test_no_compiler(monkeypatch, fresh_obstacles):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(
        RuntimeError, match=r"backend='compiled'.*C\+\+ compiler.*'no-such-compiler'.*backend='torch'"
    ):
        GWTAdamW(parameters([(4, 8)]), backend="compiled")
    backends.compiler_obstacle.cache_clear()
    monkeypatch.setenv("CXX", str(shutil.which("true")))
    GWTAdamW(parameters([(4, 8)]), backend="compiled")


def test_not_for_a_gpu():
    with pytest.raises(RuntimeError, match=r"backend='compiled' cannot run here: the tensors are on cuda"):
        backends.resolve("compiled", torch.device("cuda"), torch.float32, 2)


def test_a_compiler_that_fails_is_said_and_changes_nothing(monkeypatch):
    """In the midst of a step, which is finished: no weight is left behind its moments."""

    def fail(*args, **kwargs):
        raise OSError("the disk is full")

    monkeypatch.setattr(torch, "compile", fail)
    monkeypatch.setattr(compiled._Compiled, "failed", False)
    monkeypatch.setattr(compiled, "_pairs", compiled._Compiled(compiled._pairs._function))
    options = {"weight_rounding": "stochastic", "state_dtype": "int8"}
    with pytest.warns(
        RuntimeWarning, match=r"backend='compiled' could not compile.*OSError: the disk is full"
    ) as seen:
        history = steps("compiled", BF16, **options)
    assert len(seen) == 1
    assert_same_bits(history, steps("torch", BF16, **options))
