"""The fingerprint in C agrees with Python's, refuses the same, and is optional."""

from __future__ import annotations

import contextlib
import gc
import logging
import sys
import tracemalloc
import warnings
from collections import OrderedDict, defaultdict
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from gwt_kernels import GWTAdamW
from gwt_kernels.backends.triton import native
from gwt_kernels.core import survey
from gwt_kernels.core.survey import PYTHON, Survey
from tests.support import interpreter
from tests.support.native import needs_compiler
from tests.support.runs import assert_same_bits, snapshot

pytestmark = needs_compiler


class Own(Tensor):
    """A user's tensor subclass."""


def dense() -> dict[str, Tensor]:
    base = torch.randn(6, 8)
    return {
        "plain": base,
        "parameter": Parameter(torch.randn(6, 8)),
        "another address": torch.randn(6, 8),
        "part of another": base[2:],
        "columns": base[:, :4],
        "transposed": torch.randn(8, 6).t(),
        "negative": torch._neg_view(torch.randn(6, 8)),
        "flat": torch.randn(48),
        "scalar": torch.randn(()),
        "empty": torch.randn(0, 8),
        "half": torch.randn(6, 8).half(),
        "bytes": torch.zeros(6, 8, dtype=torch.uint8),
        "eight dimensions": torch.randn(1, 1, 1, 1, 1, 1, 2, 3),
        "nine dimensions": torch.randn(1, 1, 1, 1, 1, 1, 1, 2, 3),
        "nine others": torch.randn(1, 1, 1, 1, 1, 1, 1, 3, 2),
        "own": torch.randn(6, 8).as_subclass(Own),
    }


def others() -> dict[str, Tensor | None]:
    return {
        "absent": None,
        "meta": torch.empty(6, 8, device="meta"),
        "sparse": torch.randn(6, 8).to_sparse(),
    }


def test_addresses_equal_those_of_python():
    c, tensors = native.compiled(), list(dense().values())
    assert c.addresses(tensors) == PYTHON.addresses(tensors)
    assert c.addresses(tuple(tensors)) == PYTHON.addresses(tensors)
    assert c.addresses([]) == b""
    assert c.addresses(tensors[:1]) != c.addresses(tensors[2:3])


def test_gradients_equal_those_of_python():
    """Compare for views, subclasses and missing gradients: always the current ones, and no reference is kept."""
    c, tensors = native.compiled(), [x for x in dense().values() if x.is_floating_point()]
    params = [x.detach().requires_grad_() if x.is_leaf else x for x in tensors]
    for i, p in enumerate(params):
        if p.is_leaf and i % 3:
            p.grad = torch.randn_like(p)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of a non-leaf
        got, expected = c.grads(params), PYTHON.grads(params)
    assert PYTHON.same(got, expected)
    assert any(g is None for g in got)
    assert any(g is not None for g in got)
    p = params[1]
    p.grad = torch.ones_like(p)
    assert c.grads([p])[0] is p.grad
    before = sys.getrefcount(p.grad)
    kept = c.grads([p])
    del kept
    after = sys.getrefcount(p.grad)
    assert after == before
    p.grad = None
    assert c.grads([p]) == [None]
    assert c.grads([]) == []
    with pytest.raises(AttributeError):
        c.grads([p, 3])


def test_addresses_are_current():
    c, p = native.compiled(), Parameter(torch.randn(4, 8))
    before = c.addresses([p])
    p.data = torch.randn(4, 8)
    assert c.addresses([p]) == PYTHON.addresses([p]) != before


@pytest.mark.parametrize(
    "bad", [None, 3, "plain", torch.randn(2, 2).to_sparse()], ids=["None", "3", "str", "sparse"]
)
def test_tensors_without_address_raise_the_error_of_python(bad):
    with pytest.raises((TypeError, RuntimeError)) as expected:
        PYTHON.addresses([torch.zeros(1), bad])
    with pytest.raises(expected.type) as found:
        native.compiled().addresses([torch.zeros(1), bad])
    assert str(found.value).splitlines()[0] == str(expected.value).splitlines()[0]


def test_a_list_shrunk_during_the_scan():
    class Emptying(Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            tensors.clear()
            return super().__torch_function__(function, types, args, kwargs or {})

    tensors = [torch.zeros(2).as_subclass(Emptying), *(torch.zeros(2) for _ in range(1000))]
    expected = PYTHON.addresses([x.as_subclass(Tensor) for x in tensors])
    assert native.compiled().addresses(tensors) == expected
    assert not tensors


UNTOLD = ("own", "nine dimensions", "nine others")  # C leaves these to Python


@pytest.mark.parametrize("name", [*dense(), *others()])
def test_comparison_equals_that_of_python(name, monkeypatch):
    monkeypatch.setattr(survey, "TensorGuards", None)  # its authors did not consider all of these
    c, kinds = native.compiled(), dense() | others()
    this = kinds[name]
    for other, that in kinds.items():
        expected = PYTHON.like([this])([that])
        if other in UNTOLD and name not in UNTOLD:
            expected = False  # what C cannot compare counts as different
        assert c.like([this])([that]) == expected, other
        assert c.like([kinds["flat"], this])([kinds["flat"], that]) == expected, other
    assert c.like([this])([this])
    assert not c.like([this])([])
    assert not c.like([this])([this, this])


def test_state_of_any_dict_type_with_users_entries():
    c = native.compiled()
    p, x = Parameter(torch.zeros(2)), torch.zeros(2)
    for state in ({}, defaultdict(dict, {p: {}}), OrderedDict({p: OrderedDict(step=x, exp_avg=x)})):
        assert c.still(state)(state)
        assert c.still(state)(dict(state))
        assert not c.still(state)({**state, x: {}})
    holds = c.still({p: {"step": x}})
    assert not holds({})
    assert not holds({p: 3})
    assert not holds({p: {"step": x}})  # another, though equal, dict
    own = object()
    holds = c.still(state := {p: {"step": x}, "epoch": own})
    assert holds(state)
    assert not holds({**state, "epoch": object()})
    for bad in (3, [p]):
        with pytest.raises(TypeError, match=r"is a dict, got <class '(int|list)'>"):
            c.still(bad)


def test_identity_is_compared():
    c, x, y = native.compiled(), torch.zeros(2), torch.zeros(2)
    assert c.same([], [])
    assert c.same([x, y], [x, y])
    assert not c.same([x, y], [y, x])
    assert not c.same([x], [x, y])


def test_no_reference_is_kept():
    c, p, x, slow = native.compiled(), Parameter(torch.zeros(2)), torch.zeros(2), torch.zeros(2).as_subclass(Own)
    own = {"step": x}
    state, tensors = {p: own}, [p, x, None]

    def size() -> int:
        for _ in range(300):
            c.addresses([p, x, slow])
            c.same(tensors, list(tensors))
            c.like(tensors)([p, x, slow])
            c.like([p, x, slow])(tensors)
            c.still(state)(state)
            with contextlib.suppress(TypeError):
                c.addresses(tensors)
            with contextlib.suppress(TypeError):
                c.still({p: 3})
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    def references() -> list[int]:
        return list(map(sys.getrefcount, (p, x, slow, own, state, tensors)))

    size()
    counts = references()
    tracemalloc.start()
    sizes = [size() for _ in range(6)]
    tracemalloc.stop()
    assert references() == counts
    # The smallest object is larger, and a leak would repeat each time.
    assert min(after - before for before, after in pairwise(sizes)) < 300 * 16


@pytest.mark.parametrize(
    "arguments",
    [
        (Tensor, Parameter, Tensor.data_ptr, Tensor.grad, 0),
        (Tensor, Parameter, Tensor.data_ptr, Tensor.grad, 8),
        (Tensor, Parameter, Tensor.data_ptr, Tensor.grad, Tensor.__basicsize__ - 7),
        (Tensor, Parameter, Tensor.data_ptr, Tensor.grad, -16),
        (Tensor, dict, Tensor.data_ptr, Tensor.grad, 16),
        (Tensor, Parameter, Tensor.data_ptr, Tensor.grad),
        (Tensor, Parameter, Tensor.data_ptr, Tensor.data_ptr, 16),
        (Tensor, Parameter, Tensor.data_ptr, type.__dict__["__name__"], 16),
        (torch.zeros(1), Parameter, Tensor.data_ptr, Tensor.grad, 16),
    ],
)
def test_bad_indices_are_refused(arguments):
    with pytest.raises((ValueError, TypeError)):
        native.module().open(*arguments)
    assert native.compiled().addresses([torch.zeros(0)]) is not None


# Without the library --------------------------------------------------------------------------------------


@pytest.fixture
def _afresh() -> Iterator[None]:
    native.quickest.cache_clear()
    yield
    native.quickest.cache_clear()


def _no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CC", "false")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def _no_source(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(native, "SOURCE", tmp_path / "survey.c")


def _no_such_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source = tmp_path / "survey.c"
    source.write_text(native.SOURCE.read_text().replace("6is_neg", "6is_not"))
    monkeypatch.setattr(native, "SOURCE", source)


def _no_pointer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(Tensor, "_cdata", 3)


OBSTACLES = [_no_compiler, _no_source, _no_such_name, _no_pointer]


@pytest.mark.usefixtures("_afresh")
@pytest.mark.parametrize("obstacle", OBSTACLES)
def test_python_is_the_fallback(obstacle, monkeypatch, tmp_path, caplog):
    obstacle(monkeypatch, tmp_path)
    with caplog.at_level(logging.DEBUG):
        assert native.quickest() is PYTHON
    assert "survey.c cannot be used" in caplog.text


def steps(device: torch.device, backend: str) -> tuple[dict[str, Any], Survey]:
    """Return the results of steps between which everything in the fingerprint changes."""
    generator = torch.Generator().manual_seed(0)
    params = [Parameter(torch.randn(shape, generator=generator).to(device)) for shape in [(4, 64), (3, 40), (8,)]]
    optimizer = GWTAdamW(params, lr=0.1, level=2, backend=backend)
    for i in range(8):
        for p in params:
            g = torch.randn(p.shape, generator=generator).to(device)
            p.grad = torch._neg_view(g) if i == 2 else g.t().contiguous().t() if i == 3 else g
        if i == 4:
            params[0].data = params[0].data.clone()
        if i == 5:
            params[1].data = params[1].data.t().contiguous().t()
        if i == 6:
            optimizer.state[params[0]]["exp_avg"] = optimizer.state[params[0]]["exp_avg"].clone()
        if i == 7:
            params[2].grad = None
        with interpreter.like_a_gpu():
            optimizer.step()
    assert optimizer._plan is not None
    return snapshot(optimizer), optimizer._plan.survey


@pytest.mark.usefixtures("_afresh")
def test_steps_are_equal_with_and_without_the_library(device, monkeypatch, tmp_path):
    found, way = steps(device, "triton")
    assert way is native.quickest() is not PYTHON
    _, way = steps(device, "torch")
    assert way is PYTHON
    native.quickest.cache_clear()
    _no_source(monkeypatch, tmp_path)
    expected, way = steps(device, "triton")
    assert way is PYTHON
    assert_same_bits(found, expected)
