"""Run by test_jit.py in its own process: compile the kernels of all launches for sm_90, and print them as JSON.

The arguments go through Triton's own binder, which specialises on them and so decides how often a user's first
steps compile. Only the driver is replaced, since there is no device.
"""

import json
from typing import Any

import torch
from triton.runtime import driver

from bench.host import NoDevice
from gwt_kernels import GWTAdamW, haar_dwt, haar_idwt
from gwt_kernels.backends import choice
from gwt_kernels.backends.triton import haar_launch, launch


class NoLauncher(NoDevice):
    """A launcher for kernels that are not ``Compiled``: raises, since a launch needs a driver."""

    launcher_cls = utils = None  # type: ignore[assignment]


class Compiled:
    """Stand-in for a kernel at launch: compiles at each call, launches nothing."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def compile_only(*args: Any, **options: Any) -> None:
            compiled = self.kernel.warmup(*args, grid=grid, **options)
            seen.append((self.kernel.fn.__name__, options.get("FLAT", True), compiled.hash))

        return compile_only


seen: list[tuple[str, bool, str]] = []
driver.set_active(NoLauncher())
choice.triton_obstacle = lambda *args, **kwargs: None  # type: ignore[assignment]
for name in ("step_kernel", "norm_kernel", "limiter_kernel"):
    setattr(launch, name, Compiled(getattr(launch, name)))
for name in ("dwt_kernel", "idwt_kernel"):
    setattr(haar_launch, name, Compiled(getattr(haar_launch, name)))

for n in (1, 2, 3, 16):
    flat = [torch.nn.Parameter(torch.randn(64, 16 * n, dtype=torch.bfloat16)) for _ in range(n)]
    rows = [torch.nn.Parameter(torch.randn(5, 61, dtype=torch.bfloat16)) for _ in range(n)]
    optimizer = GWTAdamW([*flat, *rows], backend="triton")
    for _ in range(2):
        for p in (*flat, *rows):
            p.grad = torch.randn_like(p)
        optimizer.step()
for shape in ((8, 64), (16, 48), (1, 8)):
    haar_idwt(haar_dwt(torch.randn(shape), 2, backend="triton"), shape[-1], backend="triton")
print(json.dumps(seen))
