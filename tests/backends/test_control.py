"""Decisions of the device about a step, on both backends: norms, clipping, skipping, and step counts."""

from __future__ import annotations

import math

import pytest
import torch

from gwt_kernels.backends.step_decision import ClipRequest, control_, decide, squares
from gwt_kernels.functional import Hyper, gwt_adamw_
from tests.support import interpreter
from tests.support.poisoned import LAYOUTS, Poisoned
from tests.support.steps import Bucket

BACKENDS = ("torch", "triton")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
backends = pytest.mark.parametrize("backend", BACKENDS)
# Whole tiles and more than one, odd sizes, one element, a scalar, an empty tensor.
SHAPES = [(3, 4096), (9001,), (5, 7), (1,), (), (0, 3), (2, 8)]
HYPER = Hyper(lr=0.01, weight_decay=0.1)


def on(backend: str) -> torch.device:
    return torch.device("cuda" if backend == "triton" and torch.cuda.is_available() else "cpu")


def gradients(backend: str, dtype: torch.dtype = torch.float32, layout: str = "contiguous") -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [
        Poisoned(torch.randn(shape, generator=generator).to(on(backend), dtype), layout).tensor for shape in SHAPES
    ]


def exact_squares(grads: list[torch.Tensor]) -> float:
    return sum(float(g.double().square().sum()) for g in grads)


def total_of(grads: list[torch.Tensor], backend: str) -> list[float]:
    with interpreter.like_a_gpu():
        return squares(grads, backend).tolist()


def scalar(value: float, backend: str, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.tensor(value, dtype=dtype, device=on(backend))


# Norms -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@backends
def test_squares_of_all_gradients(backend, dtype, layout):
    grads = gradients(backend, dtype, layout)
    total, bad = total_of(grads, backend)
    assert total == pytest.approx(exact_squares(grads), rel=2e-6)
    assert bad == 0


@backends
def test_squares_of_several_dtypes_and_of_none(backend):
    grads = [g for dtype in DTYPES for g in gradients(backend, dtype)]
    assert total_of(grads, backend)[0] == pytest.approx(exact_squares(grads), rel=2e-6)
    assert total_of([torch.zeros(0, 4, device=on(backend))], backend) == [0, 0]


@backends
def test_squares_of_a_negative_view(backend):
    g = torch.randn(40, 3, dtype=torch.complex64, device=on(backend)).conj().imag
    assert g.is_neg()
    assert total_of([g], backend)[0] == pytest.approx(exact_squares([g]), rel=2e-6)


def test_squares_in_float64_keep_its_digits():
    grads = [g.double() for g in gradients("torch")]
    assert total_of(grads, "torch")[0] == pytest.approx(exact_squares(grads), rel=1e-14)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("place", [0, 1, 2, 3, 4, 6])
@backends
def test_one_nonfinite_element_is_found(backend, place, value):
    grads = gradients(backend)
    grads[place].view(-1)[-1] = value
    total, bad = total_of(grads, backend)
    assert bad == 1
    assert not math.isfinite(total)


@backends
def test_overflowing_squares_count_as_finite(backend):
    grads = [torch.full((3, 40), 1e30, device=on(backend))]
    total, bad = total_of(grads, backend)
    assert (total > 1e38, bad) == (True, 0)


# Decisions ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_norm", [None, 0.5, 5.0, math.inf])
@pytest.mark.parametrize("grad_scale", [None, 128.0])
@backends
def test_factor_and_norm(backend, max_norm, grad_scale):
    skipped = scalar(3, backend)
    scale = None if grad_scale is None else scalar(grad_scale, backend, torch.float32)
    total = torch.tensor([4.0, 0.0], dtype=torch.float64, device=on(backend))
    factor, go, norm = decide(backend, total, max_norm, True, scale, None, skipped).tolist()
    expected = 2 / (grad_scale or 1)
    assert norm == expected
    clipped = 1 if max_norm is None else min(1, max_norm / (expected + 1e-6))
    assert factor == pytest.approx(clipped / (grad_scale or 1), rel=1e-7)
    assert (go, float(skipped)) == (1, 3)


@pytest.mark.parametrize(
    ("bad", "skip", "found", "go"),
    [
        (0, True, None, 1),
        (2, True, None, 0),
        (2, False, None, 1),
        (0, False, 1.0, 0),
        (0, True, 0.0, 1),
        (1, True, 1.0, 0),
    ],
)
@backends
def test_when_a_step_is_skipped(backend, bad, skip, found, go):
    skipped = scalar(3, backend)
    found = None if found is None else torch.tensor([found], device=on(backend))
    total = torch.tensor([4.0, bad], dtype=torch.float64, device=on(backend))
    assert decide(backend, total, None, skip, None, found, skipped)[1] == go
    assert skipped == 4 - go


@backends
def test_nan_norm_clips_nothing(backend):
    total = torch.tensor([math.nan, 1.0], dtype=torch.float64, device=on(backend))
    factor, go, norm = decide(backend, total, 1.0, False, None, None, scalar(0, backend)).tolist()
    assert (math.isnan(factor), go, math.isnan(norm)) == (True, 1, True)


@backends
def test_gradients_are_not_read_without_a_clip_request(backend):
    with interpreter.like_a_gpu():
        grads = [torch.full((4,), math.nan, device=on(backend))]
        control = control_([(grads, backend)], ClipRequest(), skipped=scalar(0, backend))
    factor, go, norm = control[grads[0].device].tolist()
    assert (factor, go, math.isnan(norm)) == (1, 1, True)


def test_sums_over_backends_and_processes():
    if torch.cuda.is_available():
        pytest.skip("takes both backends on the CPU, where a GPU's kernels do not run: set CUDA_VISIBLE_DEVICES=''")
    grads = gradients("torch")
    seen = []

    def twice(total):
        seen.append(total.clone())
        total.mul_(2)

    with interpreter.like_a_gpu():
        control = control_(
            [(grads[:2], "torch"), (grads[2:], "triton")],
            ClipRequest(max_norm=math.inf),
            skipped=torch.zeros((), dtype=torch.float64),
            reduce=twice,
        )
    assert float(seen[0][0]) == pytest.approx(exact_squares(grads), rel=2e-6)
    assert float(control[torch.device("cpu")][2]) == pytest.approx(math.sqrt(2 * exact_squares(grads)), rel=2e-6)


# Steps counted by the device ---------------------------------------------------------------------------

STEP_SHAPES = [(4, 32), (3, 37), (0, 40), (64,)]  # both paths, and an empty tensor


def counted(bucket: Bucket, steps: list[int]) -> torch.Tensor:
    return torch.tensor(steps, dtype=torch.float64, device=bucket.device)


@pytest.mark.parametrize(
    ("level", "rule", "correct_bias"),  # every pair of two of them
    [(0, "gwt", True), (0, "foam", False), (2, "gwt", False), (2, "foam", True)],
)
@backends
def test_a_step_with_a_device_decision_follows_the_oracle(backend, level, rule, correct_bias):
    limited = rule == "gwt" and level > 0
    bucket = Bucket(STEP_SHAPES, level, rule=rule, limited=limited, first=True, device=on(backend))
    steps = counted(bucket, [0, 0, 0, 0])
    control = torch.tensor([0.25, 1.0, math.nan], dtype=torch.float64, device=bucket.device)
    workspace = {}
    hyper = HYPER._replace(grad_factor=0.25, correct_bias=correct_bias)
    for t, factor in ((1, 1.0), (2, 0.5), (3, 30.0)):
        bucket.renew_gradients(factor)
        before = steps.clone()

        def step(hypers, _, /, **options):
            gwt_hypers = [h._replace(grad_factor=1.0) for h in [hyper] * len(bucket.params)]
            Bucket.step(bucket, gwt_hypers, 1, **options)

        bucket.step = step
        bucket.check_step(hyper, t, backend=backend, workspace=workspace, steps=steps, control=control)
        assert torch.equal(steps, before + 1)


@backends
def test_step_counts_and_rates_per_tensor(backend):
    bucket = Bucket(STEP_SHAPES, 2, device=on(backend))
    hypers = [
        HYPER._replace(lr=0.01 * i, weight_decay=0.1 * i, maximize=i == 2, correct_bias=i % 2 == 0)
        for i in range(1, 5)
    ]
    steps = counted(bucket, [4, 99, 0, 10_000_000_000])

    def step(hypers, _, /, **options):
        Bucket.step(bucket, hypers, 1, **(options | {"steps": steps}))

    bucket.step = step
    bucket.check_step(hypers, [5, 100, 1, 10_000_000_001], backend=backend)
    assert steps.tolist() == [5, 100, 1, 10_000_000_001]


@pytest.mark.parametrize(
    ("limited", "options"),
    [(False, {}), (True, {}), (True, {"rounding": "stochastic"}), (False, {"state": torch.bfloat16})],
    ids=str,
)
@backends
def test_a_skipped_step_changes_nothing(backend, limited, options):
    moments = options.pop("state", None) if (options := dict(options)) else None
    dtype = torch.bfloat16 if options else torch.float32
    bucket = Bucket(STEP_SHAPES, 2, dtype=dtype, moment_dtype=moments, limited=limited, device=on(backend))
    steps = counted(bucket, [7, 8, 9, 10])
    control = torch.tensor([1.0, 0.0, math.nan], dtype=torch.float64, device=bucket.device)
    before = bucket.results()
    bucket.step(HYPER, backend=backend, steps=steps, control=control, **options)
    assert all(map(torch.equal, before, bucket.results()))
    assert steps.tolist() == [7, 8, 9, 10]
    control[1] = 1
    bucket.step(HYPER, backend=backend, steps=steps, control=control, **options)
    assert steps.tolist() == [8, 9, 10, 11]
    assert not torch.equal(before[0], bucket.results()[0])


def test_device_step_counts_equal_host_step_counts():
    """Check equal bits, also random ones, which depend on the count, unless a learning rate rounds differently."""
    stored = []
    for on_device in (False, True):
        bucket = Bucket(
            [(8, 64), (3, 37)], 2, dtype=torch.bfloat16, moment_dtype=torch.bfloat16, device=on("triton")
        )
        steps = counted(bucket, [4, 4])
        for t in (5, 6):
            bucket.step(
                HYPER, t, **({"steps": steps} if on_device else {}), backend="triton", rounding="stochastic"
            )
        stored.append(bucket.results())
    assert all(map(torch.equal, *stored))


def test_learning_rate_tensor_is_read_on_the_device():
    stored = []
    for lr in (0.5, torch.tensor(0.5, device=on("triton"))):
        bucket = Bucket([(8, 64), (3, 37)], 2, device=on("triton"))
        bucket.step(HYPER._replace(lr=lr), backend="triton", steps=counted(bucket, [0, 0]))
        stored.append(bucket.results())
    assert all(map(torch.equal, *stored))


@backends
def test_bad_step_counts_are_refused(backend):
    bucket = Bucket([(8, 64)], 2, device=on(backend))
    before = bucket.results()
    control = torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64, device=bucket.device)
    with pytest.raises(ValueError, match="control goes with steps that the device counts"):
        bucket.step(HYPER, backend=backend, control=control)
    with pytest.raises(ValueError, match="must be contiguous float64 on"):
        bucket.step(HYPER, backend=backend, steps=torch.zeros(1, device=bucket.device))
    with pytest.raises(ValueError, match="1 params need as many of all else"):
        gwt_adamw_(
            params=bucket.tensors("params"),
            grads=bucket.tensors("grads"),
            exp_avgs=bucket.tensors("exp_avgs"),
            exp_avg_sqs=bucket.tensors("exp_avg_sqs"),
            limiter_norms=[None],
            steps=counted(bucket, [1, 2]),
            hypers=[HYPER],
            level=2,
        )
    assert all(map(torch.equal, before, bucket.results()))
