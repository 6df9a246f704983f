"""Launches of the step: their number, their pointer tables, and what is cached between calls."""

from __future__ import annotations

import pytest
import torch

from gwt_kernels import haar_dwt, haar_idwt
from gwt_kernels.backends.triton import haar_launch, launch
from gwt_kernels.backends.triton.tables import Sender
from gwt_kernels.functional import Hyper
from tests.support.poisoned import Poisoned
from tests.support.steps import Bucket

HYPER = Hyper(lr=0.01, weight_decay=0.1)
KERNELS = {
    launch: ("step_kernel", "norm_kernel", "limiter_kernel"),
    haar_launch: ("dwt_kernel", "idwt_kernel"),
}


class OnADevice(Sender):
    """Sends to a CUDA device, as far as it gets."""

    def send(self, data: bytes, device: torch.device, *, capturable: bool = False) -> torch.Tensor:
        return super().send(data, torch.device("cuda"), capturable=capturable)


@pytest.fixture
def launched(monkeypatch) -> list[str]:
    """Return a list of the names of launched kernels, in order."""
    names: list[str] = []

    class Recorded:
        def __init__(self, name: str, kernel) -> None:
            self.name, self.kernel = name, kernel

        def __getitem__(self, grid):
            names.append(self.name)
            return self.kernel[grid]

        @property
        def arg_names(self) -> list[str]:
            return self.kernel.arg_names  # attributes that a launch reads from a compiled kernel

    for module, kernels in KERNELS.items():
        for name in kernels:
            monkeypatch.setattr(module, name, Recorded(name, getattr(module, name)))
    return names


@pytest.mark.parametrize("n", [1, 2, 9])
@pytest.mark.parametrize(("level", "limited"), [(0, False), (0, True), (2, False), (2, True)])
def test_launches_do_not_grow_with_the_number_of_tensors(device, launched, n, level, limited):
    passes = ["norm_kernel", "limiter_kernel", "step_kernel"] if limited and level else ["step_kernel"]
    for shapes, paths in (([(2, 16)], 1), ([(3, 13)], 1), ([(2, 16), (3, 13)], 2), ([(2, 0), (0, 8)], 0)):
        launched.clear()
        Bucket(shapes * n, level if paths else 0, limited=limited, device=device).step(HYPER, 2, backend="triton")
        assert launched == passes * paths


@pytest.mark.parametrize("level", [1, 4])
def test_a_transform_is_one_launch(device, launched, level):
    coeffs = haar_dwt(torch.randn(2, 17, device=device), level, backend="triton")
    assert launched == ["dwt_kernel"]
    haar_idwt(coeffs, 17, backend="triton")
    assert launched == ["dwt_kernel", "idwt_kernel"]
    haar_dwt(torch.randn(0, 17, device=device), level, backend="triton")
    assert len(launched) == 2


# The workspace -----------------------------------------------------------------------------------------


def test_tables_are_made_once(device):
    bucket = Bucket([(4, 16), (3, 13)], 2, limited=True, device=device)
    workspace = {}
    bucket.check_step(HYPER, 1, backend="triton", workspace=workspace)
    launches = workspace["runner"].launches
    for t in (2, 3):
        bucket.renew_gradients()
        bucket.check_step(HYPER._replace(lr=t), t, backend="triton", workspace=workspace)
        assert workspace["runner"].launches is launches


def test_alignment_that_changes_from_call_to_call(device):
    """Check a tensor that moves from one path to the other, and back."""
    bucket = Bucket([(4, 16), (8, 8), (3, 13)], 2, limited=True, device=device)
    workspace, flat = {}, []
    for t, layouts in enumerate((["contiguous"], ["misaligned"], ["contiguous", "misaligned"], ["gaps"]), start=1):
        bucket.renew_gradients(layouts=layouts)
        bucket.check_step(HYPER, t, backend="triton", workspace=workspace)
        flat.append([x.n for x in workspace["runner"].launches if x.flat])
    assert flat == [[2], [], [1], [2]]


def test_alignment_that_changes_in_a_step_that_is_refused(device, monkeypatch):
    """Check a step in a CUDA graph, which cannot send new tables: the next step must not use the old ones."""
    bucket = Bucket([(4, 16)], 2, limited=True, device=device)
    workspace = {}
    bucket.check_step(HYPER, 1, backend="triton", workspace=workspace)
    bucket.renew_gradients(layouts=["misaligned"])
    with monkeypatch.context() as capturing:
        capturing.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        capturing.setattr(launch, "Sender", OnADevice)
        with pytest.raises(RuntimeError, match="captured"):
            bucket.step(HYPER, 2, backend="triton", workspace=workspace)
    bucket.check_step(HYPER, 2, backend="triton", workspace=workspace)
    assert [x.flat for x in workspace["runner"].launches] == [False]


@pytest.mark.parametrize("capturable", [False, True])
def test_tables_that_no_replay_could_send_are_refused(monkeypatch, capturable):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="take a few steps before each capture"):
        Sender().send(bytes(8), torch.device("cuda"), capturable=capturable)


def test_workspace_with_other_tensors(device):
    """Check that cached tables are not used for more, fewer or larger tensors, another dtype or another level."""
    workspace = {}
    for i, (shapes, level, dtype) in enumerate(
        [
            ([(4, 16)], 2, torch.float32),
            ([(4, 16), (4, 16)], 2, torch.float32),
            ([(4, 16)], 2, torch.bfloat16),
            ([(16, 4)], 2, torch.float32),
            ([(3, 13), (8, 32)], 3, torch.float32),
            ([(8, 32), (3, 13)], 3, torch.float32),
            ([(4, 16)], 0, torch.float16),
        ]
    ):
        bucket = Bucket(shapes, level, dtype=dtype, limited=level > 0, device=device, seed=i)
        bucket.check_step(HYPER, 2, backend="triton", workspace=workspace)


@pytest.mark.parametrize(("shape", "other"), [((6, 10), (10, 6)), ((5, 7), (7, 5)), ((60,), (6, 10))])
def test_workspace_with_another_shape_in_the_same_memory(device, shape, other):
    """Check equal addresses and sizes with another shape, as an allocator may return them."""
    first = Bucket([shape], 2, device=device)
    second = Bucket([other], 2, device=device)
    for name in ("params", "grads", "exp_avgs", "exp_avg_sqs"):
        one, two = getattr(first, name)[0], getattr(second, name)[0]
        n = max(one.tensor.numel(), two.tensor.numel())
        memory = Poisoned(torch.zeros(n, device=device))
        for place in (one, two):
            values = place.tensor.clone()
            place.tensor = memory.tensor[: values.numel()].view(values.shape)
            place.values = values
    workspace = {}
    for bucket in (first, second):
        for name in ("params", "grads", "exp_avgs", "exp_avg_sqs"):
            place = getattr(bucket, name)[0]
            place.tensor.copy_(place.values)
        bucket.check_step(HYPER, 2, backend="triton", workspace=workspace)


def test_workspace_with_another_level_in_the_same_memory(device):
    workspace = {}
    bucket = Bucket([(4, 16)], 2, device=device)
    bucket.check_step(HYPER, 1, backend="triton", workspace=workspace)
    deeper = Bucket([(4, 16)], 3, device=device)
    deeper.params, deeper.grads = bucket.params, bucket.grads
    deeper.check_step(HYPER, 2, backend="triton", workspace=workspace)


# Validation before raw pointers reach a kernel -----------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("grads", lambda x: x[:, :-1], r"a gradient of its shape and moments of shape \(4, 4\), got \(4, 15\)"),
        ("exp_avgs", lambda x: x[:, :-1].contiguous(), r"got \(4, 16\), \(4, 3\) and \(4, 4\)"),
        ("exp_avg_sqs", lambda x: x[:-1], r"got \(4, 16\), \(4, 4\) and \(3, 4\)"),
        (
            "exp_avgs",
            lambda x: x.t().contiguous().t(),
            r"moments of a parameter of shape \(4, 16\) must be contiguous",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_refused(device, name, change, message):
    bucket = Bucket([(4, 16)], 2, device=device)
    place = getattr(bucket, name)[0]
    place.tensor = change(place.tensor)
    before = bucket.results()
    with pytest.raises(ValueError, match=message):
        bucket.step(HYPER, 1, backend="triton")
    assert all(map(torch.equal, before, bucket.results()))


def test_refused_tensors_are_refused_again(device):
    """Check that a failed check is not cached."""
    workspace = {}
    bucket = Bucket([(4, 16)], 2, device=device)
    bucket.check_step(HYPER, 1, backend="triton", workspace=workspace)
    right = bucket.grads
    bucket.grads = [Poisoned(torch.zeros(4, 8, device=device))]
    for _ in range(2):
        with pytest.raises(ValueError, match="gradient of its shape"):
            bucket.step(HYPER, 2, backend="triton", workspace=workspace)
    bucket.grads = right
    bucket.check_step(HYPER, 2, backend="triton", workspace=workspace)
