"""The Haar transform under PyTorch's function transforms, on both backends."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.autograd import forward_ad
from torch.export import Dim
from torch.func import functionalize, grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from gwt_kernels import haar_dwt, haar_idwt
from gwt_kernels.backends.torch import haar as statement
from tests.haar.test_haar import BACKENDS, COMBINATIONS, random

backends = pytest.mark.parametrize("backend", BACKENDS)
sizes = pytest.mark.parametrize(("width", "level"), [(8, 0), (8, 3), (11, 2), (1, 0)])
MODES = ("real", "fake", "symbolic")


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Transform:
    """Both functions of one backend at one width and level, and inputs for them."""

    def __init__(self, backend: str | None, width: int, level: int, device: torch.device) -> None:
        self.backend, self.width, self.level = backend, width, level
        dtype = torch.float32 if backend == "triton" else torch.float64
        self.x, self.dx = (random((3, 4, width), torch.float32, device, seed).to(dtype) for seed in (1, 2))
        self.coeffs = tuple(statement.haar_dwt(self.x, level))
        self.dcoeffs = tuple(torch.cos(c + i) for i, c in enumerate(self.coeffs))

    def dwt(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(haar_dwt(x, self.level, backend=self.backend))

    def idwt(self, *coeffs: Tensor) -> Tensor:
        return haar_idwt(coeffs, self.width, backend=self.backend)

    def dwt_loss(self, x: Tensor) -> Tensor:
        return sum((i + 1) * c.sin().sum() for i, c in enumerate(self.dwt(x)))

    def idwt_loss(self, *coeffs: Tensor) -> Tensor:
        return self.idwt(*coeffs).sin().sum()


class Stated(Transform):
    """The expected result: the private function in PyTorch's operators, in float64."""

    def dwt(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(statement.haar_dwt(x, self.level))

    def idwt(self, *coeffs: Tensor) -> Tensor:
        return statement.haar_idwt(list(coeffs), self.width)


def with_tangents(function: Callable[..., object], primals: tuple[Tensor, ...], tangents: tuple[Tensor, ...]):
    """Return values and tangents by forward-mode differentiation, where every second input has no tangent."""
    with forward_ad.dual_level():
        duals = [
            x if i % 2 else forward_ad.make_dual(x, t)
            for i, (x, t) in enumerate(zip(primals, tangents, strict=True))
        ]
        got = function(*duals)
        return [tuple(forward_ad.unpack_dual(y)) for y in (got if isinstance(got, tuple) else (got,))]


def derivatives(function: Callable[..., object], inputs: tuple[Tensor, ...]):
    """Return the gradients of a sum of cubes, and those of the sum of their squares."""
    inputs = tuple(x.detach().clone().requires_grad_() for x in inputs)
    got = function(*inputs)
    loss = sum(y.pow(3).sum() for y in (got if isinstance(got, tuple) else (got,)))
    first = torch.autograd.grad(loss, inputs, create_graph=True)
    return first, torch.autograd.grad(sum(g.square().sum() for g in first), inputs)


def batched_gradients(function: Callable[..., object], inputs: tuple[Tensor, ...], cotangent: Tensor):
    inputs = tuple(x.detach().clone().requires_grad_() for x in inputs)
    got = function(*inputs)
    cotangents = torch.stack((cotangent, cotangent.cos()))
    return torch.autograd.grad(got[0] if isinstance(got, tuple) else got, inputs, cotangents, is_grads_batched=True)


def every(t: Transform) -> tuple[int, ...]:
    return tuple(range(t.level + 1))


def shared_band(t: Transform):
    """Compute the inverse over batched multi-dimensional details, with an unbatched approximation."""
    first, *others = t.coeffs
    dims = tuple(i % 2 for i in range(len(others)))
    moved = [c.movedim(0, dim) for c, dim in zip(others, dims, strict=True)]
    return vmap(t.idwt, in_dims=(None, *dims))(first[0], *moved) if others else t.idwt(first)


def functional(t: Transform, **options):
    kinds = ({}, {"strategy": "forward-mode"}) if options.get("vectorize") else ({},)
    x, coeffs = t.x[0, :2], tuple(c[0, :2] for c in t.coeffs)
    results = [torch.autograd.functional.jacobian(t.dwt, x, **options, **kind) for kind in kinds]
    results += [torch.autograd.functional.jacobian(t.idwt, coeffs, **options, **kind) for kind in kinds]
    return [*results, torch.autograd.functional.hessian(t.dwt_loss, x, **options)]


def traced(function: Callable[..., object], mode: str, *examples: Tensor) -> Callable[..., object]:
    return make_fx(lambda *args: function(*args), tracing_mode=mode)(*examples)


COMPOSITIONS: dict[str, Callable[[Transform], object]] = {
    "values": lambda t: (t.dwt(t.x), t.idwt(*t.coeffs)),
    "vmap": lambda t: (vmap(t.dwt)(t.x), vmap(t.idwt)(*t.coeffs)),
    "vmap over another dimension": lambda t: (
        vmap(t.dwt, in_dims=1, out_dims=1)(t.x),
        vmap(t.idwt, in_dims=1)(*t.coeffs),
        vmap(t.dwt, in_dims=-1)(t.x.movedim(0, -1)),
    ),
    "vmap in chunks": lambda t: vmap(t.dwt, chunk_size=2)(t.x),
    "vmap of vmap": lambda t: (vmap(vmap(t.dwt))(t.x), vmap(vmap(t.idwt), in_dims=1)(*t.coeffs)),
    "vmap with a shared band": shared_band,
    "jvp": lambda t: (jvp(t.dwt, (t.x,), (t.dx,)), jvp(t.idwt, t.coeffs, t.dcoeffs)),
    "dual numbers": lambda t: (
        with_tangents(t.dwt, (t.x,), (t.dx,)),
        with_tangents(t.idwt, t.coeffs, t.dcoeffs),
    ),
    "linearize": lambda t: linearize(t.dwt, t.x)[1](t.dx),
    "grad": lambda t: (grad(t.dwt_loss)(t.x), grad(t.idwt_loss, argnums=every(t))(*t.coeffs)),
    "vjp": lambda t: (vjp(t.dwt, t.x)[1](t.dcoeffs), vjp(t.idwt, *t.coeffs)[1](t.dx)),
    "jacrev": lambda t: (jacrev(t.dwt)(t.x), jacrev(t.idwt, argnums=every(t))(*t.coeffs)),
    "jacfwd": lambda t: (jacfwd(t.dwt)(t.x), jacfwd(t.idwt, argnums=every(t))(*t.coeffs)),
    "hessian": lambda t: (hessian(t.dwt_loss)(t.x[0]), hessian(t.idwt_loss)(*(c[0] for c in t.coeffs))),
    "vmap of grad": lambda t: (vmap(grad(t.dwt_loss))(t.x), vmap(grad(t.idwt_loss, argnums=every(t)))(*t.coeffs)),
    "grad of vmap": lambda t: grad(lambda x: sum(c.sin().sum() for c in vmap(t.dwt)(x)))(t.x),
    "vmap of hessian": lambda t: vmap(hessian(t.dwt_loss))(t.x[0]),
    "vmap of jvp": lambda t: vmap(lambda x, dx: jvp(t.dwt, (x,), (dx,)))(t.x, t.dx),
    "jvp of vmap": lambda t: (jvp(vmap(t.dwt), (t.x,), (t.dx,)), jvp(vmap(t.idwt), t.coeffs, t.dcoeffs)),
    "jvp of grad": lambda t: (jvp(grad(t.dwt_loss), (t.x,), (t.dx,)), jvp(grad(t.idwt_loss), t.coeffs, t.dcoeffs)),
    "grad of jvp": lambda t: grad(lambda x: sum(c.pow(3).sum() for c in jvp(t.dwt, (x.sin(),), (x.cos(),))[1]))(
        t.x
    ),
    "jacrev of jacrev": lambda t: jacrev(jacrev(t.dwt_loss))(t.x[0]),
    "jacrev of jacfwd": lambda t: jacrev(jacfwd(t.idwt_loss))(*(c[0] for c in t.coeffs)),
    "double backward": lambda t: (derivatives(t.dwt, (t.x,)), derivatives(t.idwt, t.coeffs)),
    "backward through vmap": lambda t: (derivatives(vmap(t.dwt), (t.x,)), derivatives(vmap(t.idwt), t.coeffs)),
    "batched gradients": lambda t: (
        batched_gradients(t.dwt, (t.x,), t.dcoeffs[0]),
        batched_gradients(t.idwt, t.coeffs, t.dx),
    ),
    "autograd.functional": functional,
    "autograd.functional, vectorized": lambda t: functional(t, vectorize=True),
    "functionalize": lambda t: (functionalize(t.dwt)(t.x), functionalize(t.idwt)(*t.coeffs)),
    "make_fx": lambda t: [
        (traced(t.dwt, mode, t.x)(t.dx), traced(t.idwt, mode, *t.coeffs)(*t.dcoeffs)) for mode in MODES
    ],
    "make_fx of grad": lambda t: [traced(grad(t.dwt_loss), mode, t.x)(t.dx) for mode in MODES],
}


def assert_agrees(got: object, expected: object, dtype: torch.dtype) -> None:
    """Compare nested tensors with float64 ones: structure, shapes and values."""
    tolerance = 5e-6 if dtype == torch.float32 else 1e-12
    leaves, structure = torch.utils._pytree.tree_flatten(got)
    expected_leaves, expected_structure = torch.utils._pytree.tree_flatten(expected)
    assert structure == expected_structure
    for leaf, value in zip(leaves, expected_leaves, strict=True):
        if value is None:
            assert leaf is None
            continue
        assert leaf.dtype == dtype
        torch.testing.assert_close(leaf.double(), value, rtol=4 * tolerance, atol=4 * tolerance)


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
@pytest.mark.parametrize(
    ("composition", "width", "level"),  # each with an odd width, and with one of whole blocks or level 0
    [(name, *size) for i, name in enumerate(COMPOSITIONS) for size in ((11, 2), ((8, 3), (8, 0), (1, 0))[i % 3])],
)
@backends
def test_composes(backend, width, level, composition, device):
    run, t = COMPOSITIONS[composition], Transform(backend, width, level, device)
    expected = Stated("torch", width, level, device)
    assert expected.x.dtype == torch.float64
    assert_agrees(run(t), run(expected), t.x.dtype)


# Compilers ----------------------------------------------------------------------------------------------


COMPILED: dict[str, Callable[[Transform], Callable[..., object]]] = {
    "forward": lambda t: t.dwt,
    "there and back": lambda t: lambda x: t.idwt(*(2 * c for c in t.dwt(x))),
    "grad": lambda t: grad(t.dwt_loss),
    "jvp": lambda t: lambda x: jvp(t.dwt, (x,), (x.cos(),)),
    "vmap": lambda t: vmap(t.dwt),
}


@pytest.mark.parametrize(
    ("program", "width", "level"),
    [*((program, 11, 2) for program in COMPILED), ("there and back", 8, 3), ("there and back", 5, 0)],
)
@backends
def test_compiles_as_one_graph(backend, width, level, program, device, fresh_compiler):
    t, expected = (kind(backend, width, level, device) for kind in (Transform, Stated))
    expected.x = expected.x.double()
    compiled = torch.compile(COMPILED[program](t), fullgraph=True, backend="aot_eager")
    assert_agrees(compiled(t.x), COMPILED[program](expected)(expected.x), t.x.dtype)
    if program in ("forward", "there and back"):
        assert_agrees(
            derivatives_once(compiled, t.x), derivatives_once(COMPILED[program](expected), expected.x), t.x.dtype
        )


def derivatives_once(function: Callable[..., object], x: Tensor) -> Tensor:
    x = x.detach().clone().requires_grad_()
    got = function(x)
    return torch.autograd.grad(sum(y.pow(3).sum() for y in (got if isinstance(got, tuple) else (got,))), x)[0]


@pytest.mark.parametrize("backend", [None, "compiled"])
def test_aliases_compile_too(backend, fresh_compiler):
    x = random((3, 11), torch.float64)
    there = torch.compile(lambda x: haar_dwt(x, 2, backend=backend), fullgraph=True, backend="eager")
    back = torch.compile(lambda *c: haar_idwt(c, 11, backend=backend), fullgraph=True, backend="eager")
    torch.testing.assert_close(back(*there(x)), x)


@backends
def test_one_graph_serves_odd_and_even_widths(backend, device, fresh_compiler):
    t = Transform(backend, 11, 2, device)
    compilations = CompileCounter()
    there_and_back = torch.compile(
        lambda x: haar_idwt(haar_dwt(x, 2, backend=backend), x.shape[-1], backend=backend),
        fullgraph=True,
        dynamic=True,
        backend=compilations,
    )
    for width in (11, 12, 9, 16, 33):
        x = random((2, width), t.x.dtype, device, seed=width)
        torch.testing.assert_close(there_and_back(x), x, rtol=1e-5, atol=1e-6)
    assert compilations.frame_count == 1


@backends
def test_bad_input_is_refused_in_compiled_code(backend, device, fresh_compiler):
    for call in (lambda x: haar_dwt(x, 9, backend=backend), lambda x: haar_idwt([x, x], 5, backend=backend)):
        with pytest.raises(ValueError, match=r"too deep|do not belong"):
            torch.compile(call, backend="eager")(torch.zeros(8, device=device))
    with pytest.raises(RuntimeError, match="would lose precision"):
        torch.compile(lambda x: haar_dwt(x, 1, backend="triton"), backend="eager")(random((8,), torch.float64))


class ThereAndBack(torch.nn.Module):
    def __init__(self, backend: str, level: int) -> None:
        super().__init__()
        self.backend, self.level = backend, level

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        approximation, *details = haar_dwt(x, self.level, backend=self.backend)
        coeffs = [2 * approximation, *details]
        return *coeffs, haar_idwt(coeffs, x.shape[-1], backend=self.backend)


@pytest.mark.parametrize(("level", "strict"), [(0, False), (1, True), (3, False), (3, True)])
@backends
def test_exports_for_every_width(backend, level, strict, device, fresh_compiler):
    module = ThereAndBack(backend, level)
    dtype = torch.float32 if backend == "triton" else torch.float64
    shapes = {"x": {0: Dim("rows", min=2), 1: Dim("width", min=2**level + 1)}}
    example = (random((4, 11), dtype, device),)
    saved = io.BytesIO()
    torch.export.save(torch.export.export(module, example, dynamic_shapes=shapes, strict=strict), saved)
    saved.seek(0)
    exported = torch.export.load(saved).module()
    for width in (11, 12, 9, 16, 33):
        x = random((3, width), dtype, device, seed=width)
        for got, expected in zip(exported(x), ThereAndBack("torch", level)(x), strict=True):
            torch.testing.assert_close(got, expected, rtol=2e-6, atol=2e-6)
    if level:
        with pytest.raises((RuntimeError, AssertionError)):
            exported(random((3, 2 ** (level - 1)), dtype, device))


# Without data -------------------------------------------------------------------------------------------


@backends
@sizes
def test_meta_and_fake_tensors_have_the_shapes_of_real_ones(backend, width, level, device):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = random((2, 3, width), dtype, device).mT.contiguous().mT
        with torch._subclasses.FakeTensorMode() as mode:
            fake = mode.from_tensor(x)
        real = haar_dwt(x, level, backend=backend)
        for pretended in (fake, x.to("meta")):
            coeffs = haar_dwt(pretended, level, backend=backend)
            back = haar_idwt(coeffs, width, backend=backend)
            for got, expected in zip((*coeffs, back), (*real, x.contiguous()), strict=True):
                assert type(got) is type(pretended)
                assert (got.shape, got.dtype, got.stride()) == (expected.shape, dtype, expected.stride())
                assert got.device == pretended.device


def test_meta_tensors_are_refused_where_real_ones_are():
    for x, level, message in (
        (torch.empty(8, dtype=torch.float64), 1, "precision"),
        (torch.empty(2048), 11, "above"),
    ):
        with pytest.raises(RuntimeError, match=message):
            haar_dwt(x.to("meta"), level, backend="triton")


# The operators ------------------------------------------------------------------------------------------

OPERATORS = torch.ops.gwt_kernels


@pytest.mark.parametrize(
    ("shape", "level", "dtype"),
    [((3, 11), 2, torch.float32), ((3, 11), 2, torch.float64), ((8,), 3, torch.bfloat16),
     ((2, 0, 5), 1, torch.float32), ((4, 6), 0, torch.float32)],
    ids=str,
)  # fmt: skip
def test_opcheck(shape, level, dtype, device):
    for gradient in (False, True):
        x = random(shape, dtype, device).requires_grad_(gradient)
        torch.library.opcheck(OPERATORS.haar_dwt, (x, level))
        coeffs = [c.detach().requires_grad_(gradient) for c in haar_dwt(x, level)]
        torch.library.opcheck(OPERATORS.haar_idwt, (coeffs, shape[-1]))


class Seen(TorchDispatchMode):
    """Records the operators called within the context."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_batches_and_gradients_are_single_calls_of_the_operators(device):
    x = random((3, 4, 11), torch.float32, device).requires_grad_()
    with Seen() as seen:
        coeffs = vmap(lambda x: tuple(haar_dwt(x, 2, backend="triton")))(x)
        torch.autograd.grad(coeffs, x, [torch.ones_like(c) for c in coeffs])
    ours = [name for name in seen.names if name.startswith("gwt_kernels")]
    assert ours == ["gwt_kernels.haar_dwt.default", "gwt_kernels.haar_idwt.default"]


def test_operators_run_where_the_kernels_cannot(device):
    """Check that a graph exported on a machine with a GPU runs on one without."""
    x = random((3, 11), torch.float64, device)
    coeffs = OPERATORS.haar_dwt(x, 2)
    torch.testing.assert_close(coeffs, statement.haar_dwt(x, 2), rtol=0, atol=0)
    torch.testing.assert_close(OPERATORS.haar_idwt(coeffs, 11), x)
    deep = random((2, 3000), torch.float32, device)
    torch.testing.assert_close(OPERATORS.haar_dwt(deep, 11), statement.haar_dwt(deep, 11), rtol=0, atol=0)


def test_operators_validate_their_arguments(device):
    x = torch.zeros(8, device=device)
    for error, call in (
        (ValueError, lambda: OPERATORS.haar_dwt(x, -1)),
        (ValueError, lambda: OPERATORS.haar_dwt(x[0], 1)),
        (TypeError, lambda: OPERATORS.haar_dwt(x.int(), 1)),
        (ValueError, lambda: OPERATORS.haar_idwt([], 8)),
        (ValueError, lambda: OPERATORS.haar_idwt([x, x], 99)),
        (ValueError, lambda: OPERATORS.haar_idwt([x[:0], x[:0]], -1)),
        (TypeError, lambda: OPERATORS.haar_idwt([x, x.double()], 16)),
    ):
        with pytest.raises(error):
            call()


# Context managers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("backend", "dtype"), COMBINATIONS, ids=lambda x: str(x).split(".")[-1])
def test_context_managers_change_nothing(backend, dtype, device):
    x = random((3, 4, 11), dtype, device).mT.contiguous().mT.requires_grad_()
    plain = haar_dwt(x, 2, backend=backend)
    contexts = (
        torch.inference_mode(),
        torch.no_grad(),
        torch.autocast(device.type, dtype=torch.bfloat16),
        torch.device("meta"),
    )
    for context in contexts:
        with context:
            coeffs = haar_dwt(x, 2, backend=backend)
            back = haar_idwt(coeffs, 11, backend=backend)
        for got, expected in zip(coeffs, plain, strict=True):
            assert torch.equal(got, expected)
            assert (got.dtype, got.device) == (dtype, x.device)
        assert torch.equal(back, haar_idwt(plain, 11, backend=backend))
        assert back.requires_grad == (context not in contexts[:2])


@backends
def test_an_inverse_deeper_than_its_width_is_differentiable(backend, device):
    """Check more levels than the forward transform allows, for the inverse, as in PyWavelets, and its gradient."""
    coeffs = [torch.full((1,), 3.0, device=device, requires_grad=True) for _ in range(4)]
    got = torch.autograd.grad(haar_idwt(coeffs, 1, backend=backend).sum(), coeffs)
    expected = [8**-0.5, 8**-0.5, 0.5, 2**-0.5]
    torch.testing.assert_close(torch.cat(got).cpu(), torch.tensor(expected))
