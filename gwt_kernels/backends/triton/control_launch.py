"""Launch the kernels of the step decision."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from gwt_kernels.backends.triton.compiling import UNFUSED
from gwt_kernels.backends.triton.control import decide_kernel, rows_kernel, squares_kernel, total_kernel
from gwt_kernels.backends.triton.schema import SCALARS
from gwt_kernels.backends.triton.tables import TRITON_DTYPES, Sender, addresses, device_guard, misalignments, owners

TILE, WARPS = 4096, 8  # elements that one program reads at a time, and its warps
MAX_CHUNKS = 8192  # partial sums per launch, and one more for each tensor
TOTAL_BLOCK = 1024
ROWS_BLOCK = 128


def squares(grads: Sequence[Tensor], workspace: dict[str, Any], grad_stats: Sequence[Tensor] = ()) -> Tensor:
    """See :mod:`gwt_kernels.backends.step_decision`: a launch per dtype, or two if some are misaligned."""
    kinds: dict[Any, list[Tensor]] = {}
    for g in grads:
        if g.numel():
            g = g.resolve_neg().contiguous()
            aligned = not (any(misalignments(addresses([g]))) or g.numel() % 8)
            kinds.setdefault((g.dtype, aligned), []).append(g)
    device = (*grads, *grad_stats)[0].device
    if not (kinds or grad_stats):
        return torch.zeros(2, dtype=torch.float64, device=device)
    parts = list(grad_stats)
    total = torch.empty(2, dtype=torch.float64, device=device)
    with device_guard(device):
        for (dtype, aligned), tensors in kinds.items():
            name, sizes = f"{dtype}, {aligned}", [g.numel() for g in tensors]
            chunks = workspace.get(name)
            if chunks is None or chunks.sizes != sizes:  # replays of a captured step may still use the old ones
                chunks = workspace[name] = _Chunks(sizes, device)
            sent = chunks.sender.send(addresses(tensors) + chunks.numbers, device, capturable=True)
            n_chunks = chunks.n
            partials = torch.empty(2, n_chunks, dtype=torch.float32, device=device)
            align, multiple = (16, 8) if aligned else (dtype.itemsize, 1)
            squares_kernel[(n_chunks,)](
                chunks.owners, sent, partials, len(tensors), n_chunks, chunks.tiles_per_chunk,
                G=TRITON_DTYPES[dtype], TILE=TILE, ALIGN=align, MULTIPLE=multiple, num_warps=WARPS, **UNFUSED,
            )  # fmt: skip
            parts.append(partials)
        for i, partials in enumerate(parts):
            total_kernel[(2,)](partials, total, partials.shape[1], FIRST=i == 0, BLOCK=TOTAL_BLOCK, **UNFUSED)
    return total


class _Chunks:
    """Chunks of tiles of tensors of these nonzero sizes, one per program; they never change."""

    def __init__(self, sizes: list[int], device: torch.device) -> None:
        self.sender, self.sizes = Sender(), sizes
        self.tiles_per_chunk = -(-sum(sizes) // (TILE * MAX_CHUNKS))
        counts = [-(-n // (TILE * self.tiles_per_chunk)) for n in sizes]
        firsts = [0, *accumulate(counts)]
        self.n = firsts[-1]
        self.numbers = array("q", sizes + firsts[:-1]).tobytes()
        self.owners = owners(Sender().send(array("q", counts).tobytes(), device), self.n)


def decide(
    total: Tensor | None,
    max_norm: float | None,
    skip_nonfinite: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    skipped: Tensor,
) -> Tensor:
    """See :func:`gwt_kernels.backends.step_decision.decide`."""
    control = torch.empty(3, dtype=torch.float64, device=skipped.device)
    with device_guard(skipped.device):
        decide_kernel[(1,)](
            control if total is None else total,
            control if grad_scale is None else grad_scale,
            control if found_inf is None else found_inf,
            skipped, control, 0.0 if max_norm is None else float(max_norm),
            SUMMED=total is not None, CLIPPED=max_norm is not None, CHECKED=skip_nonfinite and total is not None,
            SCALED=grad_scale is not None, FOUND=found_inf is not None, **UNFUSED,
        )  # fmt: skip
    return control


def rows(
    addresses: Tensor, constants: Tensor, steps: Tensor, n: int, control: Tensor | None, counts: bool = True
) -> Tensor:
    """Count the tensors' steps and return their rows of scalars, float32 ``[n * 12]``: see ``rows_kernel``."""
    scalars = torch.empty(n * len(SCALARS), dtype=torch.float32, device=addresses.device)
    rows_kernel[(-(-n // ROWS_BLOCK),)](
        addresses, constants, constants if control is None else control, steps, scalars, n,
        CONTROLLED=control is not None, COUNTS=counts, BLOCK=ROWS_BLOCK, **UNFUSED,
    )  # fmt: skip
    return scalars
