"""Run by test_jit.py in its own process: print as JSON what each step's launches pass to the driver.

Kernels are compiled for sm_90 and launched on a simulated device. Only the first step binds arguments.
"""

import json
from typing import Any
from unittest.mock import patch

import torch
from triton.compiler.compiler import LazyDict
from triton.runtime import JITFunction

from bench import host
from gwt_kernels import GWTAdamW


def described(x: Any) -> Any:
    if isinstance(x, torch.Tensor):
        return [str(x.dtype), x.numel(), x.data_ptr() % 16]
    return type(x).__name__ if isinstance(x, LazyDict) else repr(x)


def launcher(source: Any, metadata: Any) -> Any:
    def launch(x: int, y: int, z: int, stream: int, function: int, packed: Any, *rest: Any) -> None:
        seen.append([source.fn.__name__, x, y, z, stream, *map(described, rest)])

    return launch


def binding(self: Any, *args: Any, **kwargs: Any) -> Any:
    bound.append(self.fn.__name__)
    return run(self, *args, **kwargs)


run = JITFunction.run
steps = []
with (
    host.without_device(),
    patch.object(host.NoDevice, "launcher_cls", staticmethod(launcher)),
    patch.object(JITFunction, "run", binding),
):
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in ((64, 48), (16, 16), (5, 61))]
    optimizer = GWTAdamW(params, backend="triton", telemetry=True)
    for _ in range(3):
        seen: list[Any] = []
        bound: list[str] = []
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()
        steps.append({"launches": seen, "bound": bound})
print(json.dumps(steps))
