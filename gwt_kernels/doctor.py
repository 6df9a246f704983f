"""``gwt-kernels doctor``: installed versions, the backend of each device and the reason, and a short self-check."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
import platform
import sys
import time
from collections.abc import Iterator

import torch
from torch import Tensor

from gwt_kernels import __version__
from gwt_kernels.backends import choice
from gwt_kernels.backends.cpu.step import TYPES
from gwt_kernels.backends.torch import literal
from gwt_kernels.core.tensor_step import TensorStep
from gwt_kernels.functional import Hyper, gwt_adamw_

PACKAGES = ("gwt-kernels", "torch", "triton", "numpy", "PyWavelets", "transformers")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((16, 64), (7, 61), (3, 5, 40), (33,), (10, 1000))
STEPS = 3


def report() -> bool:
    """Print versions, devices, backends and the self-check; return whether every check passed."""
    print("Versions")
    print(f"  python        {sys.version.split()[0]} on {platform.platform()}")
    for name in PACKAGES:
        print(f"  {name:<13} {_version(name)}")
    if torch.version.cuda or torch.version.hip:
        print(f"  CUDA or ROCm  {torch.version.cuda or torch.version.hip} (of the torch build)")

    print("Devices")
    for device, description in _devices():
        print(f"  {device}: {description}")
        if device.type == "cpu" and (missing := choice.compiler_obstacle(device)):
            print(f"    {missing}")
        for dtype in DTYPES:
            obstacle = choice.triton_obstacle(device, dtype)
            chosen = choice.resolve(None, device, dtype, level=2)
            reason = f": {obstacle}" if obstacle else ""
            if chosen == "torch" and not obstacle:
                reason = ": Triton runs on CUDA devices; here its interpreter serves the self-check below"
            if chosen == "torch" and dtype in TYPES and choice.is_compiled(None, device):
                chosen = "compiled"
            print(f"    {str(dtype).removeprefix('torch.'):<9} -> {chosen}{reason}")

    print("Self-check: the fused step against the literal multi-level algorithm in float64")
    start = time.perf_counter()
    passed = True
    for label, error, bound in self_check():
        good = not isinstance(error, Exception) and error <= bound
        passed &= good
        if isinstance(error, Exception):
            found = f"{type(error).__name__}: {' '.join(str(error).split())}"
        else:
            found = f"largest relative error {error:.1e}, allowed {bound:.0e}"
        print(f"  {'ok' if good else 'FAILED':<6} {label}: {found}")
    print(f"{'All checks passed' if passed else 'Some checks FAILED'} in {time.perf_counter() - start:.1f} s.")
    return passed


def self_check() -> Iterator[tuple[str, float | Exception, float]]:
    """Run a few random steps on every available backend.

    Yields:
        The name of the check; the largest error of weights and moments relative to the largest value of the
        float64 result, or the exception that a step raised; and the allowed error.
    """
    for device, _ in _devices():
        for backend, dtype, bound in (
            ("torch", torch.float64, 1e-12),
            ("torch", torch.float32, 1e-5),
            ("compiled", torch.float32, 1e-5),
            ("triton", torch.float32, 1e-5),
        ):
            if backend == "triton" and choice.triton_obstacle(device, dtype):
                continue
            if backend == "compiled" and choice.compiler_obstacle(device):
                continue
            for level in (0, 2, 3):
                label = f"{backend}, {str(dtype).removeprefix('torch.')}, level {level}, on {device}"
                try:
                    found: float | Exception = _error(device, dtype, level, backend)
                except Exception as error:  # a package that cannot be imported, a kernel that cannot be compiled
                    found = error
                yield label, found, bound


def _error(device: torch.device, dtype: torch.dtype, level: int, backend: str) -> float:
    generator = torch.Generator("cpu").manual_seed(level)
    hyper = Hyper(lr=0.01, weight_decay=0.1, eps=1e-2)  # a large eps: no division by almost 0
    params = [
        torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu").to(dtype) for shape in SHAPES
    ]
    oracle, checked = _Run(params, level), _Run([p.to(device) for p in params], level)
    for step in range(1, STEPS + 1):
        grads = [
            torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu").to(dtype) for shape in SHAPES
        ]
        oracle.literal_step([g.double() for g in grads], step, hyper)
        checked.step([g.to(device) for g in grads], step, hyper, backend)
    return max(
        float((x.cpu().double() - y).abs().max() / y.abs().max())
        for x, y in zip(checked.tensors(), oracle.tensors(), strict=True)
    )


class _Run:
    """Parameters and their state; the oracle's are float64 copies."""

    def __init__(self, params: list[Tensor], level: int) -> None:
        self.level = level
        self.params = [p.clone() for p in params]
        self.exp_avgs = [p.new_zeros(*p.shape[:-1], math.ceil(p.shape[-1] / 2**level)) for p in params]
        self.exp_avg_sqs = [torch.zeros_like(m) for m in self.exp_avgs]
        self.norms = [p.new_zeros(()) for p in params]

    def tensors(self) -> list[Tensor]:
        return [*self.params, *self.exp_avgs, *self.exp_avg_sqs]

    def step(self, grads: list[Tensor], step: int, hyper: Hyper, backend: str) -> None:
        gwt_adamw_(
            params=self.params,
            grads=grads,
            exp_avgs=self.exp_avgs,
            exp_avg_sqs=self.exp_avg_sqs,
            limiter_norms=self.norms if self.level else [None] * len(grads),
            steps=[step] * len(grads),
            hypers=[hyper] * len(grads),
            level=self.level,
            backend=backend,
        )

    def literal_step(self, grads: list[Tensor], step: int, hyper: Hyper) -> None:
        if step == 1:
            for tensors in (self.params, self.exp_avgs, self.exp_avg_sqs, self.norms):
                tensors[:] = [x.double().cpu() for x in tensors]
        norms = self.norms if self.level else [None] * len(grads)
        columns = (self.params, grads, self.exp_avgs, self.exp_avg_sqs, norms)
        tensor_steps = [TensorStep(*column, step, hyper) for column in zip(*columns, strict=True)]
        literal.gwt_adamw_(tensor_steps, level=self.level, wavelet="haar")


def _devices() -> Iterator[tuple[torch.device, str]]:
    yield torch.device("cpu"), f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        yield (
            torch.device("cuda", i),
            f"{p.name}, compute capability {p.major}.{p.minor}, {p.total_memory / 2**30:.1f} GiB",
        )


def _version(name: str) -> str:
    if name == "gwt-kernels":
        return __version__  # the running code's, installed or not
    if name == "torch":
        return torch.__version__  # names the build, unlike the package's metadata
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed" if importlib.util.find_spec(name.replace("-", "_")) is None else "a checkout"
