"""Tests of steps with a matrix stage: backends against each other in every format, and matrices in pieces."""

from __future__ import annotations

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from gwt_kernels import GWTMuon
from gwt_kernels.backends.bucket import Bucket, StepInputs
from gwt_kernels.backends.cpu import step
from gwt_kernels.backends.cpu.runner import CompiledRunner
from gwt_kernels.core.hyper import Hyper
from gwt_kernels.core.laid_out import LaidOut
from gwt_kernels.distributed import matrices
from tests.support import interpreter
from tests.support.memory import Peak
from tests.support.poisoned import Poisoned
from tests.support.runs import assert_differ, assert_same_bits, results
from tests.test_functional import on

# Numbers that are exact in float32 in any order of operations: gradients of eighths, momentum 1/2, and a rate that
# is a power of 2, on matrices whose adjustment is 1.
EXACT = {"lr": 2.0**-6, "momentum": 0.5, "weight_decay": 0.125}
SHAPES = [(16, 64), (5, 36), (2, 6, 22)]
CODED = (64, 256)  # has enough coefficients for int8


def tensors(shapes, dtype, backend, layout="contiguous", seed=0):
    generator = torch.Generator().manual_seed(seed)
    made = [Poisoned(torch.randn(s, generator=generator).to(on(backend), dtype), layout) for s in shapes]
    return made, [torch.nn.Parameter(x.tensor) for x in made]


def give(params, t, layout="contiguous"):
    generator = torch.Generator().manual_seed(100 + t)
    for p in params:
        g = torch.randint(-6, 7, p.shape, generator=generator).to(p.device, p.dtype) / 8
        p.grad = Poisoned(g, layout).tensor


def run(
    backend, shapes=SHAPES, *, dtype=torch.float32, layout="contiguous", grads="contiguous", steps=2, **options
):
    places, params = tensors(shapes, dtype, backend, layout)
    optimizer = GWTMuon(params, backend=backend, **{**EXACT, **options})
    with interpreter.like_a_gpu():
        for t in range(steps):
            give(params, t, grads)
            optimizer.step()
    for place in places:
        place.check()
    return optimizer


def check_backends(**options):
    """Check that the torch and the Triton backend store the same bits, random ones among them."""
    wanted, got = run("torch", **options), run("triton", **options)
    for p, q in zip(*(x.param_groups[0]["params"] for x in (wanted, got)), strict=True):
        assert_same_bits(p.detach().cpu(), q.detach().cpu())
        own, other = ({k: v.cpu() for k, v in x.state[y].items()} for x, y in ((wanted, p), (got, q)))
        assert_same_bits(own, other)
    return wanted


@pytest.mark.parametrize(
    ("state_dtype", "rounding", "level"),  # every pair of two of them
    [(state_dtype, rounding, (i + j) % 3)
     for i, state_dtype in enumerate((None, torch.bfloat16, torch.int8))
     for j, rounding in enumerate((None, "stochastic", "split"))],
)  # fmt: skip
def test_backends_agree_in_every_format_and_rounding(level, state_dtype, rounding):
    dtype = torch.float32 if rounding is None else torch.bfloat16
    options = {"shapes": [*SHAPES, CODED] if state_dtype == torch.int8 else SHAPES}
    options |= {"dtype": dtype, "level": level, "state_dtype": state_dtype, "weight_rounding": rounding}
    optimizer = check_backends(**options)
    kept = {x.dtype for own in optimizer.state.values() for k, x in own.items() if k == "exp_avg"}
    assert (state_dtype or torch.float32) in kept
    other = run("torch", **options, ns_steps=4)
    assert_differ(results(optimizer), results(other))  # control


@pytest.fixture
def compiled_steps(monkeypatch):
    """Return a list of the rules of the steps that C takes, in order."""
    taken = []
    original = step.Packed.step

    def watch(self):
        taken.append(self._rule.name)
        original(self)

    monkeypatch.setattr(step.Packed, "step", watch)
    return taken


@pytest.mark.parametrize("level", [1, 2, 3, 4, 5])
@pytest.mark.parametrize(
    ("dtype", "rounding"),
    [(torch.float32, None), (torch.bfloat16, None), (torch.float16, None), (torch.bfloat16, "stochastic"),
     (torch.float16, "stochastic"), (torch.bfloat16, "split")],
)  # fmt: skip
def test_the_step_in_c_leaves_the_bits_of_pytorchs_operators(level, dtype, rounding, compiled_steps):
    """Compare exact steps: in others operators may contract a product with a sum, which C never does."""
    options = {"shapes": [(16, 64), (5, 36), (2, 6, 22), (64, 256)], "dtype": dtype, "level": level, "steps": 4}
    options |= {"weight_rounding": rounding, "detail_scale": 0.5, "maximize": True}
    wanted = run("torch", **options)
    assert compiled_steps == []
    got = run("compiled", **options)
    assert set(compiled_steps) == {"muon", "orthogonal"}
    assert_same_bits(results(wanted), results(got))
    assert_differ(results(got), results(run("compiled", **options, ns_steps=4)))  # control


@pytest.mark.parametrize(
    ("options", "taken"),
    [({"level": 0}, []), ({"level": 2, "telemetry": True}, ["muon"]), ({"level": 2}, ["muon", "orthogonal"]),
     ({"level": 0, "state_dtype": torch.bfloat16}, ["muon"]),
     ({"level": 0, "state_dtype": torch.int8, "shapes": [(64, 256)]}, ["muon"]),
     ({"level": 2, "state_dtype": torch.bfloat16}, ["muon", "orthogonal"]),
     ({"level": 2, "state_dtype": torch.int8, "shapes": [(64, 256)]}, ["muon", "orthogonal"]),
     ({"level": 11, "shapes": [(4, 2048)]}, []),
     ({"level": 2, "ns_dtype": torch.float32}, ["muon", "orthogonal"]),
     ({"level": 2, "ns_dtype": torch.float64}, [])],
    ids=str,
)  # fmt: skip
def test_what_c_does_not_know_runs_by_pytorchs_operators(options, taken, compiled_steps):
    wanted, got = run("torch", **options), run("compiled", **options)
    assert sorted(set(compiled_steps)) == taken
    assert_same_bits(results(wanted), results(got))


def test_matrices_that_take_turns_in_c_are_written_where_they_are(compiled_steps):
    g, m = torch.full((4, 8), 0.5), torch.zeros(4, 2)
    bucket = Bucket([torch.zeros(4, 8)], [m], None, level=2, grad_dtype=torch.float32, rule="muon")
    runner = CompiledRunner(bucket)
    inputs = StepInputs([g], [1], [Hyper(beta1=0.5, beta2=1.0)])
    others = [torch.zeros(4, 8) for _ in range(3)] + [torch.zeros(8, 4).T]
    for x in others:
        runner.set_params([x])
        runner.apply(inputs)
    assert [float(x[1, 2]) for x in others] == [0.25, 0.375, 0.4375, 0.46875]
    assert all((x == x[0, 0]).all() for x in others)
    assert compiled_steps == ["muon"] * 4


def test_last_stages_of_kernels_take_rows_of_any_width_as_one_run(monkeypatch):
    """Check the path of the last stage: flat, for wide accesses, unless random bits are drawn by blocks."""
    from gwt_kernels.backends.triton.launch import Launch

    flat = []
    original = Launch.update

    def watch(self, *arguments):
        flat.append((self._bucket.rule, self._bucket.level, self.flat))
        original(self, *arguments)

    monkeypatch.setattr(Launch, "update", watch)
    options = {"shapes": [(8, 37)], "level": 2, "steps": 1}
    run("triton", **options)
    run("triton", **options, dtype=torch.bfloat16, weight_rounding="stochastic")
    run("triton", **options, telemetry=True)
    first, last = ("muon", 2, False), ("orthogonal", 2, False)
    assert flat == [first, ("orthogonal", 0, True), first, last, first, last]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("layout", "grads"),
    [("misaligned", "contiguous"), ("contiguous", "misaligned"), ("transposed", "contiguous"),
     ("contiguous", "transposed"), ("transposed", "transposed"), ("gaps", "strided")],
)  # fmt: skip
def test_backends_agree_on_any_layout(layout, grads, dtype):
    wanted = check_backends(dtype=dtype, layout=layout, grads=grads)
    assert_same_bits(results(wanted), results(run("torch", dtype=dtype)))


@pytest.mark.parametrize(
    "options",
    [{"nesterov": False}, {"detail_scale": 0.5}, {"maximize": True}, {"ns_steps": 0}, {"ns_dtype": torch.float32},
     {"capturable": True}, {"capturable": True, "max_grad_norm": 1e9}, {"skip_nonfinite": True}],
    ids=str,
)  # fmt: skip
def test_backends_agree_under_every_option(options):
    wanted = check_backends(**options)
    assert_differ(results(wanted), results(run("torch", steps=1, **options)))


def test_splits_of_rows_with_factors_of_their_own():
    for adjust_lr_fn, scale in (("original", 1.0), ("match_rms_adamw", 5.0)):
        check_backends(
            shapes=[(24, 16), (2, 24, 16)], row_splits=(16, 4, 4), adjust_lr_fn=adjust_lr_fn, scale=scale
        )


@pytest.mark.parametrize(
    "options",
    [{}, {"skip_nonfinite": True, "telemetry": True}, {"weight_rounding": "split", "dtype": torch.bfloat16},
     {"workspace_bytes": 8400, "state_dtype": torch.bfloat16}, {"layout": "transposed", "grads": "misaligned"}],
    ids=str,
)  # fmt: skip
def test_rows_as_blocks(options):
    """Compare backends up to rounding: means of rows, of any number of elements, are not exact."""
    options = {"shapes": [(6, 40), (5, 37), (3, 4, 16), (2, 1030)], "level": "row", "ns_steps": 0, **options}
    wanted, got = run("torch", **options), run("triton", **options)
    coarse = options.get("state_dtype") == torch.bfloat16
    for p, q in zip(*(x.param_groups[0]["params"] for x in (wanted, got)), strict=True):
        rtol = 2**-8 if q.dtype == torch.bfloat16 else 1e-6
        torch.testing.assert_close(q.detach().cpu(), p.detach(), rtol=rtol, atol=1e-3 if coarse else 1e-6)
        own, other = (x.state[y]["exp_avg"].cpu() for x, y in ((wanted, p), (got, q)))
        assert own.shape == (*p.shape[:-1], 1)
        torch.testing.assert_close(other, own, rtol=2**-7 if coarse else 1e-5, atol=1e-7)
    if "telemetry" in options:
        for name, told in wanted.telemetry().items():
            assert got.telemetry()[name] == pytest.approx(told, rel=1e-5)


# In pieces -------------------------------------------------------------------------------------------------

EXPERTS = [(3, 8, 40), (3, 6, 37), (4, 8, 48), (8, 24)]


def least_bytes(shape, itemsize=2):
    rows, cols = shape[-2:]
    return itemsize * (2 * rows * cols + 2 * min(rows, cols) ** 2)


@pytest.mark.parametrize(("backend", "level"), [("torch", 0), ("torch", 2), ("triton", 2)])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight_rounding": "stochastic", "state_dtype": torch.bfloat16, "dtype": torch.bfloat16},
        {"weight_rounding": "split", "dtype": torch.bfloat16},
        {"max_grad_norm": 0.5, "skip_nonfinite": True, "capturable": True},
        {"row_splits": (4, 4), "adjust_lr_fn": "match_rms_adamw", "shapes": [(3, 8, 40), (3, 8, 37)]},
        {"layout": "transposed", "grads": "misaligned"},
    ],
    ids=str,
)
def test_experts_in_pieces_have_the_bits_of_whole_ones(backend, level, options):
    """Compare bits without iterations: libraries compute products of one matrix and of several differently."""
    options = {"shapes": EXPERTS, "level": level, "ns_steps": 0, **options}
    whole = run(backend, **options)
    few = max(map(least_bytes, options["shapes"]))
    pieces = run(backend, workspace_bytes=few, **options)
    counts = [len(bucket.runner._batches) for x in (whole, pieces) for bucket in x._plan.buckets]
    assert counts[0] == 1
    assert counts[1] >= sum(s[0] for s in options["shapes"] if len(s) > 2)
    params, others = (x.param_groups[0]["params"] for x in (whole, pieces))
    for p, q in zip(params, others, strict=True):
        assert_same_bits(p.detach(), q.detach())
        assert_same_bits(dict(whole.state[p]), dict(pieces.state[q]))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_int8_moments_of_experts_are_cut_at_whole_scales_or_the_remedy_is_named(backend):
    shapes = [(8, 32, 128)]  # 1,024 coefficients per expert at level 2: 8 blocks of 128
    options = {"shapes": shapes, "state_dtype": torch.int8}
    pieces = run(backend, workspace_bytes=3 * least_bytes(shapes[0]), **options)
    whole = run(backend, **options)
    states = [next(iter(x.state.values())) for x in (pieces, whole)]
    assert states[0]["exp_avg"].dtype == torch.int8
    assert_same_bits(dict(states[0]), dict(states[1]))
    with pytest.raises(ValueError, match=r"cannot be cut where 128 of its int8 moments share a scale"):
        run(backend, shapes=[(300, 4, 20)], state_dtype=torch.int8, workspace_bytes=10 * least_bytes((4, 20)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_products_of_pieces_are_those_of_whole_ones_to_rounding(dtype):
    few = max(least_bytes(s, dtype.itemsize) for s in EXPERTS)
    options = {"shapes": EXPERTS, "ns_dtype": dtype, "dtype": torch.float64, "steps": 1}
    whole, pieces = (results(run("torch", **options, **given)) for given in ({}, {"workspace_bytes": few}))
    for p, q in zip(whole["params"], pieces["params"], strict=True):
        torch.testing.assert_close(p, q, rtol=2**-51, atol=EXACT["lr"] * 40 * torch.finfo(dtype).eps)


def test_telemetry_of_pieces_is_that_of_the_whole():
    told = []
    for workspace in (1 << 20, max(map(least_bytes, EXPERTS))):
        optimizer = run("torch", shapes=EXPERTS, telemetry=True, workspace_bytes=workspace)
        told.append(optimizer.telemetry())
    for name, wanted in told[0].items():
        assert told[1][name] == pytest.approx(wanted, rel=1e-6)


def test_memory_of_a_step_stays_below_the_workspace():
    """Check peak memory, without the float32 temporaries of chunks, which any CPU step in PyTorch has."""
    shapes, bound = [(32, 255, 255)] * 2, 4 << 20  # matrices below the size that a CPU takes one at a time
    params = [torch.nn.Parameter(torch.zeros(s)) for s in shapes]
    optimizer = GWTMuon(params, workspace_bytes=bound, backend="torch")
    for p in params:
        p.grad = torch.randn(p.shape)
    optimizer.step()
    with Peak() as tight:
        optimizer.step()
    optimizer.param_groups[0]["workspace_bytes"] = 256 << 20
    optimizer.step()
    with Peak() as loose:
        optimizer.step()
    chunks = 6 * 4 * (1 << 20)  # float32 copies of 2**20 elements
    assert tight.bytes <= bound + chunks
    assert loose.bytes >= 2 * tight.bytes


@pytest.mark.parametrize("state_dtype", [None, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("backend", ["torch", "compiled", "triton"])
def test_nothing_of_the_matrices_is_kept_between_steps(backend, state_dtype, monkeypatch):
    """Check that buffers, as large as bfloat16 weights, are freed, for example for another optimizer's step."""
    buffers = []

    class Watched(LaidOut):
        def __init__(self, places, buffer):
            super().__init__(places, buffer)
            buffers.append(StorageWeakRef(buffer.untyped_storage()))

    monkeypatch.setattr(matrices, "LaidOut", Watched)
    optimizer = run(backend, level=2, state_dtype=state_dtype, steps=2)
    assert optimizer.state
    assert len(buffers) > 1
    assert all(buffer.expired() for buffer in buffers)
