"""Choice of the backend, errors of one that cannot run, and imports without optional dependencies."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from gwt_kernels import GWTAdamW, haar_dwt
from gwt_kernels.backends import choice
from gwt_kernels.functional import Hyper, gwt_adamw_
from tests.support.runs import assert_same_bits, checked_step, give_gradients, parameters, refused

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def _fresh_cache():
    """Clear the cached answers about Triton, which these tests change."""
    choice.triton_obstacle.cache_clear()
    yield
    choice.triton_obstacle.cache_clear()


def python(code, **environment):
    """Run code in a new process, without Triton's interpreter by default; return its output."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | environment
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


# Choice ---------------------------------------------------------------------------------------------------


def test_none_chooses_torch_on_a_cpu_even_under_the_interpreter():
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        assert choice.resolve(None, CPU, dtype, 2) == "torch"


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton: pip install triton")
def test_none_chooses_triton_on_cuda_where_its_kernels_can_take_the_tensors(monkeypatch):
    monkeypatch.setattr(choice, "interpreted", lambda: False)
    monkeypatch.setattr(choice, "triton_obstacle", choice.triton_obstacle.__wrapped__)  # without its cache
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for level in (0, 2, choice.MAX_TRITON_LEVEL):
            assert choice.resolve(None, CUDA, dtype, level) == "triton"
            assert choice.resolve("torch", CUDA, dtype, level) == "torch"
    assert choice.resolve(None, CUDA, torch.float64, 2) == "torch"
    assert choice.resolve(None, CUDA, torch.float32, choice.MAX_TRITON_LEVEL + 1) == "torch"
    assert choice.resolve(None, CUDA, torch.float32, 2, "db2") == "torch"
    assert choice.resolve(None, CUDA, torch.float32, 2, "haar", "reflect") == "torch"
    assert choice.resolve(None, CUDA, torch.float32, 0, "bior2.2", "reflect") == "triton"


@pytest.mark.parametrize(
    ("dtype", "level", "wavelet", "words"),
    [
        (torch.float64, 2, "haar", ["torch.float64", "float32"]),
        (torch.float32, choice.MAX_TRITON_LEVEL + 1, "haar", ["level 11", "10"]),
        (torch.float32, 2, "db2", ["'db2'", "Haar"]),
    ],
)
@pytest.mark.parametrize("on", [CPU, CUDA])
def test_triton_refuses_tensors_that_its_kernels_cannot_take(on, dtype, level, wavelet, words):
    with pytest.raises(RuntimeError) as caught:
        choice.resolve("triton", on, dtype, level, wavelet)
    for word in ("backend='triton'", "backend='torch'", *words):
        assert word in str(caught.value)


@pytest.mark.parametrize("on", [CPU, CUDA])
def test_triton_refuses_boundaries_other_than_zero(on):
    with pytest.raises(RuntimeError, match=r"boundary='zero' only, not 'reflect'; use backend='torch'"):
        choice.resolve("triton", on, torch.float32, 2, "haar", "reflect")


@pytest.fixture
def no_interpreter(monkeypatch):
    """Make Triton compile for its own active driver."""
    driver = pytest.importorskip("triton.runtime").driver
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(driver, "_active", None)
    return driver


def test_triton_refuses_cpu_tensors_without_the_interpreter(no_interpreter):
    with pytest.raises(RuntimeError, match=r"backend='triton' cannot run here: .* on cpu, .* use backend='torch'"):
        choice.resolve("triton", CPU, torch.float32, 2)


def test_triton_takes_tensors_on_its_active_drivers_device(no_interpreter, monkeypatch):
    """Check for instance a driver for CPUs that the user has activated."""
    other = SimpleNamespace(get_active_torch_device=lambda: torch.device("cpu"))
    monkeypatch.setattr(no_interpreter, "_active", other)
    assert choice.resolve("triton", CPU, torch.float32, 2) == "triton"
    assert choice.resolve(None, CPU, torch.float32, 2) == "torch"
    assert choice.resolve(None, CUDA, torch.float32, 2) == "triton"
    with pytest.raises(RuntimeError, match=r"the tensors are on xpu, and Triton runs on CUDA devices"):
        choice.resolve("triton", torch.device("xpu"), torch.float32, 2)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    choice.triton_obstacle.cache_clear()
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET is set"):
        choice.resolve("triton", CUDA, torch.float32, 2)


@pytest.mark.parametrize("value", ["1", "true", "on", "YES"])
def test_the_interpreter_takes_tensors_on_a_cpu(monkeypatch, value):
    monkeypatch.setenv("TRITON_INTERPRET", value)
    assert choice.resolve("triton", CPU, torch.float32, 2) == "triton"


def test_unknown_backend_names_are_refused():
    for name in ("cuda", "", "Torch", 1):
        with pytest.raises(ValueError, match=r"unknown backend .*'triton', 'torch', 'compiled', or None"):
            choice.resolve(name, CPU, torch.float32, 2)
    for name in (None, "triton", "torch"):
        choice.check_name(name)


# Backends of an optimizer ---------------------------------------------------------------------------------


def test_the_optimizer_refuses_other_wavelets_on_triton(device):
    with pytest.raises(RuntimeError, match=r"'db2'.* use backend='torch'"):
        GWTAdamW(parameters([(4, 8)], device), wavelet="db2", backend="triton")
    optimizer = GWTAdamW(parameters([(4, 8)], device), lr=0.1, backend="triton")
    give_gradients(optimizer.param_groups[0]["params"], seed=0)
    checked_step(optimizer)
    optimizer.param_groups[0]["wavelet"] = "sym4"
    with refused(optimizer, RuntimeError, "'sym4'", "Haar", "backend='torch'"):
        optimizer.step()
    with pytest.raises(RuntimeError, match="'db2'"):
        optimizer.add_param_group({"params": parameters([(4, 8)], device), "wavelet": "db2"})
    assert len(optimizer.param_groups) == 1


def test_the_optimizer_refuses_other_boundaries_on_triton(device):
    with pytest.raises(RuntimeError, match=r"'reflect'.* use backend='torch'"):
        GWTAdamW(parameters([(4, 8)], device), boundary="reflect", backend="triton")
    optimizer = GWTAdamW(parameters([(4, 8)], device), lr=0.1, backend="triton")
    give_gradients(optimizer.param_groups[0]["params"], seed=0)
    checked_step(optimizer)
    optimizer.param_groups[0]["boundary"] = "periodic"
    with refused(optimizer, RuntimeError, "'periodic'", "boundary='zero'", "backend='torch'"):
        optimizer.step()
    with pytest.raises(RuntimeError, match="'constant'"):
        optimizer.add_param_group({"params": parameters([(4, 8)], device), "boundary": "constant"})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": parameters([(4, 8)], device), "boundary": "constant", "level": 0})


def test_the_optimizer_refuses_float64_and_deep_levels_on_triton(device):
    with pytest.raises(RuntimeError, match=r"torch.float64.*lose precision.*backend='torch'"):
        GWTAdamW(parameters([(4, 8)], device, torch.float64), backend="triton")
    with pytest.raises(RuntimeError, match=r"level 11 .*backend='torch'"):
        GWTAdamW(parameters([(1, 2048)], device), level=11, backend="triton")
    model = torch.nn.ParameterList(parameters([(4, 8)], device))
    optimizer = GWTAdamW(model.parameters(), lr=0.1, backend="triton")
    give_gradients(model, seed=0)
    checked_step(optimizer)
    model.double()
    give_gradients(model, seed=1)
    with refused(optimizer, RuntimeError, "torch.float64", "backend='torch'"):
        optimizer.step()


def test_one_optimizer_may_use_both_backends(device):
    groups = [
        {"params": parameters([(4, 8)], device, seed=i), "backend": b} for i, b in enumerate(("triton", "torch"))
    ]
    optimizer = GWTAdamW(groups, lr=0.1, level=1)
    for t in range(3):
        give_gradients([p for g in groups for p in g["params"]], seed=t)
        assert checked_step(optimizer) == 2
        optimizer.param_groups.reverse()
        optimizer.param_groups[0]["backend"] = "torch" if t else "triton"


def test_functional_checks_the_lengths_of_its_lists():
    x = [torch.ones(2, 4)]
    arguments = {
        "params": x, "grads": x, "exp_avgs": [torch.ones(2, 2)], "exp_avg_sqs": [torch.ones(2, 2)],
        "limiter_norms": [None], "steps": [1], "hypers": [Hyper()], "level": 1,
    }  # fmt: skip
    for name, value in arguments.items():
        if isinstance(value, list) and name != "params":
            with pytest.raises(ValueError, match="1 params need as many"):
                gwt_adamw_(**(arguments | {name: value * 2}))
    assert_same_bits(x, [torch.ones(2, 4)])
    gwt_adamw_(**{name: [] if isinstance(value, list) else value for name, value in arguments.items()})
    with pytest.raises(ValueError, match="unknown backend 'gpu'"):
        haar_dwt(x[0], 1, backend="gpu")


# Other processes ------------------------------------------------------------------------------------------


IMPORTS = (
    "import sys, torch; before = set(sys.modules); import gwt_kernels\n"
    "print([m for m in ('triton', 'pywt') if m in set(sys.modules) - before])\n"
    "p = torch.nn.Parameter(torch.ones(2, 8)); p.grad = torch.ones(2, 8)\n"
    "gwt_kernels.GWTAdamW([p]).step(); gwt_kernels.haar_dwt(p, 2)\n"
    "print([m for m in sys.modules if m.startswith(('gwt_kernels.backends.triton', 'pywt'))])\n"
    "print(torch.cuda.is_initialized())\n"
)
REFUSALS = (
    "import torch; from gwt_kernels import GWTAdamW, haar_dwt\n"
    "p = torch.nn.Parameter(torch.ones(2, 8)); p.grad = torch.arange(16.0).view(2, 8)\n"
    "o = GWTAdamW([p], lr=0.1)\n"
    "def by_step(): o.param_groups[0]['backend'] = 'triton'; o.step()\n"
    "for f in (lambda: GWTAdamW([p], backend='triton'), lambda: haar_dwt(p, 1, backend='triton'), by_step):\n"
    "    try: f(); print('ran')\n"
    "    except RuntimeError as e: print('cpu' in str(e), \"use backend='torch'\" in str(e))\n"
    "print(bool((p == 1).all()), len(o.state))\n"
)


@pytest.fixture(scope="module")
def printed():
    """Return what a new process prints about its imports, and then about refusals."""
    return python(IMPORTS + REFUSALS)


def test_importing_the_package_imports_neither_triton_nor_pywavelets_and_a_cpu_step_no_kernels(printed):
    assert printed[:3] == ["[]", "[]", "False"]


BLOCK = (
    "import sys\n"
    "class Block:\n"
    "    def find_spec(self, name, path=None, target=None):\n"
    "        if name.partition('.')[0] in BLOCKED: raise ModuleNotFoundError('blocked: ' + name, name=name)\n"
    "sys.meta_path.insert(0, Block())\n"
    "import importlib.util; find = importlib.util.find_spec\n"
    "importlib.util.find_spec = lambda n, p=None: None if n.partition('.')[0] in BLOCKED else find(n, p)\n"
    "import torch, gwt_kernels\n"
    "def attempt(**o):\n"
    "    p = torch.nn.Parameter(torch.ones(2, 8)); p.grad = torch.arange(16.0).view(2, 8)\n"
    "    try: gwt_kernels.GWTAdamW([p], lr=0.1, **o).step(); print(bool((p != 1).all()))\n"
    "    except Exception as e:\n"
    "        remedies = [w for w in (\"backend='torch'\", \"wavelet='haar'\") if w in str(e)]\n"
    "        print(type(e).__name__, 'not-installed' if 'not installed' in str(e) else e, *remedies)\n"
)


def test_without_triton_and_pywavelets_the_package_works_and_names_what_is_missing():
    code = "BLOCKED = ('triton', 'pywt')\n" + BLOCK + "attempt(); attempt(backend='torch'); "
    code += "attempt(backend='triton'); attempt(wavelet='db2')"
    assert python(code, TRITON_INTERPRET="1") == [
        "True",
        "True",
        *("RuntimeError", "not-installed", "backend='torch'"),
        *("ModuleNotFoundError", "not-installed", "wavelet='haar'"),
    ]


def test_triton_is_refused_on_a_cpu_by_constructor_step_and_transform(printed):
    assert printed[3:] == ["True", "True"] * 3 + ["True", "0"]


@pytest.mark.gpu
def test_the_default_on_a_gpu_equals_triton(device):
    optimizers = [GWTAdamW(parameters([(4, 16), (3, 5)], device), lr=0.1, backend=b) for b in (None, "triton")]
    for t in range(3):
        for optimizer in optimizers:
            give_gradients(optimizer.param_groups[0]["params"], seed=t)
            optimizer.step()
    a, b = ([p.detach() for p in o.param_groups[0]["params"]] for o in optimizers)
    assert_same_bits(a, b)
    with pytest.raises(TypeError, match=r"lr is a tensor on cuda.*float or a tensor on the CPU"):
        GWTAdamW(parameters([(4, 16)], device), lr=torch.tensor(0.1, device=device))
