"""Tests that need a GPU: compiled kernels at real sizes, absence of synchronisation, memory and streams.

With a CUDA device, the other tests of the Triton backend run compiled too.
"""

from __future__ import annotations

import pytest
import torch

from gwt_kernels import GWTAdafactor, GWTAdamMini, GWTAdamW, GWTLion, GWTMuon
from gwt_kernels.functional import Hyper, gwt_adamw_
from gwt_kernels.optim.base import PlannedOptimizer
from tests.haar.test_haar import check_forward, check_inverse, random
from tests.support.steps import Bucket

pytestmark = pytest.mark.gpu

HYPER = Hyper(lr=0.01, weight_decay=0.1)
MODEL = [(1024, 2736), (2736, 1024), (1024, 1024), (512, 1365), (1024,), (7,)]


def model(shapes=MODEL, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> list[torch.nn.Parameter]:
    generator = torch.Generator("cuda").manual_seed(seed)
    return [
        torch.nn.Parameter(torch.randn(s, generator=generator, device="cuda", dtype=torch.float32).to(dtype))
        for s in shapes
    ]


def optimizer_of(
    params: list[torch.nn.Parameter], kind: type[PlannedOptimizer] = GWTAdamW, **options: object
) -> PlannedOptimizer:
    matrices, rest = [p for p in params if p.dim() > 1], [p for p in params if p.dim() == 1]
    groups = [{"params": matrices}, {"params": rest, "level": 0, "rule": "adamw"}]
    return kind(groups, lr=0.01, weight_decay=0.1, backend="triton", **options)


def of_heads(*arguments: object, **options: object) -> PlannedOptimizer:
    return GWTAdamMini(*arguments, head_rows=None, **options)


def renew_gradients(params: list[torch.nn.Parameter], seed: int) -> None:
    """Allocate new gradients on the current stream and free the old ones."""
    generator = torch.Generator("cuda").manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator, device="cuda").to(p.dtype)


def results(params: list[torch.nn.Parameter], optimizer: PlannedOptimizer) -> list[torch.Tensor]:
    state = [x for p in params for x in optimizer.state[p].values()]
    return [x.detach().clone() for x in (*params, *state)]


# Against the oracle ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "dtype", "level"),
    [
        ((4096, 11008), torch.bfloat16, 2),
        ((2048, 5461), torch.bfloat16, 2),
        ((2048, 5461), torch.float32, 3),
        ((5461, 2048), torch.float32, 5),
        ((32000, 1024), torch.bfloat16, 0),
        ((1 << 20, 5), torch.bfloat16, 1),
        ((12_345_679,), torch.float32, 4),
    ],
)
def test_real_sizes(shape, dtype, level):
    """Compare every element over two steps, the second with a spike that activates the limiter."""
    bucket = Bucket([shape], level, dtype=dtype, limited=level > 0, device="cuda")
    for t, size in enumerate((1.0, 10.0), start=1):
        bucket.renew_gradients(size)
        bucket.check_step(HYPER, t, backend="triton")


@pytest.mark.parametrize(("shape", "dtype"), [((4096, 11008), torch.bfloat16), ((2048, 5461), torch.float32)])
def test_transforms_of_real_sizes(shape, dtype):
    coeffs = check_forward(random(shape, dtype, "cuda"), 3, "triton")
    check_inverse(coeffs, shape[-1], "triton")


@pytest.mark.parametrize("level", [0, 2])
def test_the_torch_backend_on_cuda(level):
    bucket = Bucket([(4, 32), (3, 37), (2, 3, 10)], level, limited=level > 0, device="cuda")
    bucket.check_step(HYPER, 3, backend="torch")


def test_other_wavelets_are_not_rounded_to_tf32():
    pytest.importorskip("pywt", reason="needs PyWavelets: pip install -e '.[test]'")

    def run(device: str) -> torch.Tensor:
        bucket = Bucket([(64, 128)], 0, device=device)
        p, g = bucket.tensors("params")[0], bucket.tensors("grads")[0]
        moments = [torch.zeros(64, 34, device=device) for _ in range(2)]
        gwt_adamw_(
            params=[p], grads=[g], exp_avgs=moments[:1], exp_avg_sqs=moments[1:], limiter_norms=[None],
            steps=[1], hypers=[HYPER._replace(eps=1.0)], level=2, wavelet="db2",
        )  # fmt: skip
        return torch.cat([p, *moments], -1).cpu()

    torch.testing.assert_close(run("cuda"), run("cpu"), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [((1 << 16) + 1, 1 << 15), (1 << 16, (1 << 15) + 1)])
def test_more_than_2_to_the_31_elements(shape):
    """Check that flat and row path give the same bits as slabs with 32-bit offsets."""
    rows, width = shape
    assert rows * width > 2**31
    if torch.cuda.mem_get_info()[0] < 32 << 30:
        pytest.skip("needs 32 GiB of free device memory: end what else uses the GPU, or run on a larger one")
    generator = torch.Generator("cuda").manual_seed(0)
    p, g = (torch.empty(shape, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    for x in (p, g):
        for slab in x.split(1 << 12):
            slab.copy_(torch.randn(slab.shape, generator=generator, device="cuda"))
    m, v = (torch.zeros(rows, -(-width // 4), device="cuda") for _ in range(2))

    def step(arrays) -> None:
        p, g, m, v = arrays
        gwt_adamw_(
            params=[p], grads=[g], exp_avgs=[m], exp_avg_sqs=[v], limiter_norms=[None],
            steps=[1], hypers=[HYPER], level=2, backend="triton",
        )  # fmt: skip

    before = p.clone()
    step((p, g, m, v))
    for p_, g_, m_, v_, new_p, new_m, new_v in zip(
        *(x.split(1 << 12) for x in (before, g)), *(torch.zeros_like(x).split(1 << 12) for x in (m, v)),
        *(x.split(1 << 12) for x in (p, m, v)), strict=True,
    ):  # fmt: skip
        own = [x.clone() for x in (p_, g_, m_, v_)]
        step(own)
        assert torch.equal(own[0], new_p)
        assert torch.equal(own[2], new_m)
        assert torch.equal(own[3], new_v)


# Synchronisation, streams, memory ----------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"telemetry": True, "max_grad_norm": 1.0}], ids=["plain", "observed"])
@pytest.mark.parametrize("kind", [GWTAdamW, GWTLion, GWTAdamMini, of_heads, GWTAdafactor, GWTMuon])
def test_a_step_never_waits_for_the_device(kind, options):
    """Check from the first step on, including launch tables and state."""
    params = model()
    optimizer = optimizer_of(params, kind, **options)
    gradients = [[torch.randn_like(p) for p in params] for _ in range(4)]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchroniz"):
            torch.ones((), device="cuda").item()  # control: synchronising does raise
        for own in gradients:
            for p, g in zip(params, own, strict=True):
                p.grad = g
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_gradients_renewed_while_earlier_steps_are_in_flight():
    """Check that if the host runs ahead, tables and gradients are not overwritten before the device reads them."""

    def run(wait: bool) -> list[torch.Tensor]:
        params = model()
        optimizer = optimizer_of(params)
        for t in range(30):
            if not wait and t % 10 == 0:
                torch.cuda._sleep(100_000_000)  # about 50 ms in which no queued work can start
            renew_gradients(params, seed=t)
            for group in optimizer.param_groups:
                group["lr"] = 0.01 / (t + 1)
            optimizer.step()
            if wait:
                torch.cuda.synchronize()
        return results(params, optimizer)

    assert all(map(torch.equal, run(wait=True), run(wait=False)))


def test_results_are_deterministic():
    def run() -> list[torch.Tensor]:
        bucket = Bucket([(2048, 5461), (1024, 2736)], 2, dtype=torch.bfloat16, limited=True, device="cuda")
        for t in (1, 2, 3):
            bucket.renew_gradients(t)
            bucket.step(HYPER, t, backend="triton")
        return bucket.results()

    first = run()
    for _ in range(3):
        assert all(map(torch.equal, first, run()))


def test_a_step_runs_on_the_current_stream():
    """Check that it runs after work queued there, and not on the default stream."""

    def run(stream: torch.cuda.Stream) -> list[torch.Tensor]:
        params = model()
        optimizer = optimizer_of(params)
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            for t in range(3):
                torch.cuda._sleep(20_000_000)
                renew_gradients(params, seed=t)
                optimizer.step()
        torch.cuda.synchronize()
        return results(params, optimizer)

    assert all(map(torch.equal, run(torch.cuda.default_stream()), run(torch.cuda.Stream())))


def test_steps_allocate_nothing_that_stays_or_grows_with_the_model():
    params = model([(4096, 11008), (2048, 5461), (4096,)])
    optimizer = optimizer_of(params)
    renew_gradients(params, seed=0)
    for _ in range(2):
        optimizer.step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(20):
        optimizer.step()
        assert torch.cuda.memory_allocated() == before
    assert torch.cuda.max_memory_allocated() - before < 256 << 10  # tables and partial norms


def test_bytes_allocated_for_state():
    params = model([(4096, 11008), (2048, 5464)])
    optimizer = optimizer_of(params)
    renew_gradients(params, seed=0)
    before = torch.cuda.memory_allocated()
    optimizer.step()
    moments = sum(2 * 4 * (p.numel() // 4) for p in params)
    assert moments <= torch.cuda.memory_allocated() - before < moments + (128 << 10)  # tables


def test_tensors_on_another_than_the_current_device():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices: run `python -m pytest -m gpu` on a machine that has two")
    bucket = Bucket([(4, 32), (3, 37)], 2, limited=True, device="cuda:1")
    with torch.cuda.device(0):
        bucket.check_step(HYPER, 1, backend="triton")
        coeffs = check_forward(random((3, 37), torch.float32, "cuda:1"), 2, "triton")
        check_inverse(coeffs, 37, "triton")
        assert torch.cuda.current_device() == 0
