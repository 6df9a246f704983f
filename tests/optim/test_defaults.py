"""Results do not depend on torch's default device and dtype, which users set for their own tensors."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import gwt_kernels
from gwt_kernels import GWTAdamW, doctor, haar_dwt, haar_idwt, migrate, release_gradients

PACKAGE = Path(gwt_kernels.__file__).parent
FACTORIES = {
    *("arange", "as_tensor", "asarray", "empty", "empty_strided", "eye", "full", "linspace", "logspace", "ones"),
    *("rand", "randint", "randn", "randperm", "scalar_tensor", "tensor", "zeros"),
}


def factory_calls(source: str) -> Iterator[ast.Call]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = node.func.value
            if isinstance(owner, ast.Name) and owner.id == "torch" and node.func.attr in FACTORIES:
                yield node


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.relative_to(PACKAGE).as_posix()
)
def test_every_tensor_is_made_with_a_device_and_a_dtype(path):
    for call in factory_calls(path.read_text()):
        said = {keyword.arg for keyword in call.keywords}
        assert {"device", "dtype"} <= said, f"line {call.lineno}: {ast.unparse(call)}"


def test_calls_without_device_and_dtype_would_be_found():
    (call,) = factory_calls("x = torch.zeros(3, dtype=dtype)")
    assert {keyword.arg for keyword in call.keywords} == {"dtype"}


@contextmanager
def wrong_defaults() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_device("meta")
    torch.set_default_dtype(torch.bfloat16)
    try:
        yield
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(before)


def tensors(seed: int, dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu").to(dtype) for shape in shapes
    ]


SHAPES = ((64, 64), (8, 12), (5, 7), (9,))
OPTIONS = {
    "plain": {},
    "limiter off": {"norm_growth_limit": None},
    "folded": {"rule": "foam"},
    "level 0": {"level": 0},
    "bfloat16 moments": {"state_dtype": torch.bfloat16},
    "int8 moments": {"state_dtype": torch.int8, "level": 1},
    "stochastic": {"weight_rounding": "stochastic"},
    "split": {"weight_rounding": "split"},
    "clipping": {"max_grad_norm": 1.0, "skip_nonfinite": True},
    "telemetry": {"telemetry": True},
    "wavelet": {"wavelet": "db2"},
}


def stepped(dtype: torch.dtype, **options) -> list[Tensor]:
    """Return all results of three steps, the second by an optimizer that has loaded the first one's state."""
    shapes = [(64, 128), *SHAPES[1:]] if options.get("state_dtype") == torch.int8 else SHAPES
    params = [nn.Parameter(x) for x in tensors(0, dtype, *shapes)]
    optimizer = GWTAdamW(params, lr=0.1, **options)
    for step in range(3):
        for p, g in zip(params, tensors(step + 1, dtype, *shapes), strict=True):
            p.grad = g
        optimizer.step()
        if step == 0:
            state, optimizer = optimizer.state_dict(), GWTAdamW(params, lr=0.1, **options)
            optimizer.load_state_dict(state)
    found = [*params, *(x for state in optimizer.state.values() for x in state.values())]
    if options.get("telemetry"):
        found += [
            torch.tensor(list(row.values()), dtype=torch.float64, device="cpu")
            for row in optimizer.telemetry().values()
        ]
    return [x.detach().clone() for x in found]


@pytest.mark.parametrize("backend", ["compiled", "torch", "triton", None])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_steps_are_equal_under_all_defaults(options, backend, device):
    if options.get("wavelet") and backend not in (None, "torch"):
        pytest.skip("other wavelets run on the torch backend; reason enough to leave the others out")
    if device.type == "cuda" and backend == "triton":
        pytest.skip("the tensors of this test lie on a CPU, where a GPU's Triton cannot run")
    dtype = torch.bfloat16 if options.get("weight_rounding") else torch.float32
    expected = stepped(dtype, **options, backend=backend)
    with wrong_defaults():
        found = stepped(dtype, **options, backend=backend)
    assert len(found) == len(expected) > 0
    for x, y in zip(found, expected, strict=True):
        assert x.dtype == y.dtype
        assert x.device == y.device
        assert torch.equal(x.nan_to_num(), y.nan_to_num())


def test_the_default_device_may_change_between_steps():
    p = nn.Parameter(torch.ones(64, 64))
    optimizer = GWTAdamW([p], lr=1e-3)
    p.grad = torch.ones(64, 64)
    optimizer.step()
    with wrong_defaults():
        optimizer.step()
    assert float(optimizer.state[p]["step"]) == 2


def transforms() -> list[Tensor]:
    (x,) = tensors(0, torch.float32, (3, 11))
    coeffs = haar_dwt(x, 2)
    return [*coeffs, haar_idwt(coeffs, 11)]


def migrated() -> list[Tensor]:
    model = nn.Linear(16, 16, bias=False, dtype=torch.float32, device="cpu")
    with torch.no_grad():
        model.weight.copy_(tensors(0, torch.float32, (16, 16))[0])
    old = torch.optim.AdamW(model.parameters())
    (model.weight.grad,) = tensors(1, torch.float32, (16, 16))
    # torch's own state is created with the current defaults, so that its dtype is explicit here
    old.state[model.weight] = {
        "step": torch.ones((), dtype=torch.float32, device="cpu"),
        "exp_avg": torch.ones(16, 16, dtype=torch.float32, device="cpu"),
        "exp_avg_sq": torch.ones(16, 16, dtype=torch.float32, device="cpu"),
    }
    new = GWTAdamW([("weight", model.weight)])
    state = migrate(old.state_dict(), new, names=model).state_dict
    new.load_state_dict(state)
    new.step()
    return [model.weight.detach(), *new.state[model.weight].values()]


def released() -> list[Tensor]:
    model = nn.Linear(16, 16, bias=False, dtype=torch.float32, device="cpu")
    with torch.no_grad():
        model.weight.copy_(tensors(0, torch.float32, (16, 16))[0])
    optimizer = GWTAdamW(model.parameters())
    release_gradients(model, optimizer)
    model(tensors(1, torch.float32, (4, 16))[0]).sum().backward()
    return [model.weight.detach(), *optimizer.state[model.weight].values()]


@pytest.mark.parametrize("make", [transforms, migrated, released])
def test_other_tools_are_equal_under_all_defaults(make: Callable[[], list[Tensor]]):
    expected = make()
    with wrong_defaults():
        found = make()
    assert all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def test_doctor_reports_the_same_under_all_defaults():
    expected = list(doctor.self_check())
    with wrong_defaults():
        assert list(doctor.self_check()) == expected


def test_another_rate_would_be_found():
    assert not all(map(torch.equal, stepped(torch.float32, norm_growth_limit=1.5), stepped(torch.float32)))
