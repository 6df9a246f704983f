"""Tests of Newton-Schulz against torch.optim.Muon's own, in place, in batches, and within its workspace."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim._muon import _adjust_lr, _zeropower_via_newtonschulz
from torch.utils._python_dispatch import TorchDispatchMode

from gwt_kernels.rules.newton_schulz import (
    WORKSPACE_BYTES,
    NewtonSchulz,
    check_workspace,
    matrix_shapes,
    orthogonalize_,
    update_scale,
    views_of,
    workspace_needed,
)
from tests.support import runs, torch_muon
from tests.support.memory import Peak

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
SHAPES = [(1, 1), (1, 7), (9, 1), (16, 16), (24, 40), (40, 24), (33, 65), (67, 31)]
OURS = NewtonSchulz()


def matrices(*shape: int, dtype: torch.dtype = FP32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=FP64).to(dtype)


def restated(g: Tensor, newton_schulz: NewtonSchulz) -> Tensor:
    """torch.optim.Muon's ``_zeropower_via_newtonschulz`` in the matrix's own dtype, without in-place operations."""
    a, b, c = newton_schulz.coefficients
    x = g.T if g.shape[0] > g.shape[1] else g
    x = x / x.norm().clamp(min=newton_schulz.eps)
    for _ in range(newton_schulz.steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if g.shape[0] > g.shape[1] else x


def muons(g: Tensor, newton_schulz: NewtonSchulz = OURS) -> Tensor:
    """Return the bits of torch.optim.Muon itself, which computes in bfloat16 only."""
    own = newton_schulz
    return _zeropower_via_newtonschulz(g, own.coefficients, own.steps, own.eps)


@pytest.mark.parametrize("steps", [0, 1, 2, 5, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_float64_equals_the_restated_iteration(shape: tuple[int, int], steps: int) -> None:
    ours = NewtonSchulz(steps=steps, dtype=FP64)
    g = matrices(*shape, dtype=FP64)
    before = g.clone()
    torch.testing.assert_close(ours(g), restated(g, ours), rtol=0, atol=1e-14)
    runs.assert_same_bits(g, before)
    batch = torch.stack([g, 3 * g.roll(1), -g])
    torch.testing.assert_close(ours(batch)[1], restated(batch[1], ours), rtol=0, atol=1e-14)
    orthogonalize_([g], ours)
    torch.testing.assert_close(g, restated(before, ours), rtol=0, atol=1e-14)


def test_singular_values_come_near_one_and_directions_stay() -> None:
    g = matrices(20, 50, dtype=FP64)
    x = NewtonSchulz(dtype=FP64)(g)
    values = torch.linalg.svdvals(x)
    assert float(values.min()) > 0.6
    assert float(values.max()) < 1.3
    u, _, vh = torch.linalg.svd(g, full_matrices=False)
    inner = u.T @ x @ vh.T
    assert float((inner - inner.diagonal().diag()).abs().max()) < 1e-12


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("given", [BF16, FP32])
@pytest.mark.parametrize("shape", [*SHAPES, (256, 384), (384, 200)])
def test_bits_are_those_of_muon(shape: tuple[int, int], given: torch.dtype, threads: int) -> None:
    """Check that bits are equal, on a CPU in batches too."""
    several = matrices(3, *shape, dtype=given)
    expected = torch.stack([muons(x.clone()) for x in several])
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        runs.assert_same_bits(OURS(several[0]), expected[0].contiguous())
        runs.assert_same_bits(OURS(several), expected)
        apart = [x.clone() for x in several]
        orthogonalize_(apart, OURS)
    finally:
        torch.set_num_threads(before)
    runs.assert_same_bits(torch.stack(apart), expected.to(given))
    runs.assert_differ(OURS._replace(steps=4)(several), expected)


def test_matrices_of_any_kind_at_once() -> None:
    """Check batches, views that lie end to end or apart, transposed, of other dtypes, and empty, in any order."""
    memory = matrices(5, 12, 20, dtype=FP64)
    fused = matrices(2, 30, 8, dtype=FP64)
    other = [matrices(12, 20, dtype=FP64, seed=3).T.contiguous().T, matrices(12, 20, seed=4), matrices(0, 5)]
    given = [
        memory[1],
        memory[2],
        fused[:, :10],
        memory[4],
        fused[:, 10:],
        *other,
        matrices(2, 3, 4, 6, dtype=FP64),
    ]
    ours = NewtonSchulz(dtype=FP64)
    expected = [
        torch.stack([restated(m.double(), ours) for m in x.reshape(-1, *x.shape[-2:])]).view(x.shape).to(x.dtype)
        if x.numel()
        else x.clone()
        for x in given
    ]
    untouched = memory[0].clone(), memory[3].clone()
    for workspace in (WORKSPACE_BYTES, ours.temporary_bytes(12, 20, copied=True), 40_000):
        own = [x.clone() for x in given] if workspace == 40_000 else None
        if own is None:  # in the memory that they are views of
            saved = memory.clone(), fused.clone(), [x.clone() for x in given[5:]]
        orthogonalize_(own or given, ours, workspace)
        for x, y in zip(own or given, expected, strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=1e-14 if y.dtype == FP64 else 1e-6)
        if own is None:
            runs.assert_same_bits((memory[0], memory[3]), untouched)
            memory.copy_(saved[0])
            fused.copy_(saved[1])
            for x, y in zip(given[5:], saved[2], strict=True):
                x.copy_(y)


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("splits", [(2, 2, 2), (4, 2), (2, 4), (1, 1, 4)])
def test_cut_rows_of_batches(splits: tuple[int, ...], n: int) -> None:
    """Check pieces of equal shape that lie end to end, within a batch or in two neighbouring ones."""
    x = matrices(2 * n, 6, 8, dtype=FP64)
    ours = NewtonSchulz(dtype=FP64)
    expected = torch.stack([torch.cat([restated(piece, ours) for piece in m.split(splits)]) for m in x])
    for workspace in (WORKSPACE_BYTES, ours.temporary_bytes(4, 8), ours.temporary_bytes(4, 8, copied=True)):
        y = x.clone()
        orthogonalize_([*views_of(y[:n], row_splits=splits), *views_of(y[n:], row_splits=splits)], ours, workspace)
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-14)


def test_same_shapes_share_products() -> None:
    class Count(TorchDispatchMode):
        products = 0

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            Count.products += any(word in str(function) for word in ("bmm", "aten.mm", "addmm"))
            return function(*args, **(kwargs or {}))

    several = [matrices(8, 12, dtype=BF16, seed=i) for i in range(6)] + [matrices(12, 8, dtype=BF16)]
    with Count():
        orthogonalize_(several, OURS)
    assert Count.products == 2 * 3 * OURS.steps


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (30, 30)])
@pytest.mark.parametrize("kind", ["alone", "end to end", "apart", "other dtype", "cut rows"])
def test_temporaries_are_those_counted(kind: str, shape: tuple[int, int], steps: int) -> None:
    ours = NewtonSchulz(steps=steps)
    rows, cols = shape
    in_place = kind in ("alone", "end to end")
    memory = matrices(7, *shape, dtype=FP32 if kind == "other dtype" else BF16)
    given = {"alone": [memory[0]], "end to end": [memory], "cut rows": [memory[:, : rows // 2]]}.get(kind)
    given = given or [x.clone() for x in memory]
    one = ours.temporary_bytes(rows // 2 if kind == "cut rows" else rows, cols, copied=not in_place)
    for at_once, workspace in ((7, WORKSPACE_BYTES), (7, 7 * one), (3, 4 * one - 1), (2, 2 * one)):
        with Peak() as peak:
            orthogonalize_(given, ours, workspace)
        if kind == "alone":
            assert peak.bytes == one
        elif in_place:
            assert peak.bytes == at_once * one
        else:
            assert at_once * one <= peak.bytes <= workspace
    least = ours.temporary_bytes(rows // 2 if kind == "cut rows" else rows, cols, copied=kind == "other dtype")
    with Peak() as peak:
        orthogonalize_(given, ours, least)
    assert peak.bytes == least
    with pytest.raises(ValueError, match=rf"workspace_bytes={least - 1}: use at least workspace_bytes={least}"):
        orthogonalize_(given, ours, least - 1)


def test_non_finite_numbers_stay_in_their_matrix() -> None:
    several = matrices(3, 6, 9)
    several[1, 2, 3] = math.nan
    expected = OURS(several[2])
    orthogonalize_([several], OURS)
    assert several[1].isnan().all()
    runs.assert_same_bits(several[2], expected.float())
    zeros = torch.zeros(2, 4, 5)
    orthogonalize_([zeros], OURS)
    runs.assert_same_bits(zeros, torch.zeros(2, 4, 5))


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"steps": 100}, ValueError, "ns_steps=100"),
        ({"steps": -1}, ValueError, "ns_steps=-1"),
        ({"steps": 5.0}, TypeError, "ns_steps=5.0"),
        ({"steps": True}, TypeError, "ns_steps=True"),
        ({"coefficients": (1.0, 2.0)}, ValueError, "ns_coefficients=.*exactly 3"),
        ({"coefficients": (1.0, 2.0, math.nan)}, ValueError, "ns_coefficients"),
        ({"coefficients": 3.0}, ValueError, "ns_coefficients"),
        ({"coefficients": ("1", 2.0, 3.0)}, ValueError, "ns_coefficients"),
        ({"eps": -1e-7}, ValueError, "eps=-1e-07"),
        ({"eps": math.inf}, ValueError, "eps=inf"),
        ({"eps": "0"}, ValueError, "eps='0'"),
        ({"dtype": torch.float16}, ValueError, r"ns_dtype=torch.float16.*bfloat16"),
        ({"dtype": "bfloat16"}, ValueError, "ns_dtype='bfloat16'"),
    ],
)
def test_bad_options_are_refused_by_name(options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        NewtonSchulz(**options).check()
    NewtonSchulz().check()
    NewtonSchulz([3, -4, 2], 99, 0, FP64).check()  # type: ignore[arg-type]


@pytest.mark.parametrize("adjust", [None, *torch_muon.ADJUSTMENTS])
@pytest.mark.parametrize("shape", [(3, 5), (64, 16), (16, 64), (8, 8)])
def test_the_scale_is_that_of_muon(shape: tuple[int, int], adjust: str | None) -> None:
    assert update_scale(adjust, shape) == _adjust_lr(1.0, adjust, torch.Size(shape))
    assert update_scale(adjust, (7, *shape)) == update_scale(adjust, shape)
    with pytest.raises(ValueError, match="adjust_lr_fn='orignal'"):
        update_scale("orignal", shape)


def test_views_are_the_parameter_itself() -> None:
    x = matrices(2, 3, 12, 5)
    for flatten, splits, shapes in (
        (False, None, [(6, 12, 5)]),
        (False, (6, 2, 4), [(6, 6, 5), (6, 2, 5), (6, 4, 5)]),
        (True, None, [(2, 180)]),
        (True, (1, 1), [(1, 180), (1, 180)]),
    ):
        views = views_of(x, flatten, splits)
        assert [tuple(v.shape) for v in views] == matrix_shapes(x.shape, flatten, splits) == shapes
        together = torch.cat(views, dim=-2).view(x.shape)
        runs.assert_same_bits(together, x)
        assert all(v.untyped_storage().data_ptr() == x.untyped_storage().data_ptr() for v in views)
    flat = matrices(12, 5)
    assert [tuple(v.shape) for v in views_of(flat)] == [(12, 5)]
    assert [tuple(v.shape) for v in views_of(flat, row_splits=[5, 7])] == [(5, 5), (7, 5)]


@pytest.mark.parametrize(
    ("shape", "flatten", "splits", "error", "words"),
    [
        ((5,), False, None, ValueError, "w of shape .5,. is no matrix.*rule='adamw'"),
        ((), False, None, ValueError, "is no matrix"),
        ((5,), True, None, ValueError, "is no matrix"),
        ((6, 2), 1, None, TypeError, "flatten=1"),
        ((6, 2), False, 3, TypeError, "row_splits=3"),
        ((6, 2), False, "33", TypeError, "row_splits='33'"),
        ((6, 2), False, (3.0, 3.0), TypeError, r"row_splits=\(3.0, 3.0\)"),
        ((6, 2), False, (True, 5), TypeError, "row_splits"),
        ((6, 2), False, (3, 4), ValueError, r"row_splits=\(3, 4\).*6 rows of w.*not to 7$"),
        ((6, 18), False, (6, 6, 6), ValueError, "not to 18, which are its columns: .*Conv1D.*row_splits=None"),
        ((6, 2), False, (6, 0), ValueError, "must be positive"),
        ((6, 2), False, (7, -1), ValueError, "must be positive"),
        ((6, 2), False, (), ValueError, "row_splits"),
        ((4, 6, 2), False, (2, 2), ValueError, "6 rows"),
    ],
)
def test_what_is_no_matrix_is_refused_by_name(
    shape: tuple[int, ...], flatten: Any, splits: Any, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        matrix_shapes(shape, flatten, splits, "w")
    with pytest.raises(error, match=words):
        check_workspace("w", shape, OURS, WORKSPACE_BYTES, flatten, splits)


@pytest.mark.parametrize(
    ("shape", "flatten", "splits"),
    [((24, 40), False, None), ((5, 24, 40), False, None), ((24, 4, 3), True, None), ((5, 24, 40), False, (8, 16))],
)
def test_the_workspace_that_is_asked_for_is_enough(
    shape: tuple[int, ...], flatten: bool, splits: tuple[int, ...] | None
) -> None:
    """Check the workspace for one index of the batch; one byte less is refused, with the bytes needed."""
    one = matrices(*shape, dtype=BF16)
    one = one[:1] if len(shape) > 2 and not flatten else one
    needed = workspace_needed([s[-2:] for s in matrix_shapes(one.shape, flatten, splits)], OURS)
    check_workspace("w", shape, OURS, needed, flatten, splits)
    with pytest.raises(ValueError, match=rf"w of shape .* needs {needed} bytes .* rule='adamw'") as caught:
        check_workspace("w", shape, OURS, needed - 1, flatten, splits)
    assert "ns_dtype" not in str(caught.value)
    with pytest.raises(ValueError, match=r"ns_dtype=torch\.bfloat16"):
        check_workspace("w", shape, OURS._replace(dtype=FP64), needed, flatten, splits)
    with Peak() as peak:
        orthogonalize_(views_of(one, flatten, splits), OURS, needed - one.nbytes)
    assert peak.bytes == needed - one.nbytes
    for bad in (1.5, True, None):
        with pytest.raises(TypeError, match=f"workspace_bytes={bad}"):
            check_workspace("w", shape, OURS, bad, flatten, splits)  # type: ignore[arg-type]
